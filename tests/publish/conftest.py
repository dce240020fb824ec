from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub_server import Hub, stand_in
from softdefend.cli.main import main

_SMALL = """
    --data.train_size 64 --data.validation 32 --optim.epochs 2 --optim.batch_size 8 --optim.lr 0.05
    --net.name small_cnn --net.width 4 --augment.pad 1 --threat.eps 4/255 --attack.steps 2
    --validate.attack.steps 2 --evaluate.curve_size 0
    --progress false --runtime.device cpu --runtime.threads 1
"""
SMALL = _SMALL.split()


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on digits, evaluated on all 359 test images; to be read only."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    assert main(["train", *SMALL, "--folder", str(folder)]) == 0
    words = ["--which", "best", "--attacks", "fgsm", "pgd-20"]
    assert main(["evaluate", str(folder), *words]) == 0
    return folder


@pytest.fixture
def run_folder(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be spoiled."""
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


@pytest.fixture
def published(evaluated: Path, tmp_path: Path) -> Path:
    """The folder of the run's best checkpoint as it is published."""
    folder = tmp_path / "published"
    words = ["push", str(evaluated), "me/digits", "--dry_run", "--output", str(folder)]
    assert main(words) == 0
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in(tmp_path / "hub-cache", monkeypatch) as made:
        yield made


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """A function that runs a command, and asserts that it is refused in one line as every bad input is."""

    def run(words: list[str], setting: str, given: str, accepted: str) -> None:
        capsys.readouterr()
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        said, _, rest = line.partition("; accepted: ")
        assert said.startswith(f"softdefend: error: {setting}: got ")
        assert given in said
        assert accepted in rest

    return run
