"""What several restarts of PGD keep, against the restarts made one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from softdefend.attacks import PGD
from softdefend.core.threat import ThreatModel


def net_and_images():
    """A network of many small regions: a larger cross-entropy is often no wrong class there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 6))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
        image = torch.rand(800, 1, 4, 4)
        return net.requires_grad_(False), image, net(image).argmax(1)


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_an_image_that_any_restart_fools_stays_fooled(keep, loss):
    net, image, label = net_and_images()
    threat, attack = ThreatModel("linf", "0.08"), PGD(steps=3, step_size="0.02", keep=keep, loss=loss)
    draws = torch.Generator().manual_seed(1)
    alone = [attack(net, image, label, threat, generator=draws) for _ in range(5)]
    several = replace(attack, restarts=5)
    together = several(net, image, label, threat, generator=torch.Generator().manual_seed(1))

    fooled = torch.stack([net(adversarial).argmax(1) != label for adversarial in alone])
    assert torch.equal(net(together).argmax(1) != label, fooled.any(0))
    # Every image is one of the restarts' own, and where they agree on the verdict that of the largest loss.
    same = torch.stack([(adversarial == together).flatten(1).all(1) for adversarial in alone])
    assert bool(same.any(0).all())
    if loss == "ce":
        losses = torch.stack([nn.functional.cross_entropy(net(a), label, reduction="none") for a in alone])
        among = torch.where(fooled == fooled.any(0), losses, -torch.inf)
        reached = nn.functional.cross_entropy(net(together), label, reduction="none")
        torch.testing.assert_close(reached, among.amax(0))
        assert bool((losses.amax(0) > reached + 1e-4).any())  # the largest loss alone would lose some
