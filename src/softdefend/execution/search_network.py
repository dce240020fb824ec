"""The network as the attacks of an evaluation search with it, and as it is asked for a verdict.

On a GPU the searching network can be a copy in the layout and precision that the device is fast in, compiled
once for all batch sizes (in bfloat16 fused kernels where there are some), and the steps of searches captured
as CUDA graphs. The verdict is the network's own,
in float32 without TF32, whatever the search ran in.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.core.errors import SettingError, one_line
from softdefend.execution.compiled_code import keep_compiled_code
from softdefend.execution.counting import CountingModel, Forward, Mask
from softdefend.execution.folding import FoldedCopy
from softdefend.execution.fused import FusedNet, agree, fused
from softdefend.execution.network_mode import frozen, kernel_search, on_device, tf32
from softdefend.execution.step_graphs import (
    SMALLEST,
    CudaGraphCapture,
    StepGraphs,
    captured_size,
    fill_up,
)

Precision = Literal["exact", "strict", "fast"]
CAPTURE_FROM = 256
"""Images of an evaluation from which on capturing pays, unless the user says otherwise."""
COMPILE_FROM = 2500
"""Likewise for torch.compile: for fewer it takes longer than it saves."""
_AGREE = 0.05
"""Largest difference of logits, by Euclidean length as a share of theirs, between two ways of computing them
that are held for the same: bfloat16 makes about a per cent, a wrong program more."""


def check_precision(precision: str, setting: str = "evaluate.precision") -> None:
    """Refuse an unknown precision.

    Raises:
        SettingError: not exact, strict or fast.
    """
    if precision not in ("exact", "strict", "fast"):
        raise SettingError(setting, repr(precision), "exact, strict or fast")


class SearchNetwork:
    """One network, as attacks search with it in one precision and as it is asked for a verdict.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k].
        device: where ``net`` is.
        precision: ``exact`` searches in float32 with TF32 in convolutions, torch's defaults on a GPU;
            ``strict`` without TF32, as every CPU does; ``fast`` in bfloat16.

    Raises:
        SettingError: an unknown precision.
    """

    def __init__(self, net: nn.Module, device: torch.device, precision: Precision) -> None:
        check_precision(precision)
        self.net, self.device, self.precision = net, device, precision
        self.step_graphs: StepGraphs | None = None
        """Captured steps of searches, once :meth:`compile` has begun to capture."""
        self._tf32 = precision == "exact" and device.type == "cuda"
        self._plain: Forward = self._autocast if precision == "fast" else net
        self._forward: Forward = self._plain
        self._copy: FoldedCopy | None = None
        self._fused: FusedNet | None = None
        self._compiling = 0.0
        self.compiled = False
        """Whether the search runs in programs of torch.compile or fused kernels."""

    @property
    def seconds(self) -> float:
        """Spent on compiling and capturing so far."""
        return self._compiling + (0.0 if self.step_graphs is None else self.step_graphs.seconds)

    @contextlib.contextmanager
    def search_mode(self) -> Iterator[None]:
        """Device, modes, gradients, choice of kernels and TF32 as searches want them, put back after."""
        with (
            on_device(self.device),
            kernel_search(False),
            frozen(self.net, "eval"),
            tf32(self._tf32, products=False),
        ):
            self._refresh()
            yield

    def strict(self, image: Tensor) -> Tensor:
        """Logits [b, k] of the network itself, in float32 without TF32."""
        n = len(image)
        if self.step_graphs is not None:
            image = fill_up(image, captured_size(n))  # of few sizes: cuDNN makes a plan for each
        with tf32(False) if self._tf32 else contextlib.nullcontext():
            logits: Tensor = self.net(image)
        return logits[:n]

    def counting_model(
        self, n: int, clean_logits: Tensor, microbatch: int, mask: Mask | None = None
    ) -> CountingModel:
        """What an attack on n images asks, given their clean logits [n, k]."""
        return CountingModel(
            self._forward,
            n,
            many_gradients=self._plain,  # a compiled network gives one gradient of a call
            exact=self.strict,
            unverified=self._tf32 or self.precision == "fast",
            clean_logits=clean_logits,
            microbatch=microbatch,
            step_graphs=self.step_graphs,
            mask=mask,
        )

    def release_graphs(self) -> None:
        """Give the memory of captured steps back."""
        if self.step_graphs is not None:
            self.step_graphs.release()

    def prepare(self, image: Tensor, *, compile: bool) -> None:
        """Adapt the searching network to a GPU and capture steps from now on; once, within
        :meth:`search_mode`.

        What fails with this network is left out, with one line of warning each.

        Args:
            image: [b, c, h, w], of the size of most forwards to come.
            compile: by torch.compile, where there are no fused kernels.

        Raises:
            torch.OutOfMemoryError: too many images at once.
        """
        if self.step_graphs is not None:
            return
        keep_compiled_code()
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        image = fill_up(image, captured_size(len(image)))
        with torch.no_grad():
            wanted = self.net(image)
        self.fuse(image)
        if self._fused is None:
            with _optional("the network is attacked in its own layout, which is slower"):
                self._adapt(image, wanted)
            self._forward = self._plain
            if compile:
                with _optional("the network is not compiled, which is slower"):
                    self._forward, self.compiled = _compiled(self._plain, image, wanted), True
        step_graphs = StepGraphs(CudaGraphCapture(self.device))
        with _optional("steps are not captured, which is slower"):
            step_graphs.enabled = False
            _check_capture(CudaGraphCapture(self.device), self._forward, image)
            step_graphs.enabled = True
        self.step_graphs = step_graphs
        torch.cuda.synchronize(self.device)
        self._compiling += time.perf_counter() - started

    def fuse(self, image: Tensor) -> None:
        """Search with fused kernels from now on where the search is ``fast`` and there are some for this
        network and device; within :meth:`search_mode`.

        Args:
            image: [b, c, h, w], on which the kernels must do what the network does.
        """
        if self.precision != "fast" or self._fused is not None:
            return
        keep_compiled_code()
        kernels = fused(self.net, tuple(image.shape[1:]), self.device)
        if kernels is None:
            return
        with _optional("the network is not run in fused kernels, which is slower"):
            # Batches of other sizes are cut into other tiles.
            counts = sorted({min(count, len(image)) for count in (16, 128, len(image))})
            kernels.compile(counts, tuple(image.shape[1:]))
            for count in counts:
                if not agree(kernels, self.net, image[:count]):
                    raise RuntimeError(f"their logits or gradients are others on {count} images")
            self._fused = self._plain = self._forward = kernels
            self.compiled = True

    def _adapt(self, image: Tensor, wanted: Tensor) -> None:
        """Search with a copy of the network in the order of memory in which convolutions on a GPU are fast;
        its weights in bfloat16, where the search is; else with normalization folded into convolutions."""
        bf16 = self.precision == "fast"
        made = FoldedCopy(self.net, fold=not bf16)
        net: nn.Module = made.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if bf16:
            _narrow(net)

        def forward(image: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                logits: Tensor = net(image.contiguous(memory_format=torch.channels_last))
            return logits if logits.dtype == torch.float64 else logits.float()

        with torch.no_grad():
            _check_equal(forward(image), wanted)
        self._copy, self._plain = made, forward

    def _refresh(self) -> None:
        """The weights may have changed since they were copied. In place: captured steps read them there."""
        if self._fused is not None:
            self._fused.refresh()
        if self._copy is not None:
            self._copy.refresh()

    def _autocast(self, image: Tensor) -> Tensor:
        """Logits in bf16 where torch deems it safe; the image itself stays float32."""
        with torch.autocast(image.device.type, torch.bfloat16):
            logits: Tensor = self.net(image)
        return logits


class _WideLinear(nn.Linear):
    """A linear layer that autocast leaves in float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


