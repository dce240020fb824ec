"""Minimal-norm attacks against those of adv_lib, distance by distance; needs a checkout of
jeromerony/adversarial-library."""

from __future__ import annotations

import importlib
import math
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.attacks import CWL2, FMN, PGD, DeepFool, SigmaZero
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import DataSettings, load
from softdefend.models.small_cnn import SmallCNN

CHECKOUT = os.environ.get("SOFTDEFEND_ADVLIB")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="SOFTDEFEND_ADVLIB does not name a checkout of jeromerony/adversarial-library"
)

N = 100
NETS = ("robust", "plain", "linear")
P = {"linf": math.inf, "l2": 2, "l1": 1}


def module(name: str, **content: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


@pytest.fixture(scope="session")
def advlib():
    """The attacks' own files, without what else the package imports: a plot server, perceptual metrics and a
    module that Python 3.12 has no more."""

    def others(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
        return torch.stack([torch.tensor([j for j in range(num_classes) if j != y]) for y in labels.tolist()])

    stubs = {
        "adv_lib.utils.visdom_logger": module("visdom_logger", VisdomLogger=object),
        "adv_lib.utils.attack_utils": module("attack_utils", get_all_targets=others),
        "distutils": module("distutils"),
        "distutils.version": module("version", LooseVersion=str),
    }
    for name in ("adv_lib", "adv_lib.attacks", "adv_lib.attacks.carlini_wagner", "adv_lib.utils"):
        stubs[name] = module(name, __path__=[str(Path(CHECKOUT, *name.split(".")))])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a docstring's backslash
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        yield types.SimpleNamespace(
            fmn=importlib.import_module("adv_lib.attacks.fast_minimum_norm").fmn,
            sigma_zero=importlib.import_module("adv_lib.attacks.sigma_zero").sigma_zero,
            df=importlib.import_module("adv_lib.attacks.deepfool").df,
            cw=importlib.import_module("adv_lib.attacks.carlini_wagner.l2").carlini_wagner_l2,
        )


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, robustly: bool) -> nn.Module:
    optimizer, threat = torch.optim.Adam(net.parameters(), 0.01), ThreatModel("linf", Budget("0.12"))
    for epoch in range(8):
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
    """Networks in eval mode with frozen parameters, double precision, and digits with their true labels."""
    data = load(DataSettings(source="digits"))
    images, labels = data.train.images.float() / 255, data.train.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = {
            "robust": train(SmallCNN(10, 1, 8), images, labels, True),
            "plain": train(SmallCNN(10, 1, 8), images, labels, False),
            "linear": train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images, labels, False),
        }
    for net in nets.values():
        net.double().eval().requires_grad_(False)
    return nets, data.test.images[:N].double() / 255, data.test.labels[:N]


def compare(net, image, label, ours, theirs, norm):
    """Distances of both on the images that are right, infinite where the result is not wrong."""
    closest, distance = ours
    right, found = net(image).argmax(1) == label, distance.isfinite()
    torch.testing.assert_close(distance[found], ThreatModel(norm, 1).distance(image, closest)[found])
    assert (net(closest).argmax(1) != label)[found].all()
    their = ThreatModel(norm, 1).distance(image, theirs)
    their = torch.where(net(theirs).argmax(1) != label, their, torch.inf)
    mine, their = distance[right], their[right]
    both = mine.isfinite() & their.isfinite()
    ratio = (mine / their)[both] if both.any() else torch.ones(1)
    print(
        f"\n{len(mine)} images, {(~mine.isfinite()).sum()} not found (theirs {(~their.isfinite()).sum()}), "
        f"median {mine.median():.5f} (theirs {their.median():.5f}); ratio: median {ratio.median():.5f}, "
        f"95% {ratio.quantile(0.95):.4f}, from {ratio.min():.4f} to {ratio.max():.4f}"
    )
    return mine, their, ratio


grid = pytest.mark.parametrize(("case", "norm"), [(c, n) for c in NETS for n in ("linf", "l2")])


@grid
def test_deepfool_takes_the_references_steps(advlib, cases, case, norm):
    nets, image, label = cases
    theirs = advlib.df(nets[case], image, label, norm=P[norm], steps=50)
    ours = DeepFool().minimal(nets[case], image, label, norm)
    mine, their, _ = compare(nets[case], image, label, ours, theirs, norm)
    assert their.isfinite().all()
    torch.testing.assert_close(mine, their, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("case", NETS)
def test_fmn_ends_where_the_reference_does_or_closer(advlib, cases, case, norm):
    """In l2 the reference always moves a point out to its ball's surface; it then stalls next to the boundary
    and returns some images unchanged (all of them on the linear network)."""
    nets, image, label = cases
    theirs = advlib.fmn(nets[case], image, label, P[norm], steps=100)
    mine, their, ratio = compare(
        nets[case], image, label, FMN().minimal(nets[case], image, label, norm), theirs, norm
    )
    assert mine.isfinite().all()
    if norm == "linf":
        assert their.isfinite().all()
        assert ratio.max() < 1.001
    else:
        assert ratio.median() < 1.001
        assert ratio.quantile(0.95) < 1.01


@pytest.mark.parametrize("case", NETS)
def test_cw_ends_where_the_reference_does(advlib, cases, case):
    """The reference stops a batch together, we stop each image when it stalls: a little earlier."""
    nets, image, label = cases
    theirs = advlib.cw(nets[case], image, label, max_iterations=100)
    mine, their, ratio = compare(
        nets[case], image, label, CWL2(steps=100).minimal(nets[case], image, label, "l2"), theirs, "l2"
    )
    assert torch.equal(mine.isfinite(), their.isfinite())
    assert ratio.median() < 1.001
    assert ratio.max() < 1.05


@pytest.mark.parametrize("case", NETS)
def test_sigma_zero_changes_as_few_values_as_the_reference(advlib, cases, case):
    """The reference's steps follow its cosine one step behind the paper's."""
    nets, image, label = cases
    theirs = advlib.sigma_zero(nets[case], image, label, num_steps=200)
    ours = SigmaZero(steps=200).minimal(nets[case], image, label, "l0")
    mine, their, _ = compare(nets[case], image, label, ours, theirs, "l0")
    assert torch.equal(mine.isfinite(), their.isfinite())
    assert mine.sum() <= 1.02 * their.sum()
    assert ((mine - their).abs() <= 1).float().mean() > 0.95
