"""Two, four and eight processes train what one does over the contract grid; see grid_of_processes.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grid_of_processes import (
    BATCH,
    EPOCHS,
    FEW,
    LABELS,
    OBJECTIVES,
    ONE,
    PAIRS,
    STEPS,
    VARIANTS,
    WEIGHTS,
    Wide,
    digest,
    train,
)

import processes
from softdefend.core import rng
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Augmented, AugmentSettings, Split
from softdefend.execution.network_mode import set_mode
from tiny import K

pytestmark = pytest.mark.slow  # the processes, once for all tests
SCRIPT = str(Path(__file__).with_name("grid_of_processes.py"))
GROUPS = {1: "pairs", 2: "pairs", 4: "few"}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Where processes end, by their number and rank: tensors of the first, digests of others."""
    folder = tmp_path_factory.mktemp("ends")
    for size, which in GROUPS.items():
        for code, errors in processes.ended(processes.start(size, SCRIPT, str(folder), which)):
            assert code == 0, errors
    return {tuple(map(int, path.stem.split("-"))): torch.load(path) for path in folder.glob("*.pt")}


NAMES = ["-".join(names) for names in PAIRS] + list(VARIANTS) + ["synchronized"]


def assert_close(many, one, name):
    for key, value in one.items():
        # Meters are sums over all images, of which single precision holds seven digits.
        rtol = 1e-5 if key == "meters" else 0
        torch.testing.assert_close(
            many[key], value, rtol=rtol, atol=1e-5, equal_nan=True, msg=lambda m, k=key: f"{name}: {k}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_does(ends, name):
    """Losses, correct predictions, targets' entropy, momentum, weights, memories, averages, predictions."""
    assert_close(ends[2, 0][name], ends[1, 0][name], name)


@pytest.mark.parametrize("name", ["-".join(names) for names in FEW])
def test_four_processes_train_what_one_does(ends, name):
    assert_close(ends[4, 0][name], ends[1, 0][name], name)


def test_eight_processes_train_what_one_does(tmp_path):
    for code, errors in processes.ended(processes.start(8, SCRIPT, str(tmp_path), "one")):
        assert code == 0, errors
    ((name, eight),) = torch.load(tmp_path / "8-0.pt").items()
    assert_close(eight, train(ONE[0]), name)
    for rank in range(1, 8):
        assert torch.load(tmp_path / f"8-{rank}.pt") == {name: digest(eight)}


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_end_in_the_same_bits(ends, size):
    """Weights, averages and memories: also where each normalizes by its own images."""
    first = {name: digest(end) for name, end in ends[size, 0].items()}
    for rank in range(1, size):
        assert ends[size, rank] == first


def test_a_direction_of_weights_is_that_of_the_whole_batch(ends):
    """AWP takes it from autograd.grad, which no wrapper averages."""
    awp = [name for name in NAMES if "AWP" in name]
    assert len(awp) >= 20
    for name in awp:
        assert_close(ends[2, 0][name], ends[1, 0][name], name)


@pytest.mark.parametrize("name", ["SAT-PGDAT", "SGLR-PGDAT", "Hard-TE"])
def test_every_sample_has_its_row_whichever_process_saw_it(ends, name):
    key = next(one for one in ends[2, 0] if one.startswith(name))
    rows, wanted = (
        next(value for kind, value in ends[size, 0][key].items() if kind.endswith(".memory"))
        for size in (2, 1)
    )
    start = torch.zeros(len(rows), K) if "TE" in name else torch.eye(K)[torch.arange(len(rows)) % K]
    assert ((rows - start).abs().sum(1) > 1e-3).all()
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)


def test_each_process_may_normalize_by_its_own_images(ends):
    """Two processes, step by step by hand: each half by itself, and the running statistics of the first."""
    end = ends[2, 0]["per_process"]
    by_hand = _halves_by_hand()
    torch.testing.assert_close(end["net.inner.0.weight"], by_hand[0].weight, atol=1e-5, rtol=0)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(end[f"net.inner.1.{name}"], getattr(by_hand[1], name), atol=1e-5, rtol=0)
    together = ends[2, 0]["synchronized"]["net.inner.0.weight"]
    assert not torch.allclose(end["net.inner.0.weight"], together, atol=1e-4)


def _halves_by_hand():
    """PGD-AT without rules, trainer or step, each half of a batch by itself."""
    labels = torch.arange(BATCH * STEPS) % K
    split = Split(torch.rand(len(labels), 1, 6, 6, generator=rng.stream(0, "images")), labels)
    data = Augmented(split, "cpu", AugmentSettings("crop-flip", pad=1))
    net, threat = Wide(), ThreatModel("linf", Budget("0.05"))
    inner = net.inner
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for epoch in range(EPOCHS):
        for number, rows in enumerate(data.plan(seed=0, epoch=epoch).split(BATCH)):
            key = rng.key(0, "step", epoch, number)
            batch = data.batch(rows)
            set_mode(net, "eval")
            start = threat.random_start(batch.image, torch.Generator().manual_seed(key)).clamp(0, 1)
            start.requires_grad_(True)
            cost = torch.nn.functional.cross_entropy(net(start).float(), batch.label, reduction="sum")
            (slope,) = torch.autograd.grad(cost, start)
            adversarial = threat.project(batch.image, start.detach() + 0.0125 * slope.sign())
            set_mode(net, "train")
            torch.manual_seed(rng.key(key, "dropout"))
            noise = torch.nn.functional.dropout(torch.ones(BATCH, 8, 6, 6, dtype=torch.float64), 0.1)
            slopes, statistics = [], []
            before = [inner[1].running_mean.clone(), inner[1].running_var.clone()]
            for half in (slice(0, 4), slice(4, 8)):
                inner[1].running_mean.copy_(before[0])
                inner[1].running_var.copy_(before[1])
                hidden = inner[:3](adversarial[half].double()) * noise[half]
                cost = torch.nn.functional.cross_entropy(inner[4:](hidden).float(), batch.label[half])
                slopes.append(torch.autograd.grad(cost, list(net.parameters())))
                statistics.append((inner[1].running_mean.clone(), inner[1].running_var.clone()))
            inner[1].running_mean.copy_(statistics[0][0])
            inner[1].running_var.copy_(statistics[0][1])
            with torch.no_grad():
                for p, m, one, other in zip(net.parameters(), momentum, *slopes, strict=True):
                    m.mul_(0.9).add_((one + other) / 2 + 5e-4 * p)
                    p.sub_(0.05 * m)
    return inner


def test_the_grid_holds_what_the_contract_asks_for():
    for kind, names in zip((LABELS, OBJECTIVES, WEIGHTS), zip(*PAIRS, strict=True), strict=True):
        assert set(kind) <= set(names)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = {(names[one], names[other]) for names in PAIRS}
        assert len(pairs) == len({names[one] for names in PAIRS}) * len({names[other] for names in PAIRS})
