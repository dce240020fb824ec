"""Labels: what a batch of views, a compact memory and a rounded start come to."""

from __future__ import annotations

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.labels import KD, SGLR, Predictions, SoftTerm, Supervision
from softdefend.labels.memory import make_memory
from tiny import K, about, batch_of, tiny_net


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_a_rule_says_is_repeated_view_after_view(soft, weighted):
    draws = stream(0, "views")
    target, other = torch.randn(2, 3, 5, generator=draws).softmax(2)
    terms = (SoftTerm(target, 0.3), SoftTerm(other, 0.7, 2.0)) if soft else ()
    weight = torch.tensor([0.5, 1.0, 1.5]) if weighted else None
    said = Supervision(torch.tensor([0, 3, 1]), target, weight, terms)
    logits = torch.randn(6, 5, generator=draws)
    twice = said.repeat(2)
    assert twice.label.tolist() == [0, 3, 1, 0, 3, 1]
    alone = torch.cat([said.cross_entropy(logits[:3]), said.cross_entropy(logits[3:])])
    torch.testing.assert_close(twice.cross_entropy(logits), alone)


def test_the_first_predictions_are_those_of_the_first_view():
    both = Predictions(torch.randn(6, 5), torch.randn(6, 5))
    first = both.first(3)
    assert torch.equal(first.adversarial, both.adversarial[:3])
    assert torch.equal(first.clean, both.clean[:3])


@pytest.mark.parametrize("storage", ["float16", "top-3"])
def test_rows_are_float32_and_never_negative_whatever_float16_rounds_to(storage):
    n = 512
    labels, index = torch.arange(n) % 5, torch.arange(n)
    memory = make_memory(storage, labels, 5, 0.0)
    rows = torch.zeros(n, 5)
    rows[:, :3] = torch.rand(n, 3, generator=stream(0, "rows")) + 0.1
    memory.update(index, rows / rows.sum(1, keepdim=True))
    read = memory.read(index)
    assert read.dtype == torch.float32
    assert float(read.min()) >= 0


def test_more_classes_than_int16_can_name_are_refused():
    assert (
        int(make_memory("top-1", torch.tensor([2**15 - 1]), 2**15, 0.9).read(torch.tensor([0])).argmax())
        == 2**15 - 1
    )
    with pytest.raises(SettingError, match=r"label\.storage"):
        make_memory("top-1", torch.tensor([0]), 2**15 + 1, 0.9)


def test_a_start_whose_product_rounds_up_begins_at_the_same_epoch():
    assert 0.55 * 100 > 55  # a rounding error above a whole number of epochs
    rule = SGLR(start=0.55)
    rule.setup(RunInfo(torch.arange(4), 4, epochs=100))
    assert [rule.phase(epoch) for epoch in (53, 54)] == ["hard", "refined"]


def test_a_teacher_looks_at_each_batch_also_where_no_update_lies_between():
    """As in the rehearsals of a captured step: a prediction held over would not be recorded."""

    def started():
        rule = KD(standard=tiny_net(seed=1), robust=tiny_net(seed=2), image="clean")
        rule.setup(about(tiny_net()))
        return rule

    one, other = (batch_of(torch.rand(4, 1, 6, 6, generator=stream(seed, "x"))) for seed in (0, 1))
    seen, rule = Predictions(torch.zeros(4, K)), started()
    rule.target(one, seen, "fixed")
    assert torch.equal(rule.target(other, seen, "fixed"), started().target(other, seen, "fixed"))
