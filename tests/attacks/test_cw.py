"""C&W's l2 attack against a naive reading with torch's own Adam, and its l-inf namesake against PGD."""

import math

import pytest
import torch
from minimal_tools import Counted, check_early_stop, images, rugged

from softdefend.attacks import CWL2, PGD, CWLinf
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import CallerRandomness


def naive(net, image, label, rounds, steps):
    """One image; the distance of the closest wrong point and the forwards made."""
    c, low, high, best, forwards = 1e-3, 0.0, 1e10, math.inf, 1
    start = torch.atanh((2 * image - 1) * (1 - 1e-6))
    if net(image[None])[0].argmax() != label:
        return 0.0, forwards
    for _ in range(rounds):
        argument = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([argument], lr=0.01)
        found, before = False, math.inf
        for step in range(steps):
            point = (argument.tanh() + 1) / 2
            logits = net(point[None])[0]
            forwards += 1
            others = torch.cat([logits[:label], logits[label + 1 :]])
            size = (point - image).square().sum()
            loss = size + c * torch.relu(logits[label] - others.max())
            if logits.argmax() != label:
                best, found = min(best, size.sqrt().item()), True
            if step % (steps // 10) == 0:
                if loss.item() > 0.9999 * before:
                    break
                before = loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        low, high = (low, min(high, c)) if found else (max(low, c), high)
        c = (low + high) / 2 if high < 1e9 else 10 * c
    return best, forwards


def test_follows_the_authors_code_on_each_image_alone():
    net, image = rugged((1, 5, 7)), images(8, (1, 5, 7))
    image[0, :, 0] = 0
    image[1, :, 1] = 1
    label = net(image).argmax(1)
    label[3] = (label[3] + 1) % 5
    forward = Counted(net)
    closest, distance = CWL2(rounds=5, steps=60).minimal(forward, image, label, "l2")
    expected = [naive(net, x, y, 5, 60) for x, y in zip(image, label.tolist(), strict=True)]
    torch.testing.assert_close(distance, torch.tensor([d for d, _ in expected], dtype=torch.float64))
    assert forward.seen == sum(n for _, n in expected)
    assert distance.isfinite().sum() > 4
    assert distance[3] == 0
    assert torch.equal(closest[3], image[3])


def test_stops_where_it_is_close_enough():
    whole, short = check_early_stop(CWL2(rounds=6, steps=100, first_c=0.01), "l2", 0.15)
    assert short < 0.85 * whole


def test_more_rounds_come_closer():
    net, image = rugged((1, 6, 6)), images(20, (1, 6, 6))
    label = net(image).argmax(1)
    distance = [CWL2(rounds=r, steps=100, first_c=1.0).minimal(net, image, label, "l2")[1] for r in (1, 6)]
    assert (distance[1] <= distance[0]).all()
    assert (distance[1] < 0.97 * distance[0]).any()


def test_the_attack_of_each_norm_refuses_the_other():
    net, image = rugged((1, 6, 6)), images(2, (1, 6, 6))
    label = net(image).argmax(1)
    with pytest.raises(SettingError, match=r"threat\.norm: got linf; accepted: l2"):
        CWL2()(net, image, label, ThreatModel("linf"))
    with pytest.raises(SettingError, match=r"threat\.norm: got l2; accepted: linf"):
        CWLinf()(net, image, label, ThreatModel("l2"))
    model = CountingModel(net, 2)
    context = AttackContext(model, CallerRandomness(None, 2))
    with pytest.raises(SettingError, match=r"threat\.norm: got l2; accepted: linf"):
        CWLinf().run_batches(model, image, label, ThreatModel("l2"), context)


def test_linf_is_pgd_on_the_margin():
    net, image, threat = rugged((1, 6, 6)), images(20, (1, 6, 6)), ThreatModel("linf", Budget("0.02"))
    label = net(image).argmax(1)
    mine = CWLinf()(net, image, label, threat, generator=stream(0, "a"))
    same = PGD(steps=30, loss="margin")(net, image, label, threat, generator=stream(0, "a"))
    assert torch.equal(mine, same)
    with pytest.raises(TypeError, match="loss"):
        CWLinf(loss="ce")


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"first_c": 0.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=rf"attack\.{next(iter(wrong))}"):
        CWL2(**wrong)
