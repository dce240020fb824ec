"""Device and precision; the only file that imports the distributed library (Lightning Fabric)."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields
from softdefend.execution.network_mode import on_device, tf32

_log = logging.getLogger(__name__)

_MOST_THREADS = 1024
"""More than any machine has cores for; far more stop a process before its first step."""


@dataclass(frozen=True)
class RuntimeSettings:
    """How the arithmetic is done; none of it changes the method.

    Raises:
        SettingError: a device that is absent, or an option the device does not have.
    """

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "fp32"
    """Inside the network during training; auto is bf16 on a GPU and fp32 on a CPU. Images, perturbations and
    an evaluation's verdicts are always fp32."""
    channels_last: bool | None = False
    """Memory order of images and convolutions that GPUs prefer; null: on a GPU only."""
    compile: bool | None = False
    """Compile the network (torch.compile); null: on a GPU only."""
    capture: bool | None = False
    """Capture the whole training step as a CUDA graph, once per phase; null: on a GPU."""
    fused: bool | None = None
    """Run the training attack in kernels that fuse all between two convolutions (bf16, evaluation-mode batch
    normalization, the built-in residual networks, Hopper GPUs); null: wherever they can. Same function, other
    rounding."""
    recompute: bool = False
    """Compute the activations of each block again in the backward pass rather than keep them (activation
    checkpointing): a third more work, far less memory. Such steps are neither compiled nor captured."""
    deterministic: bool = False
    """Refuse GPU kernels whose results vary from run to run. The CPU path is always deterministic."""
    threads: int | None = None
    """CPU threads; torch's choice when null. Bit-exact resume needs the same number."""

    def __post_init__(self) -> None:
        check_fields(self, "runtime")
        if self.precision not in ("auto", "fp32", "tf32", "bf16"):
            raise SettingError("runtime.precision", repr(self.precision), "auto, fp32, tf32 or bf16")
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise SettingError("runtime.threads", self.threads, f"a whole number from 1 to {_MOST_THREADS}")


def resolve_device(name: str) -> torch.device:
    """``auto`` to the first GPU or the CPU; any other name to that device.

    Raises:
        SettingError: the device is absent or not of a kind we run on.
    """
    if not isinstance(name, str):
        raise SettingError("runtime.device", f"a {type(name).__name__}", "auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingError("runtime.device", repr(name), "auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise SettingError("runtime.device", name, f"cpu, or one of the {count} CUDA device(s) present")
        return torch.device("cuda", device.index or 0)
    return device


def _resolve(settings: RuntimeSettings, on_gpu: bool) -> RuntimeSettings:
    """The same settings with every choice left open decided for the device."""

    def decide(choice: bool | None) -> bool:
        return on_gpu if choice is None else choice

    precision = settings.precision if settings.precision != "auto" else "bf16" if on_gpu else "fp32"
    return replace(
        settings,
        precision=precision,
        channels_last=decide(settings.channels_last),
        compile=decide(settings.compile) and not settings.recompute,
        capture=decide(settings.capture) and not settings.recompute,
    )


class Engine:
    """A thin seam over Lightning Fabric: where tensors live and in which precision the network runs."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self.device = resolve_device(settings.device)
        if settings.recompute and settings.capture is not False:
            _log.info("runtime.recompute: the step is not captured, as a graph cannot repeat random numbers")
        self.settings = settings = _resolve(settings, self.device.type == "cuda")
        if settings.capture and self.device.type != "cuda":
            raise SettingError("runtime.capture", f"true on {self.device.type}", "false, or a CUDA device")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its import touches deprecated names of its own dependencies
            from lightning_fabric import Fabric

            # Its import sets this level itself.
            logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
            self._fabric = Fabric(
                accelerator="gpu" if self.device.type == "cuda" else "cpu",
                devices=[self.device.index] if self.device.type == "cuda" else 1,
                precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            )
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forwards in training."""
        context: AbstractContextManager[None] = self._fabric.autocast()
        return context

    @contextlib.contextmanager
    def training_numerics(self) -> Iterator[None]:
        """Current device, kernel choice and TF32 for the duration of training, restored afterwards."""
        with on_device(self.device), tf32(self.settings.precision != "fp32"):
            cudnn = torch.backends.cudnn
            before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
            exact = self.settings.deterministic
            cudnn.benchmark, cudnn.deterministic = not exact, exact
            if exact:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(exact)
            try:
                yield
            finally:
                cudnn.benchmark, cudnn.deterministic = before[:2]
                torch.use_deterministic_algorithms(before[2])
