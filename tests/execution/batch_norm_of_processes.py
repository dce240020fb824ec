"""Batch normalization over processes against torch's own of the whole batch; a fault ends with its traceback.

Run as ``python batch_norm_of_processes.py CHECK...``.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from softdefend.core.errors import LostProcessError
from softdefend.core.processes import Processes
from softdefend.core.rng import stream
from softdefend.execution.batch_norm import separate, statistics, synchronize
from softdefend.execution.engine import Engine, RuntimeSettings

DEVICE = os.environ.get("GRID_DEVICE", "cpu")


def without(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        setattr(layer, name, None)
    return layer


class Own(nn.BatchNorm2d):
    """Does more than normalize, so a compiler does not look into it."""

    def forward(self, image: Tensor) -> Tensor:
        return 2 * super().forward(image)


def check_layers(ours: Processes, compiled: bool = False) -> None:
    """Outputs, slopes, running statistics, in double precision."""
    layers = (
        (nn.BatchNorm2d(3, track_running_stats=False), (ours.size, 3, 2, 2)),
        (nn.Sequential(nn.SyncBatchNorm(3)), (2 * ours.size, 3, 4, 4)),
        (Own(3), (ours.size, 3, 2, 2)),  # from the next one on also compiled
        (nn.BatchNorm2d(3), (2 * ours.size + 1, 3, 4, 4)),
        (nn.BatchNorm1d(3, momentum=None), (ours.size, 3)),
        (nn.BatchNorm3d(3, affine=False), (2 * ours.size, 3, 2, 2, 2)),
        (without(nn.BatchNorm1d(3), "bias", "num_batches_tracked"), (2 * ours.size, 3)),
    )
    if DEVICE == "cpu":  # torch's own kernels for GPUs have no gradient of a bias alone
        layers += ((without(nn.BatchNorm1d(3), "weight"), (2 * ours.size, 3)),)
    # The first process has no image. Not compiled, torch's kernels for GPUs then have no gradients.
    if ours.size > 2 and (compiled or DEVICE == "cpu"):
        layers += ((nn.BatchNorm1d(3), (ours.size - 1, 3)),)
    if compiled:
        layers = layers[3:]
    for layer, shape in layers:
        draw = stream(0, "layer")
        image = 3 * torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE) + 7
        scale = torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE)
        layer.to(DEVICE, torch.float64)
        whole = nn.BatchNorm2d(3).to(image) if isinstance(layer, nn.Sequential) else copy.deepcopy(layer)
        plain = copy.deepcopy(layer)
        synchronize(layer, ours)
        assert type(copy.deepcopy(layer)) is type(layer)
        uncut = getattr(layer, "momentum", 0.1) is not None
        called = torch.compile(layer, backend="aot_eager", fullgraph=uncut) if compiled else layer
        for _ in range(2):
            outs, slopes = {}, {}
            for name, module, part, factor in (
                ("whole", whole, image.clone(), scale),
                ("share", called, ours.own(image).clone(), ours.own(scale)),
            ):
                part.requires_grad_(True)
                outs[name] = module(part)
                (outs[name] * factor).sum().backward()
                slopes[name] = part.grad
        assert_close(outs["share"], ours.own(outs["whole"]))
        assert_close(slopes["share"], ours.own(slopes["whole"]))
        for one, other in zip(statistics(layer), statistics(whole), strict=True):
            assert_close(one, other)
        for one, other in zip(layer.parameters(), whole.parameters(), strict=True):
            assert_close(ours.sum(one.grad), other.grad)
        layer.eval(), whole.eval()
        assert_close(layer(image), whole(image))
        separate(layer)
        assert [type(module) for module in layer.modules()] == [type(module) for module in plain.modules()]


def check_compiled_layers(ours: Processes) -> None:
    """Messages of plain layers are part of one graph with the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated")  # torch's compiler does so
        check_layers(ours, compiled=True)


