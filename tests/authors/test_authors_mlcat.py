"""MLCAT by loss scaling beside the authors' published code (ChaojianYu/Understanding-Robust-Overfitting)."""

from __future__ import annotations

import ast
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beside import assert_same_network, definitions, excerpt, needs, ours, same, sgd, theirs
from softdefend import MLCAT, Hard

REPOSITORY = "Understanding-Robust-Overfitting"
SCALE, REMOVE = "train_step4_scale_15.py", "train_step2_remove_0_15.py"
EXACT = {"rtol": 1e-9, "atol": 1e-9}

pytestmark = [needs(REPOSITORY), pytest.mark.filterwarnings("ignore:size_average and reduce")]


def batch_loop(module, *, cut):
    """Their loop over the training batches; with ``cut``, the factor cut from the graph as soon as it is
    made, which is how the paper describes it."""
    loops = (node for node in ast.walk(module) if isinstance(node, ast.For))
    found = next(node for node in loops if "train_batches" in ast.unparse(node.iter))
    if cut:
        (made,) = (n for n, part in enumerate(found.body) if ast.unparse(part).startswith("scale_rate = "))
        found.body.insert(made + 1, *ast.parse("scale_rate = scale_rate.detach()").body)
    return [found]


def train(net, trainer, script, monkeypatch, *, cut, attack_bn):
    """Their code, over the run's batches. Returns the optimizer and the share of losses that were small."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.zero_())  # no random start
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "FloatTensor", torch.DoubleTensor)
    names = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "normalize": lambda image: image,  # in ours, the network's business
        "lower_limit": 0,
        "upper_limit": 1,
    }
    attack = definitions(REPOSITORY, script, "attack_pgd", "clamp", **names)["attack_pgd"]

    def in_eval_mode(model, *given):
        model.eval()
        return attack(model, *given)

    optimizer = sgd(net, trainer)
    names |= {
        "args": SimpleNamespace(eval=False, attack="pgd", attack_iters=5, restarts=1, norm="l_inf"),
        "attack_pgd": attack if attack_bn == "train" else in_eval_mode,
        "epsilon": 8 / 255,
        "pgd_alpha": 2 / 255,
        "model": net,
        "opt": optimizer,
        "lr_schedule": lambda _: optimizer.param_groups[0]["lr"],
        **dict.fromkeys(("ignore_x", *(f"ignore_x_{n}" for n in range(1, 12)), "total_x"), 0),
    }
    code = excerpt(REPOSITORY, script, partial(batch_loop, cut=cut))

    def step(batch, epoch):
        names.update(train_batches=[{"input": batch.image, "target": batch.label}], epoch=epoch - 1)
        exec(code, names)

    theirs(trainer, optimizer, step)
    return optimizer, names["ignore_x"] / names["total_x"]


@pytest.mark.parametrize("script", [SCALE, REMOVE])
def test_as_published_a_run_ends_in_the_authors_weights(tmp_path, monkeypatch, exact_network, script):
    """Of the script that scales small losses, and of the one that removes them: their gradient is the same.
    Attacked in train mode, as published; no weight depends on the running statistics, which the last forward
    of their attack moves besides."""
    trainer = ours(tmp_path / "run", Hard(), MLCAT(gradient="published"), attack_bn="train")
    net = exact_network()
    optimizer, small = train(net, trainer, script, monkeypatch, cut=False, attack_bn="train")
    assert 0.1 < small < 0.9
    for (name, found), expected in zip(trainer.net.named_parameters(), net.parameters(), strict=True):
        same(name, found, expected, **EXACT)
        momenta = (trainer.optimizer.state[found], optimizer.state[expected])
        same(f"momentum of {name}", *(state["momentum_buffer"] for state in momenta), **EXACT)


@pytest.mark.parametrize("gradient", ["published", "scaled"])
def test_attacked_in_eval_mode_statistics_are_the_same_too_and_a_cut_factor_is_the_papers_method(
    tmp_path, monkeypatch, exact_network, gradient
):
    trainer = ours(tmp_path / "run", Hard(), MLCAT(gradient=gradient))
    net = exact_network()
    _, small = train(net, trainer, SCALE, monkeypatch, cut=gradient == "scaled", attack_bn="eval")
    assert 0.1 < small < 0.9
    assert_same_network(trainer, net, **EXACT)
