"""What trackers hold is what the run measured, also after a kill; and they change nothing in the run."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from killed_runs import assert_same_files
from softdefend.core.errors import SettingError
from softdefend.training import SaveSettings
from softdefend.training.trackers import TRACKERS, Outcome, TrackedRun, Tracker, Trackers

KILLS = [(None, False), (2, False), (2, True)]
KILL_IDS = ["whole", "killed", "killed before the checkpoint"]


class Broken(Tracker):
    """One whose server has gone after the first epoch."""

    def log(self, rows, first):
        if len(rows) > 1:
            raise ConnectionError("no\nserver")

    def attach(self, outcome):
        raise ConnectionError


class Listed(Tracker):
    """One that keeps everything in its state."""

    def log(self, rows, first):
        self.state.setdefault("seen", []).extend(row["epoch"] for row in rows[first:])

    def attach(self, outcome):
        self.state.setdefault("outcomes", []).append(outcome.epoch)


@pytest.fixture
def register():
    """A function that registers a tracker for the length of a test."""
    names = []

    def add(name: str, kind: type[Tracker]) -> None:
        TRACKERS.register(name)(kind)
        names.append(name)

    yield add
    for name in names:
        TRACKERS.unregister(name)


@pytest.mark.parametrize(("killed_after", "lost"), KILLS, ids=KILL_IDS)
def test_the_csv_file_holds_the_metrics(tracked, rows, killed_after, lost):
    trainer = tracked(["csv"], killed_after, lost)
    with open(trainer.folder.path / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3
    for line, row in zip(lines, rows(trainer), strict=True):
        assert list(line) == list(row)
        for name, value in row.items():
            assert line[name] == ("" if value is None else str(value))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("killed_after", "lost"), KILLS, ids=KILL_IDS)
def test_tensorboards_events_hold_the_metrics(tracked, rows, killed_after, lost):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = tracked(["tensorboard"], killed_after, lost)
    reader = events.EventAccumulator(str(trainer.folder.path / "tensorboard"))
    reader.Reload()
    for name in ("loss", "lr", "val_robust", "val_clean"):
        points = [(event.step, event.value) for event in reader.Scalars(name)]
        assert points == [(row["epoch"], pytest.approx(row[name], abs=1e-6)) for row in rows(trainer)]
    assert b"batch_size: 16" in reader.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("restarts", [0, 1], ids=["one process", "two"])
def test_tensorboard_reads_quick_epochs_in_order(tmp_path, restarts):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [{"epoch": epoch, "loss": float(epoch)} for epoch in range(1, 13)]
    for logged in [range(12), range(9, 12)][: 1 + restarts]:
        tracker = TRACKERS["tensorboard"](TrackedRun(tmp_path, "run", {}), {})
        for epoch in logged:
            tracker.log(rows[: epoch + 1], epoch)
        tracker.close(finished=False)
    reader = events.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("loss")] == list(range(1, 13))


def test_trackers_do_not_change_the_run(tracked):
    plain = tracked([], folder="plain").folder.path
    watched = tracked(["csv", "tensorboard"], 2, folder="watched").folder.path
    assert_same_files(plain, watched)
    assert not (plain / "trackers.json").exists()


def test_an_epoch_is_logged_once_and_a_tracker_that_comes_later_gets_all(tracked, register):
    register("early", Listed)
    register("late", Listed)
    trainer = tracked(["early", "late"], 2, lost=True, first=["early"])
    states = json.loads((trainer.folder.path / "trackers.json").read_text())
    assert states["early"]["seen"] == states["late"]["seen"] == [1, 2, 3]


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tracked, rows, register, caplog):
    register("broken", Broken)
    trainer = tracked(["broken", "csv"])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("tracker broken is left out from here on (ConnectionError: no server)")
    assert len(rows(trainer)) == 3
    assert len((trainer.folder.path / "metrics.csv").read_text().splitlines()) == 4


def test_the_same_results_are_attached_once(tmp_path, register):
    register("listed", Listed)
    run = TrackedRun(tmp_path, "run", {})

    def outcome() -> Outcome:
        return Outcome(3, {}, (), (), {}, tmp_path / "report.html")

    for digest in ("a", "a", "b"):
        trackers = Trackers(["listed"], run)
        trackers.attach(digest, outcome)
        trackers.close(finished=True)
    assert json.loads((tmp_path / "trackers.json").read_text())["listed"]["outcomes"] == [3, 3]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"csv": 3}', b'{"csv": {"epoch": "x"}}'])
def test_a_damaged_memory_of_the_trackers_does_not_stop_the_run(tmp_path, content, caplog):
    (tmp_path / "trackers.json").write_bytes(content)
    trackers = Trackers(["csv"], TrackedRun(tmp_path, "run", {}))
    trackers.log([{"epoch": 1, "loss": 0.5}])
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,loss", "1,0.5"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tensorbord",), r"save\.trackers: got 'tensorbord'.*csv, mlflow.*tensorboard"),
        (("csv", "csv"), r"save\.trackers: got 'csv'.*at most once"),
        ((3,), r"save\.trackers"),
    ],
)
def test_trackers_that_there_are_not_are_refused(given: Any, message: str):
    with pytest.raises(SettingError, match=message):
        SaveSettings(trackers=given)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_training(name, monkeypatch):
    monkeypatch.setattr("softdefend.training.settings.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=rf"got '{name}'.*pip install 'softdefend\[{name}\]'"):
        SaveSettings(trackers=(name,))
