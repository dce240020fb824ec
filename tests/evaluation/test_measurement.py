"""What is measured beside the attacks is measured once, and lies in a file with what it was made from."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from checkpoint_tools import CPU, make_checkpoint, make_source

from softdefend.core.digest import value_digest
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.measurement import Measurement, measured


@pytest.fixture
def case(bundle, tmp_path):
    made = []

    def measure():
        made.append(1)
        return {"n": 5, "mean": 0.5}

    measurement = Measurement(
        "-mine", {"seed": 0, "names": ("a", "b")}, measure, lambda r: f"mean {r['mean']}"
    )
    return make_checkpoint(tmp_path, bundle), measurement, made


def test_it_is_made_once_and_shown_every_time(case, caplog, tmp_path):
    checkpoint, measurement, made = case
    caplog.set_level(logging.INFO, logger="softdefend")
    first = measured(checkpoint, measurement)
    assert first == measured(Checkpoint(checkpoint.source, CPU), measurement)
    assert first == json.loads((tmp_path / "evaluation" / "last-mine.json").read_text())
    assert made == [1]
    assert caplog.messages == ["mean 0.5", "mean 0.5"]


def test_the_file_says_of_what_it_is(case):
    checkpoint, measurement, _ = case
    result = measured(checkpoint, measurement)
    assert (result["which"], result["epoch"], result["split"]) == ("last", 3, "test")
    assert (result["norm"], result["eps"], result["n"]) == ("linf", "0.1", 5)
    assert result["settings"] == {"seed": 0, "names": ["a", "b"], "norm": "linf", "eps": "0.1"}
    assert result["key"] == value_digest(result["inputs"])
    assert checkpoint.facts.items() <= result.items()
    assert checkpoint.facts.items() <= result["inputs"].items()


def test_other_settings_and_other_weights_make_it_again(case, bundle, tmp_path):
    checkpoint, measurement, made = case
    measured(checkpoint, measurement)
    measured(checkpoint, replace(measurement, settings={"seed": 1, "names": ("a", "b")}))
    assert made == [1, 1]
    measured(Checkpoint(make_source(tmp_path, bundle, seed=1), CPU), measurement)
    assert made == [1, 1, 1]
