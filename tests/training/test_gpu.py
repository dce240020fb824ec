"""What only a CUDA device can show; run with ``pytest -m gpu``."""

from __future__ import annotations

import json

import pytest
import torch

import softdefend
from killed_runs import train_whole_and_killed
from softdefend import AWP, EMA, PGD, PGDAT, SGLR, SWA, Hard, OptimSettings, Plain
from softdefend.data import AugmentSettings
from softdefend.training import RuntimeSettings, SaveSettings
from softdefend.training.config import RULES
from softdefend.training.step import Phase
from tiny import tiny_net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


def runtime(**settings) -> RuntimeSettings:
    return RuntimeSettings(device="cuda", **{"deterministic": True, **settings})


def weights(trainer) -> torch.Tensor:
    return torch.cat([v.float().flatten() for v in trainer.net.state_dict().values()])


PAIRS = [(label, "PGDAT") for label in RULES["label"].names() if label != "Hard"]
PAIRS += [("Hard", objective) for objective in RULES["objective"].names()] + [("SGLR", "TRADES")]


def rule(name):
    if name == "KD":
        return softdefend.KD(standard=tiny_net(seed=1), robust=tiny_net(seed=2))
    return getattr(softdefend, name)()


@pytest.mark.parametrize(("label", "objective"), PAIRS)
def test_captured_steps_equal_eager_steps(make_trainer, label, objective):
    """Without dropout-like draws of its own the captured step makes the eager step's numbers."""
    runs = {}
    for name, capture in (("eager", False), ("captured", True)):
        trainer = make_trainer(rule(label), rule(objective), folder=name, runtime=runtime(capture=capture))
        for module in trainer.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.fit()
        runs[name] = weights(trainer), (trainer.folder.path / "metrics.jsonl").read_text().splitlines()
    torch.testing.assert_close(runs["captured"][0], runs["eager"][0], atol=1e-5, rtol=1e-4)
    for captured, eager in zip(runs["captured"][1], runs["eager"][1], strict=True):
        captured, eager = json.loads(captured), json.loads(eager)
        assert captured["loss"] == pytest.approx(eager["loss"], rel=1e-3)
        assert captured["train_robust"] == pytest.approx(eager["train_robust"], abs=1 / 48 + 1e-9)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_captured_steps_run_on_a_device_that_is_not_the_current_one(make_trainer):
    runs = []
    for device in ("cuda:0", "cuda:1"):
        own = RuntimeSettings(device=device, deterministic=True, capture=True)
        trainer = make_trainer(SGLR(), PGDAT(), folder=device.replace(":", ""), runtime=own)
        trainer.fit()
        assert str(next(trainer.net.parameters()).device) == device
        runs.append(weights(trainer).cpu())
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(runs[0], runs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("label", "augment"),
    [
        (SGLR, {}),
        (Hard, {"policy": "randaugment", "cutout": 2, "cutmix": 0.5}),
        (SGLR, {"policy": "autoaugment"}),
    ],
)
def test_captured_steps_that_perturb_and_augment_equal_eager_steps(make_trainer, label, augment):
    results = []
    for capture in (False, True):
        trainer = make_trainer(
            label(),
            PGDAT(),
            AWP(warmup=0.3, average=SWA(start=0.3)),
            folder=f"capture-{capture}",
            runtime=runtime(capture=capture),
            augment=AugmentSettings("crop-flip", pad=1, **augment),
        )
        for module in trainer.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.fit()
        average = trainer.recipe.weight.prediction.state_dict().values()
        results.append(torch.cat([weights(trainer), *(v.float().flatten() for v in average)]))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [None, EMA, lambda: AWP(average=SWA(start=0.3))])
def test_a_captured_run_cut_and_continued_ends_in_the_same_bits(make_trainer, weight):
    def trainer(folder):
        return make_trainer(
            SGLR(),
            PGDAT(),
            weight and weight(),
            folder=folder,
            runtime=runtime(capture=True, channels_last=True),
        )

    whole, last = train_whole_and_killed(trainer, (2, 4))
    assert torch.equal(weights(whole), weights(last))


@pytest.mark.parametrize("label", ["Hard", "SGLR", "ADR", "ReBAT"])
@pytest.mark.parametrize("weight", [Plain, EMA, lambda: AWP(average=EMA(bn="average"))])
def test_no_step_makes_the_host_wait(make_trainer, label, weight):
    """Or the GPU would have nothing to do until the next step has been started."""
    trainer = make_trainer(rule(label), PGDAT(), weight(), runtime=runtime(capture=True))
    rows = trainer.train_data.plan(seed=0, epoch=0)[:16]
    phase = Phase(*(part.phase(2) for part in trainer.recipe.rules))
    for _ in range(2):
        trainer._make_step(rows, phase)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._make_step(rows, phase)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weights_after(trainer, keys):
    """The weights after one step from the same state and batch, for each key."""
    plan = torch.zeros(16, 4, dtype=torch.long, device="cuda")
    plan[:, 0] = torch.arange(16)
    results = []
    for key in keys:
        before = [t.detach().clone() for t in trainer.step._state()]
        trainer.step(plan, Phase("fixed", "fixed", "fixed"), key)
        results.append(weights(trainer))
        with torch.no_grad():
            for tensor, value in zip(trainer.step._state(), before, strict=True):
                tensor.copy_(value)
    return results


def test_every_replay_draws_new_noise(make_trainer):
    """The same batch, two keys: different random starts, so different updates; the same key: the same."""
    trainer = make_trainer(Hard(), PGDAT(), runtime=runtime(capture=True))
    for module in trainer.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one, other, again = weights_after(trainer, (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_replay_draws_new_dropout(make_trainer, compiled):
    """An attack without random start: what differs between keys is the dropout of the update."""
    trainer = make_trainer(
        Hard(), PGDAT(), attack=PGD(steps=1, start="none"), runtime=runtime(capture=True, compile=compiled)
    )
    one, other, again = weights_after(trainer, (1, 2, 1))
    assert trainer.step.captured == 1
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_fast_path_trains(make_trainer):
    """bf16, channels_last, compiled, captured: learns, and leaves weights in fp32."""
    trainer = make_trainer(
        SGLR(),
        PGDAT(),
        runtime=runtime(
            precision="bf16", channels_last=True, compile=True, capture=True, deterministic=False
        ),
        optim=OptimSettings(epochs=12, batch_size=12, lr=0.1),
        save=SaveSettings(),
    )
    rows = []
    trainer.fit(on_epoch=rows.append)
    assert rows[-1]["val_clean"] > 0.6
    assert all(p.dtype == torch.float32 for p in trainer.net.parameters())
