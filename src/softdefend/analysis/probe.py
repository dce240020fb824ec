"""What every part measures on: drawn images, attacked as in training, and what a network returns for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from softdefend.attacks import Attack, cross_entropy
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import Resident
from softdefend.execution.network_mode import frozen, tf32


def draw_positions(n: int, count: int, seed: int, name: str) -> Tensor:
    """Draw ``count`` of n positions (all, where there are fewer), ascending, [m] int64. They are the same for
    every run of the same size."""
    order = torch.randperm(n, generator=stream(seed, f"analyse/{name}"))
    return order[:count].sort().values


def batches(index: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Numbered pieces of ``index`` [m] of at most ``size``."""
    yield from enumerate(torch.split(index, size))


def attack_images(
    net: nn.Module,
    data: Resident,
    index: Tensor,
    attack: Attack,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Attack the samples ``index`` [m] against their given labels: adversarial images [m, c, h, w].

    In eval mode and float32; the result is projected once more.
    """
    images = []
    with frozen(net, "eval"), tf32(False):
        for number, part in batches(index.to(data.labels.device), batch_size):
            batch = data.take(part)
            generator = stream(seed, f"analyse/{attack.name}", step=number, device=batch.image.device)
            adversarial = attack(net, batch.image, batch.label, threat, generator=generator).detach()
            images.append(threat.project(batch.image, adversarial))
    return torch.cat(images)


@torch.no_grad()
def logits_of(net: nn.Module, image: Tensor, batch_size: int) -> Tensor:
    """Logits [m, k] float32 of images [m, c, h, w], piece by piece."""
    with tf32(False):
        return torch.cat([net(part).float() for part in torch.split(image, batch_size)])


def predict_training_images(net: nn.Module, data: Resident, batch_size: int) -> Tensor:
    """Probabilities [n, k] float64 of a network on the clean training images, on the CPU."""
    parts = torch.split(torch.arange(data.n, device=data.labels.device), batch_size)
    logits = [logits_of(net, data.take(part).image, batch_size) for part in parts]
    return torch.cat(logits).double().softmax(dim=1).cpu()


def per_sample_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy [b] with labels [b] or probabilities [b, k]: what all parts mean by the loss."""
    return cross_entropy(logits, target)
