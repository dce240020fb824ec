"""Batch normalization by the whole batch, of which each of several processes has a share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as _OnGPU
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from softdefend.core.errors import SettingError
from softdefend.core.processes import Processes, messages_within


def synchronize(net: nn.Module, processes: Processes) -> None:
    """Have batch normalization in training mode take its statistics over all processes.

    The layers stay the objects that they are, with parameters, buffers and the rest of their ``forward``;
    they get a class derived from their own, which copies of the network have too. Alone, nothing changes.

    Raises:
        SettingError: a layer of TorchScript, which cannot be changed.
    """
    if processes.size == 1:
        return
    layers = [module for module in net.modules() if getattr(module, "running_mean", None) is not None]
    if any(isinstance(layer, torch.jit.ScriptModule) for layer in layers):
        given = "synchronized with a TorchScript network"
        accepted = "per_process, or the torch.nn.Module that the network was made from"
        raise SettingError("runtime.batch_norm", given, accepted)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = _synchronized(class_of(module))
            module.processes = processes  # type: ignore[assignment]
            module.group = _group()


def _group() -> Any:
    """The processes' name in torch's registry of groups."""
    together: Any = dist.group.WORLD
    return together.group_name


def class_of(layer: nn.Module) -> type:
    """A layer's class; of a synchronized one the class that it had before."""
    return layer.original if isinstance(layer, _Synchronized) else type(layer)


def separate(net: nn.Module) -> None:
    """Undo :func:`synchronize`."""
    for module in net.modules():
        if isinstance(module, _Synchronized):
            module.__class__ = module.original
            del module.processes, module.group


def statistics(net: nn.Module) -> list[Tensor]:
    """Running statistics that processes of their own batch normalization come to differ in."""
    layers = [module for module in net.modules() if hasattr(module, "running_mean")]
    found = (tensor for layer in layers for tensor in (layer.running_mean, layer.running_var))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


class _Synchronized(nn.Module):
    """What a layer's class gets in front: its normalization, not the rest of its ``forward``."""

    processes: Processes
    group: str
    original: type
    usual: bool
    """Whether the class does nothing in its ``forward`` but normalize."""

    def forward(self, *given: Any) -> Any:
        if not (self.training or getattr(self, "running_mean", None) is None):
            return super().forward(*given)
        if self.usual and self.momentum is not None and torch.compiler.is_compiling():
            return self._compiled(*given)
        return self._together(*given)

    def _together(self, *given: Any) -> Any:
        with messages_within(), _WholeBatch(self.processes.size, self.group):
            return super().forward(*given)

    def _compiled(self, image: Tensor) -> Tensor:
        """What the layer's own ``forward`` does, without the mode that a compiler cannot look into."""
        layer: Any = self
        layer._check_input_dim(image)
        running = None, None
        if layer.training and layer.track_running_stats:
            running = layer.running_mean, layer.running_var
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
        group = self.processes.size, self.group
        return _normalized(image, *running, layer.weight, layer.bias, layer.momentum, layer.eps, *group)


def _plain(kind: type) -> type:
    """torch's own synchronized layer runs on GPUs only, and is a :class:`_BatchNorm` without dimensions."""
    return _AnyShape if issubclass(kind, nn.SyncBatchNorm) else kind


class _AnyShape(_BatchNorm):
    def _check_input_dim(self, image: Tensor) -> None:
        """Accept all."""


@cache
def _synchronized(kind: Any) -> type:
    plain: Any = _plain(kind)
    usual = plain.forward is _BatchNorm.forward
    # The compiler does not look into this method: only plain layers send messages within a compiled graph. It
    # is not decorated where it stands, since that would import the compiler with this module.
    whole = torch.compiler.disable(_Synchronized._together)  # type: ignore[no-untyped-call]
    own = {"__module__": kind.__module__, "original": kind, "usual": usual, "_together": whole}
    return type(kind.__name__, (_Synchronized, plain), own)


