"""Residual networks in evaluation mode, bfloat16, with all that stands between two convolutions inside their
kernels."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softdefend.models.preact_resnet import PreActBlock, PreActResNet18
from softdefend.models.resnet import BasicBlock, ResNet18
from softdefend.models.wide_resnet import WideResNet


@dataclass(frozen=True)
class Tile:
    """The part of an output that one program makes, and how."""

    images: int
    rows: int
    columns: int
    """Output channels."""
    depth: int
    """Input channels summed at once."""
    warps: int
    stages: int
    """Portions on their way from memory at once."""


def tile(
    batch: int, height: int, width: int, inputs: int, outputs: int, processors: int, *, whole: bool = False
) -> Tile:
    """A tile for an output [batch, height, width, outputs], chosen by measurement on one H200.

    Few channels: many pixels, which read less of the image twice. Many: squares, and where there are too few
    of them for the processors, halves that sum more channels at once. Less than 64 output channels leave the
    fast matrix units of Hopper unused.

    Args:
        batch, height, width: of the output.
        inputs, outputs: channels that are summed, and channels that are made.
        processors: of the device.
        whole: tiles must not reach beyond the last output channel.
    """
    shares = (64, 32, 16)
    depth = next(size for size in shares if inputs % size == 0)
    if outputs % 128 == 0:
        pixels, columns, warps, stages = 128, 128, 4, 3
        if batch * height * width // pixels * (outputs // columns) < 0.7 * processors and inputs % 128 == 0:
            pixels, depth, stages = 64, 128, 4
        elif inputs % 128 == 0 and inputs > 512:
            depth = 128
    elif outputs > 256 and not whole:
        pixels, columns, warps, stages = 256, 128, 8, 3
    else:
        columns = 64 if not whole and outputs > 32 else next(size for size in shares if outputs % size == 0)
        pixels, warps, stages = (128, 4, 2) if depth == 64 else (256, 4, 4)
    rows = min(height, pixels // width)
    return Tile(max(pixels // (rows * width), 1), rows, columns, depth, warps, stages)


class Folded:
    """A convolution with the normalization behind it, if any, kept as one convolution with a bias.

    Attributes:
        w: [outputs, terms of a window], tap by tap.
        bias: [outputs] float32; zero without a normalization.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module | None, dtype: torch.dtype) -> None:
        assert isinstance(conv, nn.Conv2d)
        self.conv, self.norm, weight = conv, norm, conv.weight
        self.inputs, self.outputs = conv.in_channels, conv.out_channels
        self.w = torch.zeros(self.outputs, weight[0].numel(), dtype=dtype, device=weight.device)
        self.bias = torch.zeros(self.outputs, device=weight.device)

    def refresh(self) -> None:
        """Take over weights and statistics as they are now."""
        # Tap by tap: the order in memory already where the network is channels_last.
        source = self.conv.weight.detach().permute(0, 2, 3, 1).contiguous()
        _fold(source, self.norm, self.w, self.bias)


class Affine:
    """A normalization that no convolution can take in: scale and shift, [channels] float32."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        self.norm, channels, device = norm, norm.num_features, norm.weight.device
        self.ones, self.scale = (torch.ones(channels, 1, device=device) for _ in range(2))
        self.shift = torch.zeros(channels, device=device)

    def refresh(self) -> None:
        """Take over parameters and statistics as they are now."""
        _fold(self.ones, self.norm, self.scale, self.shift)


_compiling = ContextVar("compiling", default=False)
"""Whether kernels are compiled and not run."""
_THREADS = 16
"""That compile at once, where there are so many cores."""


@contextlib.contextmanager
def _compiled_together() -> Iterator[None]:
    """Kernels of calls in here are compiled, side by side, and not run. One that cannot be compiled says so
    when it is run."""
    from triton import AsyncCompileMode

    # With errors Triton 3.6 would not leave its mode: no later kernel could be compiled.
    threads = min(os.cpu_count() or 1, _THREADS)
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)


def _launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Run a kernel on a grid of programs, or only have it compiled."""
    if _compiling.get():
        kernel.warmup(*given, grid=grid, **options)
    else:
        kernel[grid](*given, **options)


