"""A training step that is timed: a network on random images, in the last phase of its recipe."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from softdefend.core import rng
from softdefend.core.rule import RunInfo
from softdefend.data import Augmented, Resident, Split
from softdefend.evaluation.evaluate import Evaluator
from softdefend.execution.batch_norm import synchronize
from softdefend.execution.engine import Engine
from softdefend.experiments.config import Experiment
from softdefend.models import NetSettings, build, check_logits
from softdefend.models.logits import in_eval_mode
from softdefend.training.network_checks import check_smallest_batch
from softdefend.training.optim import make_optimizer
from softdefend.training.shares import check_shares
from softdefend.training.step import Phase, TrainStep

_BATCHES = 8
"""Batches of random images, which repeat."""
_VALIDATED = 8
"""Images of a validation."""
_LR = 1e-3
"""Small: the weights of a hundred steps on noise must stay finite."""


@dataclass(frozen=True)
class ImageShape:
    """What the random images look like."""

    size: int = 32
    """Height and width in pixels."""
    classes: int = 10
    """Classes of their labels."""


class Programs(NamedTuple):
    """What a process has prepared so far to run networks and steps."""

    compiled: int
    """Graphs that torch.compile has compiled, of any network."""
    captured: int
    """CUDA graphs of the step."""

    def since(self, before: Programs) -> Programs:
        """How many are new."""
        return Programs(self.compiled - before.compiled, self.captured - before.captured)


class TimedStep:
    """Everything that a step of training takes, and what comes between the steps of two epochs.

    Args:
        experiment: network, recipe and optimizer.
        batch_size: images of a step, of all processes together.
        shape: of the images.
        engine: of the experiment's runtime.

    Raises:
        SettingError: a network that does not take such images, or batches that cannot be trained on.
    """

    def __init__(self, experiment: Experiment, batch_size: int, shape: ImageShape, engine: Engine) -> None:
        self.experiment, self.batch_size, self.engine = experiment, batch_size, engine
        recipe, optim = experiment.recipe, replace(experiment.optim, batch_size=batch_size)
        channels_last, epochs = bool(engine.settings.channels_last), optim.epochs
        split = _random_images(_BATCHES * batch_size + self._left, shape)
        data = Augmented(split, engine.device, experiment.augment, channels_last=channels_last)
        shown = split.subset(torch.arange(_VALIDATED))
        self._shown = Resident(shown, engine.device, channels_last=channels_last)
        check_shares(data, recipe, optim, engine.processes)
        net = make_net(experiment.net, shape).to(engine.device)
        check_smallest_batch(net, data, recipe, optim, engine)
        if engine.settings.batch_norm == "synchronized":
            synchronize(net, engine.processes)
        if channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for rule in recipe.rules:
            rule.setup(RunInfo(data.labels, shape.classes, epochs, net, engine.autocast, engine.processes))
            rule.advance(epochs - 0.5)
        optimizer = make_optimizer(recipe.trained(net), experiment.optim, engine.device)
        self._step = TrainStep(net, data, recipe, optimizer, engine, optim)
        self._step.set_lr(_LR)
        self._phase = Phase(*(rule.phase(epochs - 1) for rule in recipe.rules))
        self._plan = data.plan(seed=0, epoch=0, views=recipe.objective.views)
        self._made = itertools.count()

    def __call__(self) -> None:
        """One step with a full batch."""
        number = next(self._made)
        start = number % _BATCHES * self.batch_size
        self._update(self._plan[start : start + self.batch_size], number)

    def warm_up(self, steps: int) -> None:
        """The first steps, which compile, tune and capture: with a full batch, and with what an epoch ends
        with."""
        for _ in range(steps):
            self()
        self._last()

    def turn_epoch(self) -> None:
        """What comes between two epochs, and a short second one: validation, another learning rate, a step
        with a full batch and one with what an epoch ends with."""
        self._validate()
        self._step.set_lr(_LR / 2)
        self()
        self._last()

    def programs(self) -> Programs:
        """How many there are."""
        dynamo = sys.modules.get("torch._dynamo.utils")  # imported by the first torch.compile
        compiled = 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
        return Programs(compiled, self._step.captured)

    @property
    def _left(self) -> int:
        """Images of an epoch's last, smaller batch; none where ``optim.drop_last`` leaves it out."""
        share = self.engine.processes.size
        return 0 if self.experiment.optim.drop_last else self.batch_size // 2 // share * share

    def _last(self) -> None:
        if self._left:
            self._update(self._plan[-self._left :], next(self._made))

    def _update(self, rows: Tensor, key: int) -> None:
        self._step(rows, self._phase, key)
        for rule in self.experiment.recipe.rules:
            rule.after_step()

    def _validate(self) -> None:
        settings, recipe = self.experiment.validate, self.experiment.recipe
        evaluator = Evaluator(
            recipe.weight.prediction,
            self._shown,
            recipe.threat,
            batch_size=_VALIDATED,
            precision=settings.precision,
            processes=self.engine.processes,
        )
        evaluator([settings.attack])


def make_net(settings: NetSettings, shape: ImageShape) -> nn.Module:
    """A network with fresh weights for RGB images.

    Raises:
        SettingError: one that cannot be made, or does not take such images.
    """
    with torch.random.fork_rng(devices=[]):  # the network is drawn on the CPU
        torch.manual_seed(0)
        net = build(
            settings,
            num_classes=shape.classes,
            in_channels=3,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            image_size=(shape.size, shape.size),
            pretrained=False,
        )
    check_logits(net, (3, shape.size, shape.size), shape.classes, "cpu")
    return net


def forward_flops(settings: NetSettings, shape: ImageShape) -> int:
    """Floating-point operations of one image's forward: two of a multiplication with addition.

    Convolutions and matrix products count, those of attention among them, and nothing else.

    Raises:
        SettingError: see :func:`make_net`.
    """
    net, counter = make_net(settings, shape), FlopCounterMode(display=False)
    # The counter has no formula for a CPU's fused attention.
    with torch.no_grad(), in_eval_mode(net), sdpa_kernel(SDPBackend.MATH), counter:
        net(torch.zeros(1, 3, shape.size, shape.size))
    return int(counter.get_total_flops())


def _random_images(n: int, shape: ImageShape) -> Split:
    draw = rng.stream(0, "bench")
    images = torch.randint(0, 256, (n, 3, shape.size, shape.size), generator=draw, dtype=torch.uint8)
    return Split(images, torch.randint(0, shape.classes, (n,), generator=draw))
