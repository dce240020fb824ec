"""Device, precision and processes; the only file that imports the distributed library (Lightning Fabric)."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist

from softdefend.core.errors import SettingError, one_line
from softdefend.core.hints import check_fields
from softdefend.core.processes import ALONE, Processes
from softdefend.execution.compiled_code import keep_compiled_code
from softdefend.execution.launched import Place, end_with_parent, place_of_this_process, started_here
from softdefend.execution.network_mode import on_device, tf32

_log = logging.getLogger(__name__)

_MOST_THREADS = 1024
"""More than any machine has cores for; far more stop a process before its first step."""
_MOST_PROCESSES = 1024
"""Likewise."""
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others. One that has ended is noticed at once."""


@dataclass(frozen=True)
class RuntimeSettings:
    """How the arithmetic is done; none of it changes the method.

    Raises:
        SettingError: a device that is absent, or an option the device does not have.
    """

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, or cuda:N."""
    devices: int | Literal["auto"] = 1
    """Processes that train one run together, one on each GPU, or on the CPU; auto: as many as there are GPUs.
    Under torchrun or srun as many as those have started."""
    batch_norm: Literal["synchronized", "per_process"] = "synchronized"
    """What batch normalization normalizes by where several processes train: the whole batch, as one process
    does, or each process's own share, with the running statistics of the first (as torch's DDP does)."""
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
        if self.devices != "auto" and not 1 <= self.devices <= _MOST_PROCESSES:
            accepted = f"a whole number from 1 to {_MOST_PROCESSES}, or auto"
            raise SettingError("runtime.devices", self.devices, accepted)
        if self.batch_norm not in ("synchronized", "per_process"):
            raise SettingError("runtime.batch_norm", repr(self.batch_norm), "synchronized or per_process")
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise SettingError("runtime.threads", self.threads, f"a whole number from 1 to {_MOST_THREADS}")


def resolve_device(name: str) -> torch.device:
    """``auto`` to the first GPU or the CPU; any other name to that device. Of several processes on a machine
    each has a GPU of its own.

    Raises:
        SettingError: the device is absent or not of a kind we run on.
    """
    if not isinstance(name, str):
        raise SettingError("runtime.device", f"a {type(name).__name__}", "auto, cpu, cuda or cuda:N")
    place = place_of_this_process()
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
        if place is not None:
            return _gpu_of(place, name, count)
        if (device.index or 0) >= count:
            raise SettingError("runtime.device", name, f"cpu, or one of the {count} CUDA device(s) present")
        return torch.device("cuda", device.index or 0)
    return device


def _gpu_of(place: Place, name: str, count: int) -> torch.device:
    """The GPU of one of several processes on a machine that has ``count``.

    Raises:
        SettingError: one is named for all of them, or there are too few.
    """
    if ":" in name:
        raise SettingError("runtime.device", f"{name} for {place.size} processes", "auto, cpu or cuda")
    if place.local_size > count:
        given = f"{place.local_size} processes on a machine where each sees {count} GPU(s)"
        raise SettingError("runtime.device", given, "cpu, or a GPU for each process, visible to all")
    return torch.device("cuda", place.local_rank)


def count_processes(device: str, devices: int | Literal["auto"], setting: str = "runtime.devices") -> int:
    """How many processes are to work together.

    Args:
        device, devices: as in :class:`RuntimeSettings`.
        setting: what the user knows the second one by.

    Raises:
        SettingError: more than there are GPUs, one GPU for several, or another number than were started.
    """
    place, wanted = place_of_this_process(), devices
    if wanted != "auto" and not 1 <= wanted <= _MOST_PROCESSES:
        raise SettingError(setting, wanted, f"a whole number from 1 to {_MOST_PROCESSES}, or auto")
    if place is not None:
        if wanted not in (1, "auto", place.local_size, place.size):
            given = f"{wanted} where {place.size} processes were started"
            raise SettingError(setting, given, f"{place.size}, or nothing")
        return place.size
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if wanted == "auto":
        return max(gpus, 1) if device in ("auto", "cuda") else 1
    if wanted == 1:
        return 1
    if device.startswith("cuda:"):
        raise SettingError(setting, f"{wanted} on {device}", "1, or auto, cpu or cuda as the device")
    if (gpus and wanted > gpus) or (device == "cuda" and not gpus):
        raise SettingError(setting, wanted, f"at most the {gpus} CUDA device(s) present, or auto")
    return wanted


@cache
def join(on_gpu: bool) -> Processes:
    """The processes that this one was started with, once they all have answered; :data:`ALONE` without any.

    Raises:
        SettingError: the port at which they meet is taken, or nobody answers there.
    """
    place = place_of_this_process()
    if place is None:
        return ALONE
    fabric = _fabric(on_gpu, place)
    try:
        fabric.launch()
    except dist.DistError as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        given = f"{at} ({one_line(error)})"
        raise SettingError("MASTER_ADDR, MASTER_PORT", given, "a free port of the first machine") from error
    atexit.register(_leave)
    if started_here():
        end_with_parent()
    return Processes(fabric.global_rank, fabric.world_size)


def _fabric(on_gpu: bool, place: Place) -> Any:
    """What connects several processes. One alone does without it, since its import is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import touches deprecated names of its own dependencies
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        # Its import sets this level itself.
        logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
        # gloo takes what is on the CPU, such as messages of plain values; a GPU's tensors go by NCCL.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, timeout=_PATIENCE)
        accelerator = "gpu" if on_gpu else "cpu"
        return Fabric(
            accelerator=accelerator, devices=place.local_size, num_nodes=place.nodes, strategy=strategy
        )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """Where tensors live, in which precision the network runs, and with which other processes (those by
    Lightning Fabric).

    Raises:
        SettingError: a device that is absent, or an option that it does not have.
    """

    def __init__(self, settings: RuntimeSettings) -> None:
        self.device = resolve_device(settings.device)
        if settings.recompute and settings.capture is not False:
            _log.info("runtime.recompute: the step is not captured, as a graph cannot repeat random numbers")
        self.settings = settings = _resolve(settings, self.device.type == "cuda")
        if settings.capture and self.device.type != "cuda":
            raise SettingError("runtime.capture", f"true on {self.device.type}", "false, or a CUDA device")
        on_gpu = self.device.type == "cuda"
        if on_gpu or settings.compile:
            keep_compiled_code()
        self._refuse_more_than_started()
        self.processes = join(on_gpu)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

    def _refuse_more_than_started(self) -> None:
        """The command line has started the other processes; a caller from Python has to.

        Raises:
            SettingError: there are fewer than the settings name.
        """
        count, place = count_processes(self.settings.device, self.settings.devices), place_of_this_process()
        if count > 1 and place is None:
            accepted = "1, or a script that torchrun has started; softdefend train starts processes itself"
            raise SettingError("runtime.devices", f"{count} in a single process", accepted)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forwards in training."""
        if self.settings.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

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
