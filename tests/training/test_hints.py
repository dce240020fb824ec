"""Runs that go wrong quietly: what is said, when, and what is left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from softdefend import ADR, PGDAT, SGLR, TRADES, Hard
from softdefend.attacks import PGD
from softdefend.core.errors import DivergenceError
from softdefend.core.threat import ThreatModel
from softdefend.data import AugmentSettings, from_tensors
from softdefend.training import OptimSettings, Recipe, RuntimeSettings, TrainConfig, Trainer, ValidateSettings
from softdefend.training.hints import hints

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "table1.json"


def said(rows, steps_per_epoch, k=10):
    return [
        (row["epoch"], name)
        for row in rows
        for name, _ in hints(row, steps_per_epoch, k)
        if name == "guessing" or row["epoch"] % 50 == 0
    ]


def test_of_the_runs_of_table_1_one_stood_at_guessing_and_one_ran_away():
    """SGLR's first five epochs were at chance; the labels of TRADES + SGLR became uniform."""
    found = {
        row["name"]: said(row["curve"], row["curve"][0]["step"])
        for row in json.loads(RESULTS.read_text())["rows"]
        if row["name"] in ("pgd-at", "sglr-reference", "trades", "trades-sglr")
    }
    assert found == {
        "pgd-at": [],
        "sglr-reference": [(3, "guessing")],
        "trades": [],
        "trades-sglr": [(150, "uniform"), (200, "uniform")],
    }


def curves(content):
    """Every run that a result file holds, with its curve."""
    if isinstance(content, list):
        for item in content:
            yield from curves(item)
    elif isinstance(content, dict):
        if "step" in (content.get("curve") or [{}])[0]:
            yield content
        for item in content.values():
            yield from curves(item)


def test_of_all_measured_runs_the_one_called_stuck_never_rose_and_those_that_rose_were_not_called_so():
    found = {"guessing": [], "stuck": []}
    for path in sorted(RESULTS.parent.glob("*.json")):
        for run in curves(json.loads(path.read_text())):
            rows, classes = run["curve"], {"tiny-imagenet": 200}.get(run.get("setting"), 10)
            seen = {name for row in rows for name, _ in hints(row, rows[0]["step"], classes)}
            for name in seen & found.keys():
                found[name].append((path.stem, rows[-1]["train_robust"] > 0.25))
    assert found["stuck"] == [("beyond", False)]
    assert len(found["guessing"]) >= 6
    assert [rose for _, rose in found["guessing"]].count(False) == 1


@pytest.mark.parametrize(
    ("k", "robust", "expected"),
    [
        (2, 0.52, True),
        (2, 0.56, False),
        (10, 0.12, True),
        (10, 0.14, False),
        (100, 0.012, True),
        (100, 0.02, False),  # twice as good as guessing
        (1, 1.0, False),
    ],
)
def test_guessing_is_judged_by_the_number_of_classes(k, robust, expected):
    row = {"epoch": 4, "step": 1200, "train_robust": robust, "target_entropy": 0.0}
    assert bool(list(hints(row, 300, k))) is expected


def test_guessing_is_judged_after_a_thousand_steps_and_five_thousand_whatever_the_length_of_an_epoch():
    for steps in (26, 250, 999, 1000, 5000):
        rows = [
            {"epoch": e, "step": e * steps, "train_robust": 0.1, "target_entropy": None}
            for e in range(1, 201)
        ]
        found = [(name, row["step"]) for row in rows for name, _ in hints(row, steps, 10)]
        (first, soon), (second, later) = found
        assert (first, second) == ("guessing", "stuck")
        assert 1000 <= soon < 1000 + steps
        assert 5000 <= later < 5000 + steps


def test_a_hint_names_what_was_seen_and_a_setting():
    row = {"epoch": 9, "step": 90, "train_robust": 0.5, "target_entropy": 2.2}
    ((name, text),) = hints(row, 10, 10)
    assert name == "uniform"
    assert "2.20 of at most 2.30" in text
    assert "label.r" in text
    assert "\n" not in text
    assert not list(hints(row | {"target_entropy": 2.0}, 10, 10))


