"""Two teachers and averaged weights beside the authors' published code (Alleviate-Robust-Overfitting)."""

from __future__ import annotations

import argparse
import ast
import time
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beside import (
    BATCH,
    K,
    assert_same_network,
    definitions,
    excerpt,
    needs,
    network,
    ours,
    same,
    sgd,
    theirs,
)
from softdefend import KD, PGDAT, SWA, Hard
from softdefend.core.rule import RunInfo
from softdefend.weights.averaging import reestimate

CHECKOUT = "Alleviate-Robust-Overfitting"
pytestmark = needs(CHECKOUT)

BN = ("moving_average", "_check_bn", "check_bn", "reset_bn", "_get_momenta", "_set_momenta", "bn_update")
TRAINING = ("AverageMeter", "accuracy", "loss_fn_kd", "train_epoch_adv", "train_epoch_adv_dual_teacher")


class Attack:
    """In place of advertorch's, which is not theirs and is not installed: PGD from the image itself, at the
    network as it stands."""

    def __init__(self, net, loss_fn, eps, nb_iter, eps_iter, rand_init, clip_min, clip_max, targeted):
        assert not rand_init
        assert not targeted
        self.net, self.loss, self.eps, self.steps, self.length = net, loss_fn, eps, nb_iter, eps_iter
        self.box = clip_min, clip_max

    def perturb(self, image, label):
        change = torch.zeros_like(image)
        for _ in range(self.steps):
            change.requires_grad_()
            (grad,) = torch.autograd.grad(self.loss(self.net(image + change), label), change)
            change = (change.detach() + self.length * grad.sign()).clamp(-self.eps, self.eps)
            change = (image + change).clamp(*self.box) - image
        return image + change


def their_arguments(*given):
    """Their command line's: what they publish as defaults is theirs to say, not ours to copy."""

    def parser(module: ast.Module) -> list[ast.stmt]:
        return [node for node in module.body if ast.unparse(node).startswith("parser")]

    names = {"argparse": argparse}
    exec(excerpt(CHECKOUT, "main_adv.py", parser), names)
    required = ["--data=x", "--dataset=cifar10", "--arch=resnet18", "--train_randinit", "--train_step=5"]
    arguments = names["parser"].parse_args([*required, *given])
    arguments.train_eps, arguments.train_gamma = arguments.train_eps / 255, arguments.train_gamma / 255
    return arguments


def their_average(module: ast.Module) -> list[ast.stmt]:
    """When their script averages, and what it then does before it measures and saves."""
    found = [n for n in ast.walk(module) if isinstance(n, ast.If) and "swa_c_epochs" in ast.unparse(n.test)]
    assert len(found) == 1
    measuring = [number for number, node in enumerate(found[0].body) if "test(" in ast.unparse(node)]
    found[0].body, found[0].orelse = found[0].body[: measuring[0]], []
    return found


def their_utils():
    names = {"torch": torch, "F": F, "time": time, "LinfPGDAttack": Attack}
    return definitions(CHECKOUT, "utils.py", *TRAINING, *BN, ctx_noparamgrad=nullcontext, **names)


