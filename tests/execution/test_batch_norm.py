"""Batch normalization over several processes; see batch_norm_of_processes.py, which every process runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import processes
from softdefend.core.errors import SettingError
from softdefend.core.processes import ALONE, Processes
from softdefend.execution import batch_norm
from softdefend.execution.batch_norm import separate, synchronize

SCRIPT = str(Path(__file__).with_name("batch_norm_of_processes.py"))


def passes(size: int, *checks: str, **more: str) -> None:
    for code, errors in processes.ended(processes.start(size, SCRIPT, *checks, **more)):
        assert code == 0, errors


def test_three_processes_normalize_as_torch_does_the_whole_batch():
    passes(3, "layers", "compiled_layers", "no_image")


def test_two_processes_normalize_in_half_precision_and_notice_a_loss():
    passes(2, "bfloat16", "second_slopes", "unlearned_image", "loss")


def test_two_processes_compile_half_precision():
    """Compiling C++ takes some seconds."""
    passes(2, "compiled_bfloat16", TORCHINDUCTOR_COMPILE_THREADS="1")


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(batch_norm, "_group", lambda: "0")
    return Processes(0, 2)


def test_a_network_may_be_synchronized_twice_and_is_separated_at_once(two):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    before = [vars(layer).keys() for layer in net], [type(layer) for layer in net]
    for _ in range(2):
        synchronize(net, two)
        assert all(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in map(type, net))
        assert [type(layer) for layer in net] != before[1]
    separate(net)
    assert ([vars(layer).keys() for layer in net], [type(layer) for layer in net]) == before


def test_a_refused_network_is_left_as_it_was(two):
    net = nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.BatchNorm2d(3)))
    with pytest.raises(SettingError, match=r"runtime\.batch_norm: got synchronized with a TorchScript"):
        synchronize(net, two)
    assert type(net[0]) is nn.BatchNorm2d
    assert not hasattr(net[0], "group")


def test_alone_layers_stay_what_they_are():
    layer = nn.BatchNorm2d(3)
    synchronize(layer, ALONE)
    assert type(layer) is nn.BatchNorm2d
