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


def separate(net: nn.Module) -> None:
    """Undo :func:`synchronize`."""
    for module in net.modules():
        if isinstance(module, _Synchronized):
            module.__class__ = module.original
            del module.processes


def statistics(net: nn.Module) -> list[Tensor]:
    """Running statistics that processes of their own batch normalization come to differ in."""
    layers = [module for module in net.modules() if hasattr(module, "running_mean")]
    found = (tensor for layer in layers for tensor in (layer.running_mean, layer.running_var))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


class _Synchronized(nn.Module):
    """What a layer's class gets in front: its normalization, not the rest of its ``forward``."""

    processes: Processes
    original: type

    def forward(self, *given: Any) -> Any:
        if self.training or getattr(self, "running_mean", None) is None:
            return self._together(*given)
        return super().forward(*given)

    # A compiled network is cut here: messages are no part of its graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _together(self, *given: Any) -> Any:
        with _WholeBatch(self.processes):
            return super().forward(*given)


def _plain(kind: type) -> type:
    """torch's own synchronized layer runs on GPUs only, and is a :class:`_BatchNorm` without dimensions."""
    return _AnyShape if issubclass(kind, nn.SyncBatchNorm) else kind


class _AnyShape(_BatchNorm):
    def _check_input_dim(self, image: Tensor) -> None:
        """Accept all."""


@cache
def _synchronized(kind: Any) -> type:
    own = {"__module__": kind.__module__, "original": kind}
    return type(kind.__name__, (_Synchronized, _plain(kind)), own)


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
        channels = image.shape[1]
        dims, shape = [0, *range(2, image.ndim)], [1, channels, *[1] * (image.ndim - 2)]
        wide = image.float() if image.dtype in (torch.bfloat16, torch.float16) else image
        mean = wide.mean(dims)
        squares = (wide - mean.view(shape)).square().sum(dims)
        count = mean.new_full((channels,), image.numel() / channels)
        means, squared, counts = processes.gather(torch.stack([mean, squares, count])[None])[0].unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        # Squares around each process's mean, moved to the common one (Chan, Golub & LeVeque 1983).
        squares = (squared + counts * (means - mean).square()).sum(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((squares / (total - 1)).to(running_var.dtype), momentum)
        scale = (squares / total + eps).rsqrt()
        normal = (wide - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normal, weight, scale, total)
        ctx.processes, ctx.dims, ctx.shape = processes, dims, shape
        out = normal if weight is None else normal * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        normal, weight, scale, total = ctx.saved_tensors
        slope, dims, shape = slopes[0].to(normal.dtype), ctx.dims, ctx.shape
        of_bias, of_weight = slope.sum(dims), (slope * normal).sum(dims)
        of_image = None
        if ctx.needs_input_grad[0]:
            together = ctx.processes.sum(torch.stack([of_bias, of_weight])) / total
            level, along = together.view(2, *shape).unbind()
            factor = scale if weight is None else scale * weight
            of_image = ((slope - level - normal * along) * factor.view(shape)).to(slopes[0].dtype)
        wanted = ctx.needs_input_grad
        # Each process's own, as of every other parameter: the update takes their mean.
        learned = of_weight if wanted[1] else None, of_bias if wanted[2] else None
        return of_image, *learned, None, None, None, None, None
