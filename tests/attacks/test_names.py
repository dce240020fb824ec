"""Every attack by its short name."""

import dataclasses
import doctest
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from softdefend import attacks
from softdefend.attacks import (
    APGD,
    CWL2,
    FAB,
    FGSM,
    FMN,
    PGD,
    CWLinf,
    DeepFool,
    HopSkipJump,
    SigmaZero,
    Square,
    SurFree,
    TargetedAPGD,
    names,
)
from softdefend.attacks.names import ATTACKS, parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.evaluation.autoattack import parse

NAMES = {
    "fgsm": FGSM(),
    "fgsm-margin": FGSM(loss="margin"),
    "pgd-20": PGD(steps=20),
    "pgd-50x10": PGD(steps=50, restarts=10),
    "pgd-20-margin": PGD(steps=20, loss="margin"),
    "pgd-7x2-kl": PGD(steps=7, restarts=2, loss="kl"),
    "apgd-ce": APGD(),
    "apgd-dlr-50": APGD(steps=50, loss="dlr"),
    "apgd-ce-100x5": APGD(restarts=5),
    "apgd-dlr-eot20": APGD(loss="dlr", eot=20),
    "apgd-ce-50-eot5": APGD(steps=50, eot=5),
    "apgd-t": TargetedAPGD(),
    "fab-t": FAB(),
    "fab-t-50": FAB(steps=50),
    "fab": FAB(targeted=False),
    "fab-100x5": FAB(restarts=5, targeted=False),
    "fab-t-20x2": FAB(steps=20, restarts=2),
    "square": Square(),
    "square-1000": Square(queries=1000),
    "cw-linf": CWLinf(),
    "cw-linf-100": CWLinf(steps=100),
    "cw-linf-30x5": CWLinf(restarts=5),
    "cw-l2": CWL2(),
    "cw-l2-9x10000": CWL2(steps=10_000),
    "cw-l2-3x1000": CWL2(rounds=3),
    "fmn": FMN(),
    "fmn-200": FMN(steps=200),
    "deepfool": DeepFool(),
    "deepfool-100": DeepFool(steps=100),
    "sigma-zero": SigmaZero(),
    "sigma-zero-100": SigmaZero(steps=100),
    "hop-skip-jump": HopSkipJump(),
    "hop-skip-jump-300": HopSkipJump(queries=300),
    "surfree": SurFree(),
    "surfree-1000": SurFree(queries=1000),
    "pgd-20-match": PGD(steps=20, loss="match"),
    "pgd-20-margin-eot5": PGD(steps=20, loss="margin", eot=5),
    "fgsm-eot20": FGSM(eot=20),
    "cw-linf-100x2-eot3": CWLinf(steps=100, restarts=2, eot=3),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_its_attack_and_the_attack_its_name(name):
    attack = parse_attack(name)
    assert attack == NAMES[name]
    assert type(attack) is type(NAMES[name])
    assert attack.name == name


@pytest.mark.parametrize(
    ("name", "same"),
    [("pgd-20-ce", "pgd-20"), ("cw-linf-30", "cw-linf"), ("cw-l2-9x1000", "cw-l2"), ("fmn-100", "fmn")],
)
def test_the_default_may_be_said(name, same):
    assert parse_attack(name).name == same


@pytest.mark.parametrize(
    "name",
    [
        *("pgd", "pgd--3", "pgd-20x", "PGD-20", "autoattack-9000", "", "fgsm-dlr", "apgd", "apgd-fab"),
        *(
            "cw",
            "cw-l1",
            "cw-l2-9",
            "cw-l2-9x",
            "cw-linf-margin",
            "fmn-l2",
            "fmn-1x2",
            "deepfool-",
            "fab-",
            "apgd-t-eot2",
        ),
    ],
)
def test_other_names_are_refused_and_the_answer_lists_all(name):
    with pytest.raises(SettingError) as error:
        parse_attack(name)
    known = ("fgsm", "pgd", "apgd-t", "fab-t", "square", "cw-linf", "cw-l2", "fmn", "deepfool", "sigma-zero")
    assert all(word in error.value.accepted for word in known)


@pytest.mark.parametrize("name", ["pgd-20x0", "fmn-0", "deepfool-0", "cw-l2-0x10", "cw-l2-3x0", "apgd-ce-0"])
def test_counts_must_make_sense(name):
    with pytest.raises(SettingError, match=r"attack\.(steps|restarts|rounds)"):
        parse_attack(name)


LARGE = {
    "pgd-99999999999999999999": "attack.steps",
    "pgd-20x1000001": "attack.restarts",
    "apgd-ce-eot99999999999999": "attack.eot",
    "apgd-t-1000001": "attack.steps",
    "fab-t-5x99999999": "attack.restarts",
    "square-1000001": "attack.queries",
    "cw-linf-99999999999": "attack.steps",
    "cw-l2-9x99999999999": "attack.steps",
    "cw-l2-99999999999x9": "attack.rounds",
    "fmn-1000001": "attack.steps",
    "deepfool-1000001": "attack.steps",
    "sigma-zero-1000001": "attack.steps",
    "surfree-1000001": "attack.queries",
    "pgd-20-eot1000001": "attack.eot",
    "pgd-" + 5000 * "9": "attack.steps",  # more digits than Python reads
    "apgd-dlr-eot" + 5000 * "9": "attack.eot",
}


@pytest.mark.parametrize("name", LARGE, ids=lambda name: name[:20])
def test_counts_that_would_take_for_ever_are_one_short_line(name):
    for read in (parse_attack, parse):
        with pytest.raises(SettingError, match=r"accepted: at most 1,000,000$") as error:
            read(name)
        assert error.value.setting == LARGE[name]
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["square-1000000", "pgd-1000000", "apgd-ce-eot1000000"])
def test_a_million_is_a_count(name):
    assert parse_attack(name).name == name
    assert parse_attack("pgd-" + 5000 * "0" + "20") == PGD(steps=20)


