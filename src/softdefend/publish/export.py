"""A trained network as a file that runs without this package."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.evaluation.robustbench_networks import load_robustbench
from softdefend.models.robustbench import CALLED, names_there

Run = Callable[[Tensor], Tensor]
"""Images [b, c, h, w] float32 on the CPU to logits [b, k]."""

SUFFIXES = {
    "onnx": ".onnx",
    "torchscript": ".torchscript.pt",
    "torch-export": ".pt2",
    "robustbench": ".robustbench.pt",
}
"""Endings of the files by format."""

_QUANTIZED = ["Conv", "Gemm", "MatMul"]
"""Operations that compute in int8; the rest of the graph, normalization included, stays float32."""
_CALIBRATION_BATCH = 64


def write_network(net: nn.Module, image: Tensor, path: Path, kind: str) -> None:
    """Write a network, with its normalization inside, for batches of any size.

    Args:
        net: images to logits, in eval mode on the CPU.
        image: [b, c, h, w] by which the network is traced, b >= 2.
        path: of the file.
        kind: one of :data:`SUFFIXES`.

    Raises:
        SettingError: a package is missing, the network cannot be traced, or RobustBench does not know it.
    """
    writers = {"onnx": _onnx, "torchscript": _torchscript, "torch-export": _torch_export}
    if kind == "robustbench":
        _robustbench(net, path)
        return
    if kind == "onnx":
        need("onnxscript")
    try:
        with _quietly(), torch.no_grad():
            writers[kind](net, image, path)
    except Exception as error:  # tracing runs the network's own code
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        given = f"{kind} of {type(net).__name__}, which cannot be traced ({reason})"
        accepted = "a network whose forward has no branch on data, only torch's operations"
        raise SettingError("--format", given, accepted) from error


def need(package: str) -> Any:
    """An optional package of exports.

    Raises:
        SettingError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:  # whatever is wrong with an installation
        accepted = "another format, or pip install 'softdefend[export]'"
        raise SettingError("--format", f"onnx without {package} ({error})", accepted) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch's exporters say of themselves. What tracing would lose is an error."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            yield
    finally:
        log.setLevel(level)


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _onnx(net: nn.Module, image: Tensor, path: Path) -> None:
    torch.onnx.export(
        net,
        (image,),
        str(path),
        dynamo=True,
        dynamic_shapes=_any_batch(),
        input_names=["image"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _torchscript(net: nn.Module, image: Tensor, path: Path) -> None:
    traced = torch.jit.trace(net, image, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(path))


def _torch_export(net: nn.Module, image: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(net, (image,), dynamic_shapes=_any_batch()), path)


def _robustbench(net: nn.Module, path: Path) -> None:
    """A state dict by RobustBench's names; the statistics are ``mu`` and ``sigma``, as in its networks."""
    names = names_there(net)
    if not names:
        accepted = "a built-in residual network"
        raise SettingError("--format", f"robustbench of {type(net).__name__}", accepted)
    torch.save({names[name]: value.contiguous() for name, value in net.state_dict().items()}, path)


def quantize(path: Path, images: Tensor, output: Path) -> None:
    """Write an ONNX graph with convolutions and linear layers in int8.

    Weights are quantized by output channel, activations by the range that they have on some images.

    Args:
        path: of the float32 graph.
        images: [n, c, h, w] float32 of the training set.
        output: of the file.

    Raises:
        SettingError: a package is missing, or the graph cannot be quantized.
    """
    need("onnx")
    quantization = need("onnxruntime.quantization")
    shapes = need("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """The images, batch by batch."""

        def __init__(self) -> None:
            self.batches = iter(torch.split(images, _CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    prepared = output.with_suffix(".prepared.onnx")
    try:
        # Folds each BatchNorm that follows a convolution into it.
        shapes.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(output), Reader(), op_types_to_quantize=_QUANTIZED, per_channel=True
        )
    except Exception as error:  # of a library that raises anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SettingError("--quantize", f"int8 ({reason})", "no --quantize") from error
    finally:
        prepared.unlink(missing_ok=True)


def open_exported(path: Path, kind: str, *, network: str, classes: int, channels: int) -> Run:
    """What runs an exported file on the CPU.

    Args:
        path: of the file.
        kind: its format.
        network: the built-in network's name, for a file in RobustBench's form.
        classes: k.
        channels: of the images.
    """
    if kind == "onnx":
        options = need("onnxruntime").SessionOptions()
        options.log_severity_level = 3  # errors
        session = need("onnxruntime").InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
    if kind == "robustbench":
        net, _ = load_robustbench(CALLED[network], path, num_classes=classes, in_channels=channels)
        return net
    with _quietly():
        if kind == "torchscript":
            script: Run = torch.jit.load(path)  # type: ignore[no-untyped-call]
            return script
        return torch.export.load(path).module()
