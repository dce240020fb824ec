"""Whatever is wrong outside the program: one line that says what, exit code 2, and nothing lost."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import io
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_tools import SMALL, contents, pictures, write_parquet
from safetensors.torch import load_file, save_file
from torch import nn

import softdefend
from softdefend import OptimSettings, SettingError
from softdefend.cli.main import main
from softdefend.training import checkpoint

Refused = Callable[..., str]

# words of `softdefend train`, the setting named, what was given, and what is accepted
TRAIN = {
    "unknown preset": ("--preset nope", "--preset", "'nope'", "sglr-reference", "pgd-at", "YAML"),
    "preset without a name": ("--preset", "--preset", "''", "pgd-at"),
    "unknown protocol": ("--config nope", "--config", "'nope'", "cifar10_resnet18", "digits_demo"),
    "unknown key": ("--foo.bar 1", "foo.bar", "unknown", "optim", "threat"),
    "unknown key of a section": ("--optim.epoch 3", "optim.epoch", "unknown", "epochs, batch_size", "lr"),
    "stray word": ("stray", "command line", "'stray'", "--name value"),
    "no value": ("--seed", "--seed", "no value", "a value"),
    "unknown label rule": ("--label Bogus", "label", "Bogus", "Hard or", "SGLR or", "Smooth"),
    "rule of another kind": ("--label TRADES", "label", "TRADES", "Hard or", "SGLR or", "Smooth"),
    "class that is no rule": ("--label torch.nn.Linear", "label", "torch.nn.Linear", "LabelRule"),
    "unknown objective": ("--objective Foo", "objective", "Foo", "PGDAT or", "TRADES"),
    "unknown weight rule": ("--weight Foo", "weight", "Foo", "EMA or Plain"),
    "attack of another kind": ("--attack FGSM", "attack", "FGSM", "PGD"),
    "unknown argument of a rule": (
        "--label Smooth --label.bar 3",
        "label.bar",
        "unknown",
        "Smooth: smoothing, convention",
    ),
    "argument of another rule": ("--objective.beta 3", "objective.beta", "unknown", "PGDAT: none"),
    "seed of letters": ("--seed x", "seed", "x", "a whole number"),
    "no seed": ("--seed null", "seed", "None", "a whole number"),
    "half an epoch": ("--optim.epochs 1.5", "optim.epochs", "1.5", "a whole number"),
    "no epochs": ("--optim.epochs 0", "optim.epochs", "0", ">= 1"),
    "negative lr": ("--optim.lr -1", "optim.lr", "-1", "a positive number"),
    "NaN lr": ("--optim.lr .nan", "optim.lr", "nan", "a positive number"),
    "momentum": ("--optim.momentum 1", "optim.momentum", "1.0", "[0, 1)"),
    "value with a minus": ("--optim.weight_decay -1e-4", "--optim.weight_decay", "no value", "--name=VALUE"),
    "weight decay": ("--optim.weight_decay=-1e-4", "optim.weight_decay", "-0.0001", ">= 0"),
    "nesterov": ("--optim.nesterov true --optim.momentum 0", "optim.nesterov", "True", "momentum > 0"),
    "yes or no": ("--optim.nesterov perhaps", "optim.nesterov", "perhaps", "true or false"),
    "batch of nothing": ("--optim.batch_size 0", "optim.batch_size", "0", ">= 1"),
    "section as a word": ("--optim 3", "optim", "3", "--optim.NAME VALUE"),
    "schedule": (
        "--optim.schedule.kind stairs",
        "optim.schedule.kind",
        "stairs",
        "step or cosine or cyclic or one-cycle",
    ),
    "milestones": (
        "--optim.schedule.milestones [0.7,0.5]",
        "optim.schedule.milestones",
        "[0.7, 0.5]",
        "increasing",
    ),
    "gamma": ("--optim.schedule.gamma 0", "optim.schedule.gamma", "0", "(0, 1]"),
    "alpha": ("--label SGLR --label.alpha 2", "label.alpha", "2.0", "[0, 1]"),
    "temperature": ("--label SGLR --label.temperature 0", "label.temperature", "0", "a positive number"),
    "choice": ("--label SGLR --label.update never", "label.update", "never", "before or after"),
    "smoothing": ("--label Smooth --label.smoothing 1", "label.smoothing", "1.0", "[0, 1)"),
    "smoothing of letters": ("--label Smooth --label.smoothing x", "label.smoothing", "x", "a number"),
    "beta": ("--objective TRADES --objective.beta -1", "objective.beta", "-1", ">= 0"),
    "decay": ("--weight EMA --weight.decay 1.5", "weight.decay", "1.5", "[0, 1)"),
    "eps in levels": ("--threat.eps 8", "threat.eps", "8", "(0, 1]", "8/255"),
    "eps of letters": ("--threat.eps eight", "threat.eps", "eight", "8/255"),
    "eps by zero": ("--threat.eps 8/0", "threat.eps", "8/0", "8/255"),
    "no eps": ("--threat.eps 0", "threat.eps", "0", "(0, 1]"),
    "l2 eps": ("--threat.norm l2 --threat.eps 128", "threat.eps", "128", "(0, 20]", "128/255"),
    "norm": ("--threat.norm l3", "threat.norm", "l3", "linf or l2 or l1 or l0"),
    "negative steps": ("--attack.steps -3", "attack.steps", "-3", ">= 0"),
    "half a step": ("--attack.steps 2.5", "attack.steps", "2.5", "a whole number"),
    "negative validation steps": ("--validate.attack.steps -3", "validate.attack.steps", "-3", ">= 0"),
    "step size": ("--attack.step_size=-1/255", "attack.step_size", "-1/255", "8/255"),
    "restarts": ("--attack.restarts 0", "attack.restarts", "0", ">= 1"),
    "attack loss": ("--attack.loss mse", "attack.loss", "mse", "ce or margin or kl"),
    "attack loss in training": ("--attack.loss kl", "attack.loss", "'kl'", "ce", "objective"),
    "attack bn": ("--attack_bn sometimes", "attack_bn", "sometimes", "train or batch or eval"),
    "attack name": ("--evaluate.attacks [pgd20]", "evaluate.attacks", "pgd20", "fgsm", "pgd-STEPS"),
    "attack of no steps": ("--evaluate.attacks [pgd-]", "evaluate.attacks", "pgd-", "pgd-STEPS"),
    "attacks as a word": ("--evaluate.attacks pgd-20", "evaluate.attacks", "pgd-20", "a list"),
    "eps of the whole box": ("--threat.eps 0.6", "threat.eps", "0.6", "[0.1/255, 0.5)", "8/255"),
    "evaluation of nothing": ("--evaluate.size 0", "evaluate.size", "0", ">= 1"),
    "keep": ("--save.keep 1", "save.keep", "1", ">= 2"),
    "archive": ("--save.archive 0", "save.archive", "0", ">= 1"),
    "validate every": ("--validate.every 0", "validate.every", "0", ">= 1"),
    "capture on a CPU": ("--runtime.capture true", "runtime.capture", "true on cpu", "CUDA"),
    "device": ("--runtime.device tpu", "runtime.device", "tpu", "auto, cpu, cuda"),
    "precision": ("--runtime.precision fp8", "runtime.precision", "fp8", "fp32", "bf16"),
    "threads": ("--runtime.threads 0", "runtime.threads", "0", "1 to 1024"),
    "many threads": ("--runtime.threads 9999999", "runtime.threads", "9999999", "1 to 1024"),
    "unknown network": ("--net.name vgg99", "net.name", "vgg99", "small_cnn", "resnet18", "module:function"),
    "width": ("--net.width 0", "net.width", "0", "1 or more"),
    "width of a ResNet": ("--net.name resnet18", "net.width", "4 with net.name resnet18", "null"),
    "missing data": ("--data.source /no/such/file.parquet", "data.source", "/no/such/file.parquet", "digits"),
    "malformed hub id": ("--data.source hf:mnist", "data.source", "hf:mnist", "hf:owner/name"),
    "asymmetric digits": (
        "--data.noise asymmetric --data.noise_rate 0.2",
        "data.noise",
        "asymmetric with classes 0, 1",
        "CIFAR-10",
    ),
    "noise": ("--data.noise odd", "data.noise", "odd", "none or symmetric or asymmetric or file"),
    "noise rate": ("--data.noise symmetric --data.noise_rate 1", "data.noise_rate", "1.0", "[0, 1)"),
    "noise without a kind": ("--data.noise_rate 0.3", "data.noise_rate", "0.3 with noise none", "symmetric"),
    "noise file missing": (
        "--data.noise file --data.noise_file /no/such.npz",
        "data.noise_file",
        "/no/such.npz",
        ".npz",
    ),
    "batch larger than the data": (
        "--optim.batch_size 65",
        "optim.batch_size",
        "65",
        "at most the 64 training images",
    ),
    "validation larger than the data": ("--data.validation 5000", "data.validation", "5000", "fewer than"),
    "training larger than the data": ("--data.train_size 50000", "data.train_size", "50000", "at most"),
    "padding": ("--augment.pad 9", "augment.pad", "9", "0 to 7 pixels for images of 8x8"),
}


@pytest.mark.parametrize("case", TRAIN.values(), ids=TRAIN.keys())
def test_train_refuses(case: tuple[str, ...], refused: Refused, tmp_path: Path) -> None:
    words, *said = case
    refused(["train", *SMALL, "--folder", str(tmp_path / "run"), *shlex.split(words)], *said)
    assert not (tmp_path / "run").exists()


OTHER = {
    "no command": ("", "command", "nothing", "demo, train, evaluate, certify, compare, distill, report"),
    "unknown command": (
        "dance",
        "command",
        "'dance'",
        "demo, train, evaluate, certify, compare, distill, report",
    ),
    "unknown option": ("--foo", "foo", "unknown", "--help"),
    "abbreviated option": ("--vers", "vers", "unknown", "--help"),
    "evaluate nothing": ("evaluate", "run", "nothing", "softdefend evaluate --help"),
    "evaluate no run": ("evaluate /no/such/run", "run", "/no/such/run", "a run folder", "config.yaml"),
    "which": ("evaluate RUN --which bset", "--which", "'bset'", "best or last"),
    "attack": ("evaluate RUN --attacks foo", "attacks", "'foo'", "fgsm", "pgd-STEPS"),
    "no attacks": ("evaluate RUN --attacks", "--attacks", "no value", "a value"),
    "two of a name": (
        "evaluate RUN --attacks fgsm fgsm",
        "evaluate.attacks",
        "fgsm, fgsm",
        "different names",
    ),
    "eps": ("evaluate RUN --eps 8", "threat.eps", "8", "(0, 1]", "8/255"),
    "eps zero": ("evaluate RUN --eps 0", "threat.eps", "0", "(0, 1]"),
    "eps of letters": ("evaluate RUN --eps eight", "eps", "eight", "8/255"),
    "radius": ("evaluate RUN --norm l1", "--eps", "--norm l1", "a radius in l1, such as 12"),
    "norm": ("evaluate RUN --norm l3", "threat.norm", "l3", "linf, l2, l1 or l0"),
    "size": ("evaluate RUN --size 0", "evaluate.size", "0", ">= 1"),
    "size of letters": ("evaluate RUN --size many", "size", "many", "a whole number"),
    "unknown key": ("evaluate RUN --steps 3", "steps", "unknown", "attacks", "eps", "batch_size"),
    "device": ("evaluate RUN --device tpu", "runtime.device", "tpu", "auto, cpu, cuda"),
    "precision": ("evaluate RUN --precision half", "precision", "half", "exact or strict or fast"),
    "microbatch": ("evaluate RUN --microbatch 0", "evaluate.microbatch", "0", ">= 1"),
    "audit of nothing": ("evaluate RUN --audit --audit_size 0", "--audit_size", "0", ">= 1"),
    "audit of letters": ("evaluate RUN --audit --audit_size x", "audit_size", "x", "a whole number"),
    "audit with a value": ("evaluate RUN --audit true", "command line", "'true'", "--name value"),
    "surrogate": ("evaluate RUN --transfer /no/such", "--transfer", "/no/such", "safetensors"),
    "surrogate without a run": ("evaluate RUN --transfer EMPTY", "--transfer", "EMPTY", "config.yaml"),
    "surrogates of one name": (
        "evaluate RUN --transfer RUN/best.safetensors RUN/../run/best.safetensors",
        "--transfer",
        "best.safetensors",
        "different names",
    ),
    "no surrogate": ("evaluate RUN --transfer", "--transfer", "no value", "a value"),
    "exchange without the ensemble": (
        "evaluate RUN --which last --robustbench EMPTY/info.json",
        "--robustbench",
        "an evaluation with pgd-20",
        "--attacks autoattack",
        "--size null",
    ),
    "exchange of a part": (
        "evaluate RUN --which last --attacks autoattack --robustbench EMPTY/info.json",
        "--robustbench",
        "64 of 359 images",
        "all 359 test images",
    ),
    "exchange in low precision": (
        "evaluate RUN --which last --attacks autoattack --size null --precision fast --robustbench EMPTY/i",
        "--robustbench",
        "precision fast",
        "exact or strict precision",
    ),
    "exchange of two": (
        "evaluate RUN --robustbench EMPTY/i.json",
        "--robustbench",
        "2 checkpoints",
        "--which best",
    ),
    "exchange over another file": (
        "evaluate RUN --which last --attacks autoattack --size null --robustbench RUN/config.yaml",
        "--robustbench",
        "config.yaml, which is no JSON",
        "a new or a JSON file",
    ),
    "log of two": ("evaluate RUN RUN --which last --log EMPTY/log", "--log", "2 checkpoints", "one run"),
    "run and model": ("evaluate RUN --model a:b", "run", "with --model", "either"),
    "model without weights": ("evaluate --model a:b", "--weights", "nothing", "--weights PATH"),
    "model without output": ("evaluate --model a:b --weights w.pt", "--output", "nothing", "--output PATH"),
    "weights without model": ("evaluate RUN --weights w.pt", "--weights", "without --model", "only beside"),
    "output without model": ("evaluate RUN --output EMPTY", "--output", "without --model", "only beside"),
    "net without model": ("evaluate RUN --net.width 4", "--net", "without --model", "only beside"),
    "key without model": ("evaluate RUN --weights_key a", "--weights_key", "without --model", "only beside"),
    "data without model": ("evaluate RUN --data.source digits", "--data", "without --model", "only beside"),
    "model that is no path": (
        "evaluate --model nets --weights w.pt --output EMPTY",
        "--model",
        "nets",
        "module:function",
    ),
    "report nothing": ("report", "run", "nothing", "softdefend report --help"),
    "report an empty folder": ("report EMPTY", "run folder", "EMPTY", "a run folder", "config.yaml"),
    "compare without presets": ("compare", "--presets", "nothing", "softdefend compare --help"),
    "compare presets of one file name": (
        "compare --presets a/x.yaml b/x.yaml",
        "--presets",
        "b/x.yaml",
        "file names",
    ),
    "compare no preset": ("compare --presets pgd-at nope", "--preset", "'nope'", "pgd-at", "trades"),
    "compare a seed": ("compare --presets pgd-at --seed 5", "--seed", "beside --seeds", "--seeds alone"),
    "compare a preset": ("compare --presets pgd-at --preset=trades", "--preset", "beside --presets", "alone"),
    "seeds": ("compare --presets pgd-at --seeds x", "--seeds", "'x'", "a whole number"),
    "compare an unknown key": ("compare --presets pgd-at --foo.bar 2", "foo.bar", "unknown", "optim"),
    "data action": ("data frobnicate", "data", "'frobnicate'", "prepare or describe"),
    "no data action": ("data", "action", "nothing", "softdefend data --help"),
    "data key": ("data describe --data.foo 1", "data.foo", "unknown", "source", "validation"),
    "data range": ("data describe --data.test_fraction 1", "data.test_fraction", "1.0", "(0, 1)"),
}


@pytest.mark.parametrize("case", OTHER.values(), ids=OTHER.keys())
def test_other_commands_refuse(
    case: tuple[str, ...], refused: Refused, run_folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    before = contents(run_folder)
    filled = [text.replace("RUN", str(run_folder)).replace("EMPTY", str(empty)) for text in case]
    refused(shlex.split(filled[0]), *filled[1:])
    assert contents(run_folder) == before
    assert list(empty.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_gpu_that_is_not_there(refused: Refused) -> None:
    refused(
        ["train", *SMALL, "--runtime.device", "cuda"], "runtime.device", "cuda", "cpu", "0 CUDA device(s)"
    )


YAML = {
    "unknown key": ("foo: 3", "foo", "unknown", "optim"),
    "unknown key of a section": ("optim: {epochz: 3}", "optim.epochz", "unknown", "epochs"),
    "unknown key two levels down": ("optim: {schedule: {peek: 1}}", "optim.schedule.peek", "unknown", "peak"),
    "unknown rule": ("label: {class_path: Bogus}", "label", "Bogus", "Hard or", "SGLR or", "Smooth"),
    "unknown argument": (
        "label: {class_path: SGLR, init_args: {bar: 1}}",
        "label.bar",
        "unknown",
        "alpha, clean_weight, r",
    ),
    "wrong type": ("optim: {epochs: many}", "optim.epochs", "many", "a whole number"),
    "out of range": ("label: {class_path: SGLR, init_args: {r: 3}}", "label.r", "3", "[0, 1]"),
    "null": ("optim: {lr: null}", "optim.lr", "null", "a value"),
    "null section": ("threat:", "threat", "null", "a value"),
    "number as a section": ("optim: 5", "optim", "5", "epochs, batch_size"),
    "list as a section": ("data: [digits]", "data", "digits", "source"),
    "not YAML": ("optim: {epochs: 3", "FILE", "line 1", "YAML"),
    "a list": ("- optim\n- lr", "FILE", "a list", "a YAML mapping"),
    "nothing": ("", "FILE", "NoneType", "a YAML mapping"),
    "bytes": ("\x00\x01", "FILE", "unreadable YAML", "YAML"),
    "a section twice": (
        "optim: {lr: 1}\nseed: 1\noptim: {epochs: 3}",
        "FILE, line 3",
        "'optim' a second time",
    ),
    "a setting twice": ("optim:\n  lr: 0.1\n  lr: 0.2", "FILE, line 3", "'lr' a second time", "once"),
    "a list as a key": ("[a, b]: 1\n[a, b]: 2", "FILE", "unreadable YAML", "YAML"),
}


@pytest.mark.parametrize("kind", ["config", "preset"])
@pytest.mark.parametrize("case", YAML.values(), ids=YAML.keys())
def test_configuration_file_is_refused(
    case: tuple[str, ...], kind: str, refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(case[0])
    setting, *said = (text.replace("FILE", str(path)) for text in case[1:])
    refused(["train", f"--{kind}", str(path), "--folder", str(tmp_path / "run")], setting, *said)
    assert not (tmp_path / "run").exists()


def write_bad_parquet(kind: str, path: Path) -> None:
    images, labels = pictures(20), [0, 1] * 10
    if kind == "undecodable":
        images[7] = images[7][:40]
    elif kind == "sizes":
        images[19] = pictures(1, side=9)[0]
    elif kind == "label":
        labels[19] = 77
    elif kind == "negative":
        labels[19] = -1
    elif kind == "one class":
        labels = [0] * 20
    write_parquet(path, images, labels)
    if kind == "corrupt":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("image,label\n")


PARQUET = {
    "corrupt file": ("corrupt", "", "data.source", "data.parquet", "an intact Parquet file"),
    "not a Parquet file": ("text", "", "data.source", "data.parquet", "an intact Parquet file"),
    "undecodable image": (
        "undecodable",
        "",
        "data.source",
        "row 7 of data.parquet",
        "images that can be decoded",
    ),
    "image sizes": ("sizes", "", "data.source", "row 19 of data.parquet of 9x9", "images of one size (8x8"),
    "label out of range": ("label", "", "data.label_column", "label 77", "numbered from 0"),
    "negative label": ("negative", "", "data.label_column", "label -1 at row 19", "labels >= 0"),
    "one class": ("one class", "", "data.source", "the only class 0", "at least 2 classes"),
    "wrong label column": (
        "good",
        "--data.label_column labl",
        "data.label_column",
        "labl",
        "data.parquet has image (struct<bytes",
        "label (int64)",
    ),
    "wrong image column": (
        "good",
        "--data.image_column img",
        "data.image_column",
        "img",
        "data.parquet has image (struct<bytes",
        "label (int64)",
    ),
    "column of another type": (
        "good",
        "--data.label_column image",
        "data.label_column",
        "image",
        "integer labels",
        "label (int64)",
    ),
}


@pytest.mark.parametrize("command", ["train", "data describe"])
@pytest.mark.parametrize("case", PARQUET.values(), ids=PARQUET.keys())
def test_parquet_is_refused(case: tuple[str, ...], command: str, refused: Refused, tmp_path: Path) -> None:
    write_bad_parquet(case[0], tmp_path / "data.parquet")
    words = [*command.split(), "--data.source", str(tmp_path / "data.parquet"), *case[1].split()]
    folder = ["--folder", str(tmp_path / "run")] if command == "train" else []
    refused([*words, "--data.validation", "4", *folder], *case[2:])
    assert not (tmp_path / "run").exists()


NETS = """
import torch
from torch import nn

