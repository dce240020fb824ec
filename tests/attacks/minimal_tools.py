"""What the tests of the minimal-norm attacks share."""

from __future__ import annotations

import torch
from torch import nn

from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel


def rugged(shape, k=5, scale=1.0):
    """An untrained network with curved boundaries, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 64), nn.ReLU(), nn.Linear(64, k)
        )
    net[1].weight.data.mul_(4)
    net[3].weight.data.mul_(scale)
    net[3].bias.data.mul_(scale)
    return net.double().requires_grad_(False)


def images(n, shape, seed=0):
    return torch.rand(n, *shape, generator=stream(seed, "x"), dtype=torch.float64)


class Counted:
    """A forward that counts its images."""

    def __init__(self, net):
        self.net, self.seen = net, 0

    def __call__(self, image):
        self.seen += len(image)
        return self.net(image)


def check_early_stop(attack, norm, eps):
    """Called with a threat model: exactly the images with a close enough distance fall, whatever stands
    beside them in the batch, and the search for them is shorter."""
    net, image = rugged((1, 6, 6)), images(30, (1, 6, 6))
    label, forward = net(image).argmax(1), Counted(net)
    _, distance = attack.minimal(forward, image, label, norm)
    whole, near = forward.seen, distance <= eps
    assert 5 < near.sum() < 25
    forward.seen = 0
    order = torch.randperm(30, generator=stream(0, "o"))
    adversarial = attack(forward, image[order], label[order], ThreatModel(norm, Budget(eps)))
    assert torch.equal(net(adversarial).argmax(1) != label[order], near[order])
    assert torch.equal(adversarial[~near[order]], image[order][~near[order]])
    assert (ThreatModel(norm).distance(image[order], adversarial) <= eps).all()
    return whole, forward.seen
