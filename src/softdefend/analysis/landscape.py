"""Geometry: how sharp is the loss in the weights, and how linear in the image?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from softdefend.analysis.probe import per_sample_loss
from softdefend.attacks import value_and_gradient
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.execution.network_mode import tf32

Parameters = dict[str, Tensor]


def parameters_of(net: nn.Module) -> Parameters:
    """The parameters by name, cut from every graph."""
    return {name: p.detach() for name, p in net.named_parameters()}


def mean_loss(
    net: nn.Module, parameters: Mapping[str, Tensor], image: Tensor, target: Tensor, batch_size: int
) -> float:
    """Mean loss of ``net`` at other parameters, on images [m, c, h, w] with labels [m] or targets [m, k]."""
    total = 0.0
    with torch.no_grad(), tf32(False):
        pairs = zip(torch.split(image, batch_size), torch.split(target, batch_size), strict=True)
        for x, t in pairs:
            logits: Tensor = functional_call(net, dict(parameters), (x,))
            total += float(per_sample_loss(logits.float(), t).double().sum())
    return total / len(image)


def filter_normalized(parameters: Mapping[str, Tensor], generator: torch.Generator) -> Parameters:
    """A random direction whose filters are as long as the network's (Li et al., NeurIPS 2018, arXiv
    1712.09913, section 4).

    Normal numbers, scaled so that each slice along a tensor's first axis (a filter, a row of a linear layer)
    has the norm of the same slice of the parameters. Biases and batch-normalization parameters do not move,
    as in the authors' code.

    Args:
        parameters: by name.
        generator: a CPU generator.
    """
    direction = {}
    for name, p in parameters.items():
        noise = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            direction[name] = torch.zeros_like(p)
            continue
        lengths = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (p, noise)]
        scale = lengths[0] / lengths[1].clamp_min(1e-12)
        direction[name] = noise * scale.view(-1, *[1] * (p.ndim - 1))
    return direction


def moved(parameters: Mapping[str, Tensor], *steps: tuple[float, Mapping[str, Tensor]]) -> Parameters:
    """``parameters`` plus each length times its direction."""
    return {name: p + sum(length * d[name] for length, d in steps) for name, p in parameters.items()}


def surface(
    net: nn.Module,
    image: Tensor,
    target: Tensor,
    *,
    points: int,
    span: float,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The loss on a square grid of two filter-normalized directions through the weights.

    The images stay as they are: of adversarial images, these are the ones made at the center.

    Args:
        points: of each axis, odd, so that the center is one of them.
        span: the axes reach from -span to span.

    Returns:
        ``axis`` [points] and ``loss`` [points][points], rows along the first direction.
    """
    parameters = parameters_of(net)
    generator = stream(seed, "analyse/directions")
    first, second = (filter_normalized(parameters, generator) for _ in range(2))
    axis = [span * (2 * i / (points - 1) - 1) for i in range(points)] if points > 1 else [0.0]
    loss = [
        [mean_loss(net, moved(parameters, (a, first), (b, second)), image, target, batch_size) for b in axis]
        for a in axis
    ]
    return {"axis": axis, "loss": loss}


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue found by iteration: how many steps it took, and the length of H v - value v for the unit
    vector v it stands for, relative to the value."""

    value: float
    steps: int
    residual: float


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    size: int,
    generator: torch.Generator,
    *,
    steps: int,
    tolerance: float,
) -> Eigenvalue:
    """The algebraically largest eigenvalue of a symmetric matrix that is known by its products.

    Power iteration goes to the eigenvalue of largest magnitude. Where that one is negative, the matrix is
    shifted up by it and the iteration runs again: then the largest is also the largest in magnitude.

    Args:
        product: v [size] to H v [size].
        generator: of the start, on the CPU.
        steps: products at most in each of the two rounds.
        tolerance: stop where the residual, relative to the eigenvalue, is below.
    """
    start = torch.randn(size, generator=generator)
    found = _power(product, start, steps, tolerance)
    if found.value >= 0:
        return found
    shift = -found.value

    def shifted(v: Tensor) -> Tensor:
        hv = product(v)
        return hv + shift * v.to(hv)

    again = _power(shifted, start, steps, tolerance)
    value = again.value - shift
    residual = again.residual * again.value / max(abs(value), 1e-30)
    return Eigenvalue(value, found.steps + again.steps, residual)


def _power(product: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float) -> Eigenvalue:
    v = start / start.norm()
    found = Eigenvalue(0.0, 0, math.inf)
    for step in range(1, steps + 1):
        hv = product(v)
        v = v.to(hv)
        value, length = float(v @ hv), float(hv.norm())
        residual = float((hv - value * v).norm()) / max(abs(value), 1e-30)
        found = Eigenvalue(value, step, residual)
        if residual < tolerance or length == 0:
            break
        v = hv / length
    return found


def hessian_product(
    net: nn.Module, image: Tensor, target: Tensor, batch_size: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """v to H v for the Hessian of the mean loss in all parameters (Pearlmutter, 1994), and their number.

    One product is two backward passes over the images. ReLU and max pooling have a zero second derivative
    wherever they have one.
    """
    parameters = {name: p.clone().requires_grad_() for name, p in parameters_of(net).items()}
    leaves = list(parameters.values())
    sizes = [p.numel() for p in leaves]

    def product(v: Tensor) -> Tensor:
        parts = [part.view_as(p).to(p) for part, p in zip(torch.split(v, sizes), leaves, strict=True)]
        total = torch.zeros(sum(sizes), device=leaves[0].device, dtype=leaves[0].dtype)
        with torch.enable_grad(), tf32(False):
            for x, t in zip(torch.split(image, batch_size), torch.split(target, batch_size), strict=True):
                logits: Tensor = functional_call(net, parameters, (x,))
                loss = per_sample_loss(logits, t).sum() / len(image)
                gradient = torch.autograd.grad(
                    loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True
                )
                along = sum(((g * d).sum() for g, d in zip(gradient, parts, strict=True)), loss.new_zeros(()))
                if not along.requires_grad:  # a loss that is linear in the weights
                    continue
                second = torch.autograd.grad(along, leaves, allow_unused=True)
                total += torch.cat(
                    [
                        torch.zeros_like(p).flatten() if s is None else s.flatten()
                        for s, p in zip(second, leaves, strict=True)
                    ]
                )
        return total

    return product, sum(sizes)


def input_gradients(net: nn.Module, image: Tensor, target: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """l1 and l2 norm of each sample's loss gradient in the image, two tensors [m].

    The l1 norm times eps is how much a first-order l-inf attack of radius eps can gain.
    """
    norms = []
    with tf32(False):
        for x, t in zip(torch.split(image, batch_size), torch.split(target, batch_size), strict=True):
            _, gradient = value_and_gradient(net, lambda logits, t=t: per_sample_loss(logits, t), x)  # type: ignore[misc]
            flat = gradient.flatten(1)
            norms.append(torch.stack([flat.abs().sum(dim=1), flat.norm(dim=1)]))
    both = torch.cat(norms, dim=1)
    return both[0], both[1]


def local_linearity(
    loss: Callable[[Tensor], Tensor],
    image: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """The largest gap found in the ball between the loss and its first-order expansion, [b] (Qin et al.,
    NeurIPS 2019, arXiv 1907.02610): ``max |l(x + d) - l(x) - d . grad l(x)|``.

    A search by projected steepest ascent: a lower bound of the true maximum.

    Args:
        loss: images [b, c, h, w] to losses [b].
        image: [b, c, h, w].
        threat: the ball, cut with [0, 1].
        steps: of the search, each a quarter of eps long.
        generator: of the random start, on the device of ``image``.
    """
    base, gradient = value_and_gradient(lambda x: x, loss, image)

    def gap(x: Tensor) -> Tensor:
        return (loss(x) - base - ((x - image) * gradient).flatten(1).sum(dim=1)).abs()

    here = threat.project(image, threat.random_start(image, generator))
    best = torch.zeros_like(base)
    for _ in range(steps):
        value, direction = value_and_gradient(lambda x: x, gap, here)
        best = torch.maximum(best, value)
        here = threat.project(image, threat.ascend(here, direction, float(threat.eps) / 4))
    with torch.no_grad():
        return torch.maximum(best, gap(here))