def wrong_count(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes - 1))

def probabilities(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.Softmax(1))

def wrong_shape(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))

class Picky(nn.Module):
    def forward(self, image):
        assert image.shape[-1] == 32, "I want 32x32"

def picky():
    return Picky()

def frozen(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).requires_grad_(False)

def nan(num_classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    nn.init.constant_(net[1].bias, float("nan"))
    return net

def no_net():
    return "a network"

def greedy(depth):
    return nn.Flatten()

number = 3
"""

USER_NETS = {
    "wrong_count": ("net", "shape [2, 9]", "logits [2, 10]"),
    "probabilities": ("net", "probabilities", "leave out the network's last softmax"),
    "wrong_shape": ("net", "fails on a forward pass", "images [2, 1, 8, 8]"),
    "picky": ("net", "I want 32x32", "images [2, 1, 8, 8]"),
    "frozen": ("net", "without trainable parameters", "to train"),
    "nan": ("net", "NaN", "finite logits"),
    "no_net": ("net.name", "returned str", "torch.nn.Module"),
    "greedy": ("net.name", "depth", "num_classes and in_channels"),
    "number": ("net.name", "not callable", "module:function"),
    "absent": ("net.name", "absent does not exist", "module:function"),
}


@pytest.mark.parametrize(("name", "said"), USER_NETS.items(), ids=USER_NETS.keys())
def test_network_of_the_user_is_refused(
    name: str, said: tuple[str, ...], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_a_user.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_a_user", raising=False)
    words = ["--net.name", f"nets_of_a_user:{name}", "--net.width", "null", "--folder", str(tmp_path / "run")]
    refused(["train", *SMALL, *words], *said)
    assert not (tmp_path / "run").exists()


def test_timm_that_is_not_installed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    words = ["train", *SMALL, "--net.name", "timm:resnet18", "--net.width", "null"]
    refused(words, "net.name", "timm:resnet18 without timm", "softdefend[timm]")


@pytest.mark.parametrize("place", ["/proc/softdefend", "FILE/run", "FILE"])
def test_folder_that_cannot_be_written(place: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    folder = place.replace("FILE", str(tmp_path / "file"))
    refused(["train", *SMALL, "--folder", folder], "folder", folder, "can be written")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["/proc/softdefend/page.html", "FILE/page.html", "FOLDER"])
def test_report_that_cannot_be_written(place: str, finished: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    path = place.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path / "folder"))
    refused(
        ["report", str(finished), "--output", path], path, "", "writable place", "nothing was overwritten"
    )
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "content", ["{", "- 1", "optim: 3\nnet: {name: small_cnn}", "net: {name: small_cnn}\nfoo: 1"]
)
def test_broken_config_of_a_run(content: str, run_folder: Path, refused: Refused) -> None:
    path = run_folder / "config.yaml"
    path.write_text(content)
    before = contents(run_folder)
    setting = {"o": "optim", "n": "foo"}.get(content[0], str(path))
    refused(["evaluate", str(run_folder)], setting, "")
    assert main(["train", *SMALL, "--folder", str(run_folder)]) == 2
    assert contents(run_folder) == before


@pytest.mark.parametrize("content", ["{", "[1]", '{"clean": 3, "attacks": {}}'])
def test_broken_evaluation_of_a_run(content: str, run_folder: Path, refused: Refused, tmp_path: Path) -> None:
    path = run_folder / "evaluation" / "last.json"
    path.write_text(content)
    capture = ["report", str(run_folder), "--output", str(tmp_path / "page.html")]
    assert main(capture) == 2
    assert not (tmp_path / "page.html").exists()
    refused(capture, f"{path}{': clean' if 'clean' in content else ''}", "")


def test_a_changed_configuration_does_not_continue_a_run(run_folder: Path, refused: Refused) -> None:
    before = contents(run_folder)
    again = ["train", *SMALL, "--folder", str(run_folder)]
    began = f"0.1 where the run in {run_folder} began with 0.05"
    refused([*again, "--optim.lr", "0.1"], "optim.lr", began, "another --folder")
    two = f"0.1, 1 where the run in {run_folder} began with 0.05, 0"
    refused([*again, "--seed", "1", "--optim.lr", "0.1"], "optim.lr, seed", two, "another --folder")
    rule = "'softdefend.SGLR', 0.9, 'hard', 'train' where"
    named = "label.class_path, label.init_args.alpha, label.init_args.attack_label, label.init_args.clean_bn"
    more = len(inspect.signature(softdefend.SGLR).parameters) + 1 - 4  # of the class and its settings
    refused([*again, "--label", "SGLR"], f"{named} and {more} more", rule, "another --folder")
    assert contents(run_folder) == before


def test_changed_data_do_not_continue_a_run(refused: Refused, tmp_path: Path) -> None:
    data, folder = tmp_path / "data.parquet", tmp_path / "run"
    words = ["train", *SMALL, "--data.source", str(data), "--data.train_size", "20", "--data.validation", "4"]
    words += ["--optim.epochs", "1", "--folder", str(folder)]
    write_parquet(data, pictures(40), [0, 1] * 20)
    assert main(words) == 0
    before = contents(folder)
    write_parquet(data, pictures(40, seed=1), [0, 1] * 20)
    refused(words, str(folder), "other data", "the data and seed it began with")
    assert contents(folder) == before


def test_the_same_data_continue_a_run_however_their_place_is_spelt(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = tmp_path / "data.parquet", tmp_path / "run"
    write_parquet(data, pictures(40), [0, 1] * 20)
    small = ["train", *SMALL, "--data.train_size", "20", "--data.validation", "4", "--optim.epochs", "1"]
    small += ["--folder", str(folder)]
    assert main([*small, "--data.source", str(data)]) == 0
    weights = (folder / "last.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.parquet").symlink_to(data)
    for spelling in ("data.parquet", "./data.parquet", "linked.parquet"):
        assert main([*small, "--data.source", spelling]) == 0
        assert (folder / "last.safetensors").read_bytes() == weights
    (tmp_path / "copy.parquet").write_bytes(data.read_bytes())
    refused([*small, "--data.source", "copy.parquet"], "data.source", "copy.parquet", "another --folder")


def test_a_folder_in_use(run_folder: Path, refused: Refused) -> None:
    before = contents(run_folder)
    words = ["train", *SMALL, "--folder", str(run_folder)]
    with open(run_folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(words, "folder", f"{run_folder}, in use by another process", "a folder of its own")
        assert contents(run_folder) == before
    assert main(words) == 0


class Payload:
    """What a pickle can do to whoever loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A path that a payload creates; the fixture shows that it would."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.rmdir()
    return path


def test_a_malicious_batch_is_not_executed(marker: Path, refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    (folder / "data_batch_3").write_bytes(pickle.dumps({**batch, "extra": Payload(marker)}))
    words = ["data", "describe", "--data.source", str(folder), "--data.validation", "4"]
    refused(words, "data.source", f"{folder / 'data_batch_3'} with the global posix.mkdir")
    assert not marker.exists()
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch))
    assert main(words) == 0


