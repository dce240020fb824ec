from __future__ import annotations

import os
from pathlib import Path

import pytest

from softdefend.core import memory
from softdefend.core.errors import SettingError
from softdefend.core.memory import available_memory, check_memory, in_words


def test_some_of_the_machines_memory_is_free() -> None:
    free = available_memory()
    assert free is not None
    assert 10**6 < free < 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 10**12


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_without_its_copies_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    _, *names = memory._GROUPS[2 - version]
    for name, value in zip(names[:2], ("5000000", "3000000"), strict=True):
        (tmp_path / name).write_text(value + "\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{names[2]} 1000000\nfile 7\n")
    monkeypatch.setattr(memory, "_GROUPS", ((str(tmp_path), *names),))
    assert available_memory() == 3_000_000
    (tmp_path / names[0]).write_text("max\n")
    assert available_memory() != 3_000_000


def test_what_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * 10**9)
    check_memory(16 * 10**9, "data.source", "images")
    with pytest.raises(SettingError, match=r"got images that take 16\.5 GB of memory; .* at most the 16 GB"):
        check_memory(165 * 10**8, "data.source", "images")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory(10**30, "data.source", "images")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (102_060_000_000, "102.1 GB")]
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_words(count) == words
