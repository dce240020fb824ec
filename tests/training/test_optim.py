"""Optimizers against their papers' formulas, batches in parts, clipping, and resuming with each of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from killed_runs import train_whole_and_killed
from softdefend import AWP, EMA, PGDAT, SAT, SGLR, TRADES, Hard, MultiNorm, OptimSettings, Schedule
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import AugmentSettings
from softdefend.training.optim import clip_gradients, make_optimizer, state_tensors
from tiny import K

CPU = torch.device("cpu")


def small_net() -> nn.Module:
    """Without batch normalization and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, K))


def adamw(w, g, memory, t, lr, decay):
    """One step of Loshchilov and Hutter's algorithm 2."""
    m, v = memory.get("m", 0 * w), memory.get("v", 0 * w)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    memory.update(m=m, v=v)
    unbiased = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return w - lr * decay * w - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)


def lion(w, g, memory, t, lr, decay):
    """One step of Chen et al.'s algorithm 2."""
    m = memory.get("m", 0 * w)
    update = torch.sign(0.9 * m + 0.1 * g)
    memory["m"] = 0.99 * m + 0.01 * g
    return w - lr * (update + decay * w)


def sgd(w, g, memory, t, lr, decay):
    memory["m"] = 0.9 * memory.get("m", 0 * w) + g + decay * w
    return w - lr * memory["m"]


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("rule", [sgd, adamw, lion])
def test_steps_follow_the_papers_formula(rule, decay_all):
    net, draw = small_net().double(), stream(0, "gradients")
    settings = OptimSettings(name=rule.__name__, lr=0.03, weight_decay=0.2, decay_all=decay_all)
    optimizer = make_optimizer(net, settings, CPU)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    memories = {name: {} for name in expected}
    for t in (1, 2, 3):
        for name, parameter in net.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            decay = 0.2 if decay_all or name in ("1.weight", "4.weight") else 0.0
            expected[name] = rule(expected[name], parameter.grad, memories[name], t, 0.03, decay)
        optimizer.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_the_first_step_finds_its_state_made(name):
    """A captured step cannot make it; and a checkpoint holds the same tensors at any time."""
    net = small_net()
    optimizer = make_optimizer(net, OptimSettings(name=name, lr=0.01), CPU)
    before = state_tensors(optimizer)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(one is other for one, other in zip(before, state_tensors(optimizer), strict=True))
    assert len(before) == {"sgd": 1, "adamw": 3, "lion": 1}[name] * 6


