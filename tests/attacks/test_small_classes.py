"""Every attack where others crash: two or three classes, odd shapes, tiny and huge eps, dead and broken
networks. The result is inside the threat model, finite, of the same shape and type, and the images that were
given stay as they were."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from softdefend.attacks import (
    FMN,
    PGD,
    Transfer,
    cross_entropy,
    dlr,
    kl_from,
    margin,
    targeted_dlr,
    value_and_gradient,
)
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import LARGEST, Budget, ThreatModel

NAMES = (
    *("fgsm", "fgsm-margin", "pgd-4", "pgd-4-margin", "pgd-3x2-kl", "apgd-ce-8", "apgd-dlr-8", "apgd-t-8"),
    *("fab-t-6", "fab-4", "square-25", "cw-linf-4", "cw-l2-3x15", "fmn-8", "deepfool-4", "sigma-zero-20"),
    *("hop-skip-jump-250", "surfree-120", "pgd-4-match", "fgsm-match", "pgd-3-eot2"),
)
CASES = [(name, norm) for name in NAMES for norm in parse_attack(name).norms]
EPS = {"linf": 0.1, "l2": 0.1, "l1": 0.3, "l0": 1}
each = pytest.mark.parametrize(("name", "norm"), CASES)

SHAPES = ((1, 5, 7), (3, 7, 5), (2, 1, 1), (1, 1, 9), (3, 6, 2))


class Net(nn.Module):
    """A small curved network; ``scale`` stretches its logits."""

    def __init__(self, shape: tuple[int, ...], k: int, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        d = math.prod(shape)
        self.first, self.second = nn.Linear(d, 12), nn.Linear(12, k)
        with torch.no_grad():
            for number, layer in enumerate((self.first, self.second)):
                generator = stream(seed, "net", step=number)
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
                layer.bias.zero_()
        self.scale = scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.scale * self.second(self.first(image.flatten(1) - 0.5).tanh())
        return logits


class Broken(Net):
    """Returns what ``how`` makes of the logits [b, k]; with gradients, unless ``how`` cuts them off."""

    def __init__(self, how, k: int, shape=(1, 5, 7)) -> None:
        super().__init__(shape, k)
        self.how = how

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.how(super().forward(image))
        return logits


def images(n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A third of the pixels are exactly 0 or 1."""
    return (1.6 * torch.rand(n, *shape, generator=stream(seed, "x")) - 0.3).clamp(0, 1)


def attack_soundly(attack, net, image, label, threat) -> torch.Tensor:
    """The attack's result, after all that must hold for any has been checked."""
    before, labels = image.clone(), label.clone()
    with torch.random.fork_rng():
        adversarial = attack(net, image, label, threat, generator=stream(0, "a"))
    assert torch.equal(image, before)
    assert torch.equal(label, labels)
    assert not image.requires_grad
    assert not adversarial.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert adversarial.shape == image.shape
    assert adversarial.dtype == image.dtype
    assert adversarial.isfinite().all()
    assert (adversarial >= 0).all()
    assert (adversarial <= 1).all()
    eps = float(threat.eps)
    # Pixels next to 1 are 6e-8 apart; in l2 and l1 such roundings add up.
    sums = {"linf": 1, "l2": math.sqrt(image[0].numel()), "l1": image[0].numel(), "l0": 0}[threat.norm]
    rounding = 1e-7 if threat.norm == "linf" else 1e-6 * eps + 1e-7 * sums
    assert (threat.distance(image, adversarial) <= eps + rounding).all()
    return adversarial


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    shape=st.sampled_from(SHAPES),
    k=st.sampled_from([2, 3, 4]),
    n=st.sampled_from([1, 2, 5]),
    eps=st.sampled_from([1e-6, 8 / 255, 0.3, 1.0]),
    scale=st.sampled_from([1e-25, 1e-4, 1.0, 1e4]),
    seed=st.integers(0, 5),
)
def test_nothing_leaves_the_threat_model(case, shape, k, n, eps, scale, seed):
    name, norm = case
    net, image = Net(shape, k, seed, scale), images(n, shape, seed)
    label = (net(image).argmax(1) + (torch.arange(n) % 3 == 2)) % k
    if norm == "l0":
        eps = {1e-6: 1, 8 / 255: 2, 0.3: 7, 1.0: 10_000}[eps]
    elif eps == 1.0:
        eps = LARGEST[norm]
    threat = ThreatModel(norm, Budget(eps))
    attack_soundly(parse_attack(name), net, image, label, threat)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_type_and_soft_targets(name, norm, dtype):
    net, image = Net((3, 5, 7), 3).to(dtype), images(4, (3, 5, 7), 1).to(dtype)
    label = net(image).argmax(1)
    soft = 0.85 * nn.functional.one_hot(label, 3).to(dtype) + 0.05
    attack_soundly(parse_attack(name), net, image, soft, ThreatModel(norm, EPS[norm]))


