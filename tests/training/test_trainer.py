"""The loop: what it counts, what it selects, when it stops."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softdefend import PGD, PGDAT, SGLR, TRADES, Hard, OptimSettings, Schedule
from softdefend.core.errors import DivergenceError, SettingError
from softdefend.data import AugmentSettings, Resident, subset
from softdefend.evaluation import Evaluator
from softdefend.execution.engine import Engine, resolve_device
from softdefend.training import RuntimeSettings, SaveSettings, ValidateSettings, checkpoint


def rows_of(trainer):
    return [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines()]


def test_plain_training_equals_a_loop_written_by_hand(make_trainer, bundle, make_net):
    """Two epochs without attack, augmentation or dropout: SGD with momentum, weight decay and the schedule
    against torch used directly, in the same order of samples."""
    trainer = make_trainer(
        Hard(),
        PGDAT(),
        optim=OptimSettings(
            epochs=4, batch_size=16, lr=0.1, weight_decay=1e-2, nesterov=True, drop_last=False
        ),
        augment=AugmentSettings("none", pad=0),
    )
    trainer.step.attack = PGD(steps=0, start="none")
    net = make_net()
    for module in [*net.modules(), *trainer.net.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    orders = []
    take = trainer.step.data.batch
    trainer.step.data.batch = lambda plan: orders.append(plan[:, 0].tolist()) or take(plan)  # type: ignore[method-assign]
    trainer.fit()

    assert sorted(index for order in orders[:3] for index in order) == list(range(48))
    images, labels = bundle.train.images, bundle.train.labels
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    net.train()
    for number, order in enumerate(orders):
        sgd.param_groups[0]["lr"] = 0.1 if number < 6 else 0.01 if number < 9 else 0.001
        sgd.zero_grad()
        nn.functional.cross_entropy(net(images[order]), labels[order]).backward()
        sgd.step()
    for ours, theirs in zip(trainer.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_best_checkpoint_is_the_first_with_the_highest_validation_robust_accuracy(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), optim=OptimSettings(epochs=8, batch_size=16, lr=0.3))
    seen = {}
    trainer.fit(
        on_epoch=lambda row: seen.__setitem__(
            row["epoch"], {k: v.clone() for k, v in trainer.net.state_dict().items()}
        )
    )
    figures = [row["val_robust"] for row in rows_of(trainer)]
    best = 1 + int(np.argmax(figures))
    saved = load_file(trainer.folder.path / "best.safetensors")
    assert trainer.state.best == {"epoch": best, "val_robust": max(figures)}
    assert all(torch.equal(saved[key], seen[best][key]) for key in saved)
    last = load_file(trainer.folder.path / "last.safetensors")
    assert all(torch.equal(last[key], seen[8][key]) for key in last)


@pytest.mark.parametrize("background", [False, True])
def test_every_second_epoch_can_be_kept(make_trainer, background):
    """Also where files are written while training goes on, as on a GPU; what they hold is the same."""
    trainers = [
        make_trainer(
            SGLR(),
            PGDAT(),
            folder=f"run-{number}",
            optim=OptimSettings(epochs=5, batch_size=16),
            save=SaveSettings(archive=2),
        )
        for number in range(2)
    ]
    trainers[1].folder.writer._background = background
    kept = []
    for trainer in trainers:
        trainer.fit()
        kept.append([checkpoint.load(path) for path in sorted(trainer.folder.path.rglob("*.ckpt"))])
    assert [state["epoch"] for state in kept[0]] == [2, 4, 5]
    for one, other in zip(*kept, strict=True):
        assert all(torch.equal(one["net"][name], other["net"][name]) for name in one["net"])
    assert (trainers[1].folder.path / "last.safetensors").is_file()


def test_validation_figures_are_those_of_an_evaluation_of_the_same_weights(make_trainer, bundle, make_net):
    trainer = make_trainer(
        Hard(), PGDAT(), validate=ValidateSettings(attack=PGD(steps=4), size=10, test_size=20)
    )
    trainer.fit()
    net = make_net()
    net.load_state_dict(load_file(trainer.folder.path / "last.safetensors"))
    final = rows_of(trainer)[-1]
    for name, split, size in (("val", bundle.validation, 10), ("test", bundle.test, 20)):
        result = Evaluator(net, Resident(split, "cpu"), trainer.recipe.threat)(
            [PGD(steps=4)], index=subset(split.labels, size)
        )
        assert (result.clean.rate, result.robust("pgd-4").rate) == (
            final[f"{name}_clean"],
            final[f"{name}_robust"],
        )
        assert result.clean.n == size


def test_training_figures_are_counted_on_the_steps_own_adversarial_images(make_trainer):
    """Against logits and labels collected by hooks on the training forwards."""
    trainer = make_trainer(Hard(), PGDAT(), optim=OptimSettings(epochs=1, batch_size=16))
    right, losses, count = 0, 0.0, 0
    target = trainer.recipe.label.target

    def spy(batch, predictions, phase):
        nonlocal right, losses, count
        logits = predictions.adversarial
        right += int((logits.argmax(1) == batch.label).sum())
        losses += float(nn.functional.cross_entropy(logits, batch.label, reduction="sum"))
        count += len(logits)
        return target(batch, predictions, phase)

    trainer.recipe.label.target = spy  # type: ignore[method-assign]
    trainer.fit()
    (row,) = rows_of(trainer)
    assert count == 48
    assert row["train_robust"] == right / 48
    assert row["loss"] == pytest.approx(losses / 48, rel=1e-5)
    assert row["train_clean"] is None
    assert row["target_entropy"] == 0


def test_clean_figures_appear_when_clean_forwards_are_made(make_trainer):
    trainer = make_trainer(SGLR(start=0.6), PGDAT(), optim=OptimSettings(epochs=4, batch_size=16))
    trainer.fit()
    rows = rows_of(trainer)
    assert [row["phase"] for row in rows] == ["hard", "hard", "refined", "refined"]
    assert [row["train_clean"] is None for row in rows] == [True, True, False, False]
    assert rows[-1]["target_entropy"] > 0
    trades = make_trainer(Hard(), TRADES(), folder="trades")
    trades.fit()
    assert all(row["train_clean"] is not None for row in rows_of(trades))


@pytest.mark.parametrize(
    ("label", "objective", "per_step"),
    [
        (Hard(), PGDAT(), 1),  # the adversarial forward
        (SGLR(start=0.0), PGDAT(), 2),  # and the clean one, as the reference
        (SGLR(start=0.0, clean_bn="batch"), PGDAT(), 1),
        (SGLR(start=0.0, clean_bn="eval"), PGDAT(), 1),
        (Hard(), TRADES(), 2),  # clean, then adversarial
        (SGLR(start=0.0), TRADES(), 2),
    ],
    ids=["at", "sglr", "sglr-batch", "sglr-eval", "trades", "trades-sglr"],
)
def test_batch_normalization_statistics_move_as_often_as_the_card_says(
    make_trainer, label, objective, per_step
):
    trainer = make_trainer(label, objective, optim=OptimSettings(epochs=1, batch_size=16))
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == 3 * per_step


@pytest.mark.parametrize(("mode", "updates"), [("eval", 1), ("batch", 1), ("train", 1 + 3)])
def test_attack_bn_says_whether_the_attack_moves_statistics(make_trainer, mode, updates):
    trainer = make_trainer(Hard(), PGDAT(), optim=OptimSettings(epochs=1, batch_size=48))
    object.__setattr__(trainer.recipe, "attack_bn", mode)
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == updates


def test_a_trades_attack_starts_from_gaussian_noise_unless_told_otherwise(make_trainer):
    assert make_trainer(Hard(), TRADES(), folder="a").step.attack.start == "gaussian"
    assert make_trainer(Hard(), PGDAT(), folder="b").step.attack.start == "uniform"


class Explodes(nn.Module):
    """Logits that become NaN after so many forwards in training mode."""

    def __init__(self, net, after):
        super().__init__()
        self.net, self.after = net, after

    def forward(self, image):
        self.after -= self.net.training
        return self.net(image) * (float("nan") if self.after < 0 else 1.0)


def test_a_nan_loss_stops_with_one_line_and_keeps_the_last_good_checkpoint(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), save=SaveSettings(every_steps=1))
    trainer.step._forward = Explodes(trainer.net, after=4)
    with pytest.raises(
        DivergenceError, match=r"epoch 2, step 2: the loss is nan; the last good checkpoint is .*004"
    ) as e:
        trainer.fit()
    assert "\n" not in str(e.value)
    kept = trainer.folder.checkpoints.load()
    assert all(value.isfinite().all() for value in kept["net"].values())
    assert (kept["epoch"], kept["done"]) == (1, 1)


def test_a_weight_that_is_not_finite_stops_before_it_is_saved(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), save=SaveSettings())
    step = trainer.step._body

    def spoil(plan, phase):
        step(plan, phase)
        if trainer.state.done == trainer.steps_per_epoch - 1:  # no loss of this epoch has seen it
            with torch.no_grad():
                trainer.net[0].weight[0, 0, 0, 0] = float("inf")

    trainer.step._body = spoil
    with pytest.raises(DivergenceError, match="a weight is not finite"):
        trainer.fit()
    assert trainer.folder.checkpoints.paths() == []
    assert not (trainer.folder.path / "best.safetensors").exists()


def test_a_folder_in_use_is_refused(make_trainer):
    make_trainer(Hard(), PGDAT())
    with pytest.raises(SettingError, match="in use by another process"):
        make_trainer(Hard(), PGDAT())


def test_metrics_lost_from_under_a_run_are_written_again(make_trainer, caplog):
    trainer = make_trainer(Hard(), PGDAT())
    trainer.fit()
    trainer.folder.close()
    rows = rows_of(trainer)
    (trainer.folder.path / "metrics.jsonl").write_text("")
    again = make_trainer(Hard(), PGDAT())
    again.fit()
    assert rows_of(again) == rows
    assert "metrics.jsonl had lost its end" in caplog.text


def test_a_checkpoint_of_another_network_is_refused(make_trainer):
    trainer = make_trainer(Hard(), PGDAT())
    trainer.fit()
    trainer.folder.close()
    again = make_trainer(Hard(), PGDAT())
    again.net[6] = nn.Linear(32, 5)
    with pytest.raises(SettingError, match="another network or recipe"):
        again.fit()


def test_normalization_per_process_needs_as_many_processes_as_before(make_trainer):
    """Statistics of other shares are another method."""
    runtime = RuntimeSettings(device="cpu", threads=1, batch_norm="per_process")
    trainer = make_trainer(Hard(), PGDAT(), runtime=runtime)
    trainer.saves.save()
    (path,) = trainer.folder.checkpoints.paths()
    checkpoint.save(path, {**checkpoint.load(path), "processes": 2})
    trainer.folder.close()
    with pytest.raises(SettingError, match=r"^runtime\.devices: got 1 with .*; accepted: 2 processes"):
        make_trainer(Hard(), PGDAT(), runtime=runtime).fit()


def test_a_rule_that_does_not_take_its_own_state_back_is_named(make_trainer):
    class Forgetful(Hard):
        def state_dict(self):
            return {"seen": torch.zeros(1)}

        def load_state_dict(self, state):
            self.seen = state["sene"]

    trainer = make_trainer(Forgetful(), PGDAT())
    trainer.fit()
    trainer.folder.close()
    said = r"state Forgetful does not take \(KeyError: 'sene'\).* load_state_dict"
    with pytest.raises(SettingError, match=said):
        make_trainer(Forgetful(), PGDAT()).fit()


def test_cosine_changes_the_rate_at_every_step(make_trainer):
    optim = OptimSettings(epochs=3, batch_size=16, lr=0.1, schedule=Schedule("cosine"))
    trainer, rates = make_trainer(Hard(), PGDAT(), optim=optim), []
    set_lr = trainer.step.set_lr
    trainer.step.set_lr = lambda lr: rates.append(lr) or set_lr(lr)  # type: ignore[method-assign]
    trainer.fit()
    np.testing.assert_allclose(rates, [0.05 * (1 + np.cos(np.pi * i / 9)) for i in range(9)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimSettings(batch_size=0), r"optim\.batch_size"),
        (lambda: OptimSettings(lr=float("nan")), r"optim\.lr"),
        (lambda: OptimSettings(momentum=0.0, nesterov=True), r"optim\.nesterov"),
        (lambda: ValidateSettings(every=0), r"validate\.every"),
        (lambda: ValidateSettings(size=0), r"validate\.size"),
        (lambda: SaveSettings(keep=1), r"save\.keep"),
        (lambda: SaveSettings(every_steps=0), r"save\.every_steps"),
        (lambda: RuntimeSettings(precision="fp64"), r"runtime\.precision"),
        (lambda: RuntimeSettings(threads=0), r"runtime\.threads"),
        (lambda: resolve_device("tpu"), r"runtime\.device"),
        (lambda: resolve_device("mps"), r"runtime\.device"),
        (lambda: resolve_device("cuda:99"), r"runtime\.device"),
        (lambda: Engine(RuntimeSettings(device="cpu", capture=True)), r"runtime\.capture"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_open_choices_are_decided_for_the_device():
    open_ = RuntimeSettings(device="cpu", precision="auto", channels_last=None, compile=None, capture=None)
    assert Engine(open_).settings == RuntimeSettings(device="cpu")


def test_bf16_and_channels_last_train_on_the_cpu_and_keep_fp32_weights(make_trainer):
    runtime = RuntimeSettings(device="cpu", precision="bf16", channels_last=True, threads=1)
    trainer = make_trainer(
        Hard(), PGDAT(), runtime=runtime, optim=OptimSettings(epochs=10, batch_size=12, lr=0.1)
    )
    inside = []
    trainer.net[0].register_forward_hook(
        lambda _, inputs, output: inside.append((inputs[0].dtype, output.dtype))
    )
    trainer.fit()
    assert (torch.float32, torch.bfloat16) in inside
    assert all(p.dtype == torch.float32 for p in trainer.net.parameters())
    assert rows_of(trainer)[-1]["val_clean"] > 0.6
