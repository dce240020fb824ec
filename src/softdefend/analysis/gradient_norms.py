"""Gradient norms and memorisation: which samples does the training loss still pull at?

The loss is the cross-entropy with the target, in eval mode: the label term of every objective here. Its
gradient for one sample, with p the prediction, t the target and h the input of the last linear layer, is
``(p - t) h^T`` in that layer's weights and ``p - t`` in its bias, so its norm there is
``||p - t|| sqrt(||h||^2 + 1)`` exactly. The norm over all parameters takes one gradient per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from softdefend.analysis.probe import logits_of, per_sample_loss
from softdefend.core.errors import SettingError
from softdefend.execution.network_mode import tf32

_QUANTILES = 41


@dataclass(frozen=True)
class Features:
    """What enters the last linear layer, [m, d], what leaves it, [m, k], and whether it has a bias."""

    features: Tensor
    logits: Tensor
    bias: bool


@torch.no_grad()
def last_layer(net: nn.Module, image: Tensor, batch_size: int) -> Features:
    """Run images [m, c, h, w] through ``net`` and watch its last linear layer.

    Raises:
        SettingError: the network does not end in a linear layer.
    """
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise SettingError(
            "net", f"{type(net).__name__} without a linear layer", "one that ends in a linear layer"
        )
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_hook(lambda _, given, __: seen.append(given[0].detach().float()))
    try:
        logits = logits_of(net, image, batch_size)
    finally:
        hook.remove()
    if not bool(logits.isfinite().all()):
        raise SettingError("net", "a network whose logits are not finite on these images", "finite logits")
    features = torch.cat([part.flatten(1) for part in seen])
    with tf32(False):
        again = layers[-1](features) if features.shape == (len(logits), layers[-1].in_features) else None
    if (
        again is None
        or again.shape != logits.shape
        or not torch.allclose(again, logits, rtol=1e-3, atol=1e-4)
    ):
        raise SettingError("net", "a last linear layer that does not give the logits", "one that does")
    return Features(features, logits, layers[-1].bias is not None)


def last_layer_norms(seen: Features, target: Tensor) -> Tensor:
    """Gradient norm of the loss in the last layer's weights and bias, [m], in closed form.

    Args:
        seen: of m samples.
        target: probabilities [m, k].
    """
    pull = torch.linalg.vector_norm(seen.logits.softmax(dim=1) - target, dim=1)
    norms: Tensor = pull * (seen.features.square().sum(dim=1) + float(seen.bias)).sqrt()
    return norms


def whole_network_norms(net: nn.Module, image: Tensor, target: Tensor, chunk: int = 16) -> Tensor:
    """Gradient norm of each sample's loss over all parameters, [m], by one gradient per sample.

    Memory: ``chunk`` copies of the parameters.

    Args:
        net: in eval mode: in train mode batch normalization would tie samples together.
        image: [m, c, h, w].
        target: [m, k].
        chunk: samples whose gradients are in memory together.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    buffers = {name: b.detach() for name, b in net.named_buffers()}

    def loss(weights: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        logits: Tensor = functional_call(net, {**weights, **buffers}, (x[None],))
        return per_sample_loss(logits.float(), t[None]).sum()

    def norm(x: Tensor, t: Tensor) -> Tensor:
        squares = [g.square().sum() for g in grad(loss)(parameters, x, t).values()]
        return torch.stack(squares).sum().sqrt()

    with tf32(False):
        parts = zip(torch.split(image, chunk), torch.split(target, chunk), strict=True)
        return torch.cat([vmap(norm)(x, t) for x, t in parts])


def spread(norms: Tensor, wrong: Tensor | None) -> dict[str, Any]:
    """How gradient norms [m] are spread, over all samples and over the wrongly labelled ones apart.

    Args:
        norms: [m].
        wrong: [m] bool, or None where nothing is known of the labels.

    Returns:
        Means and medians; ``share_of_wrong``: the wrong samples' part of the sum of norms, to be held
        against ``fraction_wrong``; quantiles of both kinds for a figure. None where a kind is empty.
    """
    known: dict[str, Any] = {"mean": float(norms.mean()), "median": float(norms.median())}
    known["quantiles"] = _quantiles(norms)
    if wrong is None:
        return known
    total = float(norms.sum())
    known["fraction_wrong"] = float(wrong.double().mean())
    known["share_of_wrong"] = float(norms[wrong].sum()) / total if total > 0 else None
    for name, members in (("right", ~wrong), ("wrong", wrong)):
        part = norms[members]
        known[f"{name}_mean"] = float(part.mean()) if len(part) else None
        known[f"{name}_quantiles"] = _quantiles(part)
    return known


def _quantiles(values: Tensor) -> list[float] | None:
    if not len(values):
        return None
    at = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64, device=values.device)
    return [float(v) for v in torch.quantile(values.double(), at)]


def memorisation(prediction: Tensor, given: Tensor, wrong: Tensor, truth: Tensor | None) -> dict[str, Any]:
    """What a network predicts for wrongly labelled samples.

    Args:
        prediction, given: [m] int64.
        wrong: [m] bool.
        truth: [m] int64, or None where it is not known.

    Returns:
        ``fitted``: the share of wrong labels that the network repeats; ``recovered``: the share where it
        says the true class. None without wrong samples.
    """
    n = int(wrong.sum())
    share = {"fitted": int((prediction == given)[wrong].sum()) / n if n else None}
    if truth is not None:
        share["recovered"] = int((prediction == truth)[wrong].sum()) / n if n else None
    return {"wrong": n, **share}