@each
@pytest.mark.parametrize("k", [2, 3])
def test_a_huge_eps_breaks_everything(name, norm, k):
    """In the whole box no image of a network with several regions is safe; attacks that follow gradients must
    find that out."""
    net, image = Net((1, 5, 7), k), images(12, (1, 5, 7), 2)
    label = net(image).argmax(1)
    threat = ThreatModel(norm, Budget({"linf": 1.0, "l2": 6.0, "l1": 35, "l0": 35}[norm]))
    longer = {
        "sigma-zero-20": "sigma-zero-100",
        "cw-l2-3x15": "cw-l2-7x100",
        "square-25": "square-300",
        "fmn-8": "fmn",
        "deepfool-4": "deepfool",
        "hop-skip-jump-250": "hop-skip-jump-600",
        "surfree-120": "surfree-600",
    }
    attack = parse_attack(longer.get(name, name))
    adversarial = attack_soundly(attack, net, image, label, threat)
    broken = (net(adversarial).argmax(1) != label).float().mean()
    # KL moves away from the prediction wherever it leads, a single step overshoots, and in l2 and l1 it ends
    # early. Matching ends at logits, which need not be those of another class.
    assert broken >= (0.4 if name.startswith("fgsm") or "kl" in name or "match" in name else 0.9)


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[1] != "l0"])
def test_a_tiny_eps_changes_next_to_nothing(name, norm):
    net, image = Net((1, 5, 7), 3), images(8, (1, 5, 7), 3)
    label = net(image).argmax(1)
    adversarial = attack_soundly(parse_attack(name), net, image, label, ThreatModel(norm, Budget(1e-6)))
    assert torch.equal(net(adversarial).argmax(1), label)


@each
def test_images_that_are_all_wrong_stay_wrong(name, norm):
    """Attacks that stop at the first wrong image give these back as they are."""
    net, image = Net((1, 5, 7), 3), images(5, (1, 5, 7), 4)
    label = (net(image).argmax(1) + 1) % 3
    adversarial = attack_soundly(parse_attack(name), net, image, label, ThreatModel(norm, EPS[norm]))
    if name.startswith(("apgd", "fab", "square", "cw-l2", "fmn", "deepfool", "sigma", "hop", "surfree")):
        assert torch.equal(adversarial, image)


@each
def test_an_image_alone(name, norm):
    net, image = Net((1, 5, 7), 2), images(1, (1, 5, 7), 5)
    attack_soundly(parse_attack(name), net, image, net(image).argmax(1), ThreatModel(norm, EPS[norm]))


@each
@pytest.mark.parametrize("k", [2, 3])
def test_a_constant_network(name, norm, k):
    """Zero gradients: those who follow them stay where they start; nobody invents a success."""
    net = Broken(lambda logits: 0 * logits + torch.arange(logits.shape[1]).flip(0), k)
    image, label = images(4, (1, 5, 7), 6), torch.tensor([0, 0, 1, 0])
    attack, threat = parse_attack(name), ThreatModel(norm, EPS[norm])
    adversarial = attack_soundly(attack, net, image, label, threat)
    if name.startswith(("fgsm", "fab", "cw-l2", "fmn", "deepfool", "sigma", "hop", "surfree")):
        assert torch.equal(adversarial, image)
    if hasattr(attack, "minimal"):
        closest, distance = attack.minimal(net, image, label, norm)
        assert torch.equal(closest, image)
        assert distance.tolist() == [math.inf, math.inf, 0, math.inf]


