"""An evaluation killed at any moment ends in the same records as one that was not."""

from __future__ import annotations

import json
import os
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import processes
from ensemble_tools import rugged
from softdefend.attacks import APGD, FAB, PGD, Square, TargetedAPGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import fingerprint, from_tensors
from softdefend.evaluation import (
    CheckpointSource,
    Ensemble,
    EvaluateSettings,
    accuracy,
    checkpoint,
    evaluate_checkpoint,
    examples,
    expand,
    settings,
)
from softdefend.evaluation.autoattack import parse
from softdefend.evaluation.resume import StateFile
from tiny import Killed

SHAPE, N = (1, 5, 5), 40
MEMBERS = (
    APGD(steps=4, restarts=2),
    TargetedAPGD(steps=4, targets=2),
    FAB(steps=5, restarts=2, targets=2),
    Square(queries=25),
)
THREATS = [
    ThreatModel("linf", Budget("0.02")),
    ThreatModel("l2", Budget("0.08")),
    ThreatModel("l1", Budget("0.3")),
]


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A function that evaluates one network in a run folder, and the folder."""
    net = rugged(SHAPE).float()
    image = torch.rand(2 * N, *SHAPE, generator=stream(0, "x"))
    bundle = from_tensors(image, net(image).argmax(1), validation=8, test_fraction=0.5, name="noise")
    for module in (accuracy, examples, settings):  # "small" is this test's own name
        monkeypatch.setattr(
            module, "parse", lambda name, k=10: Ensemble(name, MEMBERS) if name == "small" else parse(name, k)
        )
    monkeypatch.setattr(accuracy, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "preflight", lambda *_, **__: None)  # forwards are counted

    def evaluate(folder="run", threat=THREATS[0], **changes):
        path, origin = tmp_path / folder, changes.pop("origin", None)
        path.mkdir(exist_ok=True)
        if not (path / "last.safetensors").exists():
            metadata = {"softdefend": json.dumps({"epoch": 1, **changes.pop("metadata", {})})}
            save_file(net.state_dict(), path / "last.safetensors", metadata=metadata)
        wanted = {
            "attacks": ("pgd-3", "apgd-ce-4x2", "small"),
            "curve_size": 10,
            "examples": 4,
            "batch_size": 9,
        } | changes
        source = CheckpointSource(
            net, bundle, path, "last", trained=threat, threat=threat, architecture="rugged", origin=origin
        )
        return evaluate_checkpoint(source, EvaluateSettings(**wanted), device=torch.device("cpu"))

    return evaluate, tmp_path


def records(folder: Path):
    """The table, and the JSON without what a clock wrote and without the digest that knows of it."""
    report = json.loads((folder / "evaluation" / "last.json").read_text())

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "sha256")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    examples = (folder / "evaluation" / "last-examples.safetensors").read_bytes()
    return pq.read_table(folder / "evaluation" / "last.parquet"), timeless(report), examples


@pytest.mark.parametrize(
    ("threat", "microbatch", "precision"),
    [(THREATS[0], 20, "exact"), (THREATS[1], 5, "fast"), (THREATS[2], 5, "fast")],
    ids=["linf", "l2", "l1"],
)
def test_killed_at_every_save_it_ends_in_the_same_records(case, monkeypatch, threat, microbatch, precision):
    """Each process makes one save more and dies right after it; the next one starts from the file."""
    evaluate, folder = case
    evaluate("whole", threat, microbatch=microbatch, precision=precision)
    save, kills, last = StateFile.save, 0, ""

    def deadly(self, state):
        nonlocal last
        save(self, state)
        saved = str({k: v.sum().item() for k, v in self.load()[0].items()})
        assert saved != last  # every process comes further than the one before
        last = saved
        raise Killed

    monkeypatch.setattr(StateFile, "save", deadly)
    while True:
        try:
            evaluate("run", threat, microbatch=microbatch, precision=precision)
            break
        except Killed:
            kills += 1
    table, report, examples = records(folder / "run")
    wanted_table, wanted_report, wanted_examples = records(folder / "whole")
    assert table.equals(wanted_table)
    assert report == wanted_report
    assert examples == wanted_examples
    assert not (folder / "run" / "evaluation" / "last.state").exists()
    # Clean pass, groups of batches, and within them restarts, targets and blocks of queries.
    assert kills > 30


def test_what_is_done_is_not_done_again(case, monkeypatch):
    """Killed late, the second process makes few forwards."""
    evaluate, _ = case
    calls, save, saves = [], StateFile.save, []

    def counted(self, state):
        save(self, state)
        saves.append(1)
        if len(saves) == 45:
            raise Killed

    forward = torch.nn.Flatten.forward

    def watched(self, image):
        calls.append(len(image))
        return forward(self, image)

    monkeypatch.setattr(torch.nn.Flatten, "forward", watched)
    evaluate("whole", curve_size=0, examples=0, microbatch=20)
    whole = sum(calls)
    calls.clear()
    monkeypatch.setattr(StateFile, "save", counted)
    with pytest.raises(Killed):
        evaluate("run", curve_size=0, examples=0, microbatch=20)
    first = sum(calls)
    calls.clear()
    evaluate("run", curve_size=0, examples=0, microbatch=20)
    assert 0 < sum(calls) < whole / 2
    assert first + sum(calls) == whole


def test_harmless_settings_continue(case, monkeypatch):
    """Another microbatch or number of pictures finds the same state."""
    evaluate, folder = case
    save = StateFile.save

    def deadly(self, state):
        save(self, state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", deadly)
        with pytest.raises(Killed):
            evaluate("run", microbatch=20, examples=4)
    found, load = [], StateFile.load
    monkeypatch.setattr(StateFile, "load", lambda self: found.append(load(self)) or found[-1])
    evaluate("run", microbatch=7, examples=2)
    assert found[0] is not None
    evaluate("whole", microbatch=20, examples=2)
    got, wanted = records(folder / "run"), records(folder / "whole")
    assert got[0].equals(wanted[0])
    assert got[2] == wanted[2]


@pytest.mark.parametrize("same", [True, False])
def test_another_networks_state_is_not_continued(case, monkeypatch, same):
    evaluate, _ = case
    save = StateFile.save

    def deadly(self, state):
        save(self, state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", deadly)
        with pytest.raises(Killed):
            evaluate("run", origin="nets:make")
    found, load = [], StateFile.load
    monkeypatch.setattr(StateFile, "load", lambda self: found.append(load(self)) or found[-1])
    report = evaluate("run", origin="nets:make" if same else "nets:other")
    assert (found[0] is not None) == same
    assert report["network"]["origin"] == ("nets:make" if same else "nets:other")
    assert len(report["weights"]) == 64


def test_a_new_evaluation_takes_the_old_pictures_away(case):
    """A gallery is written after the records: the one that lies there is of another evaluation."""
    evaluate, folder = case
    evaluate("run")
    gallery = folder / "run" / "evaluation" / "last-gallery.safetensors"
    gallery.write_bytes(b"old")
    evaluate("run", examples=0, seed=1)
    assert not gallery.exists()
    assert not gallery.with_name("last-examples.safetensors").exists()


@pytest.mark.parametrize("change", ["settings", "weights", "damage", "truncation"])
def test_what_another_evaluation_left_is_not_continued(case, monkeypatch, change):
    evaluate, folder = case
    save = StateFile.save

    def deadly(self, state):
        save(self, state)
        if self.load()[1]["trials"].get("2.1"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", deadly)
        with pytest.raises(Killed):
            evaluate("run")
    state = folder / "run" / "evaluation" / "last.state"
    assert state.exists()
    options = {}
    if change == "settings":
        options = {"seed": 1}
    elif change == "weights":
        net = rugged(SHAPE, seed=1).float()
        for name in ("run", "whole"):
            (folder / name).mkdir(exist_ok=True)
            save_file(net.state_dict(), folder / name / "last.safetensors", metadata={"softdefend": "{}"})
    elif change == "damage":
        content = bytearray(state.read_bytes())
        content[4] ^= 255
        state.write_bytes(content)
    else:
        state.write_bytes(state.read_bytes()[:-50])
    evaluate("run", **options)
    evaluate("whole", **options)
    got, wanted = records(folder / "run"), records(folder / "whole")
    assert got[0].equals(wanted[0])
    assert got[1] == wanted[1]


def test_other_test_images_than_those_trained_beside_are_refused(case):
    evaluate, _ = case
    with pytest.raises(SettingError, match=r"data: got test images .*; accepted: the data that the run"):
        evaluate("run", metadata={"test_data": "0" * 64})
    good = evaluate("whole")["test_data"]
    assert evaluate("again", metadata={"test_data": good})["test_data"] == good


def test_fingerprints_know_images_labels_and_their_order():
    image, label = torch.rand(6, 1, 2, 2, generator=stream(0, "x")), torch.arange(6)
    one = from_tensors(image, label, validation=2, test_fraction=0.34, name="a").test
    same = from_tensors(image.clone(), label, validation=2, test_fraction=0.34, name="b").test
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(one.subset(torch.arange(len(one)).flip(0)))
    moved = from_tensors(image, label.roll(1), validation=2, test_fraction=0.34, name="a").test
    assert fingerprint(one) != fingerprint(moved)


def test_writes_are_apart(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    state, written = StateFile(tmp_path / "a.state", {"x": 1}, every=30), []

    def content():
        written.append(clock[0])
        return {"t": torch.zeros(2)}, {"n": 1}

    for now in (101.0, 129.0, 130.5, 140.0, 161.0):
        clock[0] = now
        state.save(content)
    assert written == [130.5, 161.0]
    assert StateFile(tmp_path / "a.state", {"x": 2}).load() is None
    tensors, values = StateFile(tmp_path / "a.state", {"x": 1}).load()
    assert values == {"n": 1}
    assert torch.equal(tensors["t"], torch.zeros(2))


def test_tensors_come_back_whatever_their_order_in_memory(tmp_path):
    """Channels last, a transposed view, and two views of one storage."""
    whole = torch.arange(48.0).view(2, 3, 4, 2)
    tensors = {
        "last": whole.to(memory_format=torch.channels_last),
        "turned": whole.mT,
        "part": whole[0],
    }
    state = StateFile(tmp_path / "state", {}, every=0)
    state.save(lambda: (tensors, {"done": 3}))
    loaded = StateFile(tmp_path / "state", {}).load()
    assert loaded is not None
    assert loaded[1] == {"done": 3}
    for name, tensor in tensors.items():
        assert torch.equal(loaded[0][name], tensor)


def test_a_file_that_is_no_state_is_not_continued(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "state")
    assert StateFile(tmp_path / "state", {}).load() is None


@pytest.mark.slow
def test_the_end_of_an_evaluation_takes_no_other_ones_state(tmp_path):
    mine, other = (StateFile(tmp_path / f"best-l2-{eps}.state", {}, every=0) for eps in ("1", "1.5"))
    for file in (mine, other, *(mine.of_process(rank) for rank in range(1, 8))):
        file.save(lambda: ({"x": torch.zeros(1)}, {}))
    assert len(list(tmp_path.iterdir())) == 9
    mine.remove()
    assert list(tmp_path.iterdir()) == [other.path]


def test_a_real_kill(tmp_path):
    """SIGKILL in the middle of Square, in a process of its own."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, sys, time
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
            import torch
            from safetensors.torch import save_file
            from ensemble_tools import rugged
            from softdefend.data import from_tensors
            from softdefend.evaluation import CheckpointSource, EvaluateSettings, evaluate_checkpoint
            from softdefend.evaluation import accuracy, checkpoint
            from softdefend.core.rng import stream
            from softdefend.core.threat import Budget, ThreatModel

            torch.set_num_threads(1)
            accuracy.SAVE_EVERY = 0.1
            checkpoint.preflight = lambda *_, **__: None
            folder, pause = Path(sys.argv[1]), float(sys.argv[2])
            net = rugged((1, 5, 5)).float()
            folder.mkdir(exist_ok=True)
            weights = folder / "last.safetensors"
            if not weights.exists():
                save_file(net.state_dict(), weights, metadata={{"softdefend": "{{}}"}})
            image = torch.rand(80, 1, 5, 5, generator=stream(0, "x"))
            bundle = from_tensors(image, net(image).argmax(1), validation=8, test_fraction=0.5, name="noise")
            slow = net[0].forward
            net[0].forward = lambda x: (time.sleep(pause), slow(x))[1]
            threat = ThreatModel("linf", Budget("0.02"))
            evaluate_checkpoint(
                CheckpointSource(
                    net, bundle, folder, "last", trained=threat, threat=threat, architecture="rugged"
                ),
                EvaluateSettings(("apgd-t-5", "square-100"), curve_size=0, batch_size=15),
                device=torch.device("cpu"),
            )
            """
        )
    )

    def start(folder: str, pause: float) -> processes.Program:
        return processes.Program([str(script), str(tmp_path / folder), str(pause)], os.environ)

    def assert_ends_well(folder: str) -> None:
        ((code, errors),) = processes.ended([start(folder, 0)])
        assert code == 0, errors

    assert_ends_well("whole")
    state, kills = tmp_path / "run" / "evaluation" / "last.state", 0
    for after in ("0.0", "1.0"):  # in the first attack, then in the second
        process = start("run", 0.01)
        deadline = time.time() + 100
        while process.ended()[0] is None and time.time() < deadline:
            saved = StateFile(state, {}).path.read_bytes() if state.exists() else b""
            if f'\\"{after}\\"'.encode() in saved and b"stage/" in saved:
                process.kill()
                kills += 1
                break
            time.sleep(0.02)
    assert kills == 2
    assert_ends_well("run")
    got, wanted = records(tmp_path / "run"), records(tmp_path / "whole")
    assert got[0].equals(wanted[0])
    assert got[1] == wanted[1]
    assert not state.exists()


def test_the_full_ensemble_has_a_name_in_the_settings():
    assert EvaluateSettings(("autoattack", "autoattack-plus", "pgd-5")).attacks[0] == "autoattack"
    assert len(expand("autoattack-plus", 10)) == 6
    assert PGD(steps=5) == parse("pgd-5")
