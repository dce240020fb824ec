"""The record of what a result was computed with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from softdefend.core import environment


def commit() -> str | None:
    return environment.environment(torch.device("cpu"))["commit"]


def test_the_commit_is_that_of_the_variable_else_that_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "a"]
    for words in (["init", "--quiet"], named):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = subprocess.check_output(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], text=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.delenv("SOFTDEFEND_COMMIT", raising=False)
    found = commit()
    assert found is not None
    assert len(found) >= 7
    assert head.startswith(found)
    monkeypatch.setenv("SOFTDEFEND_COMMIT", "1234abc")
    assert commit() == "1234abc"


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOFTDEFEND_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert commit() is None
