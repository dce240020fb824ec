"""EMA that starts late, without its warm-up, and with averaged statistics, against loops."""

from __future__ import annotations

import copy

import pytest
import torch

from softdefend import EMA
from softdefend.core.errors import SettingError
from tiny import about, tiny_net

STEPS, EPOCHS = 4, 5
SETTINGS = [
    {"decay": 0.9, "start": 0.5},
    {"decay": 0.9, "start": 0.41, "warmup": False, "bn": "average"},
    {"decay": 0.99, "warmup": False},
    {"decay": 0.5, "start": 0.2, "bn": "average"},
]


def run(settings):
    """The rule's network after every step of a run with random updates, and what was trained."""
    net, found, live = tiny_net(), [], []
    rule = EMA(**settings)
    rule.setup(about(net, epochs=EPOCHS))
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS * EPOCHS):
        rule.advance(step / STEPS)
        with torch.no_grad():
            for name, value in net.state_dict().items():
                if value.is_floating_point():
                    value += torch.randn(value.shape, generator=generator)
                elif name.endswith("tracked"):
                    value += 1
        rule.after_step()
        found.append(copy.deepcopy(rule.prediction.state_dict()))
        live.append(copy.deepcopy(net.state_dict()))
    return found, live


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_average_is_that_of_a_loop(settings):
    """A copy up to the start, then d w + (1 - d) w, name by name."""
    found, live = run(settings)
    start = settings.get("start", 0.0) * EPOCHS
    expected, age = None, 0
    for step, (ours, now) in enumerate(zip(found, live, strict=True)):
        if expected is None or step / STEPS < start - 1e-9:
            expected, age = copy.deepcopy(now), 1
        else:
            decay = settings["decay"]
            if settings.get("warmup", True):
                decay = min(decay, (1 + age) / (10 + age))
            age += 1
            for name, value in now.items():
                statistics = "running" in name and settings.get("bn", "copy") == "copy"
                if statistics or not value.is_floating_point():
                    expected[name] = value.clone()
                else:
                    expected[name] = decay * expected[name] + (1 - decay) * value
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=f"{name} at {step}")


@pytest.mark.parametrize(("name", "value"), [("start", 1.0), ("start", -0.1), ("decay", 1.0), ("bn", "eval")])
def test_impossible_averages_are_refused(name, value):
    with pytest.raises(SettingError, match=rf"weight\.{name}"):
        EMA(**{name: value})


def test_a_late_average_goes_on_as_it_was_after_a_crash():
    """The count of averages is in the state, so a resumed warm-up is as far as it was."""
    settings, net = {"decay": 0.9, "start": 0.4}, tiny_net()
    first, second = EMA(**settings), EMA(**settings)
    for rule in (first, second):
        rule.setup(about(net, epochs=EPOCHS))
    for step in range(14):
        first.advance(step / STEPS)
        with torch.no_grad():
            for value in net.parameters():
                value += 0.1 * (step + 1)
        first.after_step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for rule in (first, second):
        rule.advance(14 / STEPS)
        rule.after_step()
    for ours, other in zip(
        first.prediction.state_dict().values(), second.prediction.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, other)
