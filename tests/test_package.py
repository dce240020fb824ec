"""The package's root: names are imported at their first use, and all of them are there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import softdefend as sd

SOURCE = Path(sd.__file__)


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_help_and_the_import_leave_heavy_packages_alone(words):
    code = (
        "import contextlib, sys, softdefend, softdefend.cli.main as main\n"
        f"with contextlib.suppress(SystemExit): main.run([{words!r}])\n"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'sklearn', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_trains_and_evaluates_imports_no_compiler():
    code = "import sys, softdefend.experiments.pipeline; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_name_is_what_type_checkers_are_told():
    told = {
        alias.name: node.module
        for block in ast.parse(SOURCE.read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(sd.__all__) == {*told, "DivergenceError", "SettingError"}
    for name, module in told.items():
        assert getattr(sd, name) is getattr(importlib.import_module(str(module)), name)
    assert set(sd.__all__) < set(dir(sd))


def test_folders_are_attributes():
    folders = {path.parent.name for path in SOURCE.parent.glob("*/__init__.py")}
    assert set(sd._FOLDERS) == folders
    for name in folders:
        assert getattr(sd, name) is sys.modules[f"softdefend.{name}"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'softdefend' has no attribute 'nothing'"):
        sd.nothing  # noqa: B018
