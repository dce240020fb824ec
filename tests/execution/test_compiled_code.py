"""Where compiled code is kept, and what of it is removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from softdefend.execution.compiled_code import keep_compiled_code, remove_oldest

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
DAY = 24 * 3600


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no word of the user where to keep what is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path / "softdefend" / "compiled" / f"torch-{torch.__version__}"


def test_torch_and_triton_keep_it_in_the_users_cache(cache):
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    keep_compiled_code.__wrapped__()
    assert Path(cache_dir()) == cache
    assert Path(triton_cache_dir(0)) == cache / "triton"


def test_what_the_user_said_stays(cache, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    keep_compiled_code.__wrapped__()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_a_folder_that_cannot_be_made_is_done_without(cache):
    cache.parents[1].write_text("a file")
    keep_compiled_code.__wrapped__()
    assert not any(name in os.environ for name in VARIABLES)


def make(folder: Path, name: str, size: int, used: float) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def test_the_oldest_is_removed_in_whole_folders(tmp_path):
    """Down to three quarters of the limit; a folder is as old as its newest file."""
    now = 100.0 * DAY
    old = [make(tmp_path, "a/source", 20, 1 * DAY), make(tmp_path, "a/program", 20, 3 * DAY)]
    older = [make(tmp_path, "b/c/source", 30, 2 * DAY)]
    recent = [make(tmp_path, "b/source", 10, 50 * DAY), make(tmp_path, "d/source", 50, 60 * DAY)]
    remove_oldest(tmp_path, 130, now)
    assert all(path.exists() for path in (*old, *older, *recent))
    remove_oldest(tmp_path, 129, now)  # 100 are left after the first, 60 after the second
    assert not any(path.exists() for path in (*old, *older))
    assert all(path.exists() for path in recent)


def test_what_another_process_may_be_about_to_load_stays(tmp_path):
    now = 100.0 * DAY
    paths = [
        make(tmp_path, f"{name}/source", 50, now - hours * 3600) for name, hours in (("a", 30), ("b", 2))
    ]
    remove_oldest(tmp_path, 10, now)
    assert [path.exists() for path in paths] == [False, True]
