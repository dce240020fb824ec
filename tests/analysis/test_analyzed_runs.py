from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from softdefend.analysis import probe, runs
from softdefend.core.errors import SettingError
from softdefend.data.sources import read
from softdefend.report import RunRecord
from softdefend.training import checkpoint


@pytest.fixture(scope="module")
def opened(refined) -> runs.AnalyzedRun:
    return runs.open_runs([str(refined)], torch.device("cpu"))[0]


def test_names_are_as_short_as_they_can_be():
    def run(folder: str, name: str, seed: int) -> RunRecord:
        return RunRecord(Path(folder), name, seed, {"name": name}, {}, [], {})

    assert runs.unique_names([run("a", "x", 0), run("b", "y", 0)]) == ["x", "y"]
    alike = [run("a", "x", 0), run("b", "x", 1), run("c", "x", 1)]
    assert runs.unique_names(alike) == ["x, seed 0", "x, seed 1 (b)", "x, seed 1 (c)"]


def test_positions_lead_back_to_the_source(opened):
    at = runs.source_positions(opened)
    raw = read(opened.experiment.data)
    assert torch.equal(raw.train.images[at], opened.bundle.train.images)
    assert torch.equal(raw.train.labels[at], opened.bundle.train.clean_labels)


def test_last_weights_come_with_the_memory_and_best_ones_without(opened, refined):
    best, last = runs.find_weights(refined, ["best", "last"])
    assert runs.open_network(opened, best).memory is None
    network = runs.open_network(opened, last)
    state = runs.newest_state(refined)
    torch.testing.assert_close(network.memory, state["label"]["memory"].float())
    torch.testing.assert_close(network.memory.sum(dim=1), torch.ones(96))
    index = torch.tensor([3, 1])
    torch.testing.assert_close(network.targets(index), network.memory[index])  # r is 1
    assert (network.epoch, network.refines) == (3, True)


def test_a_running_runs_last_weights_are_the_average_of_its_newest_checkpoint(opened, refined, tmp_path):
    running = tmp_path / "running"
    shutil.copytree(refined, running)
    (running / "last.safetensors").unlink()
    (weights,) = runs.find_weights(running, ["last"])
    assert weights.path.suffix == ".ckpt"
    (finished,) = runs.find_weights(refined, ["last"])
    image = opened.bundle.test.images[:20].float() / 255
    found = [runs.open_network(opened, one) for one in (weights, finished)]
    logits = [probe.logits_of(one.net, image, 7) for one in found]
    torch.testing.assert_close(*logits)
    assert torch.equal(found[0].memory, found[1].memory)


def test_kept_checkpoints_are_all_found(refined):
    names = [one.name for one in runs.find_weights(refined, ["checkpoints"])]
    assert names == [path.stem for path in sorted((refined / "checkpoints").iterdir())]
    with pytest.raises(SettingError, match="--which"):
        runs.find_weights(refined, ["newest"])


def test_archived_checkpoints_are_those_of_every_nth_epoch(tiny_run):
    run = tiny_run("--optim.epochs 5 --save.archive 2")
    steps = [line["step"] for line in runs.open_runs([str(run)], torch.device("cpu"))[0].record.metrics]
    kept = [one.name for one in runs.find_weights(run, ["checkpoints"])]
    assert kept == [f"step-{steps[epoch - 1]:09d}" for epoch in (2, 4, 5)]
    assert [one.name for one in runs.find_weights(run, ["archived"])] == kept[:2]


def test_archived_needs_an_archive(refined):
    with pytest.raises(SettingError, match=r"--which: got 'archived' with .*save\.archive"):
        runs.find_weights(refined, ["archived"])


def test_a_memory_of_another_scale_is_normalized_and_empty_rows_are_the_given_label(opened):
    rows = torch.full((96, 10), 0.05)
    rows[0] = 0
    found = runs._filled(rows, opened.bundle.train.labels)
    assert found[0].argmax() == opened.bundle.train.labels[0]
    assert found[0].max() == 1
    torch.testing.assert_close(found[1:], torch.full((95, 10), 0.1))


def test_adversarial_images_stay_in_the_ball_and_hurt(opened, refined):
    network = runs.open_network(opened, runs.find_weights(refined, ["last"])[0])
    index = torch.arange(40)
    found = probe.attack_images(
        network.net, opened.train, index, opened.training_attack, opened.threat, seed=0, batch_size=16
    )
    batch = opened.train.take(index)
    assert opened.threat.distance(batch.image, found).max() <= 0.1 + 1e-6
    losses = [probe.per_sample_loss(network.net(image), batch.label).mean() for image in (batch.image, found)]
    assert losses[1] > losses[0]


def test_the_probe_is_a_function_of_size_and_seed():
    first = probe.draw_positions(100, 10, 0, "probe")
    assert torch.equal(first, probe.draw_positions(100, 10, 0, "probe"))
    assert len(first.unique()) == 10
    assert not torch.equal(first, probe.draw_positions(100, 10, 1, "probe"))
    assert torch.equal(probe.draw_positions(5, 10, 0, "probe"), torch.arange(5))


def test_a_checkpoint_of_another_network_is_one_line(opened, refined, tmp_path):
    state = runs.newest_state(refined)
    state["net"].popitem()
    path = tmp_path / f"step-{state['step']:09d}.ckpt"
    checkpoint.save(path, state)
    weights = runs.SavedWeights(path.stem, path, "")
    with pytest.raises(SettingError, match="another network or recipe"):
        runs.open_network(opened, weights)


@pytest.mark.parametrize(
    ("words", "refines"),
    [("--label SAT --label.start 0.3", True), ("--objective TE --objective.ramp_start 0", False)],
)
def test_other_rules_memories_are_found_and_te_does_not_train_towards_its_own(words, refines, tiny_run):
    (run,) = runs.open_runs([str(tiny_run(words))], torch.device("cpu"))
    network = runs.open_network(run, runs.find_weights(run.folder, ["last"])[0])
    torch.testing.assert_close(network.memory.sum(dim=1), torch.ones(96))
    assert not torch.equal(network.memory.argmax(dim=1), network.memory.argmin(dim=1))
    assert network.refines is refines
    assert (network.targets(torch.arange(5)) is None) is not refines
