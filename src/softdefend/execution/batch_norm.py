"""Batch normalization by the whole batch, of which each of several processes has a share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _OnGPU
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from softdefend.core.errors import SettingError
from softdefend.core.processes import Processes


def synchronize(net: nn.Module, processes: Processes) -> None:
    """Have batch normalization in training mode take its statistics over all processes.

    The layers stay the objects that they are, with parameters, buffers and the rest of their ``forward``;
    they get a class derived from their own, which copies of the network have too. Alone, nothing changes.

    Raises:
        SettingError: a layer of TorchScript, which cannot be changed.
    """
    if processes.size == 1:
        return
    for module in net.modules():
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "running_mean", None) is not None:
            given = "synchronized with a TorchScript network"
            accepted = "per_process, or the torch.nn.Module that the network was made from"
            raise SettingError("runtime.batch_norm", given, accepted)
        if isinstance(module, _BatchNorm):
            kind: Any = type(module)
            module.__class__ = _synchronized(kind)
            module.processes = processes  # type: ignore[assignment]
            module.group = _group()


def _group() -> Any:
    """The processes' name in torch's registry of groups."""
    together: Any = dist.group.WORLD
    return together.group_name


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

    # A compiled network is cut here: only messages of plain layers are part of its graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _together(self, *given: Any) -> Any:
        with _WholeBatch(self.processes):
            return super().forward(*given)

    def _compiled(self, image: Tensor) -> Tensor:
        """What :meth:`_together` does, in operations that a compiler joins with those around them."""
        layer: Any = self
        layer._check_input_dim(image)
        with torch.no_grad():
            mean, scale, total, variance = _common(image.detach(), layer.eps, self.processes.size, self.group)
            if layer.training and layer.track_running_stats and layer.running_mean is not None:
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.add_(1)
                layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
                layer.running_var.lerp_(variance.to(layer.running_var.dtype), layer.momentum)
        normalization: Any = _Compiled
        out: Tensor = normalization.apply(image, layer.weight, layer.bias, mean, scale, total, self.group)
        return out


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
    own = {"__module__": kind.__module__, "original": kind, "usual": usual}
    return type(kind.__name__, (_Synchronized, plain), own)


class _WholeBatch(TorchFunctionMode):
    """``batch_norm`` over all processes, wherever it is called in here."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

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
        if not training:
            return F.batch_norm(image, running_mean, running_var, weight, bias, False, momentum, eps)
        running = running_mean, running_var
        if image.is_cuda:
            with_whom: tuple[Any, ...] = (dist.group.WORLD, self.processes.size)
        else:
            with_whom = (self.processes,)
        kind: Any = _OnGPU if image.is_cuda else _OnCPU
        out: Tensor = kind.apply(image, weight, bias, *running, eps, momentum, *with_whom)
        return out


def _wide(image: Tensor) -> Tensor:
    return image.float() if image.dtype in (torch.bfloat16, torch.float16) else image


def _layout(image: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions that are averaged over, and the shape of a value for each channel."""
    return [0, *range(2, image.ndim)], [1, image.shape[1], *[1] * (image.ndim - 2)]


def _merged(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, 1 / standard deviation, count and unbiased variance of all images, [c] each, from the means,
    squares around them and counts of each process's, [processes, 3, c]."""
    means, squared, counts = rows.unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    # Squares around each process's mean, moved to the common one (Chan, Golub & LeVeque 1983).
    squares = (squared + counts * (means - mean).square()).sum(0)
    return mean, (squares / total + eps).rsqrt(), total, squares / (total - 1)


def _common(image: Tensor, eps: float, size: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_merged` has them, of this process's images and those of the others."""
    dims, _ = _layout(image)
    variance, mean = torch.var_mean(_wide(image), dims, correction=0)
    count = torch.full_like(mean, image.numel() // image.shape[1])
    own = torch.stack([mean, variance * count, count])
    everyone = torch.ops._c10d_functional.all_gather_into_tensor(own, size, group)
    return _merged(torch.ops._c10d_functional.wait_tensor(everyone).view(size, *own.shape), eps)


def _slope_of_image(
    slope: Tensor, normal: Tensor, weight: Tensor | None, scale: Tensor, level: Tensor, along: Tensor
) -> Tensor:
    """The gradient in the image, from means over all images: ``level`` of the gradient, ``along`` of the
    gradient times the normalized image."""
    _, shape = _layout(slope)
    factor = scale if weight is None else scale * weight
    return (slope - level.view(shape) - normal * along.view(shape)) * factor.view(shape)


class _Compiled(torch.autograd.Function):
    """The layer from common statistics, with the gradient that these have; for compiled networks."""

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
        out = (_wide(image) - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(image, weight, mean, scale, total)
        ctx.group, ctx.type_of_bias = group, None if bias is None else bias.dtype
        out = out if weight is None else out * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        image, weight, mean, scale, total = ctx.saved_tensors
        dims, shape = _layout(image)
        normal = (_wide(image) - mean.view(shape)) * scale.view(shape)
        slope = slopes[0].to(normal.dtype)
        of_bias, of_weight = slope.sum(dims), (slope * normal).sum(dims)
        # Quotients, not the sums that are returned: the compiler adds up in place, and what is stacked may be
        # no copy.
        message = torch.stack([of_bias / total, of_weight / total])
        both = torch.ops._c10d_functional.all_reduce(message, "sum", ctx.group)
        level, along = torch.ops._c10d_functional.wait_tensor(both).unbind()
        of_image = _slope_of_image(slope, normal, weight, scale, level, along).to(slopes[0].dtype)
        # Each process's own, as of every other parameter: the update takes their mean.
        learned = (
            None if weight is None else of_weight.to(weight.dtype),
            None if ctx.type_of_bias is None else of_bias.to(ctx.type_of_bias),
        )
        return of_image, *learned, None, None, None, None


class _OnCPU(torch.autograd.Function):
    """Batch normalization by the statistics of all processes, with their gradient; torch has it for GPUs."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        processes: Processes,
    ) -> Tensor:
        dims, shape = _layout(image)
        wide = _wide(image)
        # A batch may have fewer images than there are processes.
        mean = wide.mean(dims) if len(image) else wide.new_zeros(image.shape[1])
        squares = (wide - mean.view(shape)).square().sum(dims)
        count = torch.full_like(mean, image.numel() / image.shape[1])
        rows = processes.gather(torch.stack([mean, squares, count])[None])[0]
        mean, scale, total, variance = _merged(rows, eps)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(variance.to(running_var.dtype), momentum)
        normal = (wide - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normal, weight, scale, total)
        ctx.processes = processes
        out = normal if weight is None else normal * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        normal, weight, scale, total = ctx.saved_tensors
        slope, (dims, _) = slopes[0].to(normal.dtype), _layout(normal)
        of_bias, of_weight = slope.sum(dims), (slope * normal).sum(dims)
        of_image = None
        if ctx.needs_input_grad[0]:
            together = ctx.processes.sum(torch.stack([of_bias, of_weight])) / total
            level, along = together.unbind()
            of_image = _slope_of_image(slope, normal, weight, scale, level, along).to(slopes[0].dtype)
        wanted = ctx.needs_input_grad
        # Each process's own, as of every other parameter: the update takes their mean.
        learned = of_weight if wanted[1] else None, of_bias if wanted[2] else None
        return of_image, *learned, None, None, None, None, None