def test_the_published_labels_of_adr_are_nearly_uniform_and_nothing_is_said():
    """Of 30 epochs on images: mean entropy 2.28 nats of ln 10, robust accuracy among the highest."""
    content = json.loads((RESULTS.parent / "recipes.json").read_text())
    (run,) = [run for run in content["runs"] if run["recipe"] == "adr-ema"]
    row = run["curve"][-1]
    assert [name for name, _ in hints(row, 382, 10)] == ["uniform"]
    assert ADR.softens_all
    assert not list(hints(row, 382, 10, soft=True))


@pytest.mark.parametrize(
    ("label", "uniform", "times"),
    [
        (SGLR(alpha=0.0, start=0.0), True, 1),
        (Hard(), False, 0),
        (ADR(interpolation_low=0.95), True, 0),  # as published: nothing to warn of
    ],
)
def test_a_run_says_it_once_and_goes_on(tmp_path, caplog, label, uniform, times):
    """An untrained network's own predictions are uniform; with no memory they are the labels."""
    torch.manual_seed(0)
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    objective = TRADES() if times else PGDAT()
    config = TrainConfig(
        recipe=Recipe(label, objective, threat=ThreatModel("linf", "0.05"), attack=PGD(steps=2)),
        optim=OptimSettings(epochs=3, batch_size=8, lr=1e-4),
        augment=AugmentSettings("none"),
        validate=ValidateSettings(attack=PGD(steps=2)),
        runtime=RuntimeSettings(device="cpu", threads=1),
    )
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    data = from_tensors(images, labels, validation=8)
    trainer = Trainer(net, data, config, tmp_path / "run", progress=False)
    trainer.fit()
    trainer.folder.close()
    assert trainer.state.epoch == 3
    assert caplog.text.count("nearly uniform") == times
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (rows[-1]["target_entropy"] > 0.9 * math.log(4)) is uniform
    assert [row.get("hints") for row in rows] == [["uniform"] if times else None] * 3


@pytest.fixture
def guesses(tmp_path, monkeypatch):
    """Trains a network that cannot learn: its images are all alike. It is judged in epochs 1 and 3."""
    monkeypatch.setattr("softdefend.training.hints.FIRST_STEPS", 1)
    monkeypatch.setattr("softdefend.training.hints.STUCK_STEPS", 8)

    def train(alarm):
        torch.manual_seed(0)
        config = TrainConfig(
            recipe=Recipe(threat=ThreatModel("linf", "0.05"), attack=PGD(steps=2)),
            optim=OptimSettings(epochs=4, batch_size=8, lr=1e-4),
            augment=AugmentSettings("none"),
            validate=ValidateSettings(attack=PGD(steps=2), alarm=alarm),
            runtime=RuntimeSettings(device="cpu", threads=1),
        )
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        data = from_tensors(torch.full((40, 1, 4, 4), 0.5), torch.arange(40) % 4, validation=8)
        trainer = Trainer(net, data, config, tmp_path / alarm, progress=False)
        try:
            trainer.fit()
        finally:
            trainer.folder.close()
        lines = (tmp_path / alarm / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("hints") for line in lines]

    return train


def test_a_stuck_run_says_so_and_goes_on(guesses, caplog):
    assert guesses("warn") == [["guessing"], None, ["stuck"], None]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "after 9 steps robust accuracy on training images is" in caplog.messages[1]
    assert "not likely to rise" in caplog.messages[1]


def test_a_stuck_run_is_not_reported_where_the_alarm_is_off(guesses, caplog):
    assert guesses("off") == [["guessing"], None, ["stuck"], None]
    assert "not likely to rise" not in caplog.text


def test_a_stuck_run_ends_where_the_alarm_stops(guesses, caplog, tmp_path):
    with pytest.raises(
        DivergenceError, match=r"after 9 steps .*optim.schedule.warmup.*best checkpoint is of epoch 1"
    ):
        guesses("stop")
    assert "not likely to rise" not in caplog.text  # the error says it
    assert len((tmp_path / "stop/metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "stop/best.safetensors").is_file()
