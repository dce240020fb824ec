"""One convention for a user's network in training and evaluation, and weights from timm."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import softdefend as sd
from softdefend.data import AugmentSettings, load
from softdefend.experiments.config import resolve
from softdefend.experiments.evaluate import evaluate_external
from softdefend.experiments.network import make_net
from softdefend.experiments.pipeline import train
from softdefend.models import NetSettings
from softdefend.training import RuntimeSettings, ValidateSettings

SOURCE = """
import torch
from torch import nn
import softdefend

seen = []

class Look(nn.Module):
    def forward(self, x):
        seen.append(tuple(x.detach().aminmax()))
        return x

def plain(num_classes, in_channels):
    first = Look(), nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(16, num_classes))

def inside(num_classes, in_channels):
    net = softdefend.normalize(plain(num_classes, in_channels), [0.5] * in_channels, [0.3] * in_channels)
    return nn.Sequential(Look(), net)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_nets"
    sys.modules.pop("own_nets", None)


def words(tmp_path, name, *more):
    settings = "--data.source digits --data.validation 60 --data.train_size 64 --optim.epochs 1"
    settings += " --optim.batch_size 32 --attack.steps 1 --validate.size 20 --evaluate.size 20"
    settings += " --evaluate.attacks [fgsm] --evaluate.curve_size 0 --evaluate.examples 0"
    settings += f" --runtime.device cpu --runtime.threads 1 --progress false --folder {tmp_path / 'run'}"
    return [*settings.split(), f"--net.name={name}", *more]


def loud(caplog):
    """Warnings about normalization."""
    return [record.getMessage() for record in caplog.records if "normalizes twice" in record.getMessage()]


def test_a_factory_gets_pixels_and_normalizes_itself(nets, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(resolve(words(tmp_path, f"{nets}:inside")))
    assert not loud(caplog)
    seen = sys.modules[nets].seen
    assert all(low >= -1e-6 and high <= 1 + 1e-6 for low, high in seen[::2])  # before; the other is behind
    names = load_file(tmp_path / "run" / "last.safetensors").keys()
    assert names == sys.modules[nets].inside(10, 1).state_dict().keys()
    assert not any("as they are" in record.getMessage() for record in caplog.records)


def test_normalizing_twice_is_loud(nets, tmp_path, caplog):
    made = resolve(words(tmp_path, f"{nets}:inside", "--net.normalize=true"))
    mean, std = (float(value) for value in _statistics(made))
    with caplog.at_level(logging.WARNING):
        train(made)
    (message,) = loud(caplog)
    assert f"mean {mean:.3g} and standard deviation {std:.3g}, then " in message
    assert f"then mean {mean + std * 0.5:.3g} and standard deviation {std * 0.3:.3g})" in message
    assert message.endswith("net.normalize false leaves it to the network")


def _statistics(experiment):
    images = load(experiment.data).train.images.double() / 255
    return images.mean(), images.std(correction=0)


def test_a_factory_that_does_not_normalize_is_told_how(nets, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(resolve(words(tmp_path, f"{nets}:plain")))
    text = "own_nets:plain gets pixels in [0, 1] as they are; net.normalize true normalizes them first"
    assert text in [record.getMessage() for record in caplog.records]
    assert not loud(caplog)


def test_python_is_warned_of_a_second_normalization(tmp_path, caplog):
    images, labels = torch.rand(60, 1, 6, 6), torch.arange(60) % 3
    bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    once = sd.normalize(bare, [0.5], [0.3])
    for net, count in ((bare, 0), (once, 0), (sd.normalize(once, [0.5], [0.3]), 1)):
        caplog.clear()
        sd.train(
            net,
            (images, labels),
            folder=tmp_path / f"{count}-{len(net)}",
            attack=sd.PGD(steps=1),
            optim=sd.OptimSettings(epochs=1, batch_size=16, lr=0.01),
            augment=AugmentSettings("none"),
            validate=ValidateSettings(attack=sd.PGD(steps=1)),
            runtime=RuntimeSettings(device="cpu", threads=1),
            progress=False,
        )
        assert len(loud(caplog)) == count


@pytest.mark.parametrize(
    ("factory", "setting"), [("inside", "null"), ("plain", "null"), ("plain", "true"), ("inside", "true")]
)
def test_weights_of_a_run_fit_the_factory_that_it_was_trained_with(factory, setting, nets, tmp_path):
    made = resolve(words(tmp_path, f"{nets}:{factory}", f"--net.normalize={setting}"))
    train(made)
    theirs = evaluate_external(
        NetSettings(f"{nets}:{factory}"),
        tmp_path / "run" / "last.safetensors",
        made.data,
        tmp_path / "outside",
        threat=made.recipe.threat,
        settings=made.evaluate,
        device="cpu",
        progress=False,
    )
    ours = json.loads((tmp_path / "run" / "evaluation" / "last.json").read_text())
    assert theirs["attacks"]["fgsm"]["count"] == ours["attacks"]["fgsm"]["count"]
    assert theirs["clean"] == ours["clean"]
    one, other = (tmp_path / name / "last.safetensors" for name in ("run", "outside"))
    assert load_file(one).keys() == load_file(other).keys()


def test_timms_weights_are_asked_for_once_and_for_the_datas_size(tmp_path, monkeypatch):
    asked: list[dict[str, Any]] = []

    def create_model(name, **keywords):
        asked.append(keywords)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64 * keywords["in_chans"], keywords["num_classes"]))
        if keywords["pretrained"]:
            nn.init.constant_(net[1].bias, 3.0)
        net.pretrained_cfg = {"mean": (0.25,), "std": (0.75,)}
        return net

    timm = SimpleNamespace(
        create_model=create_model, get_pretrained_cfg=lambda name: SimpleNamespace(fixed_input_size=True)
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    made = resolve(words(tmp_path, "timm:vit.tag"))
    train(made)
    assert [keywords["pretrained"] for keywords in asked] == [True, False]
    assert all(keywords["img_size"] == (8, 8) for keywords in asked)
    last = load_file(tmp_path / "run" / "last.safetensors")
    assert (last["normalize.mean"].item(), last["normalize.std"].item()) == (0.25, 0.75)
    assert float(last["net.1.bias"].min()) > 2  # it began at the weights that were asked for
    assert float(make_net(made, load(made.data)).state_dict()["net.1.bias"].max()) < 1
    asked.clear()
    train(made)  # finished: nothing has to be downloaded again
    assert not any(keywords["pretrained"] for keywords in asked)
    assert torch.equal(load_file(tmp_path / "run" / "last.safetensors")["net.1.bias"], last["net.1.bias"])
