"""What `softdefend evaluate` does beside attacking, and networks that were not trained here."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_tools import contents, done, pictures, write_parquet
from safetensors import safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from torch import nn

from softdefend import SettingError, ThreatModel
from softdefend.cli.evaluate import FLAGS
from softdefend.cli.main import main
from softdefend.core.docstrings import field_docstrings
from softdefend.core.store import ResultStore
from softdefend.data import DataSettings, load
from softdefend.evaluation import EvaluateSettings, Evaluator, checkpoint
from softdefend.evaluation import pictures as pictures_module
from softdefend.evaluation.corruptions import CORRUPTIONS
from softdefend.experiments.evaluate import evaluate_network
from softdefend.report.runs import read_run

Refused = Callable[..., str]


def result(folder: Path, name: str) -> dict:
    content: dict = json.loads((folder / "evaluation" / f"{name}.json").read_text())
    return content


# --- settings -----------------------------------------------------------------------------------------------


def test_every_setting_is_a_flag_with_its_own_words() -> None:
    texts = field_docstrings(EvaluateSettings)
    assert texts.keys() == {field.name for field in fields(EvaluateSettings)}
    assert all(texts.values())
    told = " ".join(FLAGS.parser().format_help().replace("-\n", "-").split())
    for name, text in texts.items():
        assert f"--{name}" in told
        assert "".join(text.split())[:40] in "".join(told.split())


def test_what_is_not_given_is_the_runs_own(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    own = {**config["evaluate"], "batch_size": 16, "seed": 3, "examples": 2, "curve_size": 0}
    path.write_text(yaml.safe_dump({**config, "evaluate": own}))
    words = ["evaluate", str(run_folder), "--which", "last", "--attacks", "fgsm"]
    done(words, capsys)
    settings = result(run_folder, "last")["settings"]
    assert settings == {**own, "attacks": ["fgsm"], "norm": "linf", "eps": "4/255"}
    done([*words, "--seed", "5", "--size", "null"], capsys)
    again = result(run_folder, "last")
    assert again["settings"] == {**settings, "seed": 5, "size": None}
    assert again["n"] == 359  # a fifth of 1,797 digits


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes_are_refused(seed: int, run_folder: Path, refused: Refused) -> None:
    refused(["evaluate", str(run_folder), "--seed", str(seed)], "evaluate.seed", str(seed), "0 to 2^63 - 1")
    assert EvaluateSettings(seed=2**63 - 1).seed == 2**63 - 1


LAST = ["--which", "last", "--size", "12", "--curve_size", "0", "--attacks", "fgsm"]


# --- classes to reach, other norms ------------------------------------------------------------------------


def test_a_targeted_result_lies_beside_the_runs_own(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (run_folder / "evaluation" / "last.json").read_bytes()
    words = ["evaluate", str(run_folder), *LAST, "--attacks", "pgd-3", "--targeted", "3", "--eps", "0.4"]
    done(words, capsys)
    found = result(run_folder, "last-linf-0.4-targeted-3")
    assert (found["targeted"], found["n"] + found["left_out"]) == ("3", 12)
    assert found["left_out"] > 0
    assert found["attacks"]["pgd-3"]["reached"]["n"] == found["n"]
    assert (run_folder / "evaluation" / "last.json").read_bytes() == own
    assert not attacked_again(words, capsys, monkeypatch)
    assert attacked_again([*words, "--targeted", "random"], capsys, monkeypatch)


def test_a_mask_says_which_pixels_may_change(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, :3] = True
    np.save(tmp_path / "mask.npy", mask.numpy())
    own = (run_folder / "evaluation" / "last.json").read_bytes()
    words = ["evaluate", str(run_folder), *LAST, "--attacks", "pgd-3", "--mask", str(tmp_path / "mask.npy")]
    done([*words, "--save_adversarial"], capsys)
    (path,) = (run_folder / "evaluation").glob("last-mask-*.json")
    found = json.loads(path.read_text())
    assert found["may_change"] == pytest.approx(12 / 64)
    kept = load_file(path.with_name(f"{path.stem}-adversarial-pgd-3.safetensors"))
    images = load(DataSettings("digits", train_size=64, validation=32)).test.images[kept["index"]] / 255
    assert torch.equal(kept["adversarial"][..., ~mask], images[..., ~mask])
    assert not torch.equal(kept["adversarial"], images)
    assert (run_folder / "evaluation" / "last.json").read_bytes() == own
    assert "as evaluated before" in done(words, capsys)
    refused([*words, "--audit"], "--mask", "a mask", "--audit")
    np.save(tmp_path / "mask.npy", mask[:5].numpy())
    refused(words, "--mask", "bool [5, 8]", "[8, 8]")


def test_a_class_is_named_where_the_data_have_names(tmp_path: Path) -> None:
    names = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
    data = replace(load(DataSettings("digits", train_size=64, validation=32)), classes=names)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def targets(targeted: str) -> tuple[str, int]:
        settings = EvaluateSettings(("pgd-2",), size=30, curve_size=0, examples=0, targeted=targeted)
        found = evaluate_network(net, data, tmp_path / targeted, settings=settings)
        return found["targeted"], found["left_out"]

    assert targets("dog") == targets("3") == targets("03") == ("3", 3)
    assert targets("next") == ("next", 0)
    with pytest.raises(SettingError, match=r"^evaluate\.targeted: got 'cat'.* such as ant"):
        targets("cat")
    with pytest.raises(SettingError, match=r"did you mean ibis\?"):
        targets("ibiss")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["03", "3", "dog", "next"]


def test_targets_that_cannot_be_are_refused(run_folder: Path, refused: Refused) -> None:
    words = ["evaluate", str(run_folder), *LAST]
    refused([*words, "--targeted", "nearest"], "evaluate.targeted", "nearest", "next, random, least-likely")
    refused([*words, "--targeted", "10"], "evaluate.targeted", "10", "from 0 to 9")
    refused([*words, "--targeted", "next", "--audit"], "evaluate.targeted", "next", "--audit")
    refused([*words, "--targeted", "next", "--attacks", "pgd-3-kl"], "attack.loss", "kl", "ce or margin")


def test_a_run_is_attacked_in_other_norms(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run_folder), *LAST]
    done([*words, "--norm", "l1", "--eps", "2", "--attacks", "pgd-3", "apgd-ce-5", "fmn-5"], capsys)
    assert set(result(run_folder, "last-l1-2")["attacks"]) == {"pgd-3", "apgd-ce-5", "fmn-5"}
    done([*words, "--norm", "l0", "--eps", "5", "--attacks", "sigma-zero-20"], capsys)
    found = result(run_folder, "last-l0-5")
    assert found["attacks"]["sigma-zero-20"]["count"] <= found["clean"]["count"]


def test_adversarial_images_are_saved_as_they_were_judged(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", str(run_folder), *LAST, "--attacks", "pgd-3", "fgsm", "--eps", "0.2"]
    done(words, capsys)
    assert not attacked_again(words, capsys, monkeypatch)
    words.append("--save_adversarial")
    assert attacked_again(words, capsys, monkeypatch)
    assert not attacked_again(words, capsys, monkeypatch)
    test = load(DataSettings(**yaml.safe_load((run_folder / "config.yaml").read_text())["data"])).test
    for attack in ("pgd-3", "fgsm"):
        path = run_folder / "evaluation" / f"last-linf-0.2-adversarial-{attack}.safetensors"
        saved = load_file(path)
        assert len(saved["adversarial"]) == 12
        clean = test.images[saved["index"]].float() / 255
        away = (saved["adversarial"] - clean).abs().flatten(1).amax(1)
        torch.testing.assert_close(away, saved["distance"])
        assert (away <= 0.2 + 1e-6).all()
        assert away.max() > 0.1
        assert torch.equal(saved["label"], test.labels[saved["index"]])
        robust = (
            (saved["prediction"] == saved["label"]) & (saved["clean_prediction"] == saved["label"])
        ).sum()
        assert robust == result(run_folder, "last-linf-0.2")["attacks"][attack]["count"]
    path.unlink()
    assert attacked_again(words, capsys, monkeypatch)
    assert path.is_file()


def test_what_l0_does_not_have_is_refused(run_folder: Path, refused: Refused) -> None:
    words = ["evaluate", str(run_folder), *LAST, "--norm", "l0", "--eps", "5", "--attacks"]
    refused([*words, "pgd-3"], "threat.norm", "l0", "l0 has sigma-zero")
    refused([*words, "sigma-zero", "--audit"], "threat.norm", "l0", "--audit")


# --- what is there already ----------------------------------------------------------------------------------


def attacked_again(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch) -> bool:
    """Whether a command attacks, or answers from the files."""
    ran, call = [], Evaluator.__call__

    def counted(self, *arguments, **more):
        ran.append(1)
        return call(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", counted)
        done(words, capsys)
    return bool(ran)


def test_other_weights_of_an_older_time_are_evaluated_anew(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", str(run_folder), *LAST, "--corruptions"]
    done(words, capsys)
    last, extra = result(run_folder, "last"), result(run_folder, "last-corruptions")
    weights = run_folder / "last.safetensors"
    assert last["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest() == extra["weights"]
    assert last["test_data"] == extra["test_data"]
    os.utime(weights)  # only touched
    assert not attacked_again(words, capsys, monkeypatch)
    with safe_open(weights, "pt") as file:
        metadata = {"softdefend": re.sub(r', "sha256": "\w+"', "", file.metadata()["softdefend"])}
    save_file({name: 1.01 * value for name, value in load_file(weights).items()}, weights, metadata=metadata)
    os.utime(weights, (1, 1))
    assert attacked_again(words, capsys, monkeypatch)
    again = result(run_folder, "last-corruptions")
    assert again["weights"] == result(run_folder, "last")["weights"] != extra["weights"]
    assert again["clean"] == result(run_folder, "last")["clean"]


def test_harmless_settings_are_answered_from_the_files(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", str(run_folder), *LAST]
    done(words, capsys)
    before = contents(run_folder)
    assert not attacked_again([*words, "--microbatch", "7"], capsys, monkeypatch)
    assert not attacked_again([*words, "--examples", "3"], capsys, monkeypatch)
    place = run_folder / "evaluation"
    assert (place / "last.json").read_bytes() == before["evaluation/last.json"]
    assert len(load_file(place / "last-examples.safetensors")["label"]) == 3
    assert len(load_file(place / "last-gallery.safetensors")["label"]) <= 6
    assert not attacked_again([*words, "--examples", "0"], capsys, monkeypatch)
    assert not (place / "last-examples.safetensors").exists()
    assert not attacked_again(words, capsys, monkeypatch)
    for name in ("last-examples.safetensors", "last-gallery.safetensors"):
        again, first = load_file(place / name), from_bytes(before[f"evaluation/{name}"])
        assert all(torch.equal(again[key], first[key]) for key in first)


def test_examples_of_one_checkpoint_are_written_whichever_it_is(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for which in ("best", "last"):
        shutil.rmtree(run_folder / "evaluation")
        done(["evaluate", str(run_folder), *LAST, "--which", which, "--examples", "3"], capsys)
        (path,) = (run_folder / "evaluation").glob("*-examples.safetensors")
        assert (path.name, len(load_file(path)["label"])) == (f"{which}-examples.safetensors", 3)


def test_killed_before_the_gallery_the_next_call_writes_it(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, gallery = ["evaluate", str(run_folder), *LAST], run_folder / "evaluation/last-gallery.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(
            pictures_module, "choose_gallery", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert main(words) == 130
    assert not gallery.exists()
    assert not attacked_again(words, capsys, monkeypatch)
    assert gallery.exists()
    assert read_run(run_folder).details["last"].gallery is not None


# --- audit, corruptions, transfer ---------------------------------------------------------------------------


def test_extras_are_written_shown_and_kept(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run_folder.parent / "theirs"
    weights = load_file(run_folder / "last.safetensors")
    save_file({f"module.{name}": 1.1 * value for name, value in weights.items()}, other)
    (other.rename(other := other.with_suffix(".safetensors")))
    words = ["evaluate", str(run_folder), "--which", "best", "--size", "12", "--audit", "--audit_size", "6"]
    words += ["--corruptions", "--transfer", str(other)]
    out = done(words, capsys)
    audit, table, transfer = (result(run_folder, f"best-{n}") for n in ("audit", "corruptions", "transfer"))
    assert audit["n"] == 6
    assert audit["summary"].split()[0] in out
    assert {finding["verdict"] for finding in audit["findings"]} <= {"fine", "suspicious", "not measured"}
    assert table["n"] == 12
    assert list(table["corruptions"]) == list(CORRUPTIONS)
    assert f"{100 * table['mean']:.1f}" in out
    assert list(transfer["attacks"]) == ["transfer-pgd-20-margin-theirs"]
    page = (run_folder / "report.html").read_text()
    for title in ("Can the gradient be trusted?", "Transfer attacks", "Accuracy under common corruptions"):
        assert title in page
    before = {p: p.stat().st_mtime_ns for p in (run_folder / "evaluation").iterdir()}
    assert done(words, capsys) == out
    assert {p: p.stat().st_mtime_ns for p in (run_folder / "evaluation").iterdir()} == before
    done([*words, "--audit_size", "5"], capsys)
    changed = {p.name for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert changed == {"best-audit.json"}


def test_an_audit_by_other_checks_than_those_of_today_is_made_again(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(run_folder), "--which", "best", "--size", "8", "--audit", "--audit_size", "4"]
    done(words, capsys)
    store, whole = ResultStore(run_folder / "evaluation"), result(run_folder, "best-audit")
    checks = whole["settings"]["checks"]
    fewer = {name: threshold for name, threshold in checks.items() if name != "border"}
    for known in (fewer, checks | {"border": "above 0.5"}):
        settings = whole["settings"] | {"checks": known}
        inputs = whole["inputs"] | {"settings": whole["inputs"]["settings"] | {"checks": known}}
        older = whole | {"settings": settings, "findings": whole["findings"][1:]}
        assert store.write("best-audit", inputs, older) == store.read("best-audit")
        done(words, capsys)
        assert result(run_folder, "best-audit") == whole


def test_a_run_is_a_surrogate_too(
    run_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--size", "8"]
    done([*words, "--transfer", str(finished), str(run_folder / "best.safetensors")], capsys)
    attacks = result(run_folder, "last-transfer")["attacks"]
    assert list(attacks) == ["transfer-pgd-20-margin-run", "transfer-pgd-20-margin-best"]
    # both are the best checkpoint's weights: the folder's, and the file's
    assert len({rate["count"] for rate in attacks.values()}) == 1


def test_preflight_comes_before_any_attack(
    run_folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ThreatModel] = []

    def refuse(
        net: nn.Module, images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel, **_: object
    ) -> None:
        assert not net.training
        assert images.shape == (359, 1, 8, 8)
        assert len(labels) == 359
        asked.append(threat)
        raise SettingError("net", "a network that moves", "one that stands still")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("attacked before the preflight")

    monkeypatch.setattr(checkpoint, "preflight", refuse)
    monkeypatch.setattr(Evaluator, "__call__", never)
    before = contents(run_folder)
    refused(["evaluate", str(run_folder), "--eps", "5/255"], "net", "a network that moves", "stands still")
    assert contents(run_folder) == before
    assert [str(threat.eps) for threat in asked] == ["5/255"]


@pytest.mark.parametrize("flag", ["--log", "--robustbench"])
@pytest.mark.parametrize("below", ["", "config.yaml/x"])
def test_files_that_cannot_be_written_are_refused_first(
    flag: str, below: str, run_folder: Path, refused: Refused
) -> None:
    before = contents(run_folder)
    words = ["evaluate", str(run_folder), "--which", "last", "--attacks", "autoattack", "--size", "null"]
    given = "a directory" if not below else "below the file"
    refused([*words, flag, str(run_folder / below)], flag, given, "a file to write")
    assert contents(run_folder) == before


@pytest.mark.parametrize(
    ("attack", "audited", "assumed"),
    [
        ("fgsm", False, [True]),
        ("apgd-ce-2-eot1", False, [True]),  # averages nothing
        ("apgd-ce-2-eot2", False, [False]),
        ("autoattack-rand", False, [False]),
        ("fgsm", True, [False, True]),
        ("apgd-ce-2-eot2", True, [False]),
    ],
)
def test_an_audit_comes_before_a_moving_network_is_refused(
    attack: str, audited: bool, assumed: list[bool], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []

    def looked(*_: object, assumes_determinism: bool, **__: object) -> None:
        said.append(assumes_determinism)
        if assumes_determinism == assumed[-1] and len(said) == len(assumed):
            raise SettingError("net", "stop", "here")

    monkeypatch.setattr(checkpoint, "preflight", looked)
    words = ["evaluate", str(run_folder), "--which", "last", "--size", "8", "--attacks", attack]
    assert main([*words, *(["--audit", "--audit_size", "4"] if audited else [])]) == 2
    assert said == assumed
    assert (run_folder / "evaluation/last-audit.json").exists() == (len(assumed) == 2)


# --- networks from outside ----------------------------------------------------------------------------------

NETS = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

def steep(num_classes, in_channels):
    return make(num_classes, in_channels).append(nn.Softsign())

def odd(num_classes, in_channels):
    return make(num_classes, in_channels)

def soft(num_classes, in_channels):
    return nn.Sequential(make(num_classes, in_channels), nn.Softmax(1))
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that evaluate a linear network on forty gray pictures, ten of them test images."""
    (tmp_path / "nets_outside.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_outside", raising=False)
    write_parquet(tmp_path / "data.parquet", pictures(40), [0, 1] * 20)
    # class 1 is brighter in the upper half
    half = torch.cat([torch.ones(32), -torch.ones(32)])
    state = {"1.weight": torch.stack([-half, half]) / 8, "1.bias": torch.tensor([1.0, -1.0])}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, "weights.pt")
    words = "evaluate --model nets_outside:make --weights weights.pt --data.source data.parquet"
    return [*words.split(), "--data.test_fraction", "0.25", "--output", "theirs", "--device", "cpu"]


