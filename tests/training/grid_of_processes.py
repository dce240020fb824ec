"""Trains combinations of rules for six steps, as one process or as one of several.

Run as ``python grid_of_processes.py FOLDER WHICH``: FOLDER/SIZE-RANK.pt gets the tensors in which each ends.
WHICH is ``all`` (the whole grid: minutes), ``pairs`` (each pair of rules in some combination, and VARIANTS),
``few``, or ``one``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import softdefend
from softdefend.attacks import PGD
from softdefend.core import rng
from softdefend.core.rule import RunInfo
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Augmented, AugmentSettings, Split
from softdefend.execution.batch_norm import synchronize
from softdefend.execution.engine import Engine
from softdefend.training import OptimSettings, Recipe, RuntimeSettings
from softdefend.training.config import RULES
from softdefend.training.optim import make_optimizer, state_tensors
from softdefend.training.step import Phase, TrainStep
from tiny import K, tiny_net

DEVICE = os.environ.get("GRID_DEVICE", "cpu")
BATCH, EPOCHS, STEPS = 8, 3, 2
LABELS, OBJECTIVES, WEIGHTS = (RULES[kind].names() for kind in ("label", "objective", "weight"))
AVERAGES = [name for name in WEIGHTS if name != "Plain" and getattr(softdefend, name)().passes == 1]
GRID = list(itertools.product(LABELS, OBJECTIVES, [*WEIGHTS, *(f"AWP+{name}" for name in AVERAGES)]))
IDLE = ("Hard", "PGDAT", "Plain")
PAIRS = [
    (label, objective, GRID[(i + j) % (len(WEIGHTS) + len(AVERAGES))][2])
    for i, label in enumerate(LABELS)
    for j, objective in enumerate(OBJECTIVES)
]
"""Combinations in which each rule meets each rule of the other kinds."""
FEW = PAIRS[::11]
ONE = [("SGLR", "TE", "AWP+EMA")]  # two memories, a direction and an average


class Wide(nn.Module):
    """A network in double precision: rounding then stays so small that no sign of a gradient, and no ReLU,
    turns over by it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = tiny_net(seed=seed).double()

    def forward(self, image: Tensor) -> Tensor:
        return self.inner(image.double())


def rule(name: str):
    if name.endswith(")"):
        return eval(f"softdefend.{name}")
    outer, _, inner = name.partition("+")
    kind = getattr(softdefend, outer)
    if name == "KD":
        return kind(standard=Wide(1), robust=Wide(2))
    return kind(average=rule(inner)) if inner else kind()


def train(names: tuple[str, str, str], batch_norm: str = "synchronized", **settings) -> dict[str, Tensor]:
    """Six steps in three epochs, which hold every phase of every rule; what they have changed, by name."""
    how = {name: settings.pop(name, False) for name in ("capture", "compile")}
    runtime = RuntimeSettings(device=DEVICE, threads=1, batch_norm=batch_norm, deterministic=True, **how)
    engine = Engine(runtime)
    draw = rng.stream(0, "images")
    labels = torch.arange(BATCH * STEPS) % K
    split = Split(torch.rand(len(labels), 1, 6, 6, generator=draw), labels)
    data = Augmented(split, engine.device, settings.pop("augment", AugmentSettings("crop-flip", pad=1)))
    net = settings.pop("net", Wide)().to(engine.device)
    if batch_norm == "synchronized":
        synchronize(net, engine.processes)
    recipe = Recipe(
        *map(rule, names),
        settings.pop("threat", ThreatModel("linf", Budget("0.05"))),
        # Near the image TRADES' divergence is flat: there the sign of its gradient is that of rounding.
        settings.pop("attack", PGD(steps=1, start="uniform")),
        settings.pop("attack_bn", "eval"),
    )
    for part in recipe.rules:
        part.setup(RunInfo(data.labels, K, EPOCHS, net, engine.autocast, engine.processes))
    optim = OptimSettings(EPOCHS, BATCH, **{"lr": 0.05, **settings.pop("optim", {})})
    optimizer = make_optimizer(recipe.trained(net), optim, engine.device)
    step = TrainStep(net, data, recipe, optimizer, engine, optim)
    for epoch in range(EPOCHS):
        plan = data.plan(seed=0, epoch=epoch, views=recipe.objective.views)
        phase = Phase(*(part.phase(epoch) for part in recipe.rules))
        for number, rows in enumerate(plan.split(BATCH)):
            for part in recipe.rules:
                part.advance(epoch + number / STEPS)
            step(rows, phase, rng.key(0, "step", epoch, number))
            for part in recipe.rules:
                part.after_step()
        everything = torch.arange(data.n, device=engine.device)
        shares = [data.take(engine.processes.own(part)).image for part in everything.split(BATCH)]
        recipe.weight.end_epoch(epoch, lambda shares=shares: iter(shares))
    end = {
        "meters": step.meters,
        "momentum": torch.cat([part.flatten() for part in state_tensors(optimizer)]),
        **{f"net.{name}": value for name, value in net.state_dict().items()},
        **{f"label.{name}": value for name, value in recipe.label.state_dict().items()},
        **{f"objective.{name}": value for name, value in recipe.objective.state_dict().items()},
        **{f"prediction.{name}": value for name, value in recipe.weight.prediction.state_dict().items()},
    }
    return {name: value.cpu() for name, value in end.items()}