BROKEN = {
    "NaN": lambda logits: logits * math.nan,
    "NaN for some": lambda logits: torch.where(logits[:, :1] > 0, logits * math.nan, logits),
    "infinity": lambda logits: logits * 1e30 * 1e30,
    "infinite gradient": lambda logits: (logits - logits.detach()).abs().sqrt() + logits.detach(),
    "one class": lambda logits: torch.cat([logits[:, :1], logits[:, 1:] * 0 - math.inf], dim=1),
}


@each
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("k", [2, 3])
def test_a_broken_network_breaks_no_attack(name, norm, how, k):
    """A wrong argmax is a wrong answer, also among NaN; a NaN gradient counts as zero."""
    net, image = Broken(BROKEN[how], k), images(5, (1, 5, 7), 7)
    label = torch.tensor([0, 1, 0, 1, k - 1])
    attack, threat = parse_attack(name), ThreatModel(norm, EPS[norm])
    attack_soundly(attack, net, image, label, threat)
    if hasattr(attack, "minimal"):
        closest, distance = attack.minimal(net, image, label, norm)
        assert closest.isfinite().all()
        assert not distance.isnan().any()
        found = distance.isfinite()
        assert (net(closest).argmax(1) != label)[found].all()


@each
def test_a_transfer_from_a_broken_network(name, norm):
    net, image = Net((1, 5, 7), 3), images(3, (1, 5, 7), 8)
    attack = Transfer(Broken(BROKEN["NaN"], 3), parse_attack(name))
    attack_soundly(attack, net, image, net(image).argmax(1), ThreatModel(norm, EPS[norm]))


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_the_gradient_is_never_nan(loss):
    """Zero where the network's is NaN or infinite, and its own for the other images."""
    net, image = Net((1, 5, 7), 3), images(6, (1, 5, 7), 10)
    label = net(image).argmax(1)
    sick = torch.arange(6) % 2 == 0

    def broken(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = net(x) * torch.where(sick, math.nan, 1.0)[:, None]
        return logits

    climb = partial(loss, target=label)
    _, gradient = value_and_gradient(broken, climb, image)
    assert not gradient[sick].any()
    assert torch.equal(gradient[~sick], value_and_gradient(net, climb, image)[1][~sick])
    assert gradient[~sick].any()


WITHOUT_GRADIENT = {
    "detached logits": lambda net: Broken(torch.Tensor.detach, 3),
    "detached images": lambda net: lambda image: net(image.detach()),  # parameters that still ask for theirs
}


@each
@pytest.mark.parametrize("cut", WITHOUT_GRADIENT)
def test_a_network_without_gradients_is_named_in_one_line(name, norm, cut):
    net, image = Net((1, 5, 7), 3), images(4, (1, 5, 7), 9)
    if cut == "detached images" and name.startswith(("cw-l2", "sigma")):
        net.requires_grad_(False)  # its loss holds the distance, which always has a gradient
    forward, label, threat = WITHOUT_GRADIENT[cut](net), net(image).argmax(1), ThreatModel(norm, EPS[norm])
    if name.startswith(("square", "hop", "surfree")):
        assert parse_attack(name)(forward, image, label, threat, generator=stream(0, "a")).isfinite().all()
        return
    with pytest.raises(SettingError, match=r"net: got a network whose logits have no gradient in the image"):
        parse_attack(name)(forward, image, label, threat, generator=stream(0, "a"))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_another_type_than_the_images(name, norm, dtype):
    """The network computes in double precision either way: what differs is the type of images and logits."""
    net, image = Net((1, 5, 7), 5).double(), images(8, (1, 5, 7), 11).to(dtype)
    other = torch.float64 if dtype == torch.float32 else torch.float32

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = net(x.double()).to(other)
        return logits

    label, threat = (
        net(image.double()).argmax(1),
        ThreatModel(norm, Budget({"linf": 0.2, "l2": 1, "l1": 3, "l0": 5}[norm])),
    )
    made = parse_attack(name)(forward, image, label, threat, generator=stream(0, "a"))
    assert made.dtype == dtype
    assert (threat.distance(image, made) <= float(threat.eps) + 1e-6).all()
    plain = parse_attack(name)(
        lambda x: net(x.double()).to(x.dtype), image, label, threat, generator=stream(0, "a")
    )
    fooled = [net(x.double()).argmax(1) != label for x in (made, plain)]
    assert torch.equal(*fooled)
    if not name.startswith(("fgsm", "pgd-3x2-kl")):
        assert fooled[0].any()


@each
def test_one_class_is_refused(name, norm):
    net, image = Net((1, 5, 7), 1), images(2, (1, 5, 7), 9)
    with pytest.raises(SettingError, match=r"net: got .* shape \[2, 1\]; accepted: logits of two or more"):
        parse_attack(name)(net, image, torch.zeros(2, dtype=torch.int64), ThreatModel(norm, EPS[norm]))


@pytest.mark.parametrize(("name", "norm"), [("cw-linf", "l2"), ("cw-l2", "linf")])
def test_a_threat_model_is_refused_before_any_look(name, norm):
    attack, other = parse_attack(name), "l2" if norm == "linf" else "linf"
    for checked in (attack, Transfer(Net((1, 5, 7), 3), attack)):
        with pytest.raises(SettingError, match=rf"threat\.norm: got {norm}; accepted: {other} under {name}"):
            checked.check(ThreatModel(norm))
        checked.check(ThreatModel(other))


@pytest.mark.parametrize("name", NAMES)
def test_every_other_norm_is_refused_in_one_line(name):
    attack = parse_attack(name)
    for norm in LARGEST.keys() - set(attack.norms):
        accepted = f"{' or '.join(attack.norms)} under {name}"
        with pytest.raises(SettingError, match=rf"threat\.norm: got {norm}; accepted: {accepted}"):
            attack.check(ThreatModel(norm, EPS[norm]))
        if hasattr(attack, "minimal"):
            net, image = Net((1, 5, 7), 3), images(2, (1, 5, 7), 9)
            with pytest.raises(SettingError, match=r"threat\.norm"):
                attack.minimal(net, image, net(image).argmax(1), norm)


@each
def test_what_an_attack_can_do_passes_its_check(name, norm):
    parse_attack(name).check(ThreatModel(norm, EPS[norm]))


def test_losses_refuse_one_class():
    logits, label = torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)
    for loss in (
        cross_entropy,
        margin,
        dlr,
        lambda z, y: targeted_dlr(z, y, y),
        lambda z, _: kl_from(z),
    ):
        with pytest.raises(SettingError, match=r"shape \[3, 1\]"):
            loss(logits, label)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_minimal_attacks_refuse_a_loss(norm):
    net, image = Net((1, 5, 7), 3), images(2, (1, 5, 7), 9)
    label = net(image).argmax(1)
    for name in ("fmn", "deepfool", "cw-l2"):
        with pytest.raises(SettingError, match=rf"attack\.loss.*{name}"):
            parse_attack(name)(net, image, label, ThreatModel(norm), loss=lambda z: cross_entropy(z, label))


def test_a_transfer_that_finds_nothing_returns_the_image():
    net = Net((1, 5, 7), 3)
    image = images(3, (1, 5, 7), 8)
    made = Transfer(net, FMN(steps=3))(net, image, net(image).argmax(1), ThreatModel("l2", Budget(1e-6)))
    assert torch.equal(made, image)
    assert not torch.equal(
        Transfer(net, PGD(steps=2))(net, image, net(image).argmax(1), ThreatModel()), image
    )
