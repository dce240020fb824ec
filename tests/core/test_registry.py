"""A registry finds what this package and what other packages have registered."""

from __future__ import annotations

import sys

import pytest

from softdefend.core.errors import SettingError
from softdefend.core.registry import Registry


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package of somebody else with two entry points, one of which cannot be imported."""
    (tmp_path / "theirs.py").write_text("THING = 'theirs'\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[softdefend.things]\nforeign = theirs:THING\nbroken = theirs:MISSING\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("theirs", None)


def test_own_and_foreign_things_are_found_by_name(installed):
    things = Registry[str]("things")
    things.register("own")("ours")
    assert things.names() == ["broken", "foreign", "own"]
    assert things["own"] == "ours"
    assert things["foreign"] == "theirs"
    assert "foreign" in things


def test_an_unknown_name_is_one_line_that_names_what_there_is(installed):
    things = Registry[str]("things")
    with pytest.raises(SettingError, match=r"things: got 'other'; accepted: broken, foreign"):
        things["other"]


def test_a_broken_package_is_refused_only_when_it_is_asked_for(installed):
    things = Registry[str]("things")
    assert things["foreign"] == "theirs"
    with pytest.raises(SettingError, match=r"things: got 'broken' \(AttributeError"):
        things["broken"]


def test_a_name_is_given_once():
    things = Registry[str]("things")
    things.register("own")("ours")
    with pytest.raises(ValueError, match="registered twice"):
        things.register("own")("another")