def test_a_network_from_outside_is_evaluated(
    outside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*outside, "--attacks", "pgd-20", "autoattack", "--eps", "2/255"]
    words += ["--robustbench", "info.json", "--log", "aa.log"]
    out = done(words, capsys)
    assert out.startswith("weights.pt: took 'state_dict' from the file; removed the prefix 'module.'\n")
    folder = tmp_path / "theirs"
    last = result(folder, "last")
    assert (last["n"], last["eps"], last["epoch"]) == (10, "2/255", None)
    assert last["clean"]["rate"] == 1.0
    assert {path.name for path in (folder / "evaluation").iterdir()} == {
        "last.json",
        "last.parquet",
        "last-gallery.safetensors",
        "last-examples.safetensors",
    }
    kept = load_file(folder / "last.safetensors")
    assert torch.equal(kept["1.bias"], torch.tensor([1.0, -1.0]))
    assert yaml.safe_load((folder / "config.yaml").read_text())["outside"]["model"] == "nets_outside:make"
    page = (folder / "report.html").read_text()
    assert "Learning curves" not in page
    assert "Accuracy after each attack" in page
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["clean_acc"] == "100.0"
    assert info["autoattack_acc"] == str(round(100 * last["attacks"]["autoattack"]["rate"], 2))
    assert info["architecture"] == "Sequential"
    assert "initial accuracy: 100.00%" in (tmp_path / "aa.log").read_text()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = done(words, capsys).splitlines(keepends=True)
    (kept,) = (line for line in again if "as evaluated before, on 10 images" in line)
    assert "".join(line for line in again if line != kept) == out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before


