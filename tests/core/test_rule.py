"""Constructors of rules: values of other types than their hints are one line each."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import softdefend as sd
from softdefend.core.errors import SettingError
from softdefend.labels.base import LABELS, LabelRule
from softdefend.objectives.base import OBJECTIVES
from softdefend.weights.base import WEIGHTS, WeightRule

NUMBERS = [
    pytest.param(kind, section, name, id=f"{kind.__name__}.{name}")
    for section, registry in (("label", LABELS), ("objective", OBJECTIVES), ("weight", WEIGHTS))
    for _, kind in registry.items()
    for name, one in inspect.signature(kind).parameters.items()
    if isinstance(one.default, (int, float))
]
WORDS = ["x", b"x", None, [], {}, 1j, object(), torch.tensor(0.5), 10**400]


@pytest.mark.parametrize(("kind", "section", "name"), NUMBERS)
def test_a_number_is_asked_for_in_one_line(kind, section, name):
    for value in WORDS:
        with pytest.raises(SettingError, match=rf"\A{section}\.{name}: got [^\n]*; accepted: [^\n]*\Z"):
            kind(**{name: value})


def test_true_is_no_number_and_a_number_is_not_true():
    with pytest.raises(SettingError, match=r"label\.r: got True; accepted: a number"):
        sd.SGLR(r=True)
    with pytest.raises(SettingError, match=r"label\.weighted: got 1; accepted: true or false"):
        sd.SAT(weighted=1)


def test_a_rule_within_a_rule_is_an_object_of_its_kind():
    with pytest.raises(SettingError, match=r"weight\.average: got the class EMA; accepted: .* EMA\(\)"):
        sd.AWP(average=sd.EMA)
    with pytest.raises(SettingError, match=r"weight\.average: got a TRADES; accepted: .*WeightRule"):
        sd.AWP(0.01, 0.0, sd.TRADES())


def test_numbers_of_numpy_become_pythons_in_a_rule():
    rule = sd.SGLR(np.float32(0.5), r=np.float64(0.25))
    assert (type(rule.r), rule.r) == (float, 0.25)
    assert type(sd.SWA(every=np.int64(2)).every) is int


def test_what_python_refuses_is_pythons_to_refuse():
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'bogus'"):
        sd.TRADES(bogus=1)


class Half(sd.TRADES):
    """A rule of somebody else, which hands on what it does not know."""

    def __init__(self, share: float = 0.5, untyped=None, **others: float) -> None:
        super().__init__(**others)
        self.share, self.untyped = share, untyped


@dataclass
class Named(WeightRule):
    name: str = "a"


def test_a_rule_of_ones_own_is_checked_by_its_hints():
    with pytest.raises(SettingError, match=r"objective\.share: got 'x'; accepted: a number"):
        Half("x")
    with pytest.raises(SettingError, match=r"objective\.beta: got 'x'; accepted: a number"):
        Half(beta="x")
    made = Half(1, "anything", beta=2)
    assert (made.share, made.untyped, made.beta) == (1, "anything", 2)
    assert Named("b").name == "b"


def test_rules_keep_their_signature_and_are_copied():
    assert [*inspect.signature(sd.TRADES).parameters] == ["beta"]
    for rule in (sd.SGLR(r=0.5), pickle.loads(pickle.dumps(sd.SGLR(r=0.5))), copy.deepcopy(sd.SGLR(r=0.5))):
        assert isinstance(rule, LabelRule)
        assert rule.r == 0.5
