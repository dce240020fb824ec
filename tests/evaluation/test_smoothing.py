"""Certificates against the exact radius of linear networks and a naive Monte Carlo."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, norm
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import Resident, split
from softdefend.evaluation.resume import StateFile
from softdefend.evaluation.smoothing import ABSTAINED, Smoothed, Smoothing

CPU = torch.device("cpu")
N = 24
IMAGE = torch.rand(N, 1, 4, 4, generator=stream(0, "image"))
LABEL = torch.arange(N) % 2
EVERYONE = torch.arange(N)


def data(label: Tensor = LABEL) -> Resident:
    return Resident(split(IMAGE, label), CPU)


def linear(k: int = 2) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, k)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(k, 16, generator=stream(1, "weight")))
    net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    return net.eval()


def distance_to_boundary(net: nn.Sequential) -> Tensor:
    """Of each image to the hyperplane between two classes."""
    weight, bias = net[1].weight, net[1].bias
    across = weight[1] - weight[0]
    return ((IMAGE.flatten(1) @ across + bias[1] - bias[0]) / across.norm()).double()


def test_a_linear_network_is_certified_up_to_its_exact_radius():
    """Under noise the margin of a linear network is normal: the class has probability Phi(distance / sigma),
    so the radius of the smoothed classifier is the distance itself. What is certified is what draws show."""
    net, settings = linear(), Smoothing(sigma=0.5, samples=4000, selection=50, alpha=0.001)
    found = Smoothed(net, data(), settings).certify(EVERYONE)
    signed = distance_to_boundary(net)
    exact = signed.abs()
    sure = exact > 0.1
    assert torch.equal(found.prediction[sure], (signed > 0).long()[sure])
    assert (found.radius <= exact + 1e-9).all()
    # A count a few deviations below its mean gives a radius that is nearly all of the exact one.
    p = norm.cdf(exact.numpy() / 0.5)
    low = settings.radius(binom.ppf(1e-5, 4000, p).astype(np.int64))
    high = settings.radius(binom.ppf(1 - 1e-5, 4000, p).astype(np.int64))
    radius = found.radius.numpy()
    assert ((low <= radius) & (radius <= high))[sure.numpy()].all()
    far = (exact > 0.3) & (exact < 0.7 * settings.largest_radius)
    assert int(far.sum()) >= 5
    assert ((found.radius / exact)[far] > 0.75).all()


def test_counts_are_those_of_a_naive_monte_carlo():
    net, settings = linear(4), Smoothing(sigma=0.6, samples=2000, selection=100)
    found = Smoothed(net, data(), settings).certify(EVERYONE)
    generator = stream(5, "naive")
    for i in range(0, N, 4):
        noise = torch.randn(2000, 1, 4, 4, generator=generator)
        votes = net(IMAGE[i] + 0.6 * noise).argmax(1).bincount(minlength=4)
        top = int(votes.argmax())
        share = votes[top] / 2000
        deviation = math.sqrt(float(share * (1 - share)) / 2000 * 2)
        if found.prediction[i] != ABSTAINED:
            assert int(found.prediction[i]) == top
        assert abs(float(found.count[i]) / 2000 - float(share)) < 4.5 * deviation + 0.1 * (share < 0.5)


@pytest.mark.parametrize("count", [0, 1, 400, 500, 501, 560, 700, 999, 1000])
def test_a_radius_is_clopper_and_pearsons_bound(count):
    settings = Smoothing(sigma=0.3, samples=1000, alpha=0.002)
    bound = binomtest(count, 1000, alternative="greater").proportion_ci(1 - 0.002, method="exact").low
    wanted = 0.3 * norm.ppf(bound) if bound > 0.5 else 0.0
    assert float(settings.radius(np.asarray([count]))[0]) == pytest.approx(wanted, abs=1e-12)


def test_the_largest_radius_is_the_papers():
    """Cohen et al., section 3.2: 100,000 samples and alpha 0.001 certify at most 3.8 sigma."""
    assert Smoothing(sigma=1.0, samples=100_000).largest_radius == pytest.approx(3.8, abs=0.02)
    assert Smoothing(sigma=0.5, samples=50).largest_radius == pytest.approx(0.5 * norm.ppf(0.001 ** (1 / 50)))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_no_result_depends_on_the_batch_or_the_order(batch_size):
    settings = Smoothing(sigma=0.5, samples=30, selection=11)
    whole = Smoothed(linear(4), data(), settings).certify(EVERYONE)
    order = torch.randperm(N, generator=stream(0, "order"))[:9]
    part = Smoothed(linear(4), data(), settings, batch_size=batch_size).certify(order)
    for name in ("prediction", "radius", "count", "label"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[order])


def test_class_and_radius_are_of_different_noise():
    net, draws = linear(4), 40
    seen = []
    net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    Smoothed(net, data(), Smoothing(samples=draws, selection=draws), batch_size=N * draws).certify(EVERYONE)
    first, second = (noisy - IMAGE.repeat_interleave(draws, 0) for noisy in seen)
    assert not torch.isclose(first, second, atol=1e-6).any(dim=0).all()
    for noise in (first, second):
        assert float(noise.std()) == pytest.approx(0.25, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    assert len(first.flatten(1).unique(dim=0)) == N * draws


class Killed(Exception):
    pass


class Dying(nn.Module):
    """A network that dies in a forward."""

    def __init__(self, net: nn.Module, after: int) -> None:
        super().__init__()
        self.net, self.left, self.calls = net, after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.left:
            raise Killed
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_killed_certificate_goes_on_where_it_was(tmp_path: Path, after: int):
    settings = Smoothing(sigma=0.5, samples=20, selection=8)
    whole = Smoothed(linear(4), data(), settings, batch_size=50).certify(EVERYONE)
    batches = -(-N * 8 // 50) + -(-N * 20 // 50)
    dying = Dying(linear(4), after)
    with pytest.raises(Killed):
        Smoothed(dying, data(), settings, batch_size=50).certify(
            EVERYONE, StateFile(tmp_path / "state", {}, every=0)
        )
    rest = Dying(linear(4), 1000)
    again = Smoothed(rest, data(), settings, batch_size=50).certify(
        EVERYONE, StateFile(tmp_path / "state", {}, every=0)
    )
    assert rest.calls == batches - after
    for name in ("prediction", "radius", "count"):
        assert torch.equal(getattr(again, name), getattr(whole, name))


def test_an_attack_never_leaves_less_than_is_certified():
    net = linear()
    label = (distance_to_boundary(net) > 0).long()
    smoothed = Smoothed(net, data(label), Smoothing(sigma=0.5, samples=2000, selection=400))
    found, exact = smoothed.certify(EVERYONE), distance_to_boundary(net).abs()
    for radius in (0.2, 0.5):
        left = smoothed.attacked(EVERYONE, radius)
        assert bool((left | ~found.certified(radius + 0.1)).all())
        # Inside the box the attack crosses the boundary wherever it is nearer than the radius.
        within = (IMAGE - 0.5).abs().flatten(1).amax(1) < 0.5 - radius
        assert not bool((left & within & (exact < radius - 0.1)).any())


def test_logits_that_are_not_finite_certify_nothing():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), math.nan)

    found = Smoothed(Broken(), data(), Smoothing(samples=100, selection=10)).certify(EVERYONE)
    assert (found.prediction == ABSTAINED).all()
    assert not found.radius.any()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sigma", 0.0),
        ("sigma", math.inf),
        ("samples", 0),
        ("samples", 2_000_000),
        ("alpha", 1.0),
        ("seed", -1),
    ],
)
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(SettingError, match=f"certify.{setting}: got"):
        Smoothing(**{setting: value})
