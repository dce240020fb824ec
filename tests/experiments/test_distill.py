"""The KD-SWA pipeline: what each stage trains, and that it can be killed anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from softdefend.core.errors import SettingError
from softdefend.experiments.distill import kd_swa
from softdefend.training.plain import plain_config
from softdefend.training.step import TrainStep
from tiny import Killed

_SMALL = """
    --data.train_size 64 --data.validation 32 --optim.epochs 3 --optim.batch_size 16 --optim.lr 0.05
    --net.name small_cnn --net.width 4 --augment.pad 1 --threat.eps 4/255 --attack.steps 2
    --save.every_steps 2 --validate.attack.steps 2 --evaluate.size 32 --evaluate.curve_size 0
    --progress false --seed 3 --runtime.device cpu --runtime.threads 1
"""
SMALL = _SMALL.split()
STEPS = 3 * 4
FILES = ("config.yaml", "metrics.jsonl", "best.safetensors", "last.safetensors")


@pytest.fixture(autouse=True)
def _own_cache_and_no_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "softdefend.experiments.pipeline.write_report", lambda runs, path: path
    )  # slow, and tested elsewhere


@pytest.fixture
def made(monkeypatch):
    """Counts updates; raises Killed instead of making the one named in ``made.stop``."""

    class Made(list):
        stop: int | None = None

    count, body = Made(), TrainStep._body

    def counted(self, plan, phase):
        if count.stop == len(count):
            raise Killed
        count.append(type(self.recipe.label).__name__)
        body(self, plan, phase)

    monkeypatch.setattr(TrainStep, "_body", counted)
    return count


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: paths in a run's configuration are as they were given."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(folder: str) -> dict:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_in_the_same_bytes(here, made, caplog):
    caplog.set_level("INFO", logger="softdefend")
    assert kd_swa(SMALL, Path("whole")) == Path("whole/student")
    assert made == ["Hard"] * 2 * STEPS + ["KD"] * STEPS
    stages = [line for line in caplog.messages if line.startswith("stage")]
    titles = ("standard teacher", "robust teacher", "student")
    assert stages == [f"stage {n} of 3: {title}" for n, title in enumerate(titles, start=1)]
    names = [f"{stage}/{name}" for stage in ("standard", "robust", "student") for name in FILES]
    whole = {name: Path("whole", name).read_bytes() for name in names}
    written = Path("whole/robust/best.safetensors").stat().st_mtime_ns

    made.clear()
    kd_swa(SMALL, Path("whole"))
    assert made == []  # nothing finished is trained again
    assert Path("whole/robust/best.safetensors").stat().st_mtime_ns == written

    Path("whole").rename("first")
    for stop in (5, 4 + STEPS, STEPS):  # in each stage, counting the updates of this attempt
        made.clear()
        made.stop = stop
        with pytest.raises(Killed):
            kd_swa(SMALL, Path("whole"))
    made.stop = None
    kd_swa(SMALL, Path("whole"))
    for name in names:
        assert Path("whole", name).read_bytes() == whole[name], name


def test_stages_differ_in_the_recipe_alone(here, monkeypatch):
    """Resolved settings of the three stages; nothing is trained."""
    experiments = []
    monkeypatch.setattr("softdefend.experiments.pipeline.train", experiments.append)
    words = [*SMALL, "--config", "digits_demo", "--label.temperature", "3"]
    kd_swa(words, Path("runs"))
    standard, robust, student = experiments
    own = {"name", "label", "weight"}
    assert len({experiment.folder for experiment in experiments}) == 3
    settings = plain_config(student)
    for other, further in ((robust, set()), (standard, {"attack", "validate"})):
        others = plain_config(other)
        differing = {key for key in settings if settings[key] != others[key]}
        assert differing == own | further
    assert (standard.recipe.attack.steps, standard.recipe.attack.start) == (0, "none")
    assert (standard.validate.attack.steps, standard.validate.attack.start) == (0, "none")
    assert standard.validate.test_size == student.validate.test_size == 150
    assert robust.recipe.attack.steps == student.recipe.attack.steps == 2
    assert student.optim.schedule.milestones == robust.optim.schedule.milestones == (0.25, 0.75)
    assert {e.recipe.attack_bn for e in experiments} == {"train"}
    assert {e.seed for e in experiments} == {3}
    assert type(student.recipe.weight).__name__ == "SWA"
    label = student.recipe.label
    assert (label.standard, label.robust) == ("runs/standard", "runs/robust")
    assert (label.hard_weight, label.standard_weight, label.robust_weight) == (0.3, 0.1, 0.6)
    assert label.temperature == 3


def test_standard_training_makes_no_adversarial_image(here, made):
    made.stop = STEPS
    with pytest.raises(Killed):
        kd_swa(SMALL, Path("runs"))
    rows = [json.loads(line) for line in Path("runs/standard/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["val_robust"] == row["val_clean"] for row in rows)
    assert not Path("runs/student").exists()


def test_teachers_that_exist_already_are_not_trained(here, monkeypatch):
    experiments = []
    monkeypatch.setattr("softdefend.experiments.pipeline.train", experiments.append)
    with pytest.raises(SettingError, match=r"--robust: got elsewhere/last\.safetensors, no such file"):
        kd_swa(SMALL, Path("runs"), robust="elsewhere/last.safetensors")
    assert experiments == []  # before anything is trained for it
    Path("elsewhere").mkdir()
    with pytest.raises(SettingError, match=r"--standard: got elsewhere, without best\.safetensors"):
        kd_swa(SMALL, Path("runs"), standard="elsewhere")
    Path("elsewhere/last.safetensors").touch()
    kd_swa(SMALL, Path("runs"), robust="elsewhere/last.safetensors")
    assert [e.folder.name for e in experiments] == ["standard", "student"]
    assert experiments[1].recipe.label.robust == "elsewhere/last.safetensors"
    assert experiments[1].recipe.label.standard == "runs/standard"


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        (["--preset", "trades"], {}, "--preset"),
        (["--folder=x"], {}, "--folder"),
        (["--label.robust=x"], {}, r"--label\.robust"),
        ([], {"preset": "trades"}, "--preset: got 'trades'; accepted: a preset whose label rule is KD"),
        (["--optim.epochs", "0"], {}, r"optim\.epochs"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(here, words, settings, said):
    with pytest.raises(SettingError, match=said):
        kd_swa([*SMALL, *words], Path("runs"), **settings)
    assert not Path("runs").exists()


def test_a_teacher_trained_on_images_of_another_size_is_refused(here, made):
    """The student of 8x8 digits, taught by a run whose examples are 12x12."""
    made.stop = STEPS
    with pytest.raises(Killed):
        kd_swa(SMALL, Path("runs"))
    save_file({"image": torch.zeros(1, 1, 12, 12)}, "runs/standard/evaluation/best-examples.safetensors")
    made.stop = None
    with pytest.raises(SettingError, match=r"label\.robust: got a teacher trained on images \[1, 12, 12\]"):
        kd_swa(SMALL, Path("other"), standard="runs/standard", robust="runs/standard")
