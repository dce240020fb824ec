"""Run folders written by hand, in the form that training and evaluation write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from softdefend.report.runs import RunRecord, read_run


def rate(value: float, n: int = 100) -> dict[str, Any]:
    return {"count": round(value * n), "n": n, "rate": value, "low": value - 0.05, "high": value + 0.04}


def evaluation(clean: float, pgd: float, **more: Any) -> dict[str, Any]:
    attack = {**rate(pgd), "forwards": 2000, "backwards": 1900, "seconds": 3.25}
    return {
        "which": "best",
        "epoch": 2,
        "split": "test",
        "n": 100,
        "name_of_data": "digits",
        "norm": "linf",
        "eps": "8/255",
        "clean": rate(clean),
        "attacks": {"pgd-20": attack},
        "worst": rate(pgd),
        "interval": "wilson 95%",
        "per_class": [
            {"class": "cat", "clean": 0.9, "robust": 0.25, "n": 50},
            {"class": "dog", "clean": 0.8, "robust": 0.75, "n": 50},
        ],
        "eps_curve": [
            {"eps": "0", "value": 0.0, **rate(clean)},
            {"eps": "8/255", "value": 8 / 255, **rate(pgd)},
        ],
        **more,
    }


def metrics_row(epoch: int, **more: Any) -> dict[str, Any]:
    row = {
        "epoch": epoch,
        "step": 10 * epoch,
        "phase": "hard",
        "lr": 0.1,
        "loss": 2.0 / epoch,
        "train_robust": 0.3 + 0.1 * epoch,
        "train_clean": None,
        "target_entropy": 0.0,
        "val_clean": 0.6,
        "val_robust": 0.3,
        "test_clean": 0.7,
        "test_robust": 0.2 + 0.05 * epoch,
        "averaged": False,
    }
    return {**row, **more}


def write(
    folder: Path,
    name: str = "PGD-AT",
    seed: int = 0,
    *,
    metrics: list[dict[str, Any]] | None = None,
    best: dict[str, Any] | None = None,
    last: dict[str, Any] | None = None,
    examples: bool = False,
    **config: Any,
) -> RunRecord:
    (folder / "evaluation").mkdir(parents=True)
    settings = {
        "name": name,
        "seed": seed,
        "data": {"source": "digits", "split_seed": seed},
        "net": {"name": "small_cnn", "width": 8},
        "threat": {"norm": "linf", "eps": "8/255"},
        "label": {"class_path": "Hard"},
        "optim": {"epochs": 4, "lr": 0.1},
        "folder": str(folder),
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "commit": "abc1234"}))
    rows = [metrics_row(epoch) for epoch in (1, 2, 3, 4)] if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timing.jsonl").write_text('{"epoch": 1, "seconds": 2.0}\n{"epoch": 2, "seconds": 4.0}\n')
    for which, content in (("best", best), ("last", last)):
        if content:
            (folder / "evaluation" / f"{which}.json").write_text(json.dumps(content))
    if examples:
        write_examples(folder)
    return read_run(folder)


def write_examples(folder: Path, **changes: Any) -> None:
    image = np.full((2, 1, 4, 4), 0.5, np.float32)
    tensors = {
        "image": image,
        "adversarial": image + np.float32(0.1) * np.where(np.arange(4) % 2, 1, -1).astype(np.float32),
        "label": np.array([0, 1]),
        "clean_prediction": np.array([0, 1]),
        "adversarial_prediction": np.array([1, 1]),
        "clean_confidence": np.array([0.9, 0.8], np.float32),
        "adversarial_confidence": np.array([0.55, 0.65], np.float32),
    }
    path = folder / "evaluation" / "last-examples.safetensors"
    save_file({**tensors, **changes}, path, metadata={"classes": json.dumps(["cat", "dog"])})


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunRecord]:
    """Write and read a run; ``folder`` is a name under the test's own folder."""
    count = iter(range(1000))
    return lambda *args, **more: write(tmp_path / f"run{next(count)}", *args, **more)


@pytest.fixture
def make_evaluation() -> Callable[..., dict[str, Any]]:
    return evaluation


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    return metrics_row


@pytest.fixture
def make_examples() -> Callable[..., None]:
    return write_examples
