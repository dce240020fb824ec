"""What counts as robust, and what an answer with a number that is none is."""

from __future__ import annotations

import math

import pytest
import torch

from softdefend.evaluation.evaluate import answers
from softdefend.evaluation.records import AttackRecord, Trial


def test_an_image_that_only_the_attack_puts_right_is_not_robust():
    label, clean = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    trial = Trial.of(torch.ones(3, dtype=torch.bool))
    trial.prediction = torch.tensor([0, 1, 1])  # kept, put right by the attack, fooled
    record = AttackRecord.of({"a": trial}, label, clean, ensemble=False)
    assert record.robust.tolist() == [True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_no_number_is_enough_to_be_wrong(bad):
    label = torch.tensor([0, 1, 2])
    logits = torch.eye(3) * 5
    logits[0, 0] = logits[1, 0] = bad  # at the label's place, and beside it
    predicted = answers(logits, label)
    assert (predicted == label).tolist() == [False, False, True]
    assert ((predicted >= 0) & (predicted < 3)).all()
