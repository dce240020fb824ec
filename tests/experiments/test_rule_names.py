"""Rules are found by the names in their registry, wherever a configuration may name one."""

from __future__ import annotations

import gc
import sys

import pytest

from softdefend import AWP, EMA, SGLR, SWA, Hard, SettingError, Smooth
from softdefend.experiments.config import resolve
from softdefend.training.config import RULES


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package of somebody else that adds a label rule by an entry point."""
    code = "from softdefend import Smooth\nclass Softer(Smooth):\n    smoothing_by_default = 0.4\n"
    (tmp_path / "their_rules.py").write_text(code)
    info = tmp_path / "their_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[softdefend.labels]\nSofter = their_rules:Softer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(RULES["label"], "_foreign", None)
    yield
    RULES["label"].unregister("Softer")
    sys.modules.pop("their_rules", None)


def test_a_rule_of_an_installed_package_has_a_name(installed):
    label = resolve(["--label", "Softer", "--label.smoothing", "0.3"]).recipe.label
    assert (type(label).__module__, label.smoothing) == ("their_rules", 0.3)


@pytest.mark.parametrize(
    "words",
    [
        ["--weight", "AWP", "--weight.average", "EMA", "--weight.average.decay", "0.5"],
        ["--weight=AWP", "--weight.init_args.average.class_path=EMA", "--weight.average.decay=0.5"],
        ["--weight", "{class_path: AWP, init_args: {average: {class_path: EMA, init_args: {decay: 0.5}}}}"],
    ],
    ids=["words", "dotted", "mapping"],
)
def test_a_rule_inside_a_rule_is_named_likewise(words):
    weight = resolve(words).recipe.weight
    assert (type(weight), type(weight.average), weight.average.decay) == (AWP, EMA, 0.5)


def test_a_file_names_what_later_words_fill_in(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("label: {class_path: SGLR, init_args: {r: 0.7}}\nweight: {class_path: AWP}\n")
    recipe = resolve(["--preset", str(path), "--label.alpha", "0.5", "--weight.average", "SWA"]).recipe
    assert (type(recipe.label), recipe.label.r, recipe.label.alpha) == (SGLR, 0.7, 0.5)
    assert type(recipe.weight.average) is SWA


def test_a_class_that_happens_to_be_loaded_has_no_name():
    class Stray(Hard):
        pass

    assert any(kind.__name__ == "Stray" for kind in Hard.__subclasses__())
    with pytest.raises(
        SettingError, match=r"^label: got Stray; accepted: ADR or Hard or .* subclass of LabelRule"
    ):
        resolve(["--label", "Stray"])
    del Stray
    gc.collect()


def test_a_text_that_equals_a_name_stays_a_text():
    """KD's teacher is a path, and a run may be called as a rule is."""
    label = resolve(["--label", "KD", "--label.standard", "SGLR"]).recipe.label
    assert label.standard == "SGLR"
    assert resolve(["--name", "Smooth"]).name == Smooth.__name__
