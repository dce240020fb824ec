"""N-FGSM and FGSM from a random start beside the published code of the former (pdejorge/N-FGSM), whose
switches make the latter of it."""

from __future__ import annotations

import argparse
import ast
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from beside import assert_same_network, definitions, excerpt, needs, network, ours, sgd, theirs
from softdefend import FGSMRS, NFGSM, PGD, Hard

pytestmark = needs("N-FGSM")

PIXELS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
"""Mean and standard deviation; theirs moves normalized images, by an eps of its own in each channel."""


def main_of(module):
    """The body of their training script."""
    return next(node for node in module.body if getattr(node, "name", "") == "main").body


def budgets(module: ast.Module) -> list[ast.stmt]:
    """Where the script makes eps, the step and the radius of its clipping from arguments."""
    names = ("epsilon", "alpha", "clip")
    found = [
        node
        for node in main_of(module)
        if ast.unparse(node).startswith(tuple(f"{name} = " for name in names))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "args.clip > 0")
    ]
    assert len(found) == 3
    return found


def epoch_loop(module: ast.Module) -> list[ast.stmt]:
    """The loop over the batches of an epoch."""
    inside = (node for statement in main_of(module) for node in ast.walk(statement))
    return [node for node in inside if isinstance(node, ast.For) and "train_loader" in ast.unparse(node.iter)]


@pytest.mark.parametrize(("mean", "std"), [PIXELS, CIFAR10], ids=["pixels", "normalized"])
@pytest.mark.parametrize(
    ("objective", "start", "arguments"),
    [
        (NFGSM(), "auto", []),
        (NFGSM(noise=0.5, alpha=1.5), "auto", ["--unif=0.5", "--alpha=12"]),
        (NFGSM(noise=0.0), "auto", ["--unif=0"]),
        (FGSMRS(), "auto", ["--unif=1", "--alpha=10", "--clip=1"]),
        (FGSMRS(alpha=1.0), "none", ["--unif=0", "--clip=1"]),
    ],
    ids=["n-fgsm", "n-fgsm-other", "n-fgsm-no-noise", "fgsm-rs", "fgsm"],
)
def test_a_run_ends_in_the_authors_weights_and_statistics(
    tmp_path, monkeypatch, echo_uniform, objective, start, arguments, mean, std
):
    # Their network is in training mode throughout, the search included.
    attack = PGD(steps=5, start=start)
    trainer = ours(tmp_path / "run", Hard(), objective, attack=attack, attack_bn="train")
    net = network()
    optimizer = sgd(net, trainer)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    attack_utils = definitions("N-FGSM", "utils/attack_utils.py", "AttackUtils", torch=torch)["AttackUtils"]
    get_args = definitions("N-FGSM", "train.py", "get_args", argparse=argparse)["get_args"]
    names = {
        "torch": torch,
        "F": F,
        "args": get_args(),
        "data_utils": SimpleNamespace(std=std),
        "attack_utils": attack_utils((0 - mean) / std, (1 - mean) / std, std),
        "model": lambda normalized: net(normalized * std + mean),
        "opt": optimizer,
        "scheduler": SimpleNamespace(step=lambda: None),  # the run's own
        **dict.fromkeys(("train_loss", "train_acc", "train_n", "iter_count"), 0),
    }
    exec(excerpt("N-FGSM", "train.py", budgets), names)
    updates = excerpt("N-FGSM", "train.py", epoch_loop)

    def step(batch, epoch):
        names["train_loader"] = [((batch.image - mean) / std, batch.label, batch.index)]
        exec(updates, names)

    if names["args"].unif > 0:
        echo_uniform(channels=True)
    theirs(trainer, optimizer, step)
    assert names["iter_count"] == trainer.optim.epochs * trainer.steps_per_epoch
    assert_same_network(trainer, net)
