"""An eps that rises over the first epochs."""

from __future__ import annotations

import json

import pytest

from softdefend import PGD, PGDAT, TRADES, GaussianNoise, Hard, OptimSettings
from softdefend.core.errors import SettingError
from softdefend.training import Recipe
from softdefend.training.ramp import ramp


@pytest.mark.parametrize(
    ("share", "factors"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (0.2, [1, 1, 1, 1, 1]),
        (0.6, [1 / 3, 2 / 3, 1, 1, 1]),
        (0.5, [1 / 3, 2 / 3, 1, 1, 1]),
        (1.0, [0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_the_ramp_rises_by_equal_amounts(share, factors):
    assert [ramp(share, epoch, 5) for epoch in range(5)] == pytest.approx(factors)


@pytest.mark.parametrize("objective", [PGDAT, TRADES], ids=["pgd-at", "trades"])
def test_adversarial_images_keep_to_the_eps_of_their_epoch(make_trainer, objective):
    """And to the threat's in validation; what an epoch was trained at stands in its row."""
    attack, optim = PGD(steps=3, step_size="0.08"), OptimSettings(epochs=4, batch_size=16)
    trainer = make_trainer(Hard(), objective(), attack=attack, optim=optim, eps_ramp=0.75)
    furthest, steps = {}, {}
    predict = trainer.recipe.objective.predict

    def watch(net, image, adversarial):
        moved = float((adversarial - image).abs().max())
        furthest[trainer.state.epoch] = max(furthest.get(trainer.state.epoch, 0), moved)
        steps[trainer.state.epoch] = float(trainer.step.attack.step_size)
        return predict(net, image, adversarial)

    trainer.recipe.objective.predict = watch
    trainer.fit()
    expected = [0.1 / 3, 0.2 / 3, 0.1, 0.1]
    assert list(furthest.values()) == pytest.approx(expected, rel=1e-5)
    assert list(steps.values()) == pytest.approx([0.8 * eps for eps in expected])
    rows = [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["eps"] for row in rows] == pytest.approx(expected)
    assert float(trainer.validator.config.recipe.threat.eps) == 0.1


def test_impossible_ramps_are_refused():
    with pytest.raises(SettingError, match=r"eps_ramp: got 1\.5"):
        Recipe(eps_ramp=1.5)
    with pytest.raises(SettingError, match=r"eps_ramp: got 0\.5 with GaussianNoise"):
        Recipe(objective=GaussianNoise(), eps_ramp=0.5)