def test_a_built_in_network_is_evaluated_by_its_name_as_its_run_was(
    run_folder: Path, refused: Refused, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = ["--attacks", "pgd-3", "--eps", "4/255", "--curve_size", "0", "--device", "cpu"]
    done(["evaluate", str(run_folder), "--which", "best", *settings, "--size", "64"], capsys)
    words = ["evaluate", "--model", "small_cnn", "--weights", str(run_folder / "best.safetensors")]
    words += ["--output", str(tmp_path / "theirs"), *settings, "--size", "64"]
    refused(words, str(run_folder / "best.safetensors"), "other shapes: net.features", "weights by name")
    done([*words, "--net.width", "4"], capsys)
    theirs, ours = result(tmp_path / "theirs", "last"), result(run_folder, "best")
    assert theirs["attacks"]["pgd-3"] | {"seconds": 0} == ours["attacks"]["pgd-3"] | {"seconds": 0}
    assert theirs["clean"] == ours["clean"]
    refused([*words, "--net.name", "small_cnn"], "--net.name", "small_cnn", "--model")


def test_of_a_network_and_its_average_one_is_chosen(
    outside: list[str], refused: Refused, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = torch.load("weights.pt")["state_dict"]
    torch.save({"state_dict": state, "ema": {k: -v for k, v in state.items()}}, "weights.pt")
    words = [*outside, "--attacks", "fgsm", "--curve_size", "0"]
    refused(
        words, "weights.pt", "2 sets of weights that fit: 'state_dict.module', 'ema.module'", "weights_key"
    )
    done([*words, "--weights_key", "ema.module"], capsys)
    assert result(tmp_path / "theirs", "last")["clean"]["count"] == 0


def test_the_same_weights_in_another_network_are_another_evaluation(
    outside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``steep`` and ``odd`` have the weights of ``make``: one is built otherwise, the other not even that."""
    words = [*outside, "--attacks", "fgsm", "--curve_size", "0"]
    for number, name in enumerate(("make", "steep", "odd", "make")):
        again = [*words, "--model", f"nets_outside:{name}"]
        assert attacked_again(again, capsys, monkeypatch), (number, name)
        assert not attacked_again(again, capsys, monkeypatch)
        assert result(tmp_path / "theirs", "last")["network"]["origin"] == f"nets_outside:{name}"


SCALED = """
import torch
from torch import nn

FACTOR, STRAIGHT = 1.0, True

class Scaled(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.__dict__["inner"] = net = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))
        self.add_module("1", net[1])

    def forward(self, x):
        image = x if STRAIGHT else x.detach() + 1e-3 * x - 1e-3 * x.detach()
        return FACTOR * self.inner(image)

def make(num_classes, in_channels):
    return Scaled(in_channels, num_classes)
"""


def test_code_that_changed_behind_the_same_weights_is_another_evaluation(
    outside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant of the module, or a gradient that is not the function's: no printed structure shows them."""
    words = [*outside, "--attacks", "fgsm", "--curve_size", "0"]
    for factor, straight in (("1.0", "True"), ("1e5", "True"), ("1.0", "False")):
        text = SCALED.replace("FACTOR, STRAIGHT = 1.0, True", f"FACTOR, STRAIGHT = {factor}, {straight}")
        (tmp_path / "nets_outside.py").write_text(text)
        for again in (False, True):
            monkeypatch.delitem(sys.modules, "nets_outside", raising=False)
            importlib.invalidate_caches()
            shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
            assert attacked_again(words, capsys, monkeypatch) is not again, (factor, straight)


def test_a_result_without_what_is_read_of_it_is_made_anew(
    outside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*outside, "--attacks", "fgsm", "--curve_size", "0"]
    done(words, capsys)
    path = tmp_path / "theirs" / "evaluation" / "last.json"
    content = json.loads(path.read_text())
    for attacks in ({"fgsm": {"rate": "x"}}, {"fgsm": 3}, 7):
        path.write_text(json.dumps(content | {"attacks": attacks}))
        assert attacked_again(words, capsys, monkeypatch)
        fgsm = json.loads(path.read_text())["attacks"]["fgsm"]
        assert fgsm | {"seconds": 0} == content["attacks"]["fgsm"] | {"seconds": 0}


def test_a_file_in_the_place_of_the_results_is_refused_before_anything_runs(
    outside: list[str], refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "evaluation").write_text("")
    refused([*outside, "--attacks", "fgsm"], "evaluation", "below the file")


@pytest.mark.parametrize("eps", [0.05, 0.11, 0.13])
def test_the_linear_network_falls_where_the_closed_form_says(
    eps: float, outside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An l-inf attack moves every pixel by eps, or to the border of [0, 1], against its weight's sign."""
    done([*outside, "--attacks", "pgd-50", "--eps", str(eps)], capsys)
    settings = DataSettings(source="data.parquet", test_fraction=0.25, validation=1)
    test = load(settings).test
    image, sign = (test.images.float() / 255).flatten(1), 2.0 * test.labels - 1
    half = torch.cat([torch.ones(32), -torch.ones(32)])
    weight = sign[:, None] * 2 * half / 8  # of the right logit less the wrong one
    room = torch.where(weight > 0, image, 1 - image).clamp(max=eps)
    margin = (weight * image).sum(1) - 2 * sign - (weight.abs() * room).sum(1)
    count = int((margin > 0).sum())
    assert (count == 10) == (eps == 0.05)
    assert 0 < count == result(tmp_path / "theirs", "last")["attacks"]["pgd-50"]["count"]


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_wants_to_run_is_refused(outside: list[str], refused: Refused, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Evil(str(tmp_path / "ran"))}, tmp_path / "weights.pt")
    refused(outside, "weights.pt", "a pickle that would run posix.mkdir", "tensors and plain values only")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "theirs").exists()


OUTSIDE = {
    "weights of another network": ("--weights other.pt", "other.pt", "no 1.weight, 1.bias", "2 weights"),
    "no weights": ("--weights none.pt", "none.pt", "no such file", "safetensors"),
    "no such module": ("--model no_such_module:make", "--model", "no_such_module", "module:function"),
    "no such function": ("--model nets_outside:none", "--model", "does not exist", "module:function"),
    "probabilities": ("--model nets_outside:soft --weights soft.pt", "net", "probabilities", "softmax"),
    "data": ("--data.source none.parquet", "data.source", "none.parquet", "digits"),
    "eps": ("--eps 8", "threat.eps", "8", "8/255"),
    "attack": ("--attacks foo", "attacks", "'foo'", "autoattack"),
    "part of the test set": (
        "--robustbench i.json --attacks autoattack --size 9",
        "--robustbench",
        "9 of 10",
    ),
    "norm of an attack": ("--norm l1 --eps 1 --attacks cw-linf", "threat.norm", "l1", "linf under cw-linf"),
    "mask": ("--mask mask.npy", "--mask", "bool [3, 3]", "[8, 8]"),
    "target": ("--targeted 10", "evaluate.targeted", "10", "from 0 to 1"),
    "surrogate": ("--transfer none", "--transfer", "none", "safetensors"),
}


@pytest.mark.parametrize("case", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_does_not_fit_leaves_nothing_behind(
    case: tuple[str, ...], outside: list[str], refused: Refused, tmp_path: Path
) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"0.1.weight": torch.zeros(2, 64), "0.1.bias": torch.zeros(2)}, tmp_path / "soft.pt")
    np.save(tmp_path / "mask.npy", np.ones((3, 3)))
    refused([*outside, *case[0].split()], *case[1:])
    assert not (tmp_path / "theirs").exists()
    assert not (tmp_path / "i.json").exists()


