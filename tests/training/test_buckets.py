"""Gradients averaged during the backward pass; see buckets_of_processes.py, which every process runs."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import processes
from softdefend.core.processes import ALONE, Processes
from softdefend.training import buckets
from softdefend.training.buckets import Buckets
from tiny import tiny_net

SCRIPT = str(Path(__file__).with_name("buckets_of_processes.py"))


def test_two_processes_average_during_the_pass_as_after_it_and_notice_a_loss():
    for code, errors in processes.ended(
        processes.start(2, SCRIPT, "averages", "overlap", "training", "loss")
    ):
        assert code == 0, errors


def test_a_loss_is_noticed_by_normalization():
    for code, errors in processes.ended(processes.start(2, SCRIPT, "loss_in_normalization")):
        assert code == 0, errors


def test_a_gradient_that_one_process_alone_has_is_averaged():
    checks = "branches", "branched_training", "frozen_in_turn"
    for code, errors in processes.ended(processes.start(2, SCRIPT, *checks), 60):
        assert code == 0, errors


def test_a_compiled_network_uses_a_layer_twice_and_notices_a_loss():
    """Compiling C++ takes some seconds."""
    checks = "reused_layer", "loss_in_a_program"
    for code, errors in processes.ended(
        processes.start(2, SCRIPT, *checks, TORCHINDUCTOR_COMPILE_THREADS="1")
    ):
        assert code == 0, errors


def test_alone_a_pass_is_torchs_own():
    net, other = tiny_net().eval(), tiny_net().eval()
    image = torch.rand(4, 1, 6, 6)
    net(image).sum().backward()
    Buckets(ALONE, list(other.parameters())).backward(other(image).sum())
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
        assert two._post_accumulate_grad_hooks is None


def test_buckets_go_from_the_last_parameter_to_the_first_and_hold_one_type(monkeypatch):
    sizes = [3, 5, 1, 1, 2, 9, 1]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[3] = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    monkeypatch.setattr(buckets, "LIMIT", 4 * 6)
    found = Buckets(Processes(0, 2), parameters).buckets
    assert [[len(one) for one in bucket] for bucket in found] == [[1, 9], [2], [1], [1, 5], [3]]
    assert [id(p) for bucket in found for p in bucket] == [id(p) for p in reversed(parameters)]
    assert copy.deepcopy(Buckets(ALONE, []).buckets) == []