def test_a_transfer_attack_needs_a_second_network():
    with pytest.raises(SettingError, match="second network"):
        parse_attack("transfer-pgd-20")


def test_the_example_in_the_documentation():
    assert doctest.testmod(names).failed == 0


PAGE = (Path(__file__).parents[2] / "docs/attacks.md").read_text(encoding="utf-8")


def test_the_page_names_every_attack_and_its_settings():
    for attack in {type(attack): attack for attack in NAMES.values()}.values():
        assert f"`{type(attack).__name__}`" in PAGE
    for kind in (APGD, CWL2, FAB, FMN, DeepFool, HopSkipJump, SigmaZero, Square, SurFree):
        row = next(line for line in PAGE.splitlines() if f"| `{kind.__name__}` |" in line)
        for field in dataclasses.fields(kind):
            shown = f"`{field.name}` {field.default:g}" if type(field.default) in (int, float) else ""
            assert shown in row
    kinds = "fgsm|pgd|apgd|fab|square|cw|fmn|deepfool|sigma-zero|hop-skip-jump|surfree"
    known = re.findall(rf"`((?:{kinds})(?:-[a-z0-9]+)*)`", PAGE)
    assert len(known) > 30
    for name in {name for name in known if name != "pgd"}:
        assert parse_attack(name).name


def test_every_registered_attack_is_public_on_the_page_and_tested_here():
    for name, kind in ATTACKS.items():
        if kind.__module__.startswith("softdefend."):
            assert kind.__name__ in attacks.__all__, (
                f"import {kind.__name__} in softdefend/attacks/__init__.py"
            )
            assert f"`{kind.__name__}" in PAGE, f"add a row of `{kind.__name__}` to docs/attacks.md"
            tested = {given for given, attack in NAMES.items() if type(attack) is kind}
            assert kind.suffix is None or any(given.startswith(name) for given in tested), (
                f"add {name!r} to NAMES in this file"
            )


def test_the_pages_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    scope: dict[str, object] = {}
    with torch.random.fork_rng():
        exec(code, scope)
    assert scope["adversarial"].shape == scope["image"].shape


@pytest.mark.parametrize(
    "name",
    [
        *("fgsm", "pgd-20", "cw-linf", "apgd-ce", "apgd-dlr", "apgd-t", "square"),
        "fab-t",
        "fmn",
        "deepfool",
        "sigma-zero",
    ],
)
def test_the_page_counts_what_an_image_costs_that_never_falls(name):
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 10)).requires_grad_(False)
    net[1].weight.copy_(0.01 * torch.randn(10, 27, generator=stream(0, "w")))
    net[1].bias.copy_(torch.eye(10)[0] * 10)
    forwards, gradients = [], []

    def counted(image: torch.Tensor) -> torch.Tensor:
        logits = net(image)
        forwards.append(len(image))
        if logits.requires_grad:
            logits.register_hook(lambda grad: gradients.append(len(grad)))
        return logits

    image = torch.rand(1, 3, 3, 3, generator=stream(0, "x"))
    threat = ThreatModel("l0", 1) if name == "sigma-zero" else ThreatModel("linf", Budget(0.01))
    parse_attack(name)(counted, image, torch.tensor([0]), threat, generator=stream(0, "a"))
    row = next(line for line in PAGE.splitlines() if line.startswith("| ") and f"`{name}`" in line)
    assert [sum(forwards), sum(gradients)] == [int(cell) for cell in row.split("|")[5:7]]