def test_folders_are_not_taken_for_each_other(
    outside: list[str], run_folder: Path, refused: Refused, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = contents(run_folder)
    refused([*outside, "--output", str(run_folder)], "--output", "a training run", "a new folder")
    assert contents(run_folder) == before
    done([*outside, "--attacks", "fgsm"], capsys)
    refused(["evaluate", "theirs"], "run", "a network from outside", "with --model")
    done(["report", "theirs", str(run_folder), "--output", "both.html"], capsys)


def test_the_same_from_python(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = torch.rand(12, 1, 6, 6), torch.arange(12) % 3
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).train()
    caplog.set_level(logging.INFO, logger="softdefend")
    found = evaluate_network(
        net,
        (images, labels),
        tmp_path / "mine",
        threat=ThreatModel("l2", "0.5"),
        settings=EvaluateSettings(attacks=("pgd-5",), curve_size=0),
        device="cpu",
    )
    assert found == result(tmp_path / "mine", "last")
    with torch.no_grad():
        assert found["clean"]["count"] == int((net(images).argmax(1) == labels).sum())
    assert caplog.messages[-1] == f"report: {tmp_path / 'mine' / 'report.html'}"
    with pytest.raises(SettingError, match="images"):
        evaluate_network(net, (2 * images, labels), tmp_path / "not")
    assert not (tmp_path / "not").exists()
