"""What goes wrong around a training run, and what must not be lost with it."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch
from safetensors import safe_open

import softdefend
from softdefend import PGDAT, SGLR, Hard
from softdefend.core.errors import SettingError
from softdefend.core.files import Writer
from softdefend.core.rule import RunInfo
from softdefend.labels import ADR
from softdefend.training import SaveSettings, folder
from tiny import Killed, tiny_net


def epoch_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["softdefend"])["epoch"]


def rows(trainer, name="metrics.jsonl"):
    return [json.loads(line) for line in (trainer.folder.path / name).read_text().splitlines()]


def validates(trainer, figures):
    """Have the trainer find these robust accuracies, epoch by epoch, in place of measuring."""
    given = {"val_clean": 1.0, "test_clean": None, "test_robust": None}
    trainer.validator.measure = lambda net, epoch: {**given, "val_robust": figures[epoch - 1]}


@pytest.mark.parametrize("temperature", [10.0, 30.0])
def test_a_recipe_that_charges_much_for_guessing_has_not_diverged(make_trainer, temperature):
    label = softdefend.KD(standard=tiny_net(seed=1), robust=tiny_net(seed=2), temperature=temperature)
    trainer = make_trainer(label, PGDAT(), optim=softdefend.OptimSettings(epochs=2, batch_size=16, lr=1e-4))
    trainer.fit()
    assert rows(trainer)[0]["loss"] > 20 * torch.log(torch.tensor(4.0))


def test_a_loss_far_above_that_of_the_first_step_still_has(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), optim=softdefend.OptimSettings(epochs=3, batch_size=16, lr=1e4))
    with pytest.raises(softdefend.core.errors.DivergenceError):
        trainer.fit()


def test_after_a_failure_nothing_more_is_written_and_waiting_waits_for_all():
    writer, gate, done = Writer(), threading.Event(), []

    def fails():
        gate.wait(5)
        raise SettingError("a", "b", "c")

    writer(fails)
    writer(lambda: done.append("after"))
    gate.set()
    for _ in range(2):  # it does not forget
        with pytest.raises(SettingError):
            writer.wait()
    assert done == []
    with pytest.raises(SettingError):
        writer(lambda: done.append("later"))
    assert done == []


@pytest.mark.parametrize("background", [False, True])
def test_best_weights_that_cannot_be_written_are_not_claimed_by_a_checkpoint(
    make_trainer, monkeypatch, background
):
    whole = make_trainer(Hard(), PGDAT(), folder="whole")
    validates(whole, [0.2, 0.9, 0.5])
    whole.fit()
    broken = make_trainer(Hard(), PGDAT(), folder="broken")
    validates(broken, [0.2, 0.9, 0.5])
    broken.folder.writer._background = background
    real = folder.write_atomic

    def fails(path, content):
        if "pending" in path.name and broken.state.epoch == 2:
            raise SettingError(str(path), "No space left on device", "space")
        real(path, content)

    monkeypatch.setattr(folder, "write_atomic", fails)
    with pytest.raises(SettingError, match="No space left"):
        broken.fit()
    broken.folder.close()
    monkeypatch.undo()
    again = make_trainer(Hard(), PGDAT(), folder="broken")
    validates(again, [0.2, 0.9, 0.5])
    again.fit()
    best = [trainer.folder.path / "best.safetensors" for trainer in (whole, again)]
    assert epoch_of(best[1]) == again.state.best["epoch"] == 2
    assert best[0].read_bytes() == best[1].read_bytes()


def test_a_kill_between_the_best_weights_and_their_checkpoint_leaves_the_best_before(make_trainer):
    """Where arithmetic is not exact the epoch that is made again may not be the best any more."""
    trainer = make_trainer(Hard(), PGDAT(), save=SaveSettings())
    validates(trainer, [0.2, 0.5, 0.9])
    save = trainer.saves.save

    def killed():
        if trainer.state.epoch == 3:
            raise Killed
        save()

    trainer.saves.save = killed
    with pytest.raises(Killed):
        trainer.fit()
    trainer.folder.close()
    again = make_trainer(Hard(), PGDAT(), save=SaveSettings())
    validates(again, [0.2, 0.5, 0.4])
    again.fit()
    assert again.state.best == {"epoch": 2, "val_robust": 0.5}
    assert epoch_of(again.folder.path / "best.safetensors") == 2
    assert not list(again.folder.path.glob(".best*"))


def test_going_back_to_an_older_checkpoint_puts_the_newer_ones_aside(make_trainer, caplog):
    trainer = make_trainer(Hard(), PGDAT(), save=SaveSettings(archive=1))
    validates(trainer, [0.2, 0.3, 0.9])
    trainer.fit()
    trainer.folder.close()
    first, *later = trainer.folder.checkpoints.paths()
    again = make_trainer(Hard(), PGDAT(), save=SaveSettings())
    validates(again, [0.2, 0.3, 0.1])
    again.fit(resume=first)
    assert [path.name for path in sorted((first.parent / "abandoned").iterdir())] == [p.name for p in later]
    assert [path.name for path in again.folder.checkpoints.paths()] == [p.name for p in later]
    assert [text[:36] for text in caplog.messages] == ["best.safetensors is not of epoch 1, "]
    assert again.state.best["epoch"] == epoch_of(again.folder.path / "best.safetensors") == 2
    again.folder.close()
    final = make_trainer(Hard(), PGDAT(), save=SaveSettings())  # a plain start finds a whole run
    final.fit()
    assert final.state.epoch == 3


def test_half_a_line_of_times_does_not_spoil_the_next(make_trainer):
    trainer = make_trainer(Hard(), PGDAT())
    trainer.fit()
    path = trainer.folder.path / "timing.jsonl"
    path.write_text(path.read_text() + '{"epoch": 3, "sec')
    trainer.folder.append("timing.jsonl", {"epoch": 4, "seconds": 1.0})
    assert [row["epoch"] for row in rows(trainer, "timing.jsonl")] == [1, 2, 3, 4]
    path.write_text("half a first line")
    trainer.folder.append("timing.jsonl", {"epoch": 1})
    assert rows(trainer, "timing.jsonl") == [{"epoch": 1}]


def test_what_ends_training_is_not_hidden_by_what_could_not_be_written(make_trainer, monkeypatch, caplog):
    trainer = make_trainer(Hard(), PGDAT(), save=SaveSettings())
    trainer.folder.writer._background = True
    full = SettingError("folder", OSError(errno.ENOSPC, "No space left on device"), "space")

    def fails(path, content):
        raise full

    monkeypatch.setattr("softdefend.training.checkpoint.write_atomic", fails)
    ends = trainer._end_epoch

    def interrupted(phase):
        ends(phase)
        trainer.saves.save()
        raise KeyboardInterrupt

    trainer._end_epoch = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert "No space left" in caplog.text


def test_dropout_and_the_attacks_starts_draw_from_different_seeds(make_trainer):
    trainer = make_trainer(SGLR(), PGDAT())
    trainer.fit()
    assert trainer.step.generator.initial_seed() != torch.initial_seed()


def test_a_tensor_under_two_names_is_averaged_once():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[2].weight = net[1].weight
    rule = ADR(decay=0.9)
    rule.setup(RunInfo(torch.arange(4), 4, 2, net))
    before = rule.teacher[1].weight.clone()
    with torch.no_grad():
        net[1].weight += 1.0
    rule.after_step()
    torch.testing.assert_close(rule.teacher[1].weight, before + 0.1)


def test_batch_mode_of_an_attack_leaves_tracking_as_it_was():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    with softdefend.execution.network_mode.frozen(net, "batch"):
        assert not net[0].track_running_stats
    assert net[0].track_running_stats
