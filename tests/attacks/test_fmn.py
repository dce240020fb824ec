"""FMN against a naive reading of the paper's algorithm; test_linear_optimum.py has its closed forms."""

import math

import pytest
import torch
from minimal_tools import Counted, check_early_stop, images, rugged

from softdefend.attacks import FMN
from softdefend.core.errors import SettingError

NORMS = ["linf", "l2"]


def naive(net, image, label, norm, steps, alpha, gamma):
    """Algorithm 1 on one image, growing by a thousandth at least; distance of the closest wrong point."""
    p, dual = (math.inf, 1) if norm == "linf" else (2, 2)
    delta, radius, best, crossed = torch.zeros_like(image), 0.0, math.inf, False
    for step in range(steps + 1):
        point = (image + delta).clone().requires_grad_(True)
        logits = net(point[None])[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        gap = others.max() - logits[label]
        (slope,) = torch.autograd.grad(gap, point)
        size = delta.norm(p).item()
        wrong = logits.argmax().item() != label
        if wrong:
            best = min(best, size)
        if step == steps:
            return best
        fall = (1 + math.cos(math.pi * step / steps)) / 2
        a, g = alpha / 100 + (alpha - alpha / 100) * fall, 0.001 + (gamma - 0.001) * fall
        if wrong:
            radius, crossed = min(radius * (1 - g), best), True
        elif crossed:
            radius *= 1 + g
        else:
            radius = max(size + abs(gap.item()) / slope.norm(dual).item(), 1.001 * radius)
        delta = delta + a * slope / slope.norm()
        if norm == "linf":
            delta = delta.clamp(-radius, radius)
        else:
            delta = delta * min(1, radius / delta.norm().item())
        delta = (image + delta).clamp(0, 1) - image
    raise AssertionError


@pytest.mark.parametrize("norm", NORMS)
def test_follows_the_papers_algorithm(norm):
    net, image = rugged((2, 5, 7)), images(40, (2, 5, 7))
    label = net(image).argmax(1)
    label[3] = (label[3] + 1) % 5
    closest, distance = FMN(steps=25, step_size=0.7, gamma=0.1).minimal(net, image, label, norm)
    expected = [naive(net, x, y, norm, 25, 0.7, 0.1) for x, y in zip(image, label.tolist(), strict=True)]
    # A point exactly on the boundary falls on either side by rounding, which differs between processors, and
    # its ball then differs a little.
    off = (distance / torch.tensor(expected, dtype=torch.float64) - 1).nan_to_num().abs()
    assert (off < 2e-3).all()
    assert (off < 1e-7).sum() >= 24
    assert distance[3] == 0
    assert torch.equal(closest[3], image[3])
    assert (distance[distance > 0] > 0.0001).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.15)])
def test_stops_where_it_is_close_enough(norm, eps):
    whole, short = check_early_stop(FMN(steps=40), norm, eps)
    assert whole == 30 * 41
    assert short < 0.75 * whole


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_may_be_of_any_size(norm):
    net, image = rugged((1, 6, 6)).float(), images(10, (1, 6, 6)).float()
    label, attack = net(image).argmax(1), FMN(steps=30)
    tiny = rugged((1, 6, 6), scale=1e-20).float()
    plain = attack.minimal(net, image, label, norm)[1]
    torch.testing.assert_close(attack.minimal(tiny, image, label, norm)[1], plain, rtol=1e-3, atol=1e-5)


def test_images_that_are_wrong_cost_one_look():
    net, image = rugged((1, 6, 6)), images(10, (1, 6, 6))
    forward = Counted(net)
    closest, distance = FMN().minimal(forward, image, (net(image).argmax(1) + 1) % 5, "l2")
    assert torch.equal(closest, image)
    assert (distance == 0).all()
    assert forward.seen == 10


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"step_size": 0.0}, {"step_size": math.inf}, {"gamma": 0.0}, {"gamma": 1.0}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=rf"attack\.{next(iter(wrong))}"):
        FMN(**wrong)