def _narrow(net: nn.Module) -> None:
    """Cast weights to bfloat16 that autocast would cast in every forward: those of convolutions and linear
    layers. Normalization and its statistics stay in float32, and so does the last linear layer: logits of
    eight bits would hide from Square what a small change of the image does."""
    linear = [module for module in net.modules() if type(module) is nn.Linear]
    for module in net.modules():
        if linear and module is linear[-1]:
            module.__class__ = _WideLinear
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def _compiled(forward: Forward, image: Tensor, wanted: Tensor) -> Forward:
    """``forward`` compiled for batches of every size, with and without gradient; it has run both ways.

    Raises:
        RuntimeError: its logits are not ``wanted``.
    """
    import torch._dynamo  # not part of torch's own import

    # Beyond this many versions, counted per process, torch goes on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    program: Forward = torch.compile(forward)

    def padded(image: Tensor) -> Tensor:
        n = len(image)
        image = fill_up(image, SMALLEST).contiguous()  # very small batches would be programs of their own
        torch._dynamo.mark_dynamic(image, 0)
        return program(image)[:n]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            _check_equal(padded(image), wanted)
        shown = image.clone().requires_grad_(True)
        with torch.enable_grad():
            logits = padded(shown)
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), shown, allow_unused=True)
        _check_equal(logits.detach(), wanted)
    return padded


@torch.no_grad()
def _check_capture(capture: CudaGraphCapture, forward: Forward, image: Tensor) -> None:
    """Refuse a forward that a graph cannot hold: one that makes the host wait, or depends on more than the
    image.

    Raises:
        RuntimeError: why not.
    """
    shown, logits = image.clone(), forward(image)

    def run() -> None:
        logits.copy_(forward(shown))

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    replay = capture(run)
    shown.copy_(image.flip(0))
    replay()
    _check_equal(logits, forward(image.flip(0)))


def _check_equal(found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape or not (found - wanted).norm() <= _AGREE * wanted.norm():
        raise RuntimeError("its logits are then others")


@contextlib.contextmanager
def _optional(consequence: str) -> Iterator[None]:
    """What may fail, whatever a network does, but for lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = one_line(error)
        warnings.warn(f"{consequence}: {reason}", RuntimeWarning, stacklevel=3)
