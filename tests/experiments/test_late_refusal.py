"""What the evaluation of a finished run would refuse is refused before the first step."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import softdefend as sd
from softdefend.data import AugmentSettings
from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train
from softdefend.training import RuntimeSettings, ValidateSettings

SOURCE = """
import torch
from torch import nn

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)

class Auxiliary(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return (logits, logits) if self.training else logits

def small(k, c, **norm):
    first = nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4, **norm), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(16, k))

def make(kind, k, c):
    return {
        "log_softmax": lambda: nn.Sequential(small(k, c), nn.LogSoftmax(1)),
        "softmax": lambda: nn.Sequential(small(k, c), nn.Softmax(1)),
        "sigmoid": lambda: nn.Sequential(small(k, c), nn.Sigmoid()),
        "batch_statistics": lambda: small(k, c, track_running_stats=False),
        "noise": lambda: nn.Sequential(Noise(), small(k, c)),
        "auxiliary": lambda: Auxiliary(small(k, c)),
        "plain": lambda: small(k, c),
    }[kind]()

def __getattr__(kind):
    if kind.startswith("_"):
        raise AttributeError(kind)
    return lambda num_classes, in_channels: make(kind, num_classes, in_channels)
"""

WORDS = {
    "softmax": "returns probabilities",
    "sigmoid": "outputs all lie in [0, 1]",
    "batch_statistics": "in another batch",
    "noise": "between equal forwards",
    "auxiliary": "returns tuple, in train mode",
}

QUICK = {
    "attack": sd.PGD(steps=1),
    "optim": sd.OptimSettings(epochs=1, batch_size=16, lr=0.01),
    "augment": AugmentSettings("none"),
    "validate": ValidateSettings(attack=sd.PGD(steps=1)),
    "runtime": RuntimeSettings(device="cpu", threads=1),
    "progress": False,
}


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "late_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "late_nets"


def run(tmp_path, name, *more):
    words = "--data.source digits --data.validation 60 --data.train_size 64 --optim.epochs 1"
    words += " --optim.batch_size 32 --attack.steps 1 --validate.size 20 --evaluate.size 20"
    words += " --evaluate.attacks [fgsm]"
    words += " --evaluate.curve_size 0 --evaluate.examples 0 --runtime.device cpu --runtime.threads 1"
    folder = tmp_path / "run"
    train(resolve([*words.split(), f"--net.name={name}", "--progress=false", f"--folder={folder}", *more]))
    return folder


@pytest.mark.parametrize("kind", WORDS)
def test_a_run_does_not_begin_with_a_network_that_it_cannot_evaluate(kind, nets, tmp_path):
    with pytest.raises(sd.SettingError) as caught:
        run(tmp_path, f"{nets}:{kind}")
    assert WORDS[kind] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "setting"),
    [
        (("--evaluate.attacks=[fgsm, fgsm]",), "evaluate.attacks"),
        (("--evaluate.attacks=[cw-linf]", "--threat.norm=l2", "--threat.eps=0.5"), "threat.norm"),
        (("--evaluate.compile=true",), "evaluate.compile"),
    ],
    ids=["twice", "another norm", "compile"],
)
def test_a_run_does_not_begin_with_an_evaluation_that_cannot_be_made(more, setting, nets, tmp_path):
    with pytest.raises(sd.SettingError) as caught:
        run(tmp_path, f"{nets}:plain", *more)
    assert caught.value.setting == setting
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_begin_where_its_evaluation_cannot_be_written(nets, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation").write_text("a file")
    with pytest.raises(sd.SettingError, match="below the file"):
        run(tmp_path, f"{nets}:plain")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["evaluation"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("log_softmax", ()), ("noise", ("--evaluate.attacks=[apgd-ce-1-eot2]",))],
    ids=["log-probabilities", "noise, averaged"],
)
def test_what_the_evaluation_takes_is_trained_to_its_end(kind, more, nets, tmp_path):
    folder = run(tmp_path, f"{nets}:{kind}", *more)
    assert {path.name for path in folder.iterdir()} >= {"best.safetensors", "last.safetensors", "report.html"}
    assert (folder / "evaluation" / "last.json").is_file()


# --- from Python --------------------------------------------------------------------------------------------


def pictures(n=60):
    labels = torch.arange(n) % 3
    generator = torch.Generator().manual_seed(0)
    return 0.5 * torch.rand(n, 1, 6, 6, generator=generator) + 0.2 * labels.view(-1, 1, 1, 1), labels


def network(*before, end=None, **norm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, **norm), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
        return nn.Sequential(*before, *layers, nn.Flatten(), nn.Linear(16, 3), *([end] if end else []))


@pytest.mark.parametrize(
    ("net", "scale", "words"),
    [
        (network(end=nn.Softmax(1)), 1, "returns probabilities"),
        (network(end=nn.Sigmoid()), 1, "outputs all lie in [0, 1]"),
        (network(nn.ReLU(inplace=True)), 1, "writes into the images"),
        (network(), 1 / 255, "divided by 255 only once"),
    ],
    ids=["softmax", "sigmoid", "in place", "divided twice"],
)
def test_python_refuses_before_it_writes(net, scale, words, tmp_path):
    images, labels = pictures()
    with pytest.raises(sd.SettingError) as caught:
        sd.train(net, (scale * images, labels), folder=tmp_path / "run", **QUICK)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_levels_of_one_are_images_divided_by_255_twice(tmp_path):
    images = torch.randint(0, 2, (60, 1, 6, 6), dtype=torch.uint8)
    with pytest.raises(sd.SettingError, match=r"no pixel above 0\.003922; .*uint8 from 0 to 255"):
        sd.train(network(), (images, pictures()[1]), folder=tmp_path / "run", **QUICK)
    with pytest.raises(sd.SettingError, match=r"no pixel above 0\.003922; .*divided by 255 only once"):
        sd.evaluate(network(), images, pictures()[1], attacks=["fgsm"], device="cpu")


def test_python_warns_of_logits_that_move_because_an_evaluation_may_average(tmp_path, caplog):
    net = network(track_running_stats=False)
    with caplog.at_level(logging.WARNING):
        sd.train(net, pictures(), folder=tmp_path / "run", **QUICK)
    (message,) = [record.getMessage() for record in caplog.records if "evaluation" in record.getMessage()]
    assert "in another batch" in message
    caplog.clear()
    sd.train(network(), pictures(), folder=tmp_path / "steady", **QUICK)
    assert not [record for record in caplog.records if "evaluation" in record.getMessage()]


def test_the_softmax_of_log_probabilities_is_that_of_the_logits(tmp_path):
    images, labels = pictures()
    threat, attacks = sd.ThreatModel("linf", "0.1"), ["fgsm", "pgd-4", "pgd-4-margin", "apgd-dlr-3"]
    bare = network()
    ended = nn.Sequential(bare, nn.LogSoftmax(1))
    one, other = (sd.evaluate(net, images, labels, threat=threat, attacks=attacks) for net in (bare, ended))
    assert one.clean.count == other.clean.count
    for name in one.attacks:
        assert torch.equal(one.attacks[name].prediction, other.attacks[name].prediction)