def malicious_body(marker: Path, *, zipped: bool) -> bytes:
    if not zipped:
        return pickle.dumps({"epoch": 1, "net": Payload(marker)})
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "net": Payload(marker)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_is_not_executed(
    zipped: bool, marker: Path, run_folder: Path, refused: Refused
) -> None:
    older, newest = sorted((run_folder / "checkpoints").iterdir())
    body = malicious_body(marker, zipped=zipped)
    header = b"softdefend-checkpoint-1\n" + hashlib.sha256(body).digest() + len(body).to_bytes(8, "little")
    newest.write_bytes(header + body)
    before = contents(run_folder)
    words = ["train", *SMALL, "--folder", str(run_folder)]
    refused(words, str(newest), "not plain data", f"--resume {older}")
    refused([*words, "--resume", str(newest)], str(newest), "not plain data", f"--resume {older}")
    assert not marker.exists()
    assert {k: v for k, v in contents(run_folder).items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_to_resume_from_is_not_executed(
    zipped: bool, marker: Path, run_folder: Path, refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "gift.ckpt"
    path.write_bytes(malicious_body(marker, zipped=zipped))
    words = ["train", *SMALL, "--folder", str(run_folder), "--resume", str(path)]
    refused(words, str(path), "another kind", "a softdefend checkpoint", "--resume")
    assert not marker.exists()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda content: content[:-100], "truncated"),
    "header only": (lambda content: content[:40], "truncated"),
    "empty": (lambda content: b"", "another kind"),
    "bit flipped": (flipped, "checksum"),
    "longer": (lambda content: content + b"x", "truncated"),
    "foreign": (lambda content: b"PK" + content, "another kind"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(
    damage: Callable[[bytes], bytes], said: str, run_folder: Path, refused: Refused
) -> None:
    older, newest = sorted((run_folder / "checkpoints").iterdir())
    newest.write_bytes(damage(newest.read_bytes()))
    words = ["train", *SMALL, "--folder", str(run_folder)]
    before = contents(run_folder)
    assert refused(words, str(newest), said).endswith(f"continue from it with --resume {older}")
    after = contents(run_folder)
    assert {name for name in before if before[name] != after.get(name)} <= {"config.yaml"}


def test_the_offered_checkpoint_continues_the_run(run_folder: Path, finished: Path, refused: Refused) -> None:
    newest = max((run_folder / "checkpoints").iterdir())
    newest.write_bytes(flipped(newest.read_bytes()))
    words = ["train", *SMALL, "--folder", str(run_folder)]
    offer = refused(words, str(newest), "checksum")
    assert main([*words, *offer.split()[-2:]]) == 0
    for name in ("last.safetensors", "best.safetensors", "metrics.jsonl"):
        assert (run_folder / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "", "..", "/tmp"])
def test_a_name_that_leads_elsewhere(name: str, refused: Refused, tmp_path: Path) -> None:
    """The run's folder has it where no other is given."""
    refused(["train", *SMALL, f"--name={name}"], "name", repr(name), "--folder")


def test_a_best_that_is_lost_when_no_epoch_is_left(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "best.safetensors").unlink()
    capsys.readouterr()
    assert main(["train", *SMALL, "--folder", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "no epoch is left to choose it from; evaluate --which last needs none" in said
    assert "epochs to come" not in said
    assert main(["evaluate", str(folder), "--which", "last"]) == 0


def test_a_missing_checkpoint(run_folder: Path, refused: Refused) -> None:
    newest = max((run_folder / "checkpoints").iterdir())
    words = ["train", *SMALL, "--folder", str(run_folder), "--resume", "/no/such.ckpt"]
    refused(words, "resume", "/no/such.ckpt (No such file", f"--resume {newest}")
    refused([*words[:-1], str(run_folder)], "resume", f"{run_folder} (Is a directory", f"--resume {newest}")


LOSSES: dict[str, Callable[[bytes], bytes | None]] = {
    "half a line": lambda content: content[:-10],
    "a whole line": lambda content: content[: content.index(b"\n") + 1],
    "everything": lambda content: b"",
    "the file": lambda content: None,
    "zeros in place of the end": lambda content: content[:50] + bytes(len(content) - 50),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES.keys())
def test_metrics_that_lost_their_end_are_written_again(
    lose: Callable[[bytes], bytes | None], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "metrics.jsonl"
    whole = path.read_bytes()
    left = lose(whole)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    capsys.readouterr()
    assert main(["train", *SMALL, "--folder", str(run_folder)]) == 0
    assert "had lost its end; it is written again from the checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == whole


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_a_bit_of_an_old_row_that_was_flipped_is_refused(
    share: float, run_folder: Path, refused: Refused
) -> None:
    path = run_folder / "metrics.jsonl"
    whole = path.read_bytes()
    at = int(share * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    before = contents(run_folder)
    words = ["train", *SMALL, "--folder", str(run_folder)]
    line = whole[:at].count(b"\n") + 1
    refused(words, f"{path} line {line}", "a row that was altered", "all rows are written again")
    assert contents(run_folder) == before
    path.unlink()
    assert main(words) == 0
    assert path.read_bytes() == whole


WEIGHTS = ("truncated", "flipped bit", "other network", "missing", "pickle")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_cannot_be_evaluated(
    kind: str, run_folder: Path, refused: Refused, marker: Path
) -> None:
    path = run_folder / "last.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
        said = "a damaged or foreign file", "safetensors"
    elif kind == "flipped bit":
        content = bytearray(path.read_bytes())
        content[-9] ^= 1  # of the last tensor: the file is as well-formed as before
        path.write_bytes(content)
        said = "an altered file (its checksum does not match)", "an intact one"
    elif kind == "other network":
        tensors = load_file(path)
        save_file({name: tensor[..., :1].clone() for name, tensor in tensors.items() if tensor.ndim}, path)
        said = "weights of another network", "weights of"
    elif kind == "missing":
        path.unlink()
        said = "no such file", "weights written by a training run"
    else:
        path.write_bytes(pickle.dumps(Payload(marker)))
        said = "a damaged or foreign file", "safetensors"
    before = contents(run_folder)
    refused(["evaluate", str(run_folder), "--which", "last", "--attacks", "fgsm"], str(path), *said)
    assert contents(run_folder) == before
    assert not marker.exists()


def test_a_run_trained_from_python_is_evaluated_there(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "mine", "seed": 0}))
    refused(["evaluate", str(folder)], "run", "trained from Python", "softdefend.evaluate(net, ...)")


@pytest.mark.parametrize(
    ("call", "k", "name"),
    [
        ("replace", 1, "config.yaml"),
        ("replace", 3, ".best.pending.safetensors"),
        ("replace", 5, "best.safetensors"),
        ("replace", 6, "checkpoints/step-000000016.ckpt"),
        ("replace", 8, "evaluation/best.parquet"),
        ("fsync", 4, "metrics.jsonl"),
        ("fsync", 5, "checkpoints/step-000000008.ckpt"),
        ("fsync", 9, "timing.jsonl"),
    ],
)
def test_a_disk_that_fills_up_loses_nothing(
    call: str,
    k: int,
    name: str,
    finished: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the k-th call on nothing can be written any more; with free space the run ends as ever."""
    folder, calls, real = tmp_path / "run", [0], getattr(os, call)
    words = ["train", *SMALL, "--evaluate.curve_size", "0", "--folder", str(folder)]

    def full(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] >= k:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        refused(words, str(folder / name), "No space left on device", "enough free space")
    assert calls[0] == k  # it stopped at the first failure
    for path in folder.rglob("*.ckpt"):
        assert checkpoint.load(path)["epoch"] >= 1
    assert not [path.name for path in folder.rglob("*.tmp")]
    if name.endswith(".jsonl"):  # the row that failed is not there, not even in part
        assert len((folder / name).read_bytes().splitlines()) == {"metrics.jsonl": 0, "timing.jsonl": 1}[name]
    assert main(words) == 0
    for name in ("last.safetensors", "best.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    lines = (folder / "timing.jsonl").read_text().splitlines()
    assert all(yaml.safe_load(line)["seconds"] > 0 for line in lines)


# --- the same from Python -----------------------------------------------------------------------------------


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4


def linear(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, outputs))


def spoiled(row: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = tensors()
    images[row, 0, 2, 3] = value
    return images, labels


IMAGES, LABELS = tensors()
PYTHON: dict[str, tuple[nn.Module, tuple[Any, Any], str, str, str]] = {
    "NaN": (linear(), spoiled(7, torch.nan), "images", "pixel nan in image 7", "finite pixels in [0, 1]"),
    "infinity": (
        linear(),
        spoiled(7, torch.inf),
        "images",
        "pixel inf in image 7",
        "finite pixels in [0, 1]",
    ),
    "above": (linear(), spoiled(3, 1.5), "images", "pixel 1.5 in image 3", "finite pixels in [0, 1]"),
    "below": (linear(), spoiled(3, -0.25), "images", "pixel -0.25 in image 3", "finite pixels in [0, 1]"),
    "levels": (linear(), (IMAGES * 255, LABELS), "images", "in image 0", "finite pixels in [0, 1]"),
    "no channels": (linear(), (IMAGES[:, 0], LABELS), "images", "float32 [40, 6, 6]", "[n, c, h, w]"),
    "integers": (linear(), (IMAGES.long(), LABELS), "images", "int64", "uint8 or floating point"),
    "too few labels": (
        linear(),
        (IMAGES, LABELS[:-1]),
        "labels",
        "int64 [39]",
        "one integer label per image",
    ),
    "float labels": (linear(), (IMAGES, LABELS.float()), "labels", "float32 [40]", "integer labels"),
    "negative label": (linear(), (IMAGES, LABELS - 1), "labels", "label -1 at row 0", "labels >= 0"),
    "no images": (linear(), (IMAGES[:0], LABELS[:0]), "images", "float32 [0, 1, 6, 6]", "at least one image"),
    "an array": (linear(), (IMAGES.numpy(), LABELS), "images", "ndarray", "[n, c, h, w]"),
    "too few classes": (linear(3), (IMAGES, LABELS), "net", "shape [2, 3]", "logits [2, 4"),
    "probabilities": (
        nn.Sequential(linear(), nn.Softmax(1)),
        (IMAGES, LABELS),
        "net",
        "probabilities",
        "leave out the network's last softmax",
    ),
    "shape": (linear(), (IMAGES[..., :5], LABELS), "net", "fails on a forward", "images [2, 1, 6, 5]"),
}


@pytest.mark.parametrize("case", PYTHON.values(), ids=PYTHON.keys())
@pytest.mark.parametrize("function", ["train", "evaluate"])
def test_python_refuses(function: str, case: tuple[Any, ...], tmp_path: Path) -> None:
    net, data, setting, given, accepted = case

    def call() -> None:
        if function == "train":
            softdefend.train(net, data, folder=tmp_path / "run", progress=False)
        else:
            softdefend.evaluate(net, *data)

    with pytest.raises(SettingError) as raised:
        call()
    said, _, rest = str(raised.value).partition("; accepted: ")
    assert said.startswith(f"{setting}: got ")
    assert given in said
    assert accepted in rest.replace("4 or more", "4")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_python_refuses_a_network_with_nothing_to_train(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :4] * 9

    short = OptimSettings(epochs=1, batch_size=8)
    with pytest.raises(SettingError, match="net: got Fixed without trainable parameters"):
        softdefend.train(Fixed(), tensors(), folder=tmp_path / "run", progress=False, optim=short)
    assert softdefend.evaluate(Fixed(), *tensors(), attacks=()).clean.n == 40


def test_python_refuses_a_changed_recipe(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"folder": tmp_path / "run", "progress": False}
    softdefend.train(linear(), tensors(), optim=OptimSettings(epochs=1, batch_size=8), **settings)
    before = contents(tmp_path / "run")
    with pytest.raises(SettingError, match=r"optim\.epochs: got 2 where the run in .* began with 1;"):
        softdefend.train(linear(), tensors(), optim=OptimSettings(epochs=2, batch_size=8), **settings)
    assert contents(tmp_path / "run") == before
