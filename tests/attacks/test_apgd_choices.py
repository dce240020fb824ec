"""APGD: the ratio at exactly four classes, ties, and which of several unverified successes is kept."""

from __future__ import annotations

import pytest
import torch

from softdefend.attacks.apgd import _Given, _likeliest_wrong, _State, _Step
from softdefend.attacks.losses import targeted_dlr
from softdefend.core.threat import ThreatModel


def test_four_classes_have_the_fourth_logit_that_the_targeted_ratio_needs():
    logits = torch.tensor([[4.0, 1.0, 3.0, 0.5]], dtype=torch.float64)
    value = targeted_dlr(logits, torch.tensor([0]), torch.tensor([2]))
    assert value.item() == pytest.approx((3.0 - 4.0) / (4.0 - 0.5 * (1.0 + 0.5)))


def test_the_true_class_is_never_a_target_whatever_its_logit():
    clean, label = torch.tensor([[0.0, 5.0, 5.0], [9.0, 1.0, 2.0]]), torch.tensor([2, 1])
    targets = torch.stack(list(_likeliest_wrong(clean, label, 9)), dim=1)
    assert targets.tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize(("deepest", "kept"), [(True, 0.7), (False, 0.3)])
def test_of_several_wrong_images_the_deepest_is_kept_where_successes_are_unverified(deepest, kept):
    step = _Step(ThreatModel(), lambda logits, label, target: logits[:, 1], 1, fooling=True, deepest=deepest)
    zero, none = torch.zeros(1, 1, 1, 1), torch.zeros(1)
    state = _State(zero, zero, zero, none, zero, zero, none, zero, none.long(), none.bool(), none, zero,
                   none.bool(), torch.full((1,), -torch.inf), none, none.long())  # fmt: skip
    given = _Given(zero, torch.zeros(1).long(), torch.zeros(1).long())
    for value in (0.3, 0.7, 0.5):
        x_adv = torch.full((1, 1, 1, 1), value)
        state = step.claim(
            state._replace(x_adv=x_adv), given, torch.tensor([[0.0, value]]), torch.tensor([value])
        )
    assert state.candidate.item() == pytest.approx(kept)