@pytest.mark.parametrize(("name", "lr"), [("adamw", 0.003), ("lion", 0.001)])
@pytest.mark.parametrize("rules", [(SGLR, PGDAT, EMA), (Hard, TRADES, AWP)], ids=["sglr", "trades-awp"])
def test_a_killed_run_ends_in_the_same_bits(make_trainer, name, lr, rules):
    label, objective, weight = rules
    optim = OptimSettings(epochs=2, batch_size=16, name=name, lr=lr, decay_all=False, clip=0.5)

    def start(folder):
        return make_trainer(label(), objective(), weight(), folder, optim=optim)

    whole, last = train_whole_and_killed(start, (2, 2))
    for one, other in zip(*(state_tensors(run.optimizer) for run in (whole, last)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_batch_in_parts_is_one_large_batch(make_trainer, parts):
    """Without batch normalization; three parts are of different sizes, and so is an epoch's last batch."""
    runs = []
    for accumulate in (1, parts):
        optim = OptimSettings(
            epochs=2, batch_size=20, lr=0.05, accumulate=accumulate, drop_last=False, clip=1.0
        )
        rules = SGLR(start=0), PGDAT()
        trainer = make_trainer(*rules, folder=f"in-{accumulate}", net=small_net(), optim=optim)
        trainer.fit()
        runs.append(trainer)
    for one, other in zip(*(run.net.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    memory = [run.recipe.label.state_dict()["memory"] for run in runs]
    torch.testing.assert_close(*memory, rtol=1e-4, atol=1e-6)


def test_a_batch_is_in_one_part_unless_parts_are_asked_for():
    """Also a larger one than of the settings, as a step has it that is made without them."""
    assert [OptimSettings(batch_size=128).parts(size) for size in (1, 128, 512)] == [1, 1, 1]
    assert [OptimSettings(batch_size=128, accumulate=4).parts(size) for size in (32, 33, 128)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("rules", "augment", "said"),
    [
        ((Hard(), PGDAT(), AWP()), {}, "AWP"),
        ((SAT(), PGDAT()), {}, "SAT.*label.weighted"),
        ((Hard(), PGDAT()), {"cutmix": 0.5}, "CutMix"),
        ((Hard(), MultiNorm("mixed")), {}, "MultiNorm.*objective.how"),
    ],
    ids=["AWP", "SAT", "CutMix", "MultiNorm"],
)
def test_what_is_done_for_a_whole_batch_is_not_done_in_parts(make_trainer, rules, augment, said):
    optim = OptimSettings(epochs=1, batch_size=16, accumulate=2)
    with pytest.raises(SettingError, match=rf"optim\.accumulate: got 2 with {said}"):
        make_trainer(*rules, optim=optim, augment=AugmentSettings("flip", **augment))


def test_parts_of_single_images_are_refused_where_batches_are_normalized(make_trainer):
    optim = OptimSettings(epochs=1, batch_size=16, accumulate=16)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, K))
    with pytest.raises(
        SettingError, match=r"optim\.accumulate: got 16: on one image .*accepted: fewer parts"
    ):
        make_trainer(Hard(), PGDAT(), net=net, optim=optim)


def test_clipping_scales_all_gradients_by_one_number():
    net = small_net()
    optimizer = make_optimizer(net, OptimSettings(lr=0.1, decay_all=False), CPU)
    gradients = [torch.randn(p.shape, generator=stream(0, "clip", n)) for n, p in enumerate(net.parameters())]
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    for longest in (0.5 * length, 2 * length, None):
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        clip_gradients(optimizer, longest)
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            scale = min(1.0, (longest or math.inf) / length)
            torch.testing.assert_close(parameter.grad, scale * gradient, rtol=1e-5, atol=1e-7)


def test_a_clipped_run_moves_no_further_than_the_limit_allows(make_trainer):
    """One step of SGD without momentum moves the weights by lr times the gradient."""
    plain = {"momentum": 0.0, "weight_decay": 0.0, "schedule": Schedule("cosine")}
    optim = OptimSettings(epochs=1, batch_size=48, lr=0.5, clip=0.01, **plain)
    trainer = make_trainer(Hard(), PGDAT(), net=small_net(), optim=optim)
    before = [p.detach().clone() for p in trainer.net.parameters()]
    trainer.fit()
    moved = sum(
        float((p - b).detach().square().sum()) for p, b in zip(trainer.net.parameters(), before, strict=True)
    )
    assert math.sqrt(moved) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_averages_of_another_optimizer_begin_anew(make_trainer, caplog):
    first = make_trainer(
        Hard(), PGDAT(), folder="first", optim=OptimSettings(epochs=1, batch_size=16, lr=0.1)
    )
    first.fit()
    start = str(first.folder.checkpoints.paths()[-1])
    for name, said in (("lion", "anew: averages of Lion"), ("sgd", "taken: network, momentum; anew")):
        optim = OptimSettings(epochs=2, batch_size=16, name=name, lr=1e-3)
        with caplog.at_level("INFO"):
            make_trainer(Hard(), PGDAT(), folder=name, optim=optim, init_from=start)
        assert said in caplog.messages[-1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "adam"}, "optim.name: got adam; accepted: sgd or adamw or lion"),
        ({"name": "adamw"}, "optim.lr: got 0.1; accepted: below 0.1 with optim.name adamw"),
        ({"name": "lion", "lr": 1e-3, "nesterov": True}, "optim.nesterov"),
        ({"betas": (0.9, 0.99)}, "optim.betas"),
        ({"name": "lion", "lr": 1e-3, "betas": (0.9, 1.0)}, "optim.betas"),
        ({"name": "adamw", "lr": 1e-3, "adam_eps": 0.0}, "optim.adam_eps"),
        ({"accumulate": 0}, "optim.accumulate"),
        ({"accumulate": 200}, "optim.accumulate"),
        ({"clip": 0.0}, "optim.clip"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(":")[0],
)
def test_impossible_optimizers_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        OptimSettings(**settings)
