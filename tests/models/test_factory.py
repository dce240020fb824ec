from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.models.factory import from_timm, from_user

SOURCE = """
from torch import nn

def both(num_classes, in_channels):
    return nn.Conv2d(in_channels, num_classes, 1)

def classes_only(*, num_classes, width=7):
    return nn.Linear(width, num_classes)

def neither():
    return nn.Flatten()

def anything(**settings):
    return nn.Conv2d(settings["in_channels"], settings["num_classes"], 1)

def positional(num_classes, /, in_channels=1):
    return nn.Flatten()

def wants_more(num_classes, depth):
    return nn.Flatten()

def no_module(num_classes):
    return num_classes

def broken():
    raise KeyError("the user's own mistake")

def leaves():
    raise SystemExit(3)

constant = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch) -> str:
    """A module that exists only in the working directory."""
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield name
    sys.modules.pop(name, None)


def test_keywords_are_passed_as_far_as_they_are_accepted(nets: str) -> None:
    both = from_user(f"{nets}:both", 5, 2)
    assert (both.in_channels, both.out_channels) == (2, 5)
    only = from_user(f"{nets}:classes_only", 5, 2)
    assert (only.in_features, only.out_features) == (7, 5)
    assert isinstance(from_user(f"{nets}:neither", 5, 2), nn.Flatten)
    anything = from_user(f"{nets}:anything", 5, 2)
    assert (anything.in_channels, anything.out_channels) == (2, 5)


def test_import_path_is_left_as_it_was(nets: str) -> None:
    before = list(sys.path)
    from_user(f"{nets}:both", 5, 2)
    with pytest.raises(SettingError):
        from_user("no_such_module_anywhere:both", 5, 2)
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "missing does not exist"),
        ("constant", "constant is not callable"),
        ("wants_more", "depth"),
        ("positional", "num_classes"),
        ("no_module", "which returned int"),
        ("", "accepted: package.module:function"),
    ],
)
def test_unusable_functions_are_refused(nets: str, function: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        from_user(f"{nets}:{function}", 5, 2)


@pytest.mark.parametrize("path", ["no_such_module_anywhere:f", ":f", ".relative:f", "torch.no_such_part:f"])
def test_unknown_modules_are_refused(path: str) -> None:
    with pytest.raises(SettingError, match=r"net.name: got .*accepted: package.module:function"):
        from_user(path, 5, 2)


def test_a_mistake_inside_the_factory_keeps_its_own_error(nets: str) -> None:
    with pytest.raises(
        SettingError, match=r"KeyError: .the user's own mistake.* \(.*\.py, line \d+\)"
    ) as caught:
        from_user(f"{nets}:broken", 5, 2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_factory_that_ends_the_process_is_one_line(nets: str, tmp_path) -> None:
    with pytest.raises(SettingError, match=r"leaves, which raised SystemExit: 3"):
        from_user(f"{nets}:leaves", 5, 2)
    (tmp_path / "script_without_a_guard.py").write_text("import sys\nsys.exit(0)")
    with pytest.raises(SettingError, match=r"whose import raised SystemExit: 0"):
        from_user("script_without_a_guard:make", 5, 2)


def test_a_module_that_cannot_be_read_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_python_at_all.py").write_text("def (:")
    with pytest.raises(SettingError, match=r"whose import raised SyntaxError: .*line 1"):
        from_user("no_python_at_all:make", 5, 2)


def test_timm_gets_fresh_weights_and_both_numbers(monkeypatch) -> None:
    calls = []

    def create_model(name: str, **settings: object) -> nn.Module:
        calls.append((name, settings))
        return nn.Flatten()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    assert isinstance(from_timm("convnext_atto", 5, 2), nn.Flatten)
    assert calls == [("convnext_atto", {"pretrained": False, "num_classes": 5, "in_chans": 2})]


def test_name_timm_does_not_know_is_refused(monkeypatch) -> None:
    def create_model(name: str, **settings: object) -> nn.Module:
        raise RuntimeError(f"Unknown model ({name})")

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    with pytest.raises(SettingError, match=r"Unknown model \(nothing\)"):
        from_timm("nothing", 5, 2)


def test_a_timm_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(SettingError, match=r"cannot be imported \(operator .*; accepted: a timm and a torch"):
        from_timm("convnext_atto", 5, 2)


def test_without_timm_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SettingError, match=r"softdefend\[timm\]"):
        from_timm("convnext_atto", 5, 2)
