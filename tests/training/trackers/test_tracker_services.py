"""Weights & Biases and MLflow: stand-ins of what their documentation promises, and the packages themselves
where they are installed."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softdefend.training.trackers import TRACKERS, Outcome, TrackedRun, Trackers

SETTINGS = {f"some.setting{number}": number for number in range(230)} | {"long": "x" * 7000, "none": None}


@pytest.fixture
def outcome(tmp_path) -> Outcome:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 200, np.uint8)).save(buffer, "PNG")
    report = tmp_path / "report.html"
    report.write_text("<html>the report</html>")
    return Outcome(
        epoch=3,
        numbers={"last/clean": 0.75},
        columns=("checkpoint", "accuracy"),
        rows=[("last", 0.75)],
        curves={"Training loss": buffer.getvalue()},
        report=report,
    )


def rows(count: int) -> list[dict[str, Any]]:
    return [{"epoch": n, "phase": "hard", "loss": 1 / n, "val_robust": None} for n in range(1, count + 1)]


def two_processes(name: str, folder: Path, outcome: Outcome) -> None:
    """One that is killed after two epochs, and one that makes the third and attaches the results."""
    run = TrackedRun(folder, "recipe-seed0", SETTINGS)
    first = Trackers([name], run)
    for count in (1, 2):
        first.log(rows(count))
    first.close(finished=False)
    second = Trackers([name], run)
    for count in (2, 3):  # the second epoch had no checkpoint
        second.log(rows(count))
    second.attach("digest", lambda: outcome)
    second.close(finished=True)
    assert second.names == [name]


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    return made


# --- Weights & Biases ---------------------------------------------------------------------------------------


class WandbRun:
    """A run as ``wandb.init`` returns it: ``log`` with ``step``, ``summary``, ``finish``."""

    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.summary = options, [], {}
        self.exit_code: int | None = None

    def log(self, content: dict[str, Any], step: int) -> None:
        assert not self.logged or step >= self.logged[-1][0]  # smaller ones are dropped
        self.logged.append((step, content))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb_runs(monkeypatch) -> list[WandbRun]:
    runs: list[WandbRun] = []

    def init(**options: Any) -> WandbRun:
        runs.append(WandbRun(**options))
        return runs[-1]

    def named(kind: str):
        return lambda *given, **options: (kind, given, options)

    stand_in = module("wandb", init=init, Settings=SimpleNamespace)
    for kind in ("Table", "Html", "Image"):
        setattr(stand_in, kind, named(kind))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_a_run_of_wandb_is_offline_and_continued_under_its_id(wandb_runs, tmp_path, outcome):
    two_processes("wandb", tmp_path, outcome)
    first, second = wandb_runs
    for run in (first, second):
        assert run.options["mode"] == "offline"
        assert run.options["resume"] == "allow"
        assert run.options["dir"] == str(tmp_path)
        assert run.options["config"] == SETTINGS
    assert first.options["id"] == second.options["id"]
    assert first.logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert second.logged[0] == (3, {"loss": 1 / 3})
    step, attached = second.logged[1]
    assert step == 4
    assert attached["evaluation"] == (
        "Table",
        (),
        {"columns": ["checkpoint", "accuracy"], "data": [["last", 0.75]]},
    )
    assert attached["report"][1] == ("<html>the report</html>",)
    assert attached["curves/Training loss"][1][0].size == (5, 4)
    assert second.summary == {"test/last/clean": 0.75}
    assert (first.exit_code, second.exit_code) == (1, 0)


def test_two_runs_of_wandb_have_two_ids_and_the_environment_chooses_mode_and_project(
    wandb_runs, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Trackers(["wandb"], TrackedRun(tmp_path / name, name, {})).log(rows(1))
    one, other = wandb_runs
    assert one.options["id"] != other.options["id"]
    assert (one.options["mode"], one.options["project"]) == ("online", "mine")


def records_of(path: Path) -> Iterator[bytes]:
    """Records of a LevelDB log: in blocks of 32 KiB, after a header of 7 bytes, pieces of checksum (4 bytes),
    length (2), kind (1: whole, 2: first, 3: middle, 4: last) and data."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_itself_writes_one_offline_run(tmp_path, outcome, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    two_processes("wandb", tmp_path, outcome)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # named by the id
    points, images = {}, list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    for file in files:
        for data in records_of(file):
            record = Record()
            record.ParseFromString(data)
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "loss" in items:
                points[int(json.loads(items["_step"]))] = json.loads(items["loss"])
    assert points == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    assert len(images) == 1
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/html/*.html"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/*.json"))


# --- MLflow -------------------------------------------------------------------------------------------------


class MlflowStore:
    """Experiments and runs as ``MlflowClient`` keeps them."""

    def __init__(self) -> None:
        self.experiments: dict[str, SimpleNamespace] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.uris: list[str] = []


class MlflowClient:
    """Of the documented methods those that are used, with MLflow's limits."""

    def __init__(self, store: MlflowStore, tracking_uri: str) -> None:
        self.store = store
        store.uris.append(tracking_uri)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return self.store.experiments.get(name)

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        made = SimpleNamespace(experiment_id=str(len(self.store.experiments)), location=artifact_location)
        self.store.experiments[name] = made
        return made.experiment_id

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        identifier = f"id{len(self.store.runs)}"
        made = {"name": run_name, "params": {}, "metrics": [], "files": {}, "status": "RUNNING"}
        self.store.runs[identifier] = made
        return SimpleNamespace(info=SimpleNamespace(run_id=identifier))

    def update_run(self, run_id: str, status: str) -> None:
        self.store.runs[run_id]["status"] = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.store.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, params: list[tuple[str, str]]) -> None:
        assert len(params) <= 100
        assert all(len(value) <= 6000 for _, value in params)
        self.store.runs[run_id]["params"].update(params)

    def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
        self.store.runs[run_id]["metrics"].append((key, value, step))

    def log_image(self, run_id: str, image: Image.Image, artifact_file: str) -> None:
        self.store.runs[run_id]["files"][artifact_file] = image

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.store.runs[run_id]["files"][artifact_file] = text

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self.store.runs[run_id]["files"][Path(local_path).name] = Path(local_path).read_text()


@pytest.fixture
def mlflow_store(monkeypatch) -> MlflowStore:
    store = MlflowStore()

    def client(tracking_uri: str) -> MlflowClient:
        return MlflowClient(store, tracking_uri)

    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", module("mlflow.tracking", MlflowClient=client))
    entities = module("mlflow.entities", Param=lambda key, value: (key, value))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return store


def test_a_run_of_mlflow_is_local_and_continued(mlflow_store, tmp_path, outcome):
    two_processes("mlflow", tmp_path, outcome)
    assert mlflow_store.uris == [f"sqlite:///{tmp_path}/mlflow.db"] * 2
    assert mlflow_store.experiments["softdefend"].location == f"file://{tmp_path}/mlflow"
    (run,) = mlflow_store.runs.values()
    assert run["name"] == "recipe-seed0"
    assert run["params"].keys() == SETTINGS.keys()
    assert run["params"]["some.setting7"] == "7"
    assert run["metrics"] == [
        ("loss", 1.0, 1),
        ("loss", 0.5, 2),
        ("loss", 1 / 3, 3),
        ("test/last/clean", 0.75, 3),
    ]
    assert run["files"]["evaluation.csv"].split() == ["checkpoint,accuracy", "last,0.75"]
    assert run["files"]["curves/Training loss.png"].size == (5, 4)
    assert run["files"]["report.html"] == "<html>the report</html>"
    assert run["status"] == "FINISHED"


def test_the_environment_names_mlflows_server_and_experiment(mlflow_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trackers = Trackers(["mlflow"], TrackedRun(tmp_path / name, name, {}))
        trackers.log(rows(1))
        trackers.close(finished=False)
    assert set(mlflow_store.uris) == {"http://127.0.0.1:5000"}
    assert list(mlflow_store.experiments) == ["mine"]
    assert mlflow_store.experiments["mine"].location is None
    assert [run["status"] for run in mlflow_store.runs.values()] == ["KILLED", "KILLED"]


@pytest.mark.filterwarnings("ignore")  # a large package, with warnings of its own
def test_mlflow_itself_keeps_one_local_run(tmp_path, outcome, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient as Client

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    two_processes("mlflow", tmp_path, outcome)
    client = Client(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("softdefend").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["some.setting7"] == "7"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((one.step, one.value) for one in history) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["test/last/clean"] == 0.75
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"curves", "evaluation.csv", "report.html"}


def test_every_tracker_with_a_package_has_an_extra_of_its_name():
    """The message about a missing one says ``pip install 'softdefend[NAME]'``."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    for name, kind in TRACKERS.items():
        assert kind.package is None or f'\n{name} = ["{kind.package}>=' in text