class Small(nn.Module):
    """A convolution, normalization and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        draw = stream(0, "weights")
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 3 + (parameter.ndim == 1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.conv(image)
        return torch.tanh(self.norm(hidden)) + hidden


def ends(net: Small, called: Callable[[Tensor], Tensor], image: Tensor, scale: Tensor) -> list[Tensor]:
    """Output, its slopes in image and weights, and running statistics of one step in bfloat16."""
    image = image.clone(memory_format=torch.channels_last).requires_grad_(True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = called(image)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    (out.float() * scale).sum().backward()
    assert all(moved.dtype == torch.float32 for moved in statistics(net))
    return [out.detach().float(), image.grad, *(p.grad for p in net.parameters()), *statistics(net)]


def check_bfloat16(ours: Processes, backend: str | None = None) -> None:
    """Under autocast and in channels_last, of uneven shares."""
    draw = stream(0, "half")
    image = torch.randn(9, 4, 6, 6, generator=draw) + torch.arange(9).view(9, 1, 1, 1)
    scale = torch.randn(9, 4, 6, 6, generator=draw).to(DEVICE)
    image, whole = image.to(DEVICE), Small().to(DEVICE, memory_format=torch.channels_last)
    net, alone = copy.deepcopy(whole), copy.deepcopy(whole)
    synchronize(net, ours)
    called = net if backend is None else torch.compile(net, backend=backend, fullgraph=True)
    wanted = ends(whole, whole, image, scale)
    shares = ours.own(image), ours.own(scale)
    apart = []
    for module, call in ((net, called), (alone, alone)):
        found = ends(module, call, *shares)
        out, slope, *learned = (tensor.contiguous() for tensor in found)
        count = len(learned) - len(statistics(module))
        learned[:count] = map(ours.sum, learned[:count])
        mine = [ours.own(wanted[0]), ours.own(wanted[1]), *wanted[2:]]
        # The largest difference, in roundings to bfloat16 of the largest number. There are four on the way
        # and four on the way back.
        pairs = zip([out, slope, *learned], mine, strict=True)
        apart.append([float((one - other).abs().max() / other.abs().max()) * 2**8 for one, other in pairs])
    assert max(apart[0]) < 8, apart[0]
    assert max(apart[1]) > 64, apart[1]


def check_compiled_bfloat16(ours: Processes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_bfloat16(ours, "inductor")


def check_no_image(ours: Processes) -> None:
    """A share of none, in half precision: the others get what they wait for."""
    image = torch.randn(ours.size - 1, 3, 4, 4, generator=stream(0, "image")).to(DEVICE, torch.bfloat16)
    layer, whole = nn.BatchNorm2d(3).to(DEVICE), nn.BatchNorm2d(3).to(DEVICE)
    synchronize(layer, ours)
    with torch.no_grad():
        whole(image.float())
        out = layer(ours.own(image))
    assert out.dtype == torch.bfloat16
    assert out.shape == ours.own(image).shape
    for one, other in zip(statistics(layer), statistics(whole), strict=True):
        torch.testing.assert_close(one, other)


def check_second_slopes(ours: Processes) -> None:
    """A gradient of the gradient is refused: it would lack what the messages carry."""
    layer = nn.BatchNorm1d(3)
    synchronize(layer, ours)
    image = torch.randn(4, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(image).pow(3).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def check_unlearned_image(ours: Processes) -> None:
    """Where the image has no gradient, the backward pass sends nothing: one process may make it by itself."""
    whole = nn.BatchNorm1d(3)
    image = torch.randn(2 * ours.size, 3, generator=stream(0, "image"))
    scale = torch.arange(2.0 * ours.size).view(-1, 1)
    (whole(image) * scale).sum().backward()
    for backend in (None, "aot_eager"):
        layer = nn.BatchNorm1d(3)
        synchronize(layer, ours)
        called = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*should not be instantiated")
            out = called(ours.own(image))
        for rank in range(ours.size):
            if ours.rank == rank:
                (out * ours.own(scale)).sum().backward()
            ours.wait()
        for one, other in zip(layer.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.sum(one.grad), other.grad)


def check_loss(ours: Processes) -> None:
    """The second process dies before a forward pass."""
    layer = nn.BatchNorm1d(3)
    synchronize(layer, ours)
    if not ours.first:
        os._exit(0)
    with pytest.raises(LostProcessError, match="has ended"):
        layer(torch.randn(4, 3))


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


if __name__ == "__main__":
    if DEVICE == "cpu":
        warnings.simplefilter("error")
    engine = Engine(RuntimeSettings(device=DEVICE, precision="fp32", threads=1))
    with engine.training_numerics():
        for check in sys.argv[1:]:
            globals()[f"check_{check}"](engine.processes)
