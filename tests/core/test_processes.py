"""What processes tell each other; see talk_of_processes.py, which every process runs."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

import processes
from softdefend.core.errors import SettingError
from softdefend.core.processes import ALONE
from softdefend.training.checkpoint import CheckpointError

SCRIPT = str(Path(__file__).with_name("talk_of_processes.py"))


def test_messages_and_random_numbers_are_those_of_the_whole_batch():
    for code, errors in processes.ended(processes.start(3, SCRIPT, "3")):
        assert code == 0, errors


def test_alone_nothing_is_copied_or_changed():
    tensor = torch.rand(4, requires_grad=True)
    assert ALONE.own(tensor) is tensor
    assert ALONE.sum(tensor) is tensor
    assert ALONE.mean(tensor) is tensor
    assert ALONE.gather(tensor)[0] is tensor
    assert ALONE.tell(3) == [3]
    assert list(ALONE.collect(ALONE.deal([1, 2]), 2)) == [1, 2]
    before = tensor.detach().clone()
    ALONE.average_([tensor])
    ALONE.copy_first_([tensor])
    assert torch.equal(tensor.detach(), before)


def test_a_refusal_travels_between_processes_whole():
    for kind in (SettingError, CheckpointError):
        error = kind("data", object, "another")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error)
