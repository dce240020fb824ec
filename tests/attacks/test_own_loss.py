"""Losses by name: the user's own function, and logits to match."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from softdefend.attacks import FGSM, PGD, margin, match_logits
from softdefend.attacks.losses import exchanged
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel

THREAT = ThreatModel("linf", Budget("0.1"))
IMAGE = torch.rand(5, 1, 4, 4, generator=stream(0, "image"))
LABEL = torch.tensor([0, 1, 2, 0, 1])
MODULE = """
import torch

def spread(logits, label):
    return logits.var(dim=1)

def whole(logits, label):
    return logits.var()

def broken(logits, label):
    raise RuntimeError("no such luck")

NUMBER = 3
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of losses that can be imported."""
    (tmp_path / "losses_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "losses_of_mine", raising=False)
    return "losses_of_mine"


def network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return net.eval().requires_grad_(False)


def spread(logits: Tensor) -> Tensor:
    return logits.var(dim=1)


@pytest.mark.parametrize("name", ["pgd-5-{}:spread", "fgsm-{}:spread", "pgd-3x2-{}:spread-eot2"])
def test_a_name_brings_the_users_loss(losses, name):
    attack = parse_attack(name.format(losses))
    assert attack.name == name.format(losses)
    made = attack(network(), IMAGE, LABEL, THREAT, generator=stream(0, "start"))
    plain = FGSM() if isinstance(attack, FGSM) else PGD(steps=attack.steps, eot=attack.eot)
    if getattr(attack, "restarts", 1) == 1:
        wanted = plain(network(), IMAGE, LABEL, THREAT, loss=spread, generator=stream(0, "start"))
        assert torch.equal(made, wanted)
    assert (spread(network()(made)) > spread(network()(IMAGE))).all()


@pytest.mark.parametrize(
    ("function", "given"),
    [
        ("nothing", "does not exist"),
        ("NUMBER", "is not callable"),
    ],
)
def test_no_such_function_is_one_line(losses, function, given):
    with pytest.raises(SettingError, match=f"attack.loss: got .*{given}"):
        parse_attack(f"pgd-5-{losses}:{function}")


def test_a_module_that_does_not_exist_is_one_line():
    with pytest.raises(SettingError, match=r"attack\.loss: got no_such_module:loss"):
        PGD(loss="no_such_module:loss")


@pytest.mark.parametrize(("function", "given"), [("whole", r"shape \[\]"), ("broken", "no such luck")])
def test_a_function_that_makes_no_loss_is_refused_before_anything_runs(losses, function, given):
    from softdefend.evaluation import EvaluateSettings
    from softdefend.evaluation.settings import check_attacks

    settings = EvaluateSettings(attacks=("fgsm", f"pgd-2-{losses}:{function}"))
    with pytest.raises(SettingError, match=f"attack.loss: got {losses}:{function}, which .*{given}"):
        check_attacks(settings, THREAT, 3, torch.device("cpu"))


def test_matched_logits_are_the_largest_loss():
    wanted = torch.randn(5, 3, generator=stream(0, "wanted"))
    loss = match_logits(wanted)
    assert not loss(wanted).any()
    shift = torch.tensor([3.0, 0.0, 4.0])
    torch.testing.assert_close(loss(wanted + shift), torch.full((5,), -25.0))
    with pytest.raises(SettingError, match=r"attack\.loss: got 3 logits to match"):
        loss(torch.zeros(5, 4))


def test_the_true_class_and_the_likeliest_wrong_one_change_places():
    clean = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    wanted = torch.tensor([[2.0, 1.0, 3.0], [1.0, 3.0, 2.0], [0.0, 5.0, 5.0]])
    assert torch.equal(exchanged(clean, torch.tensor([0, 1, 2])), wanted)


def test_images_are_pulled_towards_the_logits_that_are_wanted():
    net = network()
    label = net(IMAGE).argmax(1)
    made = PGD(steps=50, step_size=Budget("0.01"), loss="match", start="none")(
        net, IMAGE, label, ThreatModel("linf", Budget("0.4"))
    )
    wanted = exchanged(net(IMAGE), label)
    before, after = ((net(x) - wanted).square().sum(1) for x in (IMAGE, made))
    assert (after < 0.5 * before).all()
    assert (margin(net(made), label) > margin(net(IMAGE), label)).all()