def _fold(source: Tensor, norm: nn.Module | None, w: Tensor, bias: Tensor) -> None:
    from softdefend.execution.fused import kernels

    outputs, row, values = len(source), source[0].numel(), 1024
    parts: tuple[Any, ...] = (None, None, None, None, 0.0)
    if norm is not None:
        assert isinstance(norm, nn.BatchNorm2d)
        parts = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
    _launch(kernels.fold, (outputs, -(-row // values)), source, *parts, w, bias, row, *w.stride(), values)


class FusedNet(ABC):
    """The same function as a residual network behind its normalization, for attacks on frozen weights.

    :meth:`refresh` takes over the network's present weights and statistics; between two calls of it the
    network may change without any effect here. Logits are float32; images and their gradients too.

    Args:
        net: ``normalize`` and ``net``; see :func:`fused`.
        dtype: of weights and activations.
    """

    last: Affine | None = None
    """The normalization between the last block and the head."""

    def __init__(self, net: nn.Sequential, dtype: torch.dtype = torch.bfloat16) -> None:
        inner: Any = net[1]
        self.dtype, self.linear = dtype, inner.linear
        self.mean, self.std = (getattr(net[0], name).detach().flatten().float() for name in ("mean", "std"))
        self.weight, self.bias = torch.empty_like(inner.linear.weight), torch.empty_like(inner.linear.bias)
        self.device = self.bias.device
        self.processors = 1
        if self.device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.parts: list[Folded | Affine] = []
        self._build(inner)
        terms = self.stem.w.shape[1]
        self.padded = next(size for size in (16, 32, 64, 128) if size >= terms)
        self.stem_w = torch.zeros(self.padded, self.stem.outputs, dtype=dtype, device=self.device)
        self.stem.w = self.stem_w[:terms].T
        if self.device.type == "cuda":
            with _compiled_together():
                self.refresh()
        self.refresh()

    stem: Folded

    def _folded(self, conv: nn.Module, norm: nn.Module | None = None) -> Folded:
        made = Folded(conv, norm, self.dtype)
        self.parts.append(made)
        return made

    def _affine(self, norm: nn.Module) -> Affine:
        made = Affine(norm)
        self.parts.append(made)
        return made

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the network's weights and running statistics as they are now."""
        with self._here():
            self._refresh()

    @torch.no_grad()
    def compile(self, counts: Iterable[int], image_shape: tuple[int, ...]) -> None:
        """Compile the kernels for batches of these sizes, as far as they have not been.

        Args:
            counts: images of a batch.
            image_shape: (c, h, w).
        """
        with _compiled_together():
            for count in counts:
                image = torch.empty(count, *image_shape, device=self.device)
                logits, tape = self.forward(image)
                self.backward(image, tape, logits)

    def _refresh(self) -> None:
        for part in self.parts:
            part.refresh()
        self.weight.copy_(self.linear.weight)
        self.bias.copy_(self.linear.bias)

    def _here(self) -> AbstractContextManager[None]:
        """Triton starts kernels on the current device, wherever their tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def __call__(self, image: Tensor) -> Tensor:
        """Logits [b, k] of images [b, c, h, w] float32, differentiable in the images alone."""
        logits: Tensor = _Logits.apply(image, self)  # type: ignore[no-untyped-call]
        return logits

    @abstractmethod
    def _build(self, net: Any) -> None:
        """Collect ``stem``, blocks and ``last``."""

    @abstractmethod
    def _through(self, image: Tensor) -> list[Tensor]:
        """Outputs [b, h, w, c] of every ReLU in order; each but the first is one of a pair for its block."""

    @abstractmethod
    def _back(self, tape: list[Tensor], flow: Tensor) -> Tensor:
        """From the gradient behind the last block to that behind the stem."""

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and what :meth:`backward` needs."""
        from softdefend.execution.fused import kernels

        with self._here():
            tape = self._through(image)
            active = tape[-1]
            b, height, width, channels = active.shape
            logits = torch.empty(b, len(self.bias), device=self.device)
            _launch(
                kernels.head,
                (b,),
                active,
                self.weight,
                self.bias,
                logits,
                height * width,
                *self._classes(channels),
            )
        return logits, tape

    def _classes(self, channels: int) -> tuple[int, ...]:
        """Sizes that the kernels of the head want."""
        classes, padded = len(self.bias), 1 << (channels - 1).bit_length()
        return classes, channels, padded, min(16, 1 << (classes - 1).bit_length())

    def backward(self, image: Tensor, tape: list[Tensor], grad: Tensor) -> Tensor:
        """Gradient in the images, from that in the logits [b, k]."""
        from softdefend.execution.fused import kernels

        active = tape[-1]
        b, height, width, channels = active.shape
        flow = torch.empty_like(active)
        scale = None if self.last is None else self.last.scale
        with self._here():
            _launch(
                kernels.head_gradient,
                (b,),
                grad.contiguous(),
                self.weight,
                active,
                scale,
                flow,
                height * width,
                *self._classes(channels),
            )
            return self._stem_gradient(image, self._back(tape, flow))

    def _stem(self, image: Tensor, next_norm: Affine | None = None) -> tuple[Tensor, Tensor]:
        """The stem's output and its ReLU; the same tensor twice where nothing stands between."""
        from softdefend.execution.fused import kernels

        b, channels, height, width = image.shape
        count, pixels = b * height * width, 128
        out = self._empty(b, height, width, self.stem.outputs)
        second = None if next_norm is None else torch.empty_like(out)
        _launch(
            kernels.stem,
            (-(-count // pixels),),
            image,
            self.mean,
            self.std,
            self.stem_w,
            None if next_norm is None else next_norm.scale,
            self.stem.bias if next_norm is None else next_norm.shift,
            out,
            second,
            count,
            height,
            width,
            *image.stride(),
            channels,
            self.padded,
            self.stem.outputs,
            pixels,
        )
        return out, out if second is None else second

    def _stem_gradient(self, image: Tensor, flow: Tensor) -> Tensor:
        from softdefend.execution.fused import kernels

        b, channels, height, width = image.shape
        count, pixels, values = b * height * width, 128, 512
        taps = torch.empty(count, self.padded, device=self.device)
        _launch(
            kernels.stem_taps,
            (-(-count // pixels),),
            flow,
            self.stem_w,
            taps,
            count,
            self.padded,
            self.stem.outputs,
            pixels,
        )
        grad = torch.empty_like(image)
        _launch(
            kernels.stem_gradient,
            (-(-count * channels // values),),
            taps,
            self.std,
            grad,
            count,
            height,
            width,
            *grad.stride(),
            channels,
            self.padded,
            values,
        )
        return grad

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _convolve(
        self,
        x: Tensor,
        part: Folded,
        *,
        other: Tensor | None = None,
        side: Tensor | None = None,
        shortcut: Folded | None = None,
        next_norm: Affine | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Forward at stride 1, and its ReLU; the same tensor twice where nothing stands between."""
        return self._stride_one(
            x, part, other=other, side=side, shortcut=shortcut, norm=next_norm, active=None
        )

    def _gradient(
        self,
        grad: Tensor,
        part: Folded,
        active: Tensor,
        *,
        other: Tensor | None = None,
        side: Tensor | None = None,
        shortcut: Folded | None = None,
        norm: Affine | None = None,
    ) -> Tensor:
        """Backward at stride 1, through the ReLU that made ``active``."""
        return self._stride_one(
            grad, part, other=other, side=side, shortcut=shortcut, norm=norm, active=active
        )[0]

    def _stride_one(
        self,
        x: Tensor,
        part: Folded,
        *,
        other: Tensor | None,
        side: Tensor | None,
        shortcut: Folded | None,
        norm: Affine | None,
        active: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from softdefend.execution.fused import kernels

        backward = active is not None
        b, height, width, inputs = x.shape
        outputs = part.inputs if backward else part.outputs
        t = tile(b, height, width, inputs, outputs, self.processors)
        out = self._empty(b, height, width, outputs)
        second = torch.empty_like(out) if norm is not None and not backward else None
        block, window = [t.images, t.rows, width, t.columns], [t.images, t.rows, width, t.depth]
        slices = [t.depth, t.columns] if backward else [t.columns, t.depth]
        pairs = side is not None and side.shape[1] != height
        if pairs:
            assert side is not None
            side, window_side = _paired(side), [t.images, t.rows, 1, width, t.depth]
        else:
            window_side = window
        _launch(
            kernels.convolve,
            self._programs(t, b, height, outputs),
            _described(x, window),
            _described(part.w, slices),
            _described(side, window_side),
            _described(None if shortcut is None else shortcut.w, slices),
            _described(out, block),
            _described(second, block),
            _described(other, block),
            _described(active, block),
            None if backward else part.bias if norm is None else norm.shift,
            None if norm is None else norm.scale,
            height,
            inputs,
            outputs,
            0 if side is None else side.shape[-1] // (1 + pairs),
            pairs,
            t.images,
            t.rows,
            width,
            t.columns,
            t.depth,
            backward,
            num_warps=t.warps,
            num_stages=t.stages,
        )
        return out, out if second is None else second

    def _strided(self, x: Tensor, part: Folded) -> Tensor:
        """Forward at stride 2, and the ReLU."""
        from softdefend.execution.fused import kernels

        b, height, width = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
        t = tile(b, height, width, part.inputs, part.outputs, self.processors)
        out = self._empty(b, height, width, part.outputs)
        _launch(
            kernels.convolve_strided,
            self._programs(t, b, height, part.outputs),
            _described(_paired(x), [t.images, t.rows, 1, width, t.depth]),
            _described(part.w, [t.columns, t.depth]),
            _described(out, [t.images, t.rows, width, t.columns]),
            part.bias,
            height,
            part.inputs,
            part.outputs,
            t.images,
            t.rows,
            width,
            t.columns,
            t.depth,
            num_warps=t.warps,
            num_stages=t.stages,
        )
        return out

    def _gradient_strided(
        self,
        grad: Tensor,
        part: Folded,
        active: Tensor,
        *,
        side: Tensor,
        shortcut: Folded,
        norm: Affine | None = None,
    ) -> Tensor:
        """Backward at stride 2, of a 3x3 and a 1x1 convolution, through the ReLU that made ``active``."""
        from softdefend.execution.fused import kernels

        b, height, width, inputs = grad.shape
        outputs = part.inputs
        t = tile(4 * b, height, width, inputs, outputs, self.processors, whole=True)
        out = torch.empty_like(active)
        pairs, window = [t.images, t.rows, 1, width, t.columns], [t.images, t.rows, width, t.depth]
        (programs,) = self._programs(t, b, height, outputs)
        _launch(
            kernels.gradient_strided,
            (4 * programs,),
            _described(grad, window),
            _described(part.w, [t.depth, t.columns]),
            _described(side, window),
            _described(shortcut.w, [t.depth, t.columns]),
            _described(_paired(out), pairs),
            _described(_paired(active), pairs),
            None if norm is None else norm.scale,
            height,
            inputs,
            outputs,
            t.images,
            t.rows,
            width,
            t.columns,
            t.depth,
            num_warps=t.warps,
            num_stages=t.stages,
        )
        return out

    @staticmethod
    def _programs(t: Tile, b: int, height: int, outputs: int) -> tuple[int]:
        return (-(-b // t.images) * (height // t.rows) * -(-outputs // t.columns),)


class FusedResNet(FusedNet):
    """:class:`ResNet18`: ReLU last in each block, every normalization behind a convolution."""

    def _build(self, net: ResNet18) -> None:
        self.stem = self._folded(net.stem[0], net.stem[1])
        self.blocks: list[tuple[Folded, Folded, Folded | None]] = []
        for block in net.blocks:
            assert isinstance(block, BasicBlock)
            shortcut = self._folded(*block.shortcut) if len(block.shortcut) else None
            first, second = self._folded(block.conv1, block.bn1), self._folded(block.conv2, block.bn2)
            self.blocks.append((first, second, shortcut))

    def _refresh(self) -> None:
        super()._refresh()
        for _, second, shortcut in self.blocks:
            if shortcut is not None:
                second.bias.add_(shortcut.bias)

    def _through(self, image: Tensor) -> list[Tensor]:
        active, _ = self._stem(image)
        tape = [active]
        for first, second, shortcut in self.blocks:
            if shortcut is None:
                inner, _ = self._convolve(active, first)
                active, _ = self._convolve(inner, second, other=active)
            else:
                inner = self._strided(active, first)
                active, _ = self._convolve(inner, second, side=active, shortcut=shortcut)
            tape += [inner, active]
        return tape

    def _back(self, tape: list[Tensor], flow: Tensor) -> Tensor:
        for number in reversed(range(len(self.blocks))):
            first, second, shortcut = self.blocks[number]
            before, inner = tape[2 * number : 2 * number + 2]
            within = self._gradient(flow, second, inner)
            if shortcut is None:
                flow = self._gradient(within, first, before, other=flow)
            else:
                flow = self._gradient_strided(within, first, before, side=flow, shortcut=shortcut)
        return flow


class FusedPreActResNet(FusedNet):
    """:class:`PreActResNet18` and :class:`WideResNet`: ReLU before each convolution, and the residual past
    it."""

    def _build(self, net: PreActResNet18 | WideResNet) -> None:
        self.stem = self._folded(net.stem)
        self.blocks: list[tuple[Affine, Folded, Folded, Folded | None]] = []
        for block in net.blocks:
            assert isinstance(block, PreActBlock)
            shortcut = None if block.shortcut is None else self._folded(block.shortcut)
            norm, first = self._affine(block.bn1), self._folded(block.conv1, block.bn2)
            self.blocks.append((norm, first, self._folded(block.conv2), shortcut))
        self.last = self._affine(net.bn)
        self.norms = [norm for norm, *_ in self.blocks] + [self.last]

    def _through(self, image: Tensor) -> list[Tensor]:
        out, active = self._stem(image, self.norms[0])
        tape = [active]
        for (_, first, second, shortcut), norm in zip(self.blocks, self.norms[1:], strict=True):
            strided = shortcut is not None and first.conv.stride[0] == 2
            inner = self._strided(active, first) if strided else self._convolve(active, first)[0]
            if shortcut is None:
                out, active = self._convolve(inner, second, other=out, next_norm=norm)
            else:
                out, active = self._convolve(inner, second, side=active, shortcut=shortcut, next_norm=norm)
            tape += [inner, active]
        return tape

    def _back(self, tape: list[Tensor], flow: Tensor) -> Tensor:
        for number in reversed(range(len(self.blocks))):
            norm, first, second, shortcut = self.blocks[number]
            before, inner = tape[2 * number : 2 * number + 2]
            within = self._gradient(flow, second, inner)
            if shortcut is None:
                flow = self._gradient(within, first, before, other=flow, norm=norm)
            elif first.conv.stride[0] == 2:
                flow = self._gradient_strided(within, first, before, side=flow, shortcut=shortcut, norm=norm)
            else:
                flow = self._gradient(within, first, before, side=flow, shortcut=shortcut, norm=norm)
        return flow


KINDS: dict[type[nn.Module], type[FusedNet]] = {
    ResNet18: FusedResNet,
    PreActResNet18: FusedPreActResNet,
    WideResNet: FusedPreActResNet,
}


def _described(tensor: Tensor | None, block: list[int]) -> Any:
    """How the kernels reach a tensor: in blocks, zero outside."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return None if tensor is None else TensorDescriptor.from_tensor(tensor, block)


def _paired(tensor: Tensor) -> Tensor:
    """[b, 2 h, 2 w, c] as [b, h, 2, w, 2 c]: even and odd pixels apart, without a copy."""
    b, height, width, channels = tensor.shape
    return tensor.view(b, height // 2, 2, width // 2, 2 * channels)


class _Logits(torch.autograd.Function):
    """Logits whose gradient reaches the images; weights get none."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, net: FusedNet) -> Tensor:
        logits, tape = net.forward(image)
        if ctx.needs_input_grad[0]:
            ctx.net, ctx.tape = net, tape
            ctx.save_for_backward(image)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (image,) = ctx.saved_tensors
        return ctx.net.backward(image, ctx.tape, grads[0]), None