def teacher(seed):
    """Sure of itself, and with running statistics that are not those of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            net[-1].weight.mul_(3)
            for _ in range(5):
                net(0.5 * torch.rand(16, 3, 8, 8))
    return net.eval()


def both(tmp_path, monkeypatch, label, arguments, weight=None):
    """A run of ours; their network, and their average of it, after the same one."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    # Their student is attacked as it trains.
    trainer = ours(tmp_path / "run", label, PGDAT(), weight, attack_bn="train")
    utils = their_utils()
    net, averaged = network(), network()
    with torch.no_grad():
        for tensor in averaged.parameters():
            tensor.fill_(7.0)  # where an average begins must not count
    optimizer = sgd(net, trainer)
    criterion = nn.CrossEntropyLoss()
    every = torch.arange(trainer.train_data.n).split(BATCH)
    names = {
        **utils,
        "args": arguments,
        "model": net,
        "swa_model": averaged,
        "swa_n": 0,
        "train_loader": [(trainer.train_data.take(index).image, None) for index in every],
    }
    average, done = excerpt(CHECKOUT, "main_adv.py", their_average), 0
    teachers = teacher(1), teacher(2)

    def step(batch, epoch):
        nonlocal done
        loader = [(batch.image, batch.label)]
        if arguments.lwf:
            train = utils["train_epoch_adv_dual_teacher"]
            train(loader, net, *teachers, criterion, optimizer, epoch, arguments)
        else:
            utils["train_epoch_adv"](loader, net, criterion, optimizer, epoch, arguments)
        done += 1
        if done % trainer.steps_per_epoch == 0:
            exec(average, names | {"epoch": epoch - 1}, names)

    theirs(trainer, optimizer, step)
    return trainer, net, averaged, names["swa_n"]


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, []),
        (
            {"hard_weight": 0.5, "standard_weight": 0.7, "robust_weight": 0.2, "temperature": 3.0},
            ["--coef_ce=0.5", "--coef_kd1=0.7", "--coef_kd2=0.2", "--temperature=3"],
        ),
    ],
    ids=["defaults", "other"],
)
def test_a_student_ends_in_the_authors_weights_and_statistics(tmp_path, monkeypatch, settings, given):
    label = KD(teacher(1), teacher(2), **settings)
    arguments = their_arguments("--lwf", *given)
    trainer, net, _, averages = both(tmp_path, monkeypatch, label, arguments)
    assert averages == 0
    assert_same_network(trainer, net)


def assert_same_average(found, expected):
    """Weights and measured statistics; how often a layer has seen a batch counts for nothing in theirs."""
    wanted = expected.state_dict()
    for name, tensor in found.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            same(name, tensor, wanted[name])


@pytest.mark.parametrize(
    ("start", "first", "every", "averages"),
    [(0.0, 0, 1, 6), (0.275, 2, 1, 4), (1 / 3, 2, 2, 2), (1.0, 5, 1, 1)],
)
@pytest.mark.parametrize("taught", [False, True])
def test_the_average_ends_in_the_authors_weights_and_statistics(
    tmp_path, monkeypatch, start, first, every, averages, taught
):
    """Of images as they are and in batches of one size, which is where the two measure alike."""
    label = KD(teacher(1), teacher(2)) if taught else Hard()
    given = ["--swa", f"--swa_start={first}", f"--swa_c_epochs={every}", *(["--lwf"] if taught else [])]
    swa = SWA(start, every)
    trainer, net, averaged, count = both(tmp_path, monkeypatch, label, their_arguments(*given), swa)
    assert_same_network(trainer, net)
    assert count == averages == int(swa.averaged.n_averaged)
    assert_same_average(swa.prediction, averaged)


def test_the_first_average_of_200_epochs_is_theirs():
    swa = SWA()
    swa.setup(RunInfo(torch.zeros(1, dtype=torch.int64), K, 200, network()))
    assert swa.first_epoch == their_arguments().swa_start


def test_batches_of_several_sizes_count_the_same_here_and_by_size_there(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    torch.manual_seed(0)
    batches = torch.randn(16, 2, 3, 3).split([12, 4])
    found, expected = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    reestimate(found, lambda: iter(batches))
    their_utils()["bn_update"]([(batch, None) for batch in batches], expected)
    for layer, shares in ((found, (0.5, 0.5)), (expected, (0.75, 0.25))):
        mean = sum(share * b.mean((0, 2, 3)) for share, b in zip(shares, batches, strict=True))
        variance = sum(share * b.var((0, 2, 3)) for share, b in zip(shares, batches, strict=True))
        same("mean", layer.running_mean, mean)
        same("variance", layer.running_var, variance)
