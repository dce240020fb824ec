"""Networks, data and a plain loop that the tests of ensembles share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softdefend.attacks import Attack
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import Batch


class Images:
    """A split in float64, where rounding decides no verdict."""

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.labels, self.n = image, label, len(image)

    def take(self, index: Tensor) -> Batch:
        return Batch(index, self.image[index], self.labels[index])


def rugged(shape: tuple[int, ...], k: int = 5, seed: int = 0) -> nn.Module:
    """An untrained network with curved boundaries, in float64 and eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 48), nn.ReLU(), nn.Linear(48, k)
        )
    net[1].weight.data.mul_(4)
    return net.double().eval().requires_grad_(False)


def sample(net: nn.Module, n: int, shape: tuple[int, ...], wrong: int = 7) -> Images:
    """Random images with the network's own predictions as labels, but for every ``wrong``-th."""
    image = torch.rand(n, *shape, generator=stream(0, "x")).to(next(net.parameters()).dtype)
    label = net(image).argmax(1)
    k = net(image[:1]).shape[1]
    label[::wrong] = (label[::wrong] + 1) % k
    return Images(image, label)


def one_after_the_other(
    net: nn.Module, data: Images, threat: ThreatModel, members: list[Attack], batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Robust flags [n] after each member: batch by batch, every attack from a fresh generator."""
    robust = net(data.image).argmax(1) == data.labels
    after = {"clean": robust.clone()}
    for member in members:
        for rows in robust.nonzero().squeeze(1).split(batch_size):
            image, label = data.image[rows], data.labels[rows]
            generator = torch.Generator().manual_seed(seed)
            adversarial = member(net, image, label, threat, generator=generator).detach()
            robust[rows] = net(adversarial).argmax(1) == label
        after[member.name] = robust.clone()
    return after
