"""Values that may not change: no attack changes them, and each finds what can be found with the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softdefend.attacks import PGD, MinimalAttack, Transfer, margin
from softdefend.attacks.names import ATTACKS, parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel

SHAPE, N = (2, 6, 6), 20
NAMES = (
    *("fgsm", "pgd-30", "pgd-10x2-margin", "cw-linf", "apgd-ce-40", "apgd-dlr-40", "apgd-t-40", "square-600"),
    *("fab-20", "fab-t-40", "fmn", "deepfool", "cw-l2-6x200", "sigma-zero-200"),
    *("hop-skip-jump-1000", "surfree-1000"),
)
CASES = [(name, norm) for name in NAMES for norm in parse_attack(name).norms]
LARGE = {"linf": 0.6, "l2": 8, "l1": 40, "l0": 30}
MASK = torch.zeros(6, 6, dtype=torch.bool)
MASK[1:5, :4] = True


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(72, 32), nn.Tanh(), nn.Linear(32, 4))
    return net.requires_grad_(False)


NET = network()
IMAGE = torch.rand(N, *SHAPE, generator=stream(0, "x"))
LABEL = NET(IMAGE).argmax(1)


def test_every_attack_of_ours_is_among_them():
    ours = {kind for _, kind in ATTACKS.items() if kind.__module__.startswith("softdefend.")}
    assert ours - {type(parse_attack(name)) for name in NAMES} == {Transfer}


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_only_what_may_change_changes_and_that_is_enough(name, norm):
    threat = ThreatModel(norm, LARGE[norm])
    made = parse_attack(name)(NET, IMAGE, LABEL, threat, mask=MASK, generator=stream(0, "a"))
    assert torch.equal(made[..., ~MASK], IMAGE[..., ~MASK])
    assert (threat.distance(IMAGE, made) <= LARGE[norm] * (1 + 1e-5)).all()
    broken = (NET(made).argmax(1) != LABEL).float().mean()
    # A single step, or no random wrong image to start from.
    assert broken >= {"fgsm": 0.3, "hop-skip-jump-1000": 0.7, "surfree-1000": 0.7}.get(name, 0.8)


CLOSEST = [(name, norm) for name, norm in CASES if isinstance(parse_attack(name), MinimalAttack)]


@pytest.mark.parametrize(("name", "norm"), CLOSEST)
def test_the_closest_wrong_image_is_looked_for_among_those_that_may_be(name, norm):
    attack = parse_attack(name)
    made, distance = attack.minimal(NET, IMAGE, LABEL, norm, mask=MASK, generator=stream(0, "a"))
    found = distance.isfinite()
    assert found.float().mean() >= 0.7
    assert torch.equal(made[..., ~MASK], IMAGE[..., ~MASK])
    assert torch.equal(NET(made).argmax(1) != LABEL, found)
    torch.testing.assert_close(distance[found], ThreatModel(norm, 1).distance(IMAGE, made)[found])


@pytest.mark.parametrize("name", ["fmn", "fab-t-40", "deepfool"])
def test_it_is_as_far_as_for_a_network_of_the_free_values_alone(name):
    inside = IMAGE[..., 1:5, :4].clone()

    def cropped(image):
        whole = IMAGE[rows].expand(len(image), *SHAPE).clone()
        whole[..., 1:5, :4] = image
        return NET(whole)

    attack, wanted = parse_attack(name), []
    for rows in range(6):
        wanted.append(attack.minimal(cropped, inside[rows : rows + 1], LABEL[rows : rows + 1], "l2")[1])
    _, distance = attack.minimal(NET, IMAGE[:6], LABEL[:6], "l2", mask=MASK)
    torch.testing.assert_close(distance, torch.cat(wanted), rtol=1e-3, atol=1e-5)


def test_each_image_may_have_its_own():
    masks = torch.rand(N, *SHAPE, generator=stream(1, "m")) < 0.4
    for name in ("pgd-10", "fmn", "square-100", "apgd-ce-10"):
        made = parse_attack(name)(
            NET, IMAGE, LABEL, ThreatModel("linf", 0.5), mask=masks, generator=stream(0, "a")
        )
        assert torch.equal(made[~masks], IMAGE[~masks])
        assert not torch.equal(made[masks], IMAGE[masks])


def test_on_a_linear_network_the_best_of_the_free_values_is_found():
    """l-inf: every free value goes to its end, so the margin rises by eps times their slopes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 2)).requires_grad_(False)
    image, threat = 0.4 + 0.2 * IMAGE, ThreatModel("linf", 0.1)
    label = net(image).argmax(1)
    slope = (net[1].weight[1] - net[1].weight[0]).abs().view(SHAPE)
    made = PGD(steps=20)(net, image, label, threat, mask=MASK, generator=stream(0, "a"))
    risen = margin(net(made), label) - margin(net(image), label)
    torch.testing.assert_close(risen, torch.full((N,), 0.1 * float(slope[:, MASK].sum())), atol=1e-4, rtol=0)


def test_a_mask_of_everything_changes_nothing():
    for name in ("pgd-5", "fmn-10", "deepfool-5", "cw-l2-2x20"):
        attack = parse_attack(name)
        threat = ThreatModel(attack.norms[0], 0.2)
        with_mask, without = (
            attack(NET, IMAGE, LABEL, threat, mask=mask, generator=stream(0, "a"))
            for mask in (torch.ones(6, 6, dtype=torch.bool), None)
        )
        assert torch.equal(with_mask, without)


def test_a_transfer_hands_the_mask_on():
    attack = Transfer(network(), PGD(steps=10, loss="margin"))
    made = attack(NET, IMAGE, LABEL, ThreatModel("linf", 0.6), mask=MASK, generator=stream(0, "a"))
    assert torch.equal(made[..., ~MASK], IMAGE[..., ~MASK])
    assert (NET(made).argmax(1) != LABEL).float().mean() > 0.8


@pytest.mark.parametrize(
    "mask",
    [MASK.float(), MASK[:5], MASK[None, None].expand(3, 2, 6, 6), MASK[0]],
    ids=["float", "height", "images", "line"],
)
def test_masks_that_do_not_fit_are_refused(mask):
    with pytest.raises(SettingError, match=r"attack\.mask: got .*; accepted: bool \[h, w\]"):
        PGD()(NET, IMAGE, LABEL, ThreatModel(), mask=mask)


def test_a_mask_that_is_no_tensor_is_refused():
    with pytest.raises(SettingError, match=r"^attack\.mask: got a list; accepted: .*Tensor"):
        PGD()(NET, IMAGE, LABEL, ThreatModel(), mask=MASK.tolist())
