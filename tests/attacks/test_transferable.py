"""What makes transfer attacks transfer: momentum, diverse inputs, smoothed gradients, fused surrogates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from minimal_tools import images, rugged
from scipy.ndimage import convolve
from torch import nn

from softdefend.attacks import PGD, Transfer, cross_entropy
from softdefend.attacks.transferable import diverse, smooth_gradient, window
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel

SHAPE = (2, 6, 7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_momentum_is_mi_fgsm(norm, keep):
    """A naive reading of the paper's algorithm 1 on one image at a time."""
    net, image = rugged(SHAPE), images(8, SHAPE)
    label = net(image).argmax(1)
    eps, steps, decay = 0.06, 6, 0.7
    attack = PGD(steps=steps, step_size=eps / steps, start="none", momentum=decay, keep=keep)
    made = attack(net, image, label, ThreatModel(norm, eps))
    for i, clean in enumerate(image):
        x, total, seen = clean.clone(), torch.zeros_like(clean), []
        for step in range(steps + 1):
            x.requires_grad_(True)
            loss = cross_entropy(net(x[None]), label[i : i + 1]).sum()
            (grad,) = torch.autograd.grad(loss, x)
            seen.append((loss.item(), x.detach().clone()))
            if step == steps:
                break
            total = decay * total + grad / grad.abs().sum()
            way = total.sign() if norm == "linf" else total / total.norm()
            delta = x.detach() + eps / steps * way - clean
            if norm == "linf":
                delta = delta.clamp(-eps, eps)
            elif delta.norm() > eps:
                delta = delta * eps / delta.norm()
            x = (clean + delta).clamp(0, 1)
        expected = seen[-1][1] if keep == "last" else max(seen, key=lambda one: one[0])[1]
        torch.testing.assert_close(made[i], expected)


def test_a_gradient_is_smoothed_as_scipy_convolves_it():
    net, image = rugged(SHAPE), images(3, SHAPE)
    plain = image.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(net(plain)[:, 0].sum(), plain)
    smoothed = image.clone().requires_grad_(True)
    seen = smooth_gradient(smoothed, 5)
    assert torch.equal(seen, image)
    (found,) = torch.autograd.grad(net(seen)[:, 0].sum(), smoothed)
    kernel = window(5).double().numpy()
    assert kernel.sum() == pytest.approx(1)
    assert kernel[2, 2] / kernel[2, 4] == pytest.approx(np.exp(4.5), rel=1e-5)  # three deviations away
    for i, c in np.ndindex(3, 2):
        wanted = convolve(grad[i, c].numpy(), kernel, mode="constant")
        np.testing.assert_allclose(found[i, c].numpy(), wanted, atol=1e-12)


def test_a_diverse_image_is_a_smaller_one_somewhere_in_black():
    image = torch.ones(2, 3, 20, 30)
    generator, sizes, places = stream(0, "d"), set(), set()
    for _ in range(200):
        seen = diverse(image, 1.0, generator)
        assert seen.shape == image.shape
        rows, columns = (seen[0, 0].amax(1 - axis).nonzero().flatten().tolist() for axis in (0, 1))
        assert torch.equal(seen, seen[:1, :1].expand_as(seen))
        inside = seen[0, 0][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        torch.testing.assert_close(inside, torch.ones_like(inside))
        sizes.add((len(rows), len(columns)))
        places.add((rows[0], columns[0]))
    assert {h for h, _ in sizes} == {18, 19, 20}
    assert {w for _, w in sizes} == {27, 28, 29, 30}
    assert len(places) > 6


def test_images_are_diverse_as_often_as_asked_for():
    image, generator = torch.ones(1, 1, 40, 40), stream(0, "p")
    changed = sum(diverse(image, 0.3, generator) is not image for _ in range(1000))
    assert abs(changed / 1000 - 0.3) < 0.05
    assert all(diverse(image, 0.0, generator) is image for _ in range(20))


class Mean(nn.Module):
    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(image) for net in self.nets]).mean(0)


def test_fused_surrogates_are_attacked_by_their_mean_logits():
    one, two = rugged(SHAPE), rugged(SHAPE, scale=0.3)
    two[1].weight.data.roll(3)
    image = images(6, SHAPE)
    judge, label, threat = rugged(SHAPE), rugged(SHAPE)(image).argmax(1), ThreatModel("linf", 0.05)
    attack = PGD(steps=5, start="none")
    fused = Transfer((one, two), attack, fused=True)(judge, image, label, threat)
    mean = attack(Mean(one, two), image, label, threat)
    clean, made = (cross_entropy(judge(x), label) for x in (image, mean))
    better = (made > clean).tolist()
    for i, risen in enumerate(better):
        if risen:
            torch.testing.assert_close(fused[i], mean[i])
    assert any(better)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_all_options_together_stay_in_the_ball_and_repeat_with_their_generator(norm):
    net, threat = rugged(SHAPE), ThreatModel(norm, {"linf": 0.05, "l2": 0.4, "l1": 2}[norm])
    image = images(10, SHAPE)
    label = net(image).argmax(1)
    attack = Transfer(
        (rugged(SHAPE), rugged(SHAPE, scale=0.5)),
        PGD(steps=5, loss="margin", momentum=1.0),
        fused=True,
        diversity=0.5,
        smoothing=3,
    )
    made = attack(net, image, label, threat, generator=stream(0, "a"))
    assert (threat.distance(image, made) <= float(threat.eps) * (1 + 1e-6)).all()
    assert (made.min(), made.max()) >= (0, 0)
    assert made.max() <= 1
    assert torch.equal(made, attack(net, image, label, threat, generator=stream(0, "a")))


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda net: Transfer(net, PGD(), diversity=1.5), "attack.diversity"),
        (lambda net: Transfer(net, PGD(), smoothing=4), "attack.smoothing"),
        (lambda net: PGD(momentum=-1.0), "attack.momentum"),
    ],
)
def test_impossible_settings_are_refused(make, setting):
    with pytest.raises(SettingError) as error:
        make(rugged(SHAPE))
    assert error.value.setting == setting
