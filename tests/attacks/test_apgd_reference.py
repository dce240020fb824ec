"""Auto-PGD against its authors' implementation, image by image; needs a checkout of fra31/auto-attack."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.attacks import APGD, PGD, TargetedAPGD, dlr, margin
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import DataSettings, load
from softdefend.models.resnet import BasicBlock
from softdefend.models.small_cnn import SmallCNN

CHECKOUT = os.environ.get("SOFTDEFEND_AUTOATTACK")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="SOFTDEFEND_AUTOATTACK does not name a checkout of fra31/auto-attack"
)

N = 100
SEED = 3
NETS = ("robust", "plain", "untrained")
THREATS = {
    "linf": ThreatModel("linf", Budget("0.08")),
    "l2": ThreatModel("l2", Budget("0.5")),
    "l1": ThreatModel("l1", Budget("2")),
}
ATTACKS = {
    "apgd-ce": APGD(),
    "apgd-dlr": APGD(loss="dlr"),
    "apgd-t": TargetedAPGD(),
    "apgd-dlr-40x3": APGD(steps=40, restarts=3, loss="dlr"),
    "apgd-t-20x2": TargetedAPGD(steps=20, restarts=2),
}
ONE_BALL = {
    "apgd-ce-20x2 in one ball": APGD(steps=20, restarts=2, multi_eps=False),
    "apgd-t in one ball": TargetedAPGD(targets=5, multi_eps=False),
}
"""In l1, where all others begin in larger balls."""


class Residual(nn.Module):
    """Two residual blocks with fresh weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(24 * 16, 10)
        self.blocks = nn.Sequential(BasicBlock(12, 12, 1), BasicBlock(12, 24, 2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(image)).flatten(1))


def train(images: torch.Tensor, labels: torch.Tensor, robustly: bool) -> nn.Module:
    torch.manual_seed(0)
    net, threat = SmallCNN(10, 1, 8), ThreatModel("linf", Budget("0.12"))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for epoch in range(12):
        for rows in torch.randperm(len(images), generator=stream(0, "order", epoch)).split(64):
            image, label = images[rows], labels[rows]
            if robustly:
                image = PGD(steps=5)(net, image, label, threat, generator=stream(0, "pgd", epoch))
            optimizer.zero_grad()
            F.cross_entropy(net(image), label).backward()
            optimizer.step()
    return net


@pytest.fixture(scope="session")
def cases():
    """Networks in eval mode with frozen parameters, and images with labels, some of them wrong."""
    data = load(DataSettings(source="digits"))
    images, labels = data.train.images.float() / 255, data.train.labels
    test, truth = data.test.images[:N].float() / 255, data.test.labels[:N]
    with torch.random.fork_rng():
        nets = {"robust": train(images, labels, True), "plain": train(images, labels, False)}
        torch.manual_seed(1)
        nets["untrained"] = Residual()
    for net in nets.values():
        net.eval().requires_grad_(False)
    own = nets["untrained"](test).argmax(1)
    own[::10] = (own[::10] + 1) % 10
    return {name: (net, test, own if name == "untrained" else truth) for name, net in nets.items()}


class Reference:
    """One attack of the checkout; remembers what its searches returned."""

    def __init__(self, name: str, forward: Counted, threat: ThreatModel) -> None:
        sys.path.insert(0, str(CHECKOUT))
        try:
            module = importlib.import_module("autoattack.autopgd_base")
        finally:
            sys.path.remove(str(CHECKOUT))
        ours = (ATTACKS | ONE_BALL)[name]
        if isinstance(ours, TargetedAPGD):
            made, options = module.APGDAttack_targeted, {"n_target_classes": ours.targets}
        else:
            made, options = module.APGDAttack, {"loss": ours.loss}
        options |= {"n_iter": ours.steps, "n_restarts": ours.restarts, "eps": float(threat.eps)}
        options["use_largereps"] = threat.norm == "l1" and ours.multi_eps
        norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
        self.attack = made(forward, norm=norm, seed=SEED, device="cpu", **options)
        self.searches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        once = self.attack.attack_single_run

        def recorded(image, label, x_init=None):
            largest, _, loss, _ = found = once(image, label, x_init=x_init)
            if self.attack.eps == float(threat.eps):
                self.searches.append((image, largest, loss))
            return found

        self.attack.attack_single_run = recorded

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its adversarial images, and of all its searches the image of largest loss (it returns clean images
        where nothing fooled the network)."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of zero gradients
            adversarial = self.attack.perturb(image, label)
        best, value = image.clone(), torch.full((len(image),), -torch.inf)
        for clean, largest, loss in self.searches:
            for row, x in enumerate(clean):
                i = int((image == x).flatten(1).all(1).nonzero()[0])
                if loss[row] > value[i]:
                    best[i], value[i] = largest[row], loss[row]
        return adversarial, best


class Counted:
    """A forward that counts its images."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.images = net, 0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.images += len(image)
        return self.net(image)


class Outcome:
    """Both attacks on the same images from the same seed."""

    def __init__(self, net: nn.Module, image, label, name: str, threat: ThreatModel) -> None:
        mine, theirs = Counted(net), Counted(net)
        reference, best = Reference(name, theirs, threat)(image, label)
        generator = torch.Generator().manual_seed(SEED)
        adversarial = (ATTACKS | ONE_BALL)[name](mine, image, label, threat, generator=generator)
        self.robust, self.expected = (net(x).argmax(1) == label for x in (adversarial, reference))
        self.forwards, self.their_forwards = mine.images, theirs.images
        self.margin, self.their_margin = margin(net(adversarial), label), margin(net(best), label)
        self.drift = (dlr(net(adversarial), label) - dlr(net(best), label)).abs()[self.robust & self.expected]


grid = pytest.mark.parametrize(
    ("case", "name", "threat"),
    [(c, a, t) for c in NETS for a in ATTACKS for t in THREATS]
    + [(c, a, "l1") for c in NETS for a in ONE_BALL],
)


@grid
def test_in_float64_every_verdict_and_every_loss_are_the_references(cases, monkeypatch, case, name, threat):
    """The reference casts to float32; here its casts go to float64, so that rounding cannot decide."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    net, image, label = cases[case]
    torch.set_default_dtype(torch.float64)
    try:
        out = Outcome(copy.deepcopy(net).double(), image.double(), label, name, THREATS[threat])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out.robust, out.expected)
    assert (out.drift < 1e-6).all()
    assert out.forwards <= out.their_forwards


@grid
def test_in_float32_every_verdict_is_the_references(cases, case, name, threat):
    """Rounding can flip the comparison of two nearly equal losses, and then a step is halved at another
    checkpoint: a verdict may differ only where both attacks' best images are that close to the border, and
    few losses drift."""
    out = Outcome(*cases[case], name, THREATS[threat])
    for i in (out.robust != out.expected).nonzero().flatten().tolist():
        print(f"image {i}: margin {out.margin[i]:.2e}, the reference's best {out.their_margin[i]:.2e}")
        assert max(abs(out.margin[i]), abs(out.their_margin[i])) < 1e-3
    assert (out.drift > 1e-5).sum() <= 0.1 * N
    assert (out.drift < 0.05).all()


@pytest.mark.parametrize("case", NETS)
def test_the_comparison_sees_both_verdicts(cases, case):
    net, image, label = cases[case]
    right = net(image).argmax(1) == label
    robust = Outcome(net, image, label, "apgd-ce", THREATS["linf"]).robust
    assert robust.sum() > 10
    assert robust.sum() < right.sum() - 10
    assert right.sum() < N
