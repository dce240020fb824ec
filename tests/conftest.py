"""Small things that many tests train."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

from pictures import Drawn
from softdefend.attacks import PGD
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import AugmentSettings, DataBundle, from_tensors
from softdefend.report import embed
from softdefend.training import (
    OptimSettings,
    Recipe,
    RuntimeSettings,
    SaveSettings,
    TrainConfig,
    Trainer,
    ValidateSettings,
)
from softdefend.weights import Plain
from tiny import K, tiny_net


def pytest_configure(config: pytest.Config) -> None:
    """Tests of the CPU run on the CPU also where there is a GPU; ``-m gpu`` is for the others."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # the tensors are tiny: a second thread costs more than it brings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first, those with many before others: what begins last should end soon."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    many = Counter(item.path for item in items)
    items.sort(key=lambda item: -many[item.path] if item.path in slow else 0)


@pytest.fixture(scope="session", autouse=True)
def _figures_that_look_alike_are_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "svg", Drawn(embed.svg))
        yield


@pytest.fixture(scope="session", autouse=True)
def _the_disk_has_what_is_written():
    """Only a power cut tells the difference; waiting for the disk takes longer than many a training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def every_figure_drawn(monkeypatch):
    """For tests of what drawing itself does."""
    monkeypatch.setattr(embed, "svg", embed.svg.draw)


@pytest.fixture(scope="session")
def bundle() -> DataBundle:
    """48 training images of 1x6x6 in 4 classes that a small network can tell apart."""
    generator = stream(0, "test-images")
    labels = torch.arange(96) % K
    images = 0.3 * torch.rand(96, 1, 6, 6, generator=generator)
    for number, label in enumerate(labels.tolist()):
        images[number, 0, label] += 0.5
    return from_tensors(images, labels, validation=16, test_fraction=1 / 3, name="stripes")


@pytest.fixture
def make_net():
    """A function that builds the same small network (with BatchNorm and dropout) every time."""
    return tiny_net


@pytest.fixture
def make_trainer(bundle, make_net, tmp_path):
    """A function that builds a trainer of three short epochs; same arguments, same run."""

    made: list[Trainer] = []

    def make(
        label,
        objective,
        weight=None,
        folder="run",
        net=None,
        data=bundle,
        attack=None,
        attack_bn="eval",
        eps_ramp=0.0,
        **settings,
    ) -> Trainer:
        threat = ThreatModel("linf", Budget("0.1"))
        recipe = Recipe(
            label, objective, weight or Plain(), threat, attack or PGD(steps=3), attack_bn, eps_ramp
        )
        defaults = {
            "optim": OptimSettings(epochs=3, batch_size=16, lr=0.1),
            "augment": AugmentSettings("crop-flip", pad=1),
            "validate": ValidateSettings(attack=PGD(steps=2)),
            "runtime": RuntimeSettings(device="cpu", threads=1),
            "save": SaveSettings(every_steps=1),
        }
        brought = {"data": None, "net": None, "evaluate": None}
        config = TrainConfig(recipe=recipe, **{**brought, **defaults, **settings})
        trainer = Trainer(net or make_net(), data, config, tmp_path / folder, progress=False)
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.folder.close()