class Deep(nn.Module):
    """Drops whole images at random, as implementations of stochastic depth do, and single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Wide()

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            image = image * image.new_empty(len(image), 1, 1, 1).bernoulli_(0.7)
            image = image + 0.01 * torch.randn_like(image)
        return self.inner(nn.functional.dropout2d(image, 0.1, self.training))


def smooth_net() -> nn.Module:
    """In single precision, without kinks."""
    net = tiny_net()
    net[2] = nn.Softplus()
    return net


L2 = ThreatModel("l2", Budget("0.3"))
VARIANTS = {
    "cutmix": (("Smooth", "PGDAT", "Plain"), {"augment": AugmentSettings("flip", cutmix=1.0)}),
    "attack in train mode": (("SGLR", "PGDAT", "Plain"), {"attack_bn": "train"}),
    "attack in batch mode": (("Hard", "PGDAT", "AWP"), {"attack_bn": "batch"}),
    "gaussian start": (("SAT", "MART", "EMA"), {"threat": L2, "attack": PGD(steps=2)}),
    "in parts": (("SGLR", "TRADES", "EMA"), {"optim": {"accumulate": 2}, "attack": PGD(start="uniform")}),
    "clipped AdamW": (("Hard", "PGDAT", "Plain"), {"optim": {"name": "adamw", "clip": 0.1, "lr": 0.003}}),
    "norms in turn": (("Hard", "MultiNorm(how='mixed')", "Plain"), {"attack": PGD(steps=1, start="uniform")}),
    "restarts": (("Hard", "PGDAT", "Plain"), {"attack": PGD(steps=1, restarts=2)}),
    "random networks": (("Hard", "Consistency", "Plain"), {"net": Deep}),
    "single precision": (
        ("SGLR", "PGDAT", "EMA"),
        {"net": smooth_net, "threat": L2, "attack": PGD(steps=2, step_size=Budget("0.1"))},
    ),
    "float16 memory": (("SGLR(storage='float16')", "PGDAT", "Plain"), {}),
    "small memory": (("SGLR(storage='top-2')", "PGDAT", "Plain"), {}),
}
"""Other settings that the processes have to agree in."""


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def main(folder: Path, which: list[tuple[str, str, str]]) -> None:
    place = Engine(RuntimeSettings(device=DEVICE)).processes
    ends = {"-".join(names): train(names) for names in which}
    if which is PAIRS:
        ends |= {name: train(names, **settings) for name, (names, settings) in VARIANTS.items()}
        for batch_norm in ("synchronized", "per_process"):
            ends[batch_norm] = train(IDLE, batch_norm)
    kept = ends if place.first else {name: digest(end) for name, end in ends.items()}
    torch.save(kept, folder / f"{place.size}-{place.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"all": GRID, "pairs": PAIRS, "few": FEW, "one": ONE}[sys.argv[2]])
