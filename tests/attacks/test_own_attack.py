"""Attacks from elsewhere: the example of CONTRIBUTING.md by its own code, and entry points of packages."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ensemble_tools import rugged, sample
from softdefend import attacks
from softdefend.attacks import FGSM, Attack
from softdefend.attacks.names import ATTACKS, parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.evaluation import Evaluator
from softdefend.evaluation.autoattack import parse

DOCUMENT = Path(__file__).parents[2] / "CONTRIBUTING.md"
SHAPE = (1, 4, 4)
THREAT = ThreatModel("linf", Budget("0.02"))


def blocks() -> list[str]:
    """The Python of the section on attacks: the attack and its test."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("\n## Add an attack\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The attack's file as if it lay in the package."""
    if "mi-fgsm" in ATTACKS:
        pytest.skip("the example lies in the package")
    path, name = tmp_path / "mi_fgsm.py", "softdefend.attacks.mi_fgsm"
    path.write_text(blocks()[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    try:
        spec.loader.exec_module(module)
        monkeypatch.setattr(attacks, "MIFGSM", module.MIFGSM, raising=False)
        yield module
    finally:
        ATTACKS.unregister("mi-fgsm")


def test_the_documents_attack_passes_the_documents_test(example: ModuleType) -> None:
    scope: dict[str, object] = {}
    exec(blocks()[1], scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(tests) >= 4
    for test in tests:
        assert callable(test)
        test()


def test_the_documents_attack_is_evaluated_by_its_name(example: ModuleType) -> None:
    net = rugged(SHAPE)
    data, attack = sample(net, 30, SHAPE), parse("mi-fgsm-4")
    assert attack == example.MIFGSM(steps=4)
    result = Evaluator(net, data, THREAT, batch_size=11, microbatch=7)([attack])  # type: ignore[arg-type]
    record = result.attacks["mi-fgsm-4"]
    assert (record.trials["mi-fgsm-4"].forwards == 5).all()  # and one for the verdict
    assert (record.trials["mi-fgsm-4"].backwards == 4).all()
    adversarial = example.MIFGSM(steps=4)(net, data.image, data.labels, THREAT)
    assert torch.equal(record.prediction, net(adversarial).argmax(1))
    with pytest.raises(SettingError, match=r"mi-fgsm\[-STEPS\]"):
        parse_attack("mi-fgsm-")


def test_the_document_leaves_nothing_behind() -> None:
    assert ("mi-fgsm" in ATTACKS) == hasattr(attacks, "MIFGSM")


# --- entry points -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theirs(Attack):
    """Nothing but the protocol."""

    name = "theirs"

    def run(self, net, image, label, threat, context):
        return threat.project(image, image + 0.01 * torch.rand(image.shape, generator=context.generator))


def broken() -> type[Attack]:
    raise ImportError("no module named what_it_needs")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two installed packages with entry points, one of which cannot be imported."""
    monkeypatch.setattr(ATTACKS, "_foreign", {"theirs": lambda: Theirs, "broken": broken})
    yield
    ATTACKS.unregister("theirs")


def test_an_attack_of_another_package_is_found_by_its_name(packages: None) -> None:
    net = rugged(SHAPE)
    attack = parse_attack("theirs")
    assert attack == Theirs()
    data = sample(net, 30, SHAPE)
    one, two = (
        Evaluator(net, data, THREAT, batch_size=10, microbatch=size)([attack]).attacks["theirs"]
        for size in (4, 30)
    )
    assert torch.equal(one.distance, two.distance)
    assert one.distance.min() > 0


def test_a_package_that_cannot_be_imported_stops_only_its_own_name(packages: None) -> None:
    assert parse_attack("fgsm") == FGSM()
    with pytest.raises(
        SettingError, match=r"attacks: got 'broken' \(ImportError: no module named what_it_needs\)"
    ):
        parse_attack("broken")
    with pytest.raises(SettingError, match=r"attacks: got 'unheard'; accepted: .*broken.*theirs"):
        parse_attack("unheard")
    with pytest.raises(SettingError, match="got 'theirs-5'"):
        parse_attack("theirs-5")
