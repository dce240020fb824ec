"""A run that dies at any of its writes, renames, truncations, flushes and deletions ends in the same bits."""

from __future__ import annotations

import builtins
import collections
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from softdefend import PGD, PGDAT, SGLR, OptimSettings
from softdefend.core import files
from softdefend.core.rng import stream
from softdefend.data import from_tensors
from softdefend.training import SaveSettings, ValidateSettings, folder
from softdefend.weights import EMA
from tiny import K, Killed

CALLS = ("fsync", "replace", "truncate", "unlink")


class Disk:
    """Counts what is done to files and dies at one of these events.

    Args:
        at: number of the event, from 1 on; 0 for none.
        when: ``before`` it, ``after`` it, or with ``half`` of what a write was to write.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0, when: str = "before") -> None:
        self.at, self.when, self.count, self.kinds = at, when, 0, collections.Counter()
        self.writes: list[int] = []
        """The numbers of writes."""
        self.last: dict[str, int] = {}
        """The number of the last write to each file by its name."""
        for name in CALLS:
            real = (
                getattr(os, name) if name != "fsync" else lambda _: None
            )  # slow, and seen by power cuts alone
            monkeypatch.setattr(os, name, self._spied(name, real))
        for module in (files, folder):
            monkeypatch.setattr(module, "open", self._open, raising=False)

    def _spied(self, name, real):
        def call(*arguments, **keywords):
            self.happens(name, "before")
            result = real(*arguments, **keywords)
            self.happens(name, "after")
            return result

        return call

    def _open(self, *arguments, **keywords):
        return Written(builtins.open(*arguments, **keywords), self)

    def happens(self, kind: str, when: str) -> bool:
        """Count an event once, and die where it is the chosen one."""
        if when == "before":
            self.count += 1
            self.kinds[kind] += 1
        if self.count == self.at and when == self.when:
            raise Killed
        return self.count == self.at and self.when == "half"


def _flushed(_: int) -> None:
    """As though the disk had it."""


class Written:
    """A file whose writes are events."""

    def __init__(self, file, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *about):
        return self.file.__exit__(*about)

    def write(self, content):
        half = self.disk.happens("write", "before")
        self.disk.writes.append(self.disk.count)
        self.disk.last[Path(self.file.name).name] = self.disk.count
        self.file.write(content[: len(content) // 2] if half else content)
        self.file.flush()
        if half:
            raise Killed
        self.disk.happens("write", "after")


@pytest.fixture
def start(make_trainer, monkeypatch):
    """A function that builds a trainer of two epochs of two steps, with a memory and an average to save."""
    monkeypatch.setenv("SOFTDEFEND_COMMIT", "none")  # asking git takes longer than training
    images = torch.rand(20, 1, 3, 3, generator=stream(0, "kills"))
    data = from_tensors(images, torch.arange(20) % K, validation=4, test_fraction=0.2)

    def begin(name: str):
        torch.manual_seed(0)
        return make_trainer(
            SGLR(start=0.0),
            PGDAT(),
            EMA(),
            name,
            net=nn.Sequential(nn.Flatten(), nn.Linear(9, K)),
            data=data,
            attack=PGD(steps=1),
            optim=OptimSettings(epochs=2, batch_size=6, lr=0.5),
            validate=ValidateSettings(attack=PGD(steps=1)),
            save=SaveSettings(every_steps=1),
        )

    return begin


def run(start, name: str, at: int = 0, when: str = "before") -> tuple[Path, Disk, bool]:
    """Train in a folder; the folder, what was done to files, and whether it died."""
    trainer, died = None, False
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, at, when)
        try:
            trainer = start(name)
            trainer.fit()
        except Killed:
            died = True
    if trainer is not None:
        trainer.folder.close()
    return trainer and trainer.folder.path, disk, died


def contents(place: Path) -> dict[str, bytes]:
    """All files but for those that speak of the moment; a leftover is one too many."""
    named = {str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in named.items() if name not in OF_THE_MOMENT}


OF_THE_MOMENT = {"timing.jsonl", "environment.json"}


def lose_the_end(place: Path) -> None:
    path = place / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("begins", ["fresh", "with a row too many", "with a row too few"])
def test_a_run_killed_at_any_event_ends_in_the_same_bits(start, tmp_path, begins, when):
    place, disk, _ = run(start, "whole")
    expected, second = contents(place), disk.last["metrics.jsonl"]
    if begins != "fresh":
        run(start, "begun", second + 1, "after")  # the flush behind the second row
        if begins == "with a row too few":
            lose_the_end(tmp_path / "begun")

    def begin(name: str) -> str:
        if begins != "fresh":
            shutil.copytree(tmp_path / "begun", tmp_path / name)
        return name

    _, disk, _ = run(start, begin("counted"))
    assert disk.kinds["truncate"] == (begins == "with a row too many")
    ends = []
    for at in disk.writes if when == "half" else range(1, disk.count + 1):
        name = begin(f"killed-{at}")
        _, _, died = run(start, name, at, when)
        ends.append(died)
        place, _, _ = run(start, name)
        assert contents(place) == expected, at
        times = (place / "timing.jsonl").read_text()
        assert all(json.loads(row)["seconds"] > 0 for row in times.splitlines())
    assert all(ends)
    assert len(disk.writes) >= 5
