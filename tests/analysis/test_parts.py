"""What every part of an analysis must do, and the example of CONTRIBUTING.md."""

from __future__ import annotations

import json
import pkgutil
import re
import runpy
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from softdefend.analysis import PARTS, AnalysisRequest, AnalyzeSettings, NetworkPart, analyze_runs, parts
from softdefend.analysis.part import make_parts
from softdefend.analysis.runs import AnalyzedNetwork, find_weights, open_network, open_runs

CPU = torch.device("cpu")
SMALL = AnalyzeSettings(
    probe=20, whole=4, chunk=2, test=20, steps=1, bins=4, points=1, eigen_steps=1, linearity_steps=1,
    contrast_steps=2, components=2, batch_size=10,
)  # fmt: skip
FIELDS = {one.name for one in fields(AnalyzeSettings)}
CHANGES_NOTHING = {"chunk"}
"""Settings that say how much memory is used: results do not depend on them."""


@pytest.fixture(scope="module")
def network(refined) -> AnalyzedNetwork:
    (run,) = open_runs([str(refined)], CPU)
    return open_network(run, find_weights(run.folder, ["last"])[0])


@pytest.mark.parametrize("name", PARTS.names())
def test_a_part_reads_the_settings_that_it_names(name, network):
    """What is read and not named would let a stored result answer for another setting."""
    read: set[str] = set()

    class Watched(AnalyzeSettings):
        def __getattribute__(self, attribute: str) -> object:
            if attribute in FIELDS:
                read.add(attribute)
            return super().__getattribute__(attribute)

    (part,) = make_parts(AnalysisRequest(parts=(name,), settings=Watched(**asdict(SMALL))))
    read.clear()
    part.measure(network if isinstance(part, NetworkPart) else network.run)
    assert read - CHANGES_NOTHING == set(part.needs)


@pytest.mark.parametrize("name", PARTS.names())
def test_a_result_depends_on_what_a_part_names(name, network):
    (part,) = make_parts(AnalysisRequest(parts=(name,), settings=SMALL))
    assert part.inputs(network.run)["settings"] == {need: getattr(SMALL, need) for need in part.needs}
    json.dumps(part.inputs(network.run))


def test_every_file_of_parts_registers_a_part():
    files = {f"{parts.__name__}.{module.name}" for module in pkgutil.iter_modules(parts.__path__)}
    assert {kind.__module__ for _, kind in PARTS.items()} == files


def test_parts_stand_in_the_order_of_the_argument():
    ours = ["overfitting", "gradients", "labels", "information", "geometry"]
    assert [part.name for part in make_parts(AnalysisRequest()) if part.name in ours] == ours
    some = make_parts(AnalysisRequest(parts=("geometry", "overfitting", "geometry")))
    assert [part.name for part in some] == ["overfitting", "geometry"]


@pytest.fixture
def example(tmp_path) -> Iterator[str]:
    """The test of the example, while its part is registered."""
    if "margins" in PARTS:
        pytest.skip("the example lies in the package")
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    section = text.partition("## Add an analysis part\n")[2].partition("\n## ")[0]
    part, test = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "margins.py").write_text(part)
    before = PARTS.names()
    runpy.run_path(str(tmp_path / "margins.py"))
    yield test
    PARTS.unregister("margins")
    assert PARTS.names() == before


def test_the_example_of_the_document_passes_its_own_test(example, refined, tmp_path):
    (tmp_path / "test_margins.py").write_text(example)
    tests = runpy.run_path(str(tmp_path / "test_margins.py"))
    names = [name for name in tests if name.startswith("test_")]
    assert names == ["test_margins_are_negative_where_another_class_is_predicted"]
    tests[names[0]](refined, tmp_path / "out")


def test_a_part_of_ones_own_is_measured_once_and_shown_last(example, refined, tmp_path, monkeypatch):
    request = AnalysisRequest(parts=("margins", "overfitting"), which=("best", "last"), settings=SMALL)
    analysis = analyze_runs([str(refined)], tmp_path / "out", request, CPU)
    assert list(analysis.parts) == ["overfitting", "margins"]
    page = (tmp_path / "out" / "analysis.html").read_bytes()
    assert re.findall(rb"<h2>(.*?)</h2>", page) == [b"Robust overfitting", b"Margins"]
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [one["weights"] for one in content["margins"]] == ["best", "last"]
    monkeypatch.setattr(PARTS["margins"], "measure", None)  # a second time nothing is measured
    analyze_runs([str(refined)], tmp_path / "out", request, CPU)
    assert (tmp_path / "out" / "analysis.html").read_bytes() == page
