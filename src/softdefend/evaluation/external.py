"""Networks that were not trained here: loaded from a factory and a file, and recognized by what they do."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.core.weight_files import load_weights_file, read_weights
from softdefend.evaluation.preflight import own_random_numbers
from softdefend.execution.network_mode import tf32
from softdefend.models import NetSettings, build, normalize
from softdefend.models.normalization import stands_in_front


def load_network(
    settings: NetSettings,
    weights: Path,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: Sequence[int] | None = None,
    key: str = "",
) -> tuple[nn.Module, list[str]]:
    """A network by its name or factory, with the weights of a file, in eval mode on the CPU.

    Args:
        settings: of the network, as in training. A layer that normalizes also stands in front where the
            weights are of a run with ``net.normalize``.
        weights: safetensors, or a torch file.
        num_classes: of the data.
        mean, std: of each channel of the data. Statistics in the file take their place.
        image_size: height and width of the images.
        key: where in the file the weights stand; looked for if empty.

    Returns:
        The network, and what had to be done to find its weights, in words.

    Raises:
        SettingError: no such network, or weights that cannot be read or do not fit.
    """
    notes: list[str] = []
    try:
        net = build(
            settings,
            num_classes=num_classes,
            in_channels=len(mean),
            mean=mean,
            std=std,
            image_size=image_size,
            pretrained=False,
        )
    except SettingError as error:
        setting = "--model" if error.setting == "net.name" else f"--{error.setting}"
        raise SettingError(setting, error.given, error.accepted) from error
    content = read_weights(weights)
    if settings.normalize is None and stands_in_front(content, net):
        net, notes = normalize(net, mean, std), ["normalizes first, as in training"]
    return net.eval(), [*notes, *load_weights_file(net, weights, content, key)]


def identity(net: nn.Module, origin: str, images: Tensor, labels: Tensor) -> dict[str, str]:
    """What tells a network from others with the same weights: its code may be another.

    Args:
        net: images [b, c, h, w] to logits [b, k], in eval mode, on their device.
        origin: where it comes from, such as ``package.module:function``.
        images, labels: a few, which need a gradient.

    Returns:
        ``origin``, a digest of the printed ``structure``, and the :func:`behavior` in words.
    """
    # Addresses of functions change from process to process.
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(net))
    return {
        "origin": origin,
        "structure": hashlib.sha256(structure.encode()).hexdigest(),
        "behavior": behavior(net, images, labels),
    }


def behavior(net: nn.Module, images: Tensor, labels: Tensor) -> str:
    """What a network does on some images and a little way off, in words.

    Three things are recorded: the predicted classes, and of the logits and of the loss's gradient the size
    and a few random projections, which know of signs and directions. They are rounded as coarsely as the
    arithmetic of another machine demands.

    Args:
        net: images [b, c, h, w] to logits [b, k], in eval mode, on their device.
        images, labels: a few.
    """
    aside = 0.05 * torch.randn(images.shape, generator=rng.stream(0, "behaviour/aside")).to(images)
    with own_random_numbers(images.device), tf32(False), torch.enable_grad():
        point = torch.cat([images, (images + aside).clamp(0, 1)]).requires_grad_(True)
        logits = net(point).float()
        gradient = "none"
        if logits.requires_grad:
            loss = F.cross_entropy(logits, labels.repeat(2), reduction="sum")
            with contextlib.suppress(RuntimeError):  # of the network's own backward
                (grad,) = torch.autograd.grad(loss, point, allow_unused=True)
                gradient = "none" if grad is None else _sketch(grad)
    classes = hashlib.sha256(str(logits.argmax(1).tolist()).encode()).hexdigest()
    size = _sketch(logits.detach() - logits.detach().mean())
    return f"logits {size}, gradient {gradient}, classes {classes[:16]}"


def _sketch(values: Tensor) -> str:
    """The length of a tensor, and its share along four random directions, each about one in size."""
    flat = values.detach().double().cpu().flatten()
    length = float(flat.norm())
    directions = torch.randn(4, len(flat), generator=rng.stream(0, "behaviour/sketch"), dtype=torch.float64)
    shares = (directions @ flat / max(length, 1e-300)).tolist()
    return f"{length:.2g} along " + " ".join(f"{share:.1f}" for share in shares)
