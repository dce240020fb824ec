"""The step benchmark in miniature; its arithmetic against counts made by hand."""

from __future__ import annotations

import json

import pytest

from softdefend.core.errors import SettingError
from softdefend.experiments.bench import BenchSettings, bench_train, format_row
from softdefend.experiments.timed_step import ImageShape, forward_flops
from softdefend.models import NetSettings

QUICK = ["--runtime.device", "cpu", "--attack.steps", "1", "--optim.epochs", "2", "--runtime.threads", "1"]


def test_rows_hold_what_was_asked_for_and_their_arithmetic_closes(tmp_path, caplog):
    caplog.set_level("INFO", logger="softdefend")
    settings = BenchSettings(
        nets=("small_cnn",),
        presets=("pgd-at", "sglr-reference"),
        batch_sizes=(2, 4),
        steps=2,
        repeats=1,
        warmup=1,
        images=100,
        output=str(tmp_path / "step.json"),
    )
    result = bench_train(settings, QUICK)
    assert json.loads((tmp_path / "step.json").read_text()) == result
    assert [(r["recipe"], r["batch_size"]) for r in result["rows"]] == [
        ("pgd-at", 2),
        ("sglr-reference", 2),
        ("pgd-at", 4),
        ("sglr-reference", 4),
    ]
    flops = forward_flops(NetSettings("small_cnn"), ImageShape())
    for row in result["rows"]:
        forwards = {"pgd-at": 2 + 3, "sglr-reference": 2 + 3 + 1}[row["recipe"]]
        assert row["tflop"] == pytest.approx(forwards * flops * row["batch_size"] / 1e12, abs=1e-5)
        share = row["tflop"] / (row["ms"] / 1e3) / result["ceiling_tflops"]
        assert row["ceiling_share"] == pytest.approx(share, rel=0.3, abs=1e-3)  # rounded figures
        assert row["seconds_per_epoch"] == pytest.approx(
            row["ms"] * (100 // row["batch_size"]) / 1e3, rel=0.01
        )
        assert "ratio" not in row
        assert format_row(row) in caplog.messages


def test_resnet18s_forward_is_the_1_11_gflop_that_the_field_counts():
    """0.556 G multiply-adds on 32x32 (He et al.'s ResNet-18 with a 3x3 stem), two operations each."""
    assert forward_flops(NetSettings("resnet18"), ImageShape()) == pytest.approx(1.11e9, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"bench\.steps: got 0"),
        ({"batch_sizes": (128, 0)}, r"bench\.batch_sizes: got 0"),
        ({"presets": ("pgd-it",)}, "--preset: got 'pgd-it'"),
        ({"reference": "/nowhere"}, r"bench\.reference: got /nowhere"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        BenchSettings(**settings)