class _WholeBatch(TorchFunctionMode):
    """``batch_norm`` over all processes, wherever it is called in here."""

    def __init__(self, size: int, group: str) -> None:
        super().__init__()
        self.size, self.group = size, group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._normalize if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _normalize(
        self,
        image: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        running = running_mean, running_var
        if not training:
            return F.batch_norm(image, *running, weight, bias, False, momentum, eps)
        if not image.is_cuda:
            return _normalized(image, *running, weight, bias, momentum, eps, self.size, self.group)
        # torch's kernels, which uncompiled operations cannot match. They send statistics in float32, but
        # those of no image in the type of the images: another length, for which the others would wait.
        kernels: Any = _OnGPU
        given = image if image.numel() else _wide(image)
        if weight is None and bias is not None:  # they have no gradient of a bias alone
            weight = torch.ones_like(bias)
        out: Tensor = kernels.apply(given, weight, bias, *running, eps, momentum, dist.group.WORLD, self.size)
        return out.to(image.dtype)


def _normalized(
    image: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    size: int,
    group: str,
) -> Tensor:
    """What ``F.batch_norm`` does in training mode to a batch [b, c, ...] of which each of ``size`` processes
    in ``group`` has a share, running statistics included.

    Its messages are operations that a compiler takes into its graphs.
    """
    with torch.no_grad():
        mean, variance, total = _common(_moments(image.detach()), size, group)
        if running_mean is not None and running_var is not None:
            unbiased = variance * (total / (total - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        scale = (variance + eps).rsqrt()
    normalization: Any = _Normalization
    out: Tensor = normalization.apply(_wide(image), weight, bias, mean, scale, total, group)
    return out.to(image.dtype)


def _wide(image: Tensor) -> Tensor:
    return image.float() if image.dtype in (torch.bfloat16, torch.float16) else image


def _layout(image: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions that are averaged over, and the shape of a value for each channel."""
    return [0, *range(2, image.ndim)], [1, image.shape[1], *[1] * (image.ndim - 2)]


def _moments(image: Tensor) -> Tensor:
    """Mean, sum of squares around it and count of each channel's values, [3, c]."""
    (dims, shape), image = _layout(image), _wide(image)
    if not image.numel():  # a batch may have fewer images than there are processes
        return image.new_zeros(3, image.shape[1])
    count = image.numel() // image.shape[1]
    if torch.compiler.is_compiling():  # one pass over the images
        variance, mean = torch.var_mean(image, dims, correction=0)
        squares = variance * count
    else:  # two, of which each is several times as fast as var_mean's on a CPU
        mean = image.mean(dims)
        squares = (image - mean.view(shape)).square_().sum(dims)
    return torch.stack([mean, squares, torch.full_like(mean, count)])


def _common(moments: Tensor, size: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the values of all processes, [c] each, from each one's moments."""
    everyone = torch.ops._c10d_functional.all_gather_into_tensor(moments, size, group)
    rows = torch.ops._c10d_functional.wait_tensor(everyone).view(size, *moments.shape)
    means, squares, counts = rows.unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    # Squares around each process's mean, moved to the common one (Chan, Golub & LeVeque 1983).
    moved = squares + counts * (means - mean).square()
    return mean, moved.sum(0) / total, total


class _Normalization(torch.autograd.Function):
    """The layer from common statistics, with the gradient that these have; all in their type.

    Its result is neither changed in place nor cast: torch 2.11's compiler then loses the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        total: Tensor,
        group: str,
    ) -> Tensor:
        _, shape = _layout(image)
        ctx.save_for_backward(image, weight, mean, scale, total)
        ctx.group, ctx.type_of_bias = group, None if bias is None else bias.dtype
        out = _normal(image, mean, scale)
        if weight is not None:
            out = out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        image, weight, mean, scale, total = ctx.saved_tensors
        dims, shape = _layout(image)
        normal = _normal(image, mean, scale)
        of_bias, of_weight = slope.sum(dims), (slope * normal).sum(dims)
        of_image = None
        if ctx.needs_input_grad[0]:
            # Quotients, not the sums that are returned: the compiler adds up in place, and what is stacked
            # may be no copy.
            message = torch.stack([of_bias / total, of_weight / total])
            both = torch.ops._c10d_functional.all_reduce(message, "sum", ctx.group)
            level, along = torch.ops._c10d_functional.wait_tensor(both).unbind()
            factor = scale if weight is None else scale * weight
            of_image = (slope - level.view(shape) - normal * along.view(shape)) * factor.view(shape)
        # Each process's own, as of every other parameter: the update takes their mean.
        learned = (
            None if weight is None else of_weight.to(weight.dtype),
            None if ctx.type_of_bias is None else of_bias.to(ctx.type_of_bias),
        )
        return of_image, *learned, None, None, None, None


def _normal(image: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The image around 0 with a variance of 1 in each channel."""
    _, shape = _layout(image)
    return (image - mean.view(shape)) * scale.view(shape)
