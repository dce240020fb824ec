"""Runs that start from weights or from another run's state, and what may be continued in place."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from killed_runs import FILES, assert_same_files
from softdefend import KD, PGDAT, SGLR, TRADES, Hard, OptimSettings
from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.labels import ADR
from softdefend.training import SaveSettings, checkpoint
from softdefend.training.start import check_resume
from softdefend.weights import AWP, EMA, SWA, Plain
from tiny import K, Killed, tiny_net

EVERY = SaveSettings(archive=1)


def optim(epochs=3, **changes):
    return OptimSettings(**{"epochs": epochs, "batch_size": 16, "lr": 0.1, **changes})


@pytest.fixture
def parent(make_trainer):
    """A finished run of three epochs with a memory and an average."""
    trainer = make_trainer(SGLR(start=0.0), PGDAT(), EMA(), "parent", save=EVERY)
    trainer.fit()
    trainer.folder.close()
    return trainer.folder.path


def first_checkpoint(folder):
    return min((folder / "checkpoints").glob("*.ckpt"))


def same(net, tensors):
    return all(torch.equal(value, tensors[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", ["run", "best", "last", "torch"])
def test_a_run_starts_from_weights(make_trainer, parent, tmp_path, kind):
    """As one whose network was given these weights by hand; all other settings may differ."""
    source = {"run": parent, "torch": tmp_path / "weights.pt"}.get(kind, parent / f"{kind}.safetensors")
    weights = load_file(parent / ("last.safetensors" if kind == "last" else "best.safetensors"))
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    settings = {"optim": optim(2, lr=0.02), "seed": 3}
    trainer = make_trainer(Hard(), TRADES(), init_from=str(source), folder="from file", **settings)
    assert same(trainer.net, weights)
    assert trainer.state.epoch == 0
    trainer.fit()
    by_hand = tiny_net()
    by_hand.load_state_dict(weights)
    other = make_trainer(Hard(), TRADES(), net=by_hand, folder="by hand", **settings)
    other.fit()
    assert same(trainer.net, other.net.state_dict())
    recorded = yaml.safe_load((trainer.folder.path / "config.yaml").read_text())
    file = parent / "best.safetensors" if kind == "run" else source
    assert (recorded["init_from"], recorded["init_sha256"]) == (str(source), file_digest(file))


def test_averages_start_at_the_weights_that_were_loaded(make_trainer, parent):
    weights = load_file(parent / "best.safetensors")
    for number, weight in enumerate((EMA(), SWA(), AWP(average=EMA()))):
        trainer = make_trainer(Hard(), PGDAT(), weight, f"run-{number}", init_from=str(parent))
        assert same(trainer.recipe.weight.prediction, weights)
    trainer = make_trainer(ADR(), PGDAT(), folder="adr", init_from=str(parent))
    assert same(trainer.recipe.label.teacher, weights)


def test_a_fork_with_the_same_settings_goes_on_as_the_run_did(make_trainer, parent):
    """Every random draw belongs to an epoch and a step: with nothing changed it ends in the same bits."""
    fork = make_trainer(
        SGLR(start=0.0), PGDAT(), EMA(), "fork", save=EVERY, init_from=str(first_checkpoint(parent))
    )
    fork.fit()
    ours, theirs = (
        checkpoint.load(checkpoint.CheckpointFolder(folder / "checkpoints").paths()[-1])
        for folder in (fork.folder.path, parent)
    )
    for part in ("net", "label"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    averages = (state["weight"]["averaged"] for state in (ours, theirs))
    assert all(torch.equal(*pair) for pair in zip(*(average.values() for average in averages), strict=True))
    assert all(
        torch.equal(*pair) for pair in zip(*(s["optimizer"]["tensors"] for s in (ours, theirs)), strict=True)
    )
    files = (folder / "metrics.jsonl" for folder in (fork.folder.path, parent))
    rows, before = (file.read_text().splitlines() for file in files)
    assert rows == before[1:]  # from the second epoch on


def test_a_fork_may_be_longer_and_have_another_rate(make_trainer, parent, caplog):
    caplog.set_level("INFO")
    source = str(first_checkpoint(parent))
    fork = make_trainer(
        SGLR(start=0.0), PGDAT(), EMA(), "fork", optim=optim(5, lr=0.01), init_from=source, seed=7
    )
    assert fork.state.epoch == 1
    assert caplog.messages[-1] == (
        f"starts from {source}, after epoch 1; "
        "taken: network, momentum, state of SGLR, state of EMA; anew: nothing"
    )
    rows = []
    fork.fit(on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [2, 3, 4, 5]
    assert [row["step"] for row in rows] == [6, 9, 12, 15]
    assert rows[0]["lr"] == 0.01


def test_what_does_not_fit_the_new_recipe_begins_anew(make_trainer, parent, caplog):
    caplog.set_level("INFO")
    source = str(first_checkpoint(parent))
    state = checkpoint.load(first_checkpoint(parent))
    fork = make_trainer(ADR(), PGDAT(), SWA(), "fork", init_from=source)
    assert caplog.messages[-1].endswith("; taken: network, momentum; anew: state of ADR, state of SWA")
    assert same(fork.recipe.label.teacher, state["net"])
    plain = make_trainer(Hard(), TRADES(), Plain(), "plain", init_from=source, optim=optim(3, momentum=0))
    assert caplog.messages[-1].endswith("; taken: network; anew: nothing")
    plain.fit()


def test_a_memory_of_other_images_is_not_taken(make_trainer, bundle, parent, caplog):
    caplog.set_level("INFO")
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = copy.copy(bundle)
    object.__setattr__(shuffled, "train", bundle.train.subset(order))
    object.__setattr__(shuffled, "fingerprint", "other")
    source = str(first_checkpoint(parent))
    fork = make_trainer(SGLR(start=0.0), PGDAT(), EMA(), "fork", data=shuffled, init_from=source)
    assert caplog.messages[-1].endswith("; taken: network, momentum, state of EMA; anew: state of SGLR")
    fresh = make_trainer(SGLR(start=0.0), PGDAT(), EMA(), "fresh", data=shuffled)
    ours, theirs = fork.recipe.label.state_dict(), fresh.recipe.label.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_other_teachers_may_teach_a_fork(make_trainer):
    first = make_trainer(KD(robust=tiny_net(seed=1)), PGDAT(), folder="first", save=EVERY)
    first.fit()
    source = str(first_checkpoint(first.folder.path))
    make_trainer(KD(robust=tiny_net(seed=2)), PGDAT(), folder="second", init_from=source).fit()


def test_an_epoch_that_was_not_finished_begins_anew(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), folder="first", save=SaveSettings(every_steps=1, keep=9))
    trainer.fit()
    source = trainer.folder.path / "checkpoints" / "step-000000005.ckpt"
    fork = make_trainer(Hard(), PGDAT(), folder="second", init_from=str(source))
    assert (fork.state.epoch, fork.state.done) == (1, 0)
    assert not fork.step.meters.any()
    assert same(fork.net, checkpoint.load(source)["net"])


@pytest.mark.parametrize("kind", ["weights", "state"])
def test_a_killed_run_continues_without_what_it_started_from(make_trainer, parent, kind):
    source = parent if kind == "weights" else first_checkpoint(parent)

    def start(folder):
        return make_trainer(SGLR(start=0.0), PGDAT(), EMA(), folder, optim=optim(4), init_from=str(source))

    whole = start("whole")
    whole.fit()

    def stop(row):
        if row["epoch"] == 2:
            raise Killed

    part = start("part")
    with pytest.raises(Killed):
        part.fit(on_epoch=stop)
    part.folder.close()
    shutil.rmtree(parent)
    again = start("part")
    again.fit()
    assert_same_files(again.folder.path, whole.folder.path, (*FILES, "config.yaml"))


def refused(make_trainer, tmp_path, said, **settings):
    net = tiny_net()
    with pytest.raises(SettingError, match=said) as caught:
        make_trainer(Hard(), PGDAT(), folder="refused", net=net, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()
    assert same(net, tiny_net().state_dict())


def test_what_a_run_cannot_start_from_is_refused_before_the_folder_is_made(make_trainer, parent, tmp_path):
    def check(said, source=None, **settings):
        refused(make_trainer, tmp_path, said, init_from=None if source is None else str(source), **settings)

    check(
        r"^init_from: got .*nowhere \(No such file or directory\); accepted: a run folder",
        tmp_path / "nowhere",
    )
    check(r"^init_from: got .*best\.safetensors \(No such file", tmp_path)
    check(r"^init_from: got /dev/zero \(no regular file\)", "/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    check(r"^init_from: got .*pipe \(no regular file\)", tmp_path / "pipe")
    (tmp_path / "text").write_text("nothing")
    check(r"text: got a damaged or foreign file", tmp_path / "text")
    last = parent / "last.safetensors"
    digest = file_digest(last)
    check(f"^init_from: got .* of sha256 {digest}; accepted: the file of sha256 abc", last, init_sha256="abc")
    check(r"^init_sha256: got a digest without init_from", init_sha256=digest)
    newest = max((parent / "checkpoints").iterdir())
    check(r"^optim\.epochs: got 3; accepted: more than the 3 that .* has behind it", newest)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    check("checksum does not match", newest)


def test_weights_of_another_network_are_refused(make_trainer, parent, tmp_path):
    for source in (parent, first_checkpoint(parent)):
        with pytest.raises(SettingError, match="other shapes: 6"):
            make_trainer(Hard(), PGDAT(), folder="refused", net=tiny_net(K + 1), init_from=str(source))
    assert not (tmp_path / "refused").exists()


def test_weights_in_the_folder_of_another_run_are_refused(make_trainer, parent, tmp_path):
    other = make_trainer(Hard(), PGDAT(), folder="other")
    other.fit()
    shutil.copy(other.folder.path / "best.safetensors", parent / "best.safetensors")
    refused(make_trainer, tmp_path, r"best\.safetensors: got weights of another run", init_from=str(parent))


def test_a_start_that_got_nowhere_may_have_begun_elsewhere(make_trainer, parent):
    make_trainer(Hard(), PGDAT(), folder="run", init_from=str(parent)).folder.close()
    trainer = make_trainer(Hard(), PGDAT(), folder="run")
    assert same(trainer.net, tiny_net().state_dict())


def test_a_run_goes_on_with_what_it_began_with_only(make_trainer, parent):
    first = make_trainer(Hard(), PGDAT(), folder="run")
    first.fit()
    first.folder.close()
    with pytest.raises(SettingError, match=r"^init_from: got .* began with None"):
        make_trainer(Hard(), PGDAT(), folder="run", init_from=str(parent))


def test_only_checkpoints_of_the_run_in_the_folder_are_resumed(make_trainer, parent, tmp_path):
    source = first_checkpoint(parent)
    rest = rf"accepted: a checkpoint of the run in the folder; --init_from {source} starts a new run from it$"
    with pytest.raises(SettingError, match=rf"^resume: got {source}, and no run in .*new; {rest}"):
        check_resume(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    other = make_trainer(SGLR(start=0.0), PGDAT(), EMA(), "other", save=EVERY, seed=1)
    other.fit()
    with pytest.raises(SettingError, match=rf"^resume: got {source}, of another run than that in .*; {rest}"):
        check_resume(source, other.folder.path)
    check_resume(source, parent)


def test_what_is_resumed_may_lie_elsewhere_and_have_another_name(make_trainer, parent, tmp_path):
    copied = shutil.copy(first_checkpoint(parent), tmp_path / "kept.ckpt")
    check_resume(copied, parent)
    weights = (parent / "last.safetensors").read_bytes()
    again = make_trainer(SGLR(start=0.0), PGDAT(), EMA(), "parent", save=EVERY)
    again.fit(resume=copied)
    assert (parent / "last.safetensors").read_bytes() == weights
