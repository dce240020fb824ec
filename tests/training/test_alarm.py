"""The alarm for catastrophic overfitting: when it speaks, what it says, what it leaves alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from softdefend import FGSMRS, NFGSM, PGD, PGDAT, TRADES, DataSettings, Hard, OptimSettings, load
from softdefend.attacks import FGSM
from softdefend.core.errors import DivergenceError, SettingError
from softdefend.core.threat import ThreatModel
from softdefend.data import AugmentSettings, Resident, subset
from softdefend.evaluation import Evaluator
from softdefend.report import read_run
from softdefend.report.curves import by_epoch
from softdefend.training import (
    Recipe,
    RuntimeSettings,
    SaveSettings,
    Schedule,
    TrainConfig,
    Trainer,
    ValidateSettings,
)
from softdefend.training.alarm import collapsed, describe, trains_on_one_step


@pytest.mark.parametrize(
    ("fgsm", "robust", "expected"),
    [
        (0.85, 0.00, True),  # what the literature describes
        (1.00, 0.10, True),
        (0.45, 0.10, True),
        (0.57, 0.51, False),  # PGD-AT on CIFAR-10, about
        (0.55, 0.44, False),  # robust overfitting is no collapse
        (0.42, 0.20, False),  # large eps: a weak step, not a learnt one
        (0.15, 0.00, False),  # nothing is learnt yet
        (0.10, 0.10, False),
        (0.00, 0.00, False),
        (0.20, 0.50, False),
    ],
)
def test_a_collapse_is_much_accuracy_under_one_step_and_little_under_several(fgsm, robust, expected):
    assert collapsed(fgsm, robust) is expected


def test_both_thresholds_are_needed():
    assert not collapsed(0.25, 0.06)  # the gap is 0.19
    assert collapsed(0.26, 0.06)
    assert not collapsed(0.80, 0.20)  # a quarter, not less
    assert collapsed(0.80, 0.199)


@pytest.mark.parametrize(
    ("objective", "steps", "expected"),
    [
        (NFGSM(), 10, True),
        (FGSMRS(), 10, True),
        (PGDAT(), 1, True),
        (TRADES(), 1, True),
        (PGDAT(), 2, False),
        (PGDAT(), 10, False),
        (PGDAT(), 0, False),
    ],
)
def test_runs_that_train_on_one_gradient_step_are_watched(objective, steps, expected):
    recipe = Recipe(objective=objective, attack=PGD(steps=steps))
    assert trains_on_one_step(recipe) is expected


def test_the_line_names_epoch_figures_and_a_remedy():
    line = describe(7, 0.851, 0.004, "pgd-10")
    assert "\n" not in line
    for part in ("epoch 7", "85.1% under FGSM", "0.4% under pgd-10", "NFGSM"):
        assert part in line


@pytest.fixture(scope="module")
def digits():
    return load(DataSettings(source="digits", test_fraction=0.4435, validation=200, train_size=800))


@pytest.fixture
def train_digits(digits, tmp_path):
    """A function that trains a small perceptron on 800 digits at an eps where one step is easily learnt."""
    made = []

    def make(objective, *, start="none", alarm="warn", folder="run", watch=None, every=1) -> Trainer:
        layers: list[nn.Module] = [nn.Flatten()]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for width in (64, 128, 128):
                layers += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()]
            net = nn.Sequential(*layers, nn.Linear(128, 10))
        threat, attack = ThreatModel("linf", "0.3"), PGD(steps=10, start=start)
        config = TrainConfig(
            recipe=Recipe(objective=objective, threat=threat, attack=attack),
            optim=OptimSettings(
                epochs=12, batch_size=80, lr=0.2, weight_decay=0, schedule=Schedule(milestones=(0.9,))
            ),
            augment=AugmentSettings("none"),
            validate=ValidateSettings(attack=PGD(steps=10), alarm=alarm, every=every),
            runtime=RuntimeSettings(device="cpu", threads=1),
            save=SaveSettings(),
        )
        trainer = Trainer(net, digits, config, tmp_path / folder, progress=False)
        trainer.validator.watched = trainer.validator.watched if watch is None else watch
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.folder.close()


def rows_of(trainer):
    return [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines()]


def test_it_fires_on_a_run_that_collapses_says_so_once_and_goes_on(train_digits, caplog):
    """FGSM without a random start: accuracy under FGSM rises from epoch to epoch, under PGD-10 it is lost."""
    trainer = train_digits(FGSMRS(alpha=1.0))
    trainer.fit()
    rows = rows_of(trainer)
    assert len(rows) == 12
    flags = [row["catastrophic_overfitting"] for row in rows]
    assert flags == [collapsed(row["val_fgsm"], row["val_robust"]) for row in rows]
    assert sum(flags) >= 3
    assert rows[-1]["val_fgsm"] > 0.25
    assert rows[-1]["val_robust"] < 0.1
    warnings = [text for text in caplog.messages if "catastrophic" in text]
    assert len(warnings) == 1
    assert f"epoch {1 + flags.index(True)}:" in warnings[0]


def test_it_is_silent_on_a_run_with_pgd_that_is_as_hard(train_digits, caplog):
    """The same network, data and eps; watched although PGD training is not."""
    assert not train_digits(PGDAT(), start="auto", folder="unwatched").validator.watched
    trainer = train_digits(PGDAT(), start="auto", watch=True)
    trainer.fit()
    rows = rows_of(trainer)
    assert not any(row["catastrophic_overfitting"] for row in rows)
    assert rows[-1]["val_robust"] > 0.15
    assert caplog.messages == []


def test_stop_ends_like_a_divergence_at_the_same_epoch_also_when_started_again(train_digits):
    messages = []
    for _ in range(2):
        trainer = train_digits(FGSMRS(alpha=1.0), alarm="stop")
        with pytest.raises(DivergenceError, match="the best checkpoint is of epoch") as error:
            trainer.fit()
        trainer.folder.close()
        messages.append(str(error.value))
        rows = rows_of(trainer)
        assert [row["catastrophic_overfitting"] for row in rows] == [False] * (len(rows) - 1) + [True]
        best = max(rows[:-1], key=lambda row: row["val_robust"])
        assert f"epoch {best['epoch']}, {100 * best['val_robust']:.1f}%" in messages[-1]
        with safe_open(trainer.folder.path / "best.safetensors", "pt") as file:
            assert json.loads(file.metadata()["softdefend"])["epoch"] == best["epoch"]
        assert not (trainer.folder.path / "last.safetensors").exists()
        kept = trainer.folder.checkpoints.load()
        assert kept is not None
        assert kept["epoch"] == len(rows) - 1  # the collapsed epoch is not in a checkpoint
    assert messages[0] == messages[1]


def test_a_collapse_that_no_checkpoint_knows_of_is_not_called_the_best(train_digits):
    trainer = train_digits(FGSMRS(alpha=1.0), alarm="stop", every=12)
    with pytest.raises(DivergenceError, match="no epoch before it was validated"):
        trainer.fit()
    assert rows_of(trainer)[-1]["catastrophic_overfitting"]
    assert not list(trainer.folder.path.glob("*.safetensors"))
    assert not list(trainer.folder.path.glob(".*.safetensors"))


def test_the_figure_is_that_of_an_evaluation_and_readers_of_metrics_know_the_row(make_trainer, bundle):
    validate = ValidateSettings(attack=PGD(steps=2), size=10, test_size=7, every=2)
    trainer = make_trainer(Hard(), NFGSM(), validate=validate)
    trainer.fit()
    rows = rows_of(trainer)
    assert [row["val_fgsm"] is None for row in rows] == [True, False, False]
    assert "catastrophic_overfitting" not in rows[0]
    result = Evaluator(trainer.net, Resident(bundle.validation, "cpu"), trainer.recipe.threat)(
        [FGSM()], index=subset(bundle.validation.labels, 10)
    )
    assert rows[-1]["val_fgsm"] == result.robust("fgsm").rate
    run = read_run(trainer.folder.path)
    line = by_epoch([run], "val_fgsm")
    assert line is not None
    assert line.x == (2.0, 3.0)


def test_the_rows_of_other_runs_and_of_a_switched_off_alarm_are_as_ever(make_trainer):
    for number, (objective, alarm) in enumerate([(PGDAT(), "warn"), (NFGSM(), "off")]):
        trainer = make_trainer(
            Hard(),
            objective,
            folder=str(number),
            validate=ValidateSettings(attack=PGD(steps=2), alarm=alarm),
        )
        trainer.fit()
        for row in rows_of(trainer):
            assert "val_fgsm" not in row
            assert "catastrophic_overfitting" not in row


def test_an_unknown_alarm_is_refused():
    with pytest.raises(SettingError, match=r"validate\.alarm: got 'ring'; accepted: warn, stop or off"):
        ValidateSettings(alarm="ring")
