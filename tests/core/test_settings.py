"""Plain values against type hints: what fits is taken as its type has it, all else is one line."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softdefend.core.errors import SettingError
from softdefend.core.hints import fields_of
from softdefend.core.registry import Registry
from softdefend.core.settings import Settings, Word
from softdefend.core.threat import Budget
from softdefend.core.yaml_files import parse_value


class Rule(ABC):
    @abstractmethod
    def apply(self) -> None: ...


class Mild(Rule):
    def __init__(self, share: float = 0.5, way: Literal["up", "down"] = "up") -> None: ...
    def apply(self) -> None: ...


class Strong(Rule):
    def __init__(self, share: float = 0.5, rounds: int = 3, inner: Rule | None = None) -> None: ...
    def apply(self) -> None: ...


class Stronger(Strong):
    def __init__(self, edge: Budget | None = None, **others: Any) -> None: ...


class Needy(Rule):
    def __init__(self, must: int) -> None: ...
    def apply(self) -> None: ...


class Foreign:
    """No rule at all."""


@dataclass(frozen=True)
class Plan:
    kind: Literal["step", "cosine"] = "step"
    marks: tuple[float, ...] = (0.5, 0.75)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    count: int | None = None
    plan: Plan = Plan()


@dataclass(frozen=True)
class Everything:
    name: str = "run"
    seed: int = 0
    fast: bool = False
    folder: Path | None = None
    eps: Budget = Budget("8/255")
    pair: tuple[int, str] = (1, "a")
    names: list[str] = field(default_factory=list)
    anything: Foreign | None = None
    either: str | Inner = "text"
    inner: Inner = Inner()
    rule: Rule = field(default_factory=Mild)


RULES = Registry[type]("rules-of-this-test")
for _kind in (Mild, Strong, Stronger, Needy):
    RULES.register(_kind.__name__)(_kind)
SETTINGS = Settings(fields_of(Everything), registries={Rule: RULES})
NAMES = "name, seed, fast, folder, eps, pair, names, anything, either, inner, rule"
INNER = "its settings by name: rate, count, plan; as words: --inner.NAME VALUE"
VALUE = "a value behind it; --name=VALUE where it begins with a minus"
CLASSES = "Mild or Needy or Strong or Stronger or the import path of your own subclass of Rule"


def read(*words: str) -> dict[str, Any]:
    """Words ``name=value``, one after another."""
    tree: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        tree = SETTINGS.update(tree, {name: Word(text if equals else None)})
    return tree


FITTING = {
    "a whole number as a float": ("inner: {rate: 1}", {"inner": {"rate": 1.0}}),
    "an exponent": ("inner: {rate: 1e-4}", {"inner": {"rate": 0.0001}}),
    "a number in quotes": ("inner: {rate: '0.2'}", {"inner": {"rate": 0.2}}),
    "null where it is allowed": ("inner: {count: null}", {"inner": {"count": None}}),
    "a dotted name": ("inner.plan.kind: cosine", {"inner": {"plan": {"kind": "cosine"}}}),
    "a ratio": ("eps: 4/255", {"eps": "4/255"}),
    "a ratio as a number": ("eps: 0.03", {"eps": "0.03"}),
    "a date is text": ("name: 2020-01-01", {"name": "2020-01-01"}),
    "a list": ("inner: {plan: {marks: [0.5, 1]}}", {"inner": {"plan": {"marks": [0.5, 1.0]}}}),
    "a list in quotes": ("inner: {plan: {marks: '[0.5]'}}", {"inner": {"plan": {"marks": [0.5]}}}),
    "a list of two": ("pair: [3, b]", {"pair": [3, "b"]}),
    "a type of somebody else": ("anything: {a: [1]}", {"anything": {"a": [1]}}),
    "a rule by its name": ("rule: Strong", {"rule": {"class_path": f"{__name__}.Strong", "init_args": {}}}),
    "a rule's argument alone": (
        "rule: {way: down}",
        {"rule": {"class_path": f"{__name__}.Mild", "init_args": {"way": "down"}}},
    ),
    "a rule by its path": (
        f"rule: {{class_path: {__name__}.Strong, init_args: {{rounds: 1}}}}",
        {"rule": {"class_path": f"{__name__}.Strong", "init_args": {"rounds": 1}}},
    ),
    "a rule in a rule": (
        "rule: {class_path: Strong, init_args: {inner: {class_path: Mild, init_args: {share: 1}}}}",
        {
            "rule": {
                "class_path": f"{__name__}.Strong",
                "init_args": {"inner": {"class_path": f"{__name__}.Mild", "init_args": {"share": 1.0}}},
            }
        },
    ),
    "an argument of the base class": (
        "rule: {class_path: Stronger, init_args: {rounds: 2, edge: 1/255}}",
        {"rule": {"class_path": f"{__name__}.Stronger", "init_args": {"rounds": 2, "edge": "1/255"}}},
    ),
}


@pytest.mark.parametrize(("text", "expected"), FITTING.values(), ids=FITTING.keys())
def test_what_fits_is_taken_as_its_type_has_it(text: str, expected: dict[str, Any]) -> None:
    tree = SETTINGS.update({}, parse_value(text))
    assert tree == expected
    assert repr(tree) == repr(expected)  # 1 is equal to 1.0
    assert SETTINGS.update({}, tree) == tree  # nothing is left to be done


REFUSED = {
    "unknown": ("foo: 1", f"foo: got an unknown setting; accepted: {NAMES}"),
    "unknown in a section": (
        "inner: {rat: 1}",
        "inner.rat: got an unknown setting; accepted: those of inner: rate, count, plan; did you mean rate?",
    ),
    "unknown two levels down": (
        "inner: {plan: {mark: 1}}",
        "inner.plan.mark: got an unknown setting; accepted: those of inner.plan: kind, marks; "
        "did you mean marks?",
    ),
    "a name below a value": ("seed.x: 1", f"seed.x: got an unknown setting; accepted: {NAMES}"),
    "a name that is no text": ("3: 4", f"3: got an unknown setting; accepted: {NAMES}"),
    "text for a number": ("seed: many", "seed: got many; accepted: a whole number"),
    "half a number": ("seed: 1.5", "seed: got 1.5; accepted: a whole number"),
    "true for a number": ("seed: true", "seed: got True; accepted: a whole number"),
    "a number for true": ("fast: 1", "fast: got 1; accepted: true or false"),
    "a number for text": ("name: 3", "name: got 3; accepted: text"),
    "no text for a number": ("seed: ''", "seed: got nothing; accepted: a whole number"),
    "null": ("seed: null", "seed: got null (None); accepted: a value: a whole number"),
    "null for a section": (
        "inner:",
        "inner: got null (None); accepted: a value: its settings by name: rate, count, plan",
    ),
    "not even null": ("inner: {count: x}", "inner.count: got x; accepted: a whole number or null"),
    "no ratio": (
        "eps: 8/0",
        "eps: got 8/0; accepted: a ratio such as 8/255 or a non-negative number such as 0.03",
    ),
    "no choice": ("inner: {plan: {kind: stairs}}", "inner.plan.kind: got stairs; accepted: step or cosine"),
    "no list": (
        "inner: {plan: {marks: 0.5}}",
        "inner.plan.marks: got 0.5; accepted: a list, such as [a, b]",
    ),
    "one of a list": ("names: [a, 3]", "names: got 3; accepted: text"),
    "one of a list of numbers": (
        "inner: {plan: {marks: [a]}}",
        "inner.plan.marks: got 'a'; accepted: a number",
    ),
    "a list of another length": ("pair: [1]", "pair: got [1]; accepted: a list of 2"),
    "no section": (
        "inner: 5",
        f"inner: got 5; accepted: {INNER}",
    ),
    "an unknown class": ("rule: Foo", f"rule: got Foo; accepted: {CLASSES}"),
    "a class of another kind": (
        f"rule: {__name__}.Foreign",
        f"rule: got {__name__}.Foreign; accepted: {CLASSES}",
    ),
    "a class that is abstract": (
        f"rule: {__name__}.Rule",
        f"rule: got {__name__}.Rule, an abstract class; accepted: {CLASSES}",
    ),
    "no module": ("rule: no.where", f"rule: got no.where (No module named 'no'); accepted: {CLASSES}"),
    "no class": ("rule: {class_path: null}", f"rule: got null (None); accepted: {CLASSES}"),
    "a number as a class": ("rule: {class_path: 3}", f"rule: got 3; accepted: {CLASSES}"),
    "a number as a rule": ("rule: 3", f"rule: got 3; accepted: {CLASSES}"),
    "an unknown argument": (
        "rule: {class_path: Strong, init_args: {way: up}}",
        "rule.way: got an unknown setting; accepted: those of Strong: share, rounds, inner",
    ),
    "an argument beside the class": (
        "rule: {class_path: Strong, rounds: 1}",
        "rule: got settings beside class_path; "
        "accepted: {class_path: NAME, init_args: {SETTING: VALUE}}, or NAME alone",
    ),
    "arguments that are none": (
        "rule: {class_path: Strong, init_args: null}",
        "rule: got init_args None; accepted: {class_path: NAME, init_args: {SETTING: VALUE}}, or NAME alone",
    ),
    "an argument of another type": (
        "rule: {class_path: Strong, init_args: {rounds: x}}",
        "rule.rounds: got x; accepted: a whole number",
    ),
    "a rule in a rule": (
        "rule: {class_path: Strong, init_args: {inner: Foo}}",
        f"rule.inner: got Foo; accepted: {CLASSES} or null",
    ),
    "an argument without a rule": (
        "rule: {class_path: Strong, init_args: {inner: {share: 1}}}",
        f"rule.inner: got no class_path; accepted: {CLASSES} or null",
    ),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_all_else_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(SettingError) as raised:
        SETTINGS.update({}, parse_value(text))
    assert str(raised.value) == expected


def test_a_number_beyond_all_floats_is_refused() -> None:
    with pytest.raises(SettingError, match=r"inner\.rate: got 1000.* accepted: a number"):
        SETTINGS.update({}, {"inner": {"rate": 10**400}})


@pytest.mark.parametrize("name", ["inner.count", "pair"])
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_whole_numbers_have_64_bits(name: str, number: int) -> None:
    text = f"[{number}, a]" if name == "pair" else str(number)
    for value in (Word(text), parse_value(text)):
        with pytest.raises(
            SettingError, match=rf"^{name}: got {number}; accepted: a whole number from -2\^63 to 2\^63 - 1$"
        ):
            SETTINGS.update({}, {name: value})
    for fits in (2**63 - 1, -(2**63)):
        assert SETTINGS.update({}, {"inner.count": Word(str(fits))}) == {"inner": {"count": fits}}
    assert SETTINGS.update({}, {"seed": number}) == {"seed": number}  # which the run itself refuses


@pytest.mark.parametrize("value", ["{rate: 1, rate: 2}", "{plan: {kind: step}, plan.kind: cosine}"])
def test_a_setting_that_stands_twice_in_a_value_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(SettingError, match=r"^inner: got '.*' a second time; accepted: each setting once$"):
        SETTINGS.update({}, {"inner": Word(value)})


def test_what_is_not_a_number_is_left_to_the_setting() -> None:
    assert math.isnan(read("inner.rate=.nan")["inner"]["rate"])
    assert read("inner.rate=1e400")["inner"]["rate"] == math.inf


def test_a_broken_module_of_somebody_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rules_of_a_user.py").write_text("raise OSError('no\\nlicence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        SettingError, match=r"^rule: got broken_rules_of_a_user\.Mine \(no licence\); accepted: "
    ):
        read("rule=broken_rules_of_a_user.Mine")


# --- words of a command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("name=3", {"name": "3"}),
        ("name=null", {"name": "null"}),
        ("name=", {"name": ""}),
        ("folder=null", {"folder": None}),
        ("folder=3", {"folder": "3"}),
        ("seed=-5", {"seed": -5}),
        ("seed=1_000", {"seed": 1000}),
        ("fast=yes", {"fast": True}),
        ("inner.rate=1e-3", {"inner": {"rate": 0.001}}),
        ("inner.count=null", {"inner": {"count": None}}),
        ("eps=.03", {"eps": ".03"}),
        ("names=[a, b]", {"names": ["a", "b"]}),
        ("inner={rate: 2}", {"inner": {"rate": 2.0}}),
        ("rule={share: 1}", {"rule": {"class_path": f"{__name__}.Mild", "init_args": {"share": 1.0}}}),
        ("rule.init_args.share=1", {"rule": {"class_path": f"{__name__}.Mild", "init_args": {"share": 1.0}}}),
        ("rule.class_path=Strong", {"rule": {"class_path": f"{__name__}.Strong", "init_args": {}}}),
    ],
)
def test_words_are_read_by_the_type_of_their_setting(word: str, expected: dict[str, Any]) -> None:
    assert read(word) == expected


def test_a_section_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "inner.yaml"
    path.write_text("rate: 2\nplan: {kind: cosine}")
    assert read(f"inner={path}") == {"inner": {"rate": 2.0, "plan": {"kind": "cosine"}}}
    assert read(f"either={path}") == {"either": str(path)}  # where text is accepted too, it is text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "seed",
            "--seed: got no value; accepted: a value behind it; --name=VALUE where it begins with a minus",
        ),
        ("foo", f"foo: got an unknown setting; accepted: {NAMES}"),
        ("seed=null", "seed: got null (None); accepted: a value: a whole number"),
        (
            "inner=3",
            "inner: got 3; accepted: its settings by name: rate, count, plan; as words: --inner.NAME VALUE",
        ),
        ("rule.share.x=1", "rule.share.x: got an unknown setting; accepted: those of Mild: share, way"),
        ("rule=", f"rule: got no class_path; accepted: {CLASSES}"),
        ("rule=3", f"rule: got 3; accepted: {CLASSES}"),
        ("names=a", "names: got a; accepted: a list, such as [a, b]"),
    ],
)
def test_words_that_cannot_be_read(word: str, expected: str) -> None:
    with pytest.raises(SettingError) as raised:
        read(word)
    assert str(raised.value) == expected


KINDS = ["name", "seed", "fast", "eps", "inner.rate", "inner.count", "inner", "rule", "rule.share", "pair"]


@given(st.text(), st.sampled_from(KINDS))
def test_every_word_is_a_value_or_one_line(text: str, name: str) -> None:
    error, tree = None, dict[str, Any]()
    try:
        tree = SETTINGS.update({}, {name: Word(text)})
    except SettingError as raised:
        error = raised
    assert "\n" not in str(error)
    assert SETTINGS.update({}, tree) == tree or "nan" in repr(tree)


# --- one after another --------------------------------------------------------------------------------------


def test_later_values_win_and_the_others_stay() -> None:
    first = SETTINGS.update({}, {"seed": 1, "inner": {"rate": 1, "plan": {"kind": "cosine"}}})
    second = SETTINGS.update(first, {"inner": {"rate": 2}})
    assert second == {"seed": 1, "inner": {"rate": 2.0, "plan": {"kind": "cosine"}}}
    assert first["inner"]["rate"] == 1.0


def test_a_rules_arguments_stay_where_the_next_class_has_them_too() -> None:
    assert read("rule=Strong", "rule.rounds=1", "rule.share=0.7", "rule=Mild")["rule"] == {
        "class_path": f"{__name__}.Mild",
        "init_args": {"share": 0.7},
    }
    again = read("rule=Strong", "rule.rounds=1", f"rule={__name__}.Strong")["rule"]
    assert again == {"class_path": f"{__name__}.Strong", "init_args": {"rounds": 1}}
    with pytest.raises(SettingError, match=r"rule\.rounds: got an unknown setting; accepted: those of Mild"):
        read("rule.rounds=1", "rule=Strong")


def test_what_has_no_default_is_missing_until_it_is_given() -> None:
    @dataclass(frozen=True)
    class Needs:
        runs: tuple[str, ...]
        size: int | None
        rule: Rule = field(default_factory=Mild)

    settings = Settings(fields_of(Needs), registries={Rule: RULES}, prefix="--")
    assert dict(settings.missing({})) == {
        "--runs": "a list, such as [a, b]",
        "--size": "a whole number or null",
    }
    tree = settings.update({}, {"runs": ["a"], "size": None, "rule": "Needy"})
    assert dict(settings.missing(tree)) == {"--rule.must": "a whole number"}
    assert dict(settings.missing(settings.update(tree, {"rule.must": 1}))) == {}


def test_messages_may_call_settings_by_their_flags() -> None:
    with pytest.raises(SettingError, match=r"^--seed: got x; accepted: a whole number$"):
        Settings(fields_of(Everything), prefix="--").update({}, {"seed": Word("x")})
    with pytest.raises(SettingError, match=r"^--seed: got no value"):
        Settings(fields_of(Everything), prefix="--").update({}, {"seed": Word(None)})
