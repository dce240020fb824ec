import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_ratios_are_to_one_process_of_the_same_work(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("scaling", FOLDER / "scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaling", scaling)
    spec.loader.exec_module(scaling)
    same = {"net": "a", "recipe": "b"}
    rows = [
        {**same, "batch_size": 100, "processes": 1, "ms": 50.0},
        {**same, "batch_size": 100, "processes": 2, "ms": 20.0},
        {**same, "batch_size": 400, "processes": 1, "ms": 80.0},
        {**same, "batch_size": 400, "processes": 2, "ms": 100.0},
    ]
    found = [(row["images_per_second"], row["times_one"]) for row in scaling.ratios(rows)]
    assert found == [(2000.0, 1.0), (5000.0, 2.5), (5000.0, 1.0), (4000.0, 0.8)]
