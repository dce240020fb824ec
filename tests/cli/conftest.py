from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import SMALL

from softdefend.cli.main import main


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the small training; to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *SMALL, "--folder", str(folder)]) == 0
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command, asserts that it is refused as every bad input must be, and returns
    what the line accepts."""

    def run(words: list[str], setting: str, given: str, *accepted: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        said, separator, rest = lines[0].partition("; accepted: ")
        assert said.startswith(f"softdefend: error: {setting}: got "), lines[0]
        assert separator
        assert given in said.partition(": got ")[2], lines[0]
        assert rest
        for fragment in accepted:
            assert fragment in rest, lines[0]
        assert "Traceback" not in lines[0]
        return rest

    return run
