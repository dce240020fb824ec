"""FAB and Square against their papers' algorithms, read image by image and pixel by pixel in NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from minimal_tools import images, rugged
from scipy.optimize import brentq
from torch import nn

from softdefend.attacks import FAB, Square
from softdefend.attacks.square import _eta
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import CallerRandomness

Array = np.ndarray


def logits(net: nn.Module, point: Array) -> Array:
    return net(torch.from_numpy(point)[None])[0].numpy()


def lead(net: nn.Module, point: Array, label: int) -> float:
    """The margin: how far the best rival is ahead of the label."""
    z = logits(net, point)
    return float(np.delete(z, label).max() - z[label])


# --- FAB ----------------------------------------------------------------------------------------------------


def slope_of(net: nn.Module, point: Array, rival: int, label: int) -> tuple[float, Array]:
    """The lead of the rival over the label, and its gradient."""
    x = torch.from_numpy(point).requires_grad_(True)
    z = net(x[None])[0]
    (grad,) = torch.autograd.grad(z[rival] - z[label], x)
    return (z[rival] - z[label]).item(), grad.numpy()


def projection(point: Array, slope: Array, gap: float, norm: str) -> Array:
    """The shortest shift inside the box to where the linear function vanishes: the root of one number."""
    speed = np.sign(slope) if norm == "linf" else slope

    def shift(height: float) -> Array:
        return np.clip(-np.sign(gap) * height * speed, -point, 1 - point)

    def left(height: float) -> float:
        return float(np.sign(gap) * (gap + (slope * shift(height)).sum()))

    far = 1e9
    return shift(brentq(left, 0, far, xtol=1e-15, rtol=1e-14, maxiter=500) if left(far) < 0 else far)


def length(delta: Array, norm: str) -> float:
    return float(np.abs(delta).max() if norm == "linf" else np.sqrt((delta**2).sum()))


def naive_fab(net: nn.Module, image: Array, label: int, norm: str, attack: FAB) -> tuple[Array, float, float]:
    """The closest wrong point, its distance, and how near the label and its best rival came to a tie."""
    clean = logits(net, image)
    rivals = sorted((k for k in range(len(clean)) if k != label), key=lambda k: -clean[k])
    closest, distance, tie = image, math.inf, math.inf
    for rival in rivals[: attack.targets]:
        point = image
        for _ in range(attack.steps):
            gap, slope = slope_of(net, point, rival, label)
            near = projection(point, slope, gap, norm)
            home = projection(image, slope, gap + (slope * (image - point)).sum(), norm)
            lean = min(length(near, norm) / (length(near, norm) + length(home, norm)), attack.alpha_max)
            moved = (point + attack.eta * near) * (1 - lean) + (image + attack.eta * home) * lean
            point = np.clip(moved, 0, 1)
            tie = min(tie, abs(lead(net, point, label)))
            if logits(net, point).argmax() != label:
                if length(point - image, norm) < distance:
                    closest, distance = point, length(point - image, norm)
                point = image + attack.beta * (point - image)
    return closest, distance, tie


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [FAB(steps=12, targets=2), FAB(12, 4, alpha_max=0.4, eta=1.2, beta=0.6)])
def test_fab_goes_where_the_papers_algorithm_goes(attack: FAB, norm: str) -> None:
    net, image = rugged((1, 4, 5)), images(12, (1, 4, 5))
    label = net(image).argmax(1)
    closest, distance = attack.minimal(net, image, label, norm)  # type: ignore[arg-type]
    assert len(label.unique()) > 1
    compared = 0
    for row in range(len(image)):
        found, away, tie = naive_fab(net, image[row].numpy(), int(label[row]), norm, attack)
        # From a wrong point the two overshoots cancel where the lean is below its limit. Where the network is
        # linear, the next point then ties, and rounding decides whether it counts as wrong.
        if tie < 1e-12:
            continue
        compared += 1
        assert distance[row].item() == pytest.approx(away, rel=1e-9)
        np.testing.assert_allclose(closest[row].numpy(), found, atol=1e-9)
    assert compared >= len(image) - 1


def test_an_untargeted_search_is_charged_a_gradient_for_every_class() -> None:
    net, image = rugged((1, 4, 5)), images(6, (1, 4, 5))
    model, threat = CountingModel(net, len(image)), ThreatModel("linf", Budget(1e-6))
    context = AttackContext(model, CallerRandomness(None, len(image)))
    FAB(steps=3, targeted=False).run_batches(model, image, net(image).argmax(1), threat, context)
    forwards, gradients, unassigned = model.counts()
    assert int(gradients.sum()) + unassigned[1] == 6 * 3 * 5
    assert int(forwards.sum()) + unassigned[0] == 6 * (1 + 2 * 3)


# --- Square -------------------------------------------------------------------------------------------


def pyramid(height: int, width: int) -> Array:
    """1 / (k + 1)^2 for every k whose square about the center holds the pixel."""
    found = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            ring = max(abs(i - height // 2), abs(j - width // 2))
            found[i, j] = sum(1 / (k + 1) ** 2 for k in range(ring, max(height, width) // 2 + 1))
    return found / np.sqrt((found**2).sum())


def pattern(side: int) -> Array:
    both = np.zeros((side, side))
    if side > 1:
        both[: side // 2] = pyramid(side // 2, side)
    both[side // 2 :] = -pyramid(side - side // 2, side)
    return both / np.sqrt((both**2).sum())


@pytest.mark.parametrize("side", range(2, 12))
def test_the_pattern_of_a_window_is_the_papers(side: int) -> None:
    np.testing.assert_allclose(_eta(side).numpy(), pattern(side), atol=1e-6)


def naive_square_in_l2(
    net: nn.Module, image: Array, label: int, eps: float, attack: Square, drawn: Iterator[float]
) -> Array:
    """Algorithm 3 for one image that never falls."""
    channels, height, width = image.shape

    def turned(side: int) -> Array:
        return pattern(side).T if next(drawn) > 0.5 else pattern(side)

    def coins() -> Array:
        return np.array([np.sign(2 * next(drawn) - 1) for _ in range(channels)])[:, None, None]

    def on_sphere(delta: Array) -> Array:
        return np.clip(image + delta / np.sqrt((delta**2).sum()) * eps, 0, 1)

    side = height // 5
    start, delta = (height - 5 * side) // 2, np.zeros_like(image)
    for i in range(height // side):
        for j in range(width // side):
            tile = turned(side) * coins()
            rows = slice(start + i * side, start + (i + 1) * side)
            columns = slice(start + j * side, start + (j + 1) * side)
            place = delta[:, rows, columns]
            place += tile[:, : place.shape[1], : place.shape[2]]
    best = on_sphere(delta)
    for query in range(attack.queries):
        side = attack.side(query, height, width, "l2")
        top, left = (int(next(drawn) * (n - side)) for n in (height, width))
        top2, left2 = (int(next(drawn) * (n - side)) for n in (height, width))
        fresh = turned(side) * coins()
        delta = best - image
        both = np.zeros((height, width), dtype=bool)
        both[top : top + side, left : left + side] = True
        both[top2 : top2 + side, left2 : left2 + side] = True
        unused = max(eps**2 - (delta**2).sum(), 0) / channels
        reach = np.sqrt(unused + (delta**2 * both).sum((1, 2)))[:, None, None]
        old = delta[:, top : top + side, left : left + side].copy()
        size = np.sqrt((old**2).sum((1, 2), keepdims=True))
        fresh = fresh + old / (1e-12 + size)
        delta[:, top2 : top2 + side, left2 : left2 + side] = 0
        fresh = fresh / np.sqrt((fresh**2).sum((1, 2), keepdims=True)) * reach
        delta[:, top : top + side, left : left + side] = fresh
        candidate = on_sphere(delta)
        if lead(net, candidate, label) > lead(net, best, label):
            best = candidate
    return best


def naive_square_in_linf(
    net: nn.Module, image: Array, label: int, eps: float, attack: Square, drawn: Iterator[float]
) -> Array:
    """Algorithm 2 for one image that never falls."""
    channels, height, width = image.shape

    def coin() -> float:
        return float(np.sign(2 * next(drawn) - 1))

    best = image.copy()
    for c in range(channels):
        for j in range(width):
            best[c, :, j] += eps * coin()
    best = np.clip(best, 0, 1)
    for query in range(attack.queries):
        side = attack.side(query, height, width)
        top, left = (int(next(drawn) * (n - side)) for n in (height, width))
        candidate = best.copy()
        for c in range(channels):
            candidate[c, top : top + side, left : left + side] += 2 * eps * coin()
        candidate = np.clip(np.clip(candidate, image - eps, image + eps), 0, 1)
        if lead(net, candidate, label) > lead(net, best, label):
            best = candidate
    return best


@pytest.mark.parametrize("shape", [(1, 5, 8), (3, 9, 6)])
def test_square_in_linf_goes_where_the_papers_algorithm_goes(shape: tuple[int, int, int]) -> None:
    net, image = rugged(shape), images(1, shape)
    net[-1].bias.data[2] = 100  # class 2 holds
    attack, label = Square(queries=150, p_init=0.5), torch.tensor([2])
    found = attack(net, image, label, ThreatModel("linf", Budget(0.1)), generator=stream(1, "draws"))
    drawn = iter(torch.rand(20_000, generator=stream(1, "draws")).tolist())
    naive = naive_square_in_linf(net, image[0].numpy(), 2, 0.1, attack, drawn)
    np.testing.assert_allclose(found[0].numpy(), naive, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 12, 12), (2, 17, 17)])
def test_square_in_l2_goes_where_the_papers_algorithm_goes(shape: tuple[int, int, int]) -> None:
    net, image = rugged(shape), images(1, shape)
    net[-1].bias.data[2] = 100  # class 2 holds
    attack, eps = Square(queries=150, p_init=0.3), 1.5
    label = torch.tensor([2])
    found = attack(net, image, label, ThreatModel("l2", Budget(eps)), generator=stream(1, "draws"))
    drawn = iter(torch.rand(20_000, generator=stream(1, "draws")).tolist())
    naive = naive_square_in_l2(net, image[0].numpy(), 2, eps, attack, drawn)
    np.testing.assert_allclose(found[0].numpy(), naive, atol=1e-5)
    assert np.abs(naive - image[0].numpy()).max() > 0.05
