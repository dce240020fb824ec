"""Captured steps with other optimizers, parts, clipping and a ramp; run with ``pytest -m gpu``."""

from __future__ import annotations

import json

import pytest
import torch

from softdefend import PGDAT, SGLR, TRADES, OptimSettings
from softdefend.training import RuntimeSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("objective", [PGDAT, TRADES], ids=["pgd-at", "trades"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "adamw", "lr": 1e-3, "decay_all": False},
        {"name": "lion", "lr": 1e-3, "decay_all": False},
        {"lr": 0.1, "clip": 0.1},
        {"lr": 0.1, "accumulate": 2},
    ],
    ids=["adamw", "lion", "clip", "accumulate"],
)
def test_captured_steps_make_the_eager_steps_numbers(make_trainer, settings, objective):
    runs = []
    for capture in (False, True):
        trainer = make_trainer(
            SGLR(start=0),
            objective(),
            folder=f"capture-{capture}",
            optim=OptimSettings(epochs=3, batch_size=16, **settings),
            runtime=RuntimeSettings(device="cuda", deterministic=True, capture=capture),
            eps_ramp=0.7,
        )
        for module in trainer.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.fit()
        rows = (trainer.folder.path / "metrics.jsonl").read_text().splitlines()
        runs.append((trainer, [json.loads(row) for row in rows]))
    (eager, their), (captured, our) = runs
    for one, other in zip(captured.net.parameters(), eager.net.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)
    assert [row["eps"] for row in our] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert [row["loss"] for row in our] == pytest.approx([row["loss"] for row in their], rel=1e-2)
