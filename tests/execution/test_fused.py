"""Fused kernels against the networks they stand for; the kernels themselves need a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.execution.fused import FusedThreat, agree, fused, refusal
from softdefend.execution.fused.residual import _compiled_together
from softdefend.labels import Hard
from softdefend.models import NetSettings, build
from softdefend.objectives import PGDAT
from softdefend.training import RuntimeSettings
from tiny import tiny_net

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NETS = ("resnet18", "preact_resnet18", "wrn34_10")


def network(name: str, channels: int = 3) -> nn.Module:
    """Weights and running statistics away from their starting values, as after training."""
    torch.manual_seed(0)
    net = build(
        NetSettings(name=name),
        num_classes=10,
        in_channels=channels,
        mean=(0.5, 0.4, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    net = net.cuda().to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.rand(64, channels, 32, 32, device="cuda"))
    return net.eval().requires_grad_(False)


def look(forward, image, label):
    image = image.clone().requires_grad_(True)
    logits = forward(image)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), image)
    return logits.detach().double(), grad.double()


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [5, 64, 128, 300, 448, 512, 1024])
class TestOnGpu:
    pytestmark = on_gpu

    def test_as_close_to_float64_as_autocast(self, name, size):
        """Both compute in bf16; neither should be further from the truth than rounding alone explains."""
        net = network(name)
        image, label = torch.rand(size, 3, 32, 32, device="cuda"), torch.arange(size, device="cuda") % 10
        kernels = fused(net, (3, 32, 32), torch.device("cuda"))

        def autocast(image):
            with torch.autocast("cuda", torch.bfloat16):
                return net(image).float()

        ours, theirs = look(kernels, image, label), look(autocast, image, label)
        few = slice(0, 5)
        truth = look(net.double(), image[few].double(), label[few])
        for mine, its, true in zip(ours, theirs, truth, strict=True):
            assert apart(mine[few], true) < 1.5 * apart(its[few], true) + 1e-3

    def test_every_image_of_a_batch(self, name, size):
        net = network(name)
        kernels = fused(net, (3, 32, 32), torch.device("cuda"))
        for _ in range(3):
            assert agree(kernels, net, torch.rand(size, 3, 32, 32, device="cuda"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
class TestOtherImages:
    pytestmark = on_gpu

    def test_memory_order_and_channels(self, name, channels):
        net = network(name, channels)
        image, label = torch.rand(6, channels, 32, 32, device="cuda"), torch.arange(6, device="cuda")
        kernels = fused(net, (channels, 32, 32), torch.device("cuda"))
        plain = look(kernels, image, label)
        last = look(kernels, image.contiguous(memory_format=torch.channels_last), label)
        assert torch.equal(plain[0], last[0])
        assert torch.equal(plain[1], last[1])
        assert apart(plain[0], look(net, image, label)[0]) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_are_taken_over_by_refresh_alone():
    net = network("resnet18")
    kernels = fused(net, (3, 32, 32), torch.device("cuda"))
    image = torch.rand(4, 3, 32, 32, device="cuda")
    before = kernels(image)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    assert torch.equal(kernels(image), before)
    kernels.refresh()
    assert apart(kernels(image).double(), net(image).double()) < 0.05
    assert not torch.equal(kernels(image), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_compiled_after_the_sizes_were_named(monkeypatch):
    import triton

    from softdefend.execution.fused.kernels import convolve

    net, compiled = network("resnet18"), []
    kernels = fused(net, (3, 32, 32), torch.device("cuda"))
    convolve.device_caches.clear()  # of what other tests of this process have compiled
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, src, **_: compiled.append(src.name))
    kernels.compile([24, 200], (3, 32, 32))
    assert "convolve" in compiled
    compiled.clear()
    for size in (24, 200):
        assert agree(kernels, net, torch.rand(size, 3, 32, 32, device="cuda"))
    assert compiled == []


def test_a_kernel_that_cannot_be_compiled_is_no_hindrance_to_others():
    mode = pytest.importorskip("triton.runtime._async_compile").active_mode

    def fail() -> None:
        raise ValueError

    with _compiled_together():
        mode.get().submit("kernel", fail, lambda kernel: None)
    assert mode.get() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_steps_are_those_of_the_threat_model(norm, order):
    plain = ThreatModel(norm, "8/255")
    image = torch.rand(7, 3, 32, 32, device="cuda").to(memory_format=order)
    point = plain.random_start(image).clamp(0, 1)
    grad = torch.randn_like(image)
    grad[0, 0, 0] = 0
    moved = FusedThreat(norm, "8/255").move(image, point, grad, 2 / 255)
    assert torch.equal(moved, plain.move(image, point, grad, 2 / 255))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_that_are_wrong_for_a_batch_are_found():
    net, image = network("resnet18"), torch.rand(40, 3, 32, 32, device="cuda")
    kernels = fused(net, (3, 32, 32), torch.device("cuda"))
    assert agree(kernels, net, image)
    right = kernels.forward

    def wrong(image):
        logits, tape = right(image)
        logits[17] *= 0.7
        return logits, tape

    kernels.forward = wrong
    assert not agree(kernels, net, image)


class Coarse(nn.Module):
    """A network whose weights lose most of their digits in bfloat16."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 12, generator=draws) + offset, requires_grad=False)
        self.offset = offset

    def forward(self, image):
        # The offset is added and taken away again: what is left of a product in bfloat16 is mostly rounding.
        logits = F.linear(image.flatten(1), self.weight)
        return logits.float() - self.offset * image.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_kernels_may_err_as_bfloat16_does_and_no_further(offset):
    net, image = Coarse(offset), torch.rand(32, 3, 2, 2, generator=torch.Generator().manual_seed(1))

    def autocast(image):
        with torch.autocast("cpu", torch.bfloat16):
            return net(image).float()

    def wrong(image):
        factor = torch.ones(len(image), 1).index_fill(0, torch.tensor([17]), 3.0)
        return autocast(image) * factor

    error = apart(autocast(image), net(image))
    assert (error > 0.15) == (offset > 0)
    assert agree(autocast, net, image)
    assert not agree(wrong, net, image)
    assert not agree(lambda image: autocast(image) * torch.nan, net, image)
    assert not agree(lambda image: net(image).detach() + 0 * autocast(image), net, image)  # no gradient


def test_a_cpu_has_none():
    net = build(NetSettings(name="resnet18"), num_classes=10, in_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert "capability 9" in refusal(net, (3, 32, 32), torch.device("cpu"))
    assert fused(net, (3, 32, 32), torch.device("cpu")) is None
    assert fused(tiny_net(), (1, 8, 8), torch.device("cpu")) is None


def test_asking_for_what_cannot_be_is_refused(make_trainer):
    with pytest.raises(SettingError, match=r"runtime\.fused.*false or null"):
        make_trainer(Hard(), PGDAT(), runtime=RuntimeSettings(fused=True))


def test_null_falls_back(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), runtime=RuntimeSettings(fused=None))
    assert trainer.step._fused is None
