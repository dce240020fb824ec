"""The example of CONTRIBUTING.md's section on data sources, from its own code blocks."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.sources import SOURCES, Source, read

CONTRIBUTING = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
SECTION = CONTRIBUTING.partition("\n## Add a data source\n")[2].partition("\n## ")[0]
SOURCE, TEST = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
CASES = re.findall(r"^def (test_\w+)", TEST, flags=re.MULTILINE)
BUILT_IN = SOURCES.names()


def run(code: str, name: str) -> ModuleType:
    """A module of some code."""
    module = ModuleType(name)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def absent() -> None:
    if "tensors" in BUILT_IN:
        pytest.skip("the example lies in the package")


@pytest.fixture
def example(absent: None) -> Iterator[type[Source]]:
    """The registered source of the example."""
    try:
        yield run(SOURCE, "tensors_of_mine").Tensors
    finally:
        SOURCES.unregister("tensors")


@pytest.mark.parametrize("name", CASES)
def test_the_examples_own_tests_pass(example: type[Source], name: str, tmp_path: Path) -> None:
    assert SOURCES.names() == sorted([*BUILT_IN, "tensors"])
    getattr(run(TEST, "test_tensors_of_mine"), name)(tmp_path)


def test_the_example_is_listed_with_the_other_sources(example: type[Source], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"accepted: digits, .*, a \.pt file with images and labels, "):
        read(DataSettings(str(tmp_path / "file")))


def test_an_entry_point_brings_the_example_in(
    absent: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As an installed package would: a module on the path, and the metadata that name its class."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "tensors.py").write_text(SOURCE.replace('@SOURCES.register("tensors")\n', ""))
    points = re.search(r"```toml\n\[project\.entry-points\.\"(.*?)\"\]\n(.*?)```", SECTION, flags=re.DOTALL)
    metadata = tmp_path / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[{}]\n{}".format(*points.groups()).replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(SOURCES, "_foreign", None)
    try:
        assert SOURCES.names() == sorted([*BUILT_IN, "tensors"])
        run(TEST, "test_tensors_of_mine").test_images_and_labels_are_read_as_they_are(tmp_path)
    finally:
        SOURCES.unregister("tensors")
        for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
            del sys.modules[name]


def test_nothing_of_the_example_stays_registered() -> None:
    assert SOURCES.names() == BUILT_IN
    assert {"cifar", "digits", "folder", "hub", "npz", "parquet"} <= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_source_has_a_test_of_its_own(name: str) -> None:
    assert (Path(__file__).parent / f"test_{name}.py").is_file(), f"write tests/data/sources/test_{name}.py"
