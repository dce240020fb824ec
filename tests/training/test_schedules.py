import math

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.training import Schedule


def changes(schedule: Schedule, epochs: int) -> dict[int, float]:
    """Zero-based epochs at which the factor differs from the epoch before, and the factor."""
    factors = [schedule.factor(e, 0.0, epochs) for e in range(epochs)]
    return {e: f for e, f in enumerate(factors) if e == 0 or f != factors[e - 1]}


def test_the_fields_protocol_drops_after_100_and_150_of_200_epochs():
    assert changes(Schedule(), 200) == {0: 1.0, 100: pytest.approx(0.1), 150: pytest.approx(0.01)}


def test_one_based_counting_drops_one_epoch_earlier_as_the_reference_does():
    """LR 0.1 for the reference's epochs 1 to 99."""
    assert list(changes(Schedule(one_based=True), 200)) == [0, 99, 149]


def test_a_step_schedule_is_constant_within_an_epoch():
    assert Schedule().factor(99, 0.999, 200) == 1.0


def test_cosine_and_cyclic_against_their_closed_forms():
    cosine, cyclic = Schedule("cosine"), Schedule("cyclic", peak=0.4)
    for epoch in range(10):
        for fraction in (0.0, 0.25, 0.9):
            t = (epoch + fraction) / 10
            assert cosine.factor(epoch, fraction, 10) == pytest.approx(math.cos(math.pi * t / 2) ** 2)
            assert cyclic.factor(epoch, fraction, 10) == pytest.approx(min(t / 0.4, (1 - t) / 0.6))


@pytest.mark.parametrize(("peak", "steps"), [(0.025, 4000), (0.25, 2000)])
def test_one_cycle_is_torchs(peak, steps):
    """Which has its last factor at the last step, not after it: one step of so many."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps, pct_start=peak)
    ours = Schedule("one-cycle", peak=peak)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert ours.factor(0, step / steps, 1) == pytest.approx(expected, abs=2 / (peak * steps))
        optimizer.step()
        if step + 1 < steps:
            theirs.step()
    assert ours.factor(0, 0.0, 1) == pytest.approx(1 / 25)
    assert ours.factor(0, peak, 1) == 1.0
    assert expected == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize("kind", ["step", "cosine", "cyclic", "one-cycle"])
def test_a_warm_up_rises_linearly_to_what_the_schedule_says_and_leaves_the_rest(kind):
    plain, warm = Schedule(kind), Schedule(kind, warmup=0.2)
    for epoch in range(10):
        for fraction in (0.0, 0.25, 0.9):
            share = min(1.0, (epoch + fraction) / 2)
            assert warm.factor(epoch, fraction, 10) == pytest.approx(
                share * plain.factor(epoch, fraction, 10)
            )


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "linear"},
        {"milestones": (0.75, 0.5)},
        {"milestones": (0.0, 0.5)},
        {"milestones": (0.5, 1.0)},
        {"gamma": 0.0},
        {"gamma": 2.0},
        {"peak": 1.0},
        {"warmup": -0.1},
        {"warmup": 1.0},
    ],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(SettingError, match=f"schedule.{next(iter(wrong))}"):
        Schedule(**wrong)
