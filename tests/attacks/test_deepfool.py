"""DeepFool against a naive reading of the authors' loop; test_linear_optimum.py has its closed forms."""

import math

import pytest
import torch
from minimal_tools import Counted, check_early_stop, images, rugged

from softdefend.attacks import DeepFool
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import CallerRandomness

NORMS = ["linf", "l2"]


def naive(net, image, label, norm, steps, targets):
    """One image, class by class; the point where it ends and the steps taken."""
    rivals = [j for j in net(image[None])[0].argsort(descending=True).tolist() if j != label][:targets]
    point = image.clone()
    for step in range(steps + 1):
        point = point.detach().requires_grad_(True)
        logits = net(point[None])[0]
        if logits.argmax() != label or step == steps:
            return point.detach(), step
        options = []
        for j in rivals:
            gap = logits[j] - logits[label]
            (slope,) = torch.autograd.grad(gap, point, retain_graph=True)
            way, dual = (
                (slope.sign(), slope.abs().sum()) if norm == "linf" else (slope / slope.norm(), slope.norm())
            )
            options.append(((gap.abs() / dual).item(), way))
        distance, way = min(options, key=lambda option: option[0])
        point = (point.detach() + 1.02 * (distance + 1e-4) * way).clamp(0, 1)
    raise AssertionError


@pytest.mark.parametrize("targets", [1, 2, 9])
@pytest.mark.parametrize("norm", NORMS)
def test_follows_the_authors_loop(norm, targets):
    net, image = rugged((2, 5, 7)), images(15, (2, 5, 7))
    label = net(image).argmax(1)
    label[3] = (label[3] + 1) % 5
    closest, distance = DeepFool(steps=4, targets=targets).minimal(net, image, label, norm)
    ends = [naive(net, x, y, norm, 4, targets) for x, y in zip(image, label.tolist(), strict=True)]
    assert len({steps for _, steps in ends}) > 2
    expected = torch.stack([point for point, _ in ends])
    found = net(expected).argmax(1) != label
    torch.testing.assert_close(closest[found], expected[found])
    assert torch.equal(distance.isfinite(), found)
    assert torch.equal(closest[~found], image[~found])
    assert distance[3] == 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.15)])
def test_returns_what_is_within_eps(norm, eps):
    check_early_stop(DeepFool(), norm, eps)


def test_an_image_is_looked_at_until_it_falls():
    net, image = rugged((1, 6, 6)), images(10, (1, 6, 6))
    label, forward = net(image).argmax(1), Counted(net)
    steps = sum(naive(net, x, y, "l2", 50, 9)[1] + 1 for x, y in zip(image, label.tolist(), strict=True))
    DeepFool().minimal(forward, image, label, "l2")
    assert forward.seen == steps


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_may_be_of_any_size(norm):
    net, image = rugged((1, 6, 6)).float(), images(10, (1, 6, 6)).float()
    label, attack = net(image).argmax(1), DeepFool()
    tiny = rugged((1, 6, 6), scale=1e-20).float()
    plain = attack.minimal(net, image, label, norm)[1]
    torch.testing.assert_close(attack.minimal(tiny, image, label, norm)[1], plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"targets": 0}, {"overshoot": -0.1}, {"overshoot": math.nan}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=rf"attack\.{next(iter(wrong))}"):
        DeepFool(**wrong)


def test_an_evaluation_counts_every_gradient():
    net, image = rugged((1, 6, 6)), images(10, (1, 6, 6))
    label, model = net(image).argmax(1), CountingModel(net, 10)
    taken = []

    def counted(x):
        logits = net(x)
        if logits.requires_grad:
            logits.register_hook(lambda grad: taken.append(len(grad)))
        return logits

    DeepFool(targets=3).minimal(counted, image, label, "l2")
    context = AttackContext(model, CallerRandomness(None, 10))
    DeepFool(targets=3).run_batches(model, image, label, ThreatModel("l2", Budget(1)), context)
    forwards, gradients, unassigned = model.counts()
    assert forwards.sum() + unassigned[0] > 20
    # A forward of points that turn out to be all wrong is the one that no gradient follows.
    assert 0 <= gradients.sum() + unassigned[1] - sum(taken) <= 10
