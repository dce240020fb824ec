"""An evaluation on several processes; see evaluate_of_processes.py, which every process runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import processes
from softdefend.core.processes import Processes
from softdefend.evaluation.shares import Shares

SCRIPT = str(Path(__file__).with_name("evaluate_of_processes.py"))


def evaluate(folder: Path, size: int, saves: int = 0) -> list[int]:
    """Exit codes of so many processes, the last of which dies at a save."""
    folder.mkdir(exist_ok=True)
    ends = processes.ended(processes.start(size, SCRIPT, str(folder), str(saves)))
    if not saves:
        assert [code for code, _ in ends] == [0] * size, ends
    return [code for code, _ in ends]


def results(folder: Path) -> dict[str, object]:
    """All result files, but for what a clock wrote and the digest that knows of it."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "sha256")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    files = {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir()}
    return {n: timeless(json.loads(v)) if n.endswith(".json") else v for n, v in files.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process finds: tables of all samples, counts, curve, corruptions and examples."""
    folder = tmp_path_factory.mktemp("evaluations") / "one"
    evaluate(folder, 1)
    found = results(folder)
    assert {"last.json", "last.parquet", "last-corruptions.json"} <= found.keys()
    return found


def test_several_processes_find_the_same_bytes(whole, tmp_path):
    evaluate(tmp_path / "run", 3)
    assert results(tmp_path / "run") == whole


def test_eight_processes_find_the_same_bytes(whole, tmp_path):
    """Each has one batch, the last a part of one."""
    evaluate(tmp_path / "run", 8)
    assert results(tmp_path / "run") == whole


def test_killed_it_goes_on_with_the_same_and_with_another_number(whole, tmp_path):
    run = tmp_path / "run"
    codes = evaluate(run, 2, saves=9)
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert (run / "evaluation" / "last.process1.state").exists()
    assert evaluate(run, 2, saves=6)[1] == 9  # with the same number
    assert evaluate(run, 3, saves=5)[2] == 9  # with another one
    evaluate(run, 1)
    assert results(run) == whole


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_batch_goes_to_one_process_and_units_stay_together(size, unit):
    attacked = torch.rand(100, generator=torch.Generator().manual_seed(size)) < 0.7
    carried = torch.arange(-(-int(attacked.sum()) // 7)) % 5 == 3
    dealt = [
        [number for number, _ in Shares(Processes(rank, size), 7, unit).own(attacked, carried)]
        for rank in range(size)
    ]
    left = (~carried).nonzero().squeeze(1).tolist()
    assert sorted(number for numbers in dealt for number in numbers) == left
    for numbers in dealt:
        for start in range(0, len(numbers) - 1, unit):
            at = [left.index(number) for number in numbers[start : start + unit]]
            assert at == list(range(at[0], at[0] + len(at)))
            assert at[0] % unit == 0
