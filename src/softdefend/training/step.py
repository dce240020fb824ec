"""One training step: image, label, attack, loss, update, memory, meters.

Nothing in the step reads the device from the host, branches on data or changes a shape, so on a GPU the
whole of it can be captured as a CUDA graph, once per phase and batch size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from softdefend.attacks import PGD, Forward
from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.core.rule import Rule
from softdefend.core.threat import ThreatModel
from softdefend.data import Batch, Resident
from softdefend.execution.engine import Engine
from softdefend.execution.fused import FusedNet, FusedThreat, agree, fused, refusal
from softdefend.execution.network_mode import frozen, set_mode
from softdefend.labels import BNMode, LabelRule, Predictions, Supervision
from softdefend.objectives import Objective
from softdefend.training.mixture import Mixture
from softdefend.training.schedules import Schedule
from softdefend.weights import Plain, WeightRule


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the length of the run: SGD with momentum, as the field's protocols have it.

    Raises:
        SettingError: a value outside its range.
    """

    epochs: int = 200
    """Passes over the training data, >= 1."""
    batch_size: int = 128
    """Images per step, >= 1."""
    lr: float = 0.1
    """Base learning rate, > 0."""
    momentum: float = 0.9
    """In [0, 1)."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 5e-4
    """>= 0, on every parameter, as the reference codes do."""
    drop_last: bool = True
    """Leave the last, smaller batch of an epoch out. The reference codes train on it (false)."""
    schedule: Schedule = Schedule()
    """Learning rate over the run."""

    def __post_init__(self) -> None:
        checks = (
            ("epochs", self.epochs, self.epochs >= 1, "a whole number >= 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "a whole number >= 1"),
            ("lr", self.lr, 0 < self.lr < float("inf"), "a positive number"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "a number >= 0"),
            (
                "nesterov",
                self.nesterov,
                not self.nesterov or self.momentum > 0,
                "true only with momentum > 0",
            ),
        )
        for name, value, good, accepted in checks:
            if not good:
                raise SettingError(f"optim.{name}", value, accepted)


@dataclass(frozen=True)
class Recipe:
    """The three independent answers, and the threat and attack they are trained against.

    Raises:
        SettingError: an attack with a loss of its own: in training the objective says what it climbs.
    """

    threat: ThreatModel
    attack: PGD
    label: LabelRule
    objective: Objective
    attack_bn: BNMode = "eval"

    def __post_init__(self) -> None:
        if self.attack.loss != "ce":
            accepted = "ce, the default: in training the objective says what the attack climbs"
            raise SettingError("attack.loss", repr(self.attack.loss), accepted)
        step = float(self.attack.step_size or 0)
        if self.threat.norm == "linf" and step > 1:
            accepted = "at most 1: pixel values lie in [0, 1], so 2 levels of 255 are 2/255"
            raise SettingError("attack.step_size", self.attack.step_size, accepted)


class Phase(NamedTuple):
    """What each rule does in an epoch; a step is captured once for each that occurs."""

    label: str
    objective: str
    weight: str


METERS = ("samples", "loss", "adversarial_correct", "clean_correct", "target_entropy")


def make_optimizer(net: nn.Module, settings: OptimSettings, device: torch.device) -> torch.optim.SGD:
    """SGD whose momentum exists from the start, so that the first step is like every other.

    On a GPU the learning rate is a device tensor: a captured step reads it, the host writes it.

    Raises:
        SettingError: nothing to train.
    """
    on_gpu = device.type == "cuda"
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise SettingError("net", f"{type(net).__name__} without trainable parameters", "some to train")
    optimizer = torch.optim.SGD(
        parameters,
        lr=torch.tensor(settings.lr, device=device) if on_gpu else settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=True if on_gpu else None,
    )
    if settings.momentum > 0:
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def mixing_refusal(rule: Rule) -> str | None:
    """Why a rule cannot be trained on images that CutMix has mixed; None where it can."""
    if not rule.mixes:
        return "what it does for an image and its one label has no meaning for a mixture of two"
    if getattr(rule, "views", 1) > 1:
        return "views of one image would be mixtures of different labels"
    return None


def _compiled(net: nn.Module) -> Forward:
    """The network compiled for every mode and batch size it will meet."""
    import torch._dynamo  # not part of torch's own import

    # Beyond this many versions, counted per process, torch goes on uncompiled: a comparison of many recipes
    # makes more than the 8 it allows.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    compiled: Forward = torch.compile(net, dynamic=False)
    return compiled


def _fused(net: nn.Module, data: Resident, recipe: Recipe, engine: Engine) -> FusedNet | None:
    """The network as fused kernels for the attack, where it is to have them.

    Raises:
        SettingError: ``runtime.fused`` asks for what cannot be.
    """
    wanted = engine.settings.fused
    if wanted is False:
        return None
    why = refusal(net, data.image_shape, engine.device)
    if engine.settings.precision != "bf16":
        why = f"precision {engine.settings.precision}; they compute in bf16"
    if recipe.attack_bn != "eval":
        why = f"attack_bn {recipe.attack_bn}; they compute in evaluation mode"
    if why is None:
        return fused(net, data.image_shape, engine.device)
    if wanted:
        raise SettingError("runtime.fused", "true", f"false or null: {why}")
    return None


def _refuse(rule: LabelRule, what: str, size: int, k: int) -> NoReturn:
    accepted = f"[b, k] = [{size}, {k}] of floating-point numbers >= 0, rows summing to one"
    raise SettingError("label", f"{type(rule).__name__}, which returned {what}", accepted)


def _check_form(rule: LabelRule, said: Supervision, size: int, k: int) -> None:
    """Refuse what would train to nonsense by its shape or type; asks the host only.

    Raises:
        SettingError: targets that are not [size, k], or not floating-point numbers.
    """
    terms = {f"a term {n} with a target": term.target for n, term in enumerate(said.terms)}
    for name, rows in {"a target": said.target, **terms}.items():
        if tuple(rows.shape) != (size, k) or not rows.is_floating_point():
            kind = str(rows.dtype).removeprefix("torch.")
            _refuse(rule, f"{name} {list(rows.shape)} of {kind}", size, k)
    weight = said.weight
    if weight is not None and tuple(weight.shape) != (size,):
        given = f"{type(rule).__name__}, which returned sample weights {list(weight.shape)}"
        raise SettingError("label", given, f"[b] = [{size}], mean one, or None")


_DRIFT = 0.05
"""How far the sum of a row may lie from one: a float16 memory whose momentum is 0.99 comes to 0.02."""


@torch.no_grad()
def _check_rows(rule: LabelRule, said: Supervision, seen: Predictions) -> None:
    """Refuse targets that are no distributions. Reads the device, so it must not be captured.

    Raises:
        SettingError: rows with a negative or an unbounded entry, or that do not sum to one.
    """
    logits = [seen.adversarial] if seen.clean is None else [seen.adversarial, seen.clean]
    if not all(bool(rows.isfinite().all()) for rows in logits):
        return  # a network that has diverged, which the trainer says in its own words
    for rows in (said.target, *(term.target for term in said.terms)):
        size, k = rows.shape
        if not rows.isfinite().all():
            _refuse(rule, "a target that is not finite", size, k)
        least, sums = float(rows.min()), rows.float().sum(dim=1)
        worst = float(sums[(sums - 1).abs().argmax()])
        if least < 0:
            _refuse(rule, f"a target with an entry of {least:.4g}", size, k)
        if abs(worst - 1) > _DRIFT:
            _refuse(rule, f"a target with a row that sums to {worst:.4g}", size, k)


def _dropout(key: int) -> int:
    """The seed of what a network with dropout draws, apart from that of the attack's starts."""
    return rng.key(key, "dropout")


class TrainStep:
    """Runs steps, eagerly or from captured graphs.

    Args:
        net: the network, on the engine's device; its own object is never wrapped or replaced.
        data: the training split; plain, or :class:`~softdefend.data.Augmented`.
        recipe: what to train.
        optimizer: from :func:`make_optimizer`.
        engine: device and precision.
        weight: at which weights the gradient is taken; set up by the caller.

    Raises:
        SettingError: a rule that cannot be trained on images that ``data`` mixes; in a step, a label rule
            that returns no distributions.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Resident,
        recipe: Recipe,
        optimizer: torch.optim.SGD,
        engine: Engine,
        weight: WeightRule | None = None,
    ) -> None:
        self.net, self.data, self.recipe, self.optimizer, self.engine = net, data, recipe, optimizer, engine
        self.weight = weight or Plain()
        for rule in (recipe.label, recipe.objective, self.weight) if data.mixes else ():
            if reason := mixing_refusal(rule):
                given = f"CutMix with {type(rule).__name__}"
                raise SettingError("augment.cutmix", given, f"0: {reason}")
        self.attack = recipe.objective.training_attack(recipe.attack, recipe.threat)
        self.generator = torch.Generator(engine.device)
        self.meters = torch.zeros(len(METERS), device=engine.device, dtype=torch.float64)
        self._forward: Forward = _compiled(net) if engine.settings.compile else net
        self._fused = _fused(net, data, recipe, engine)
        self._agreed: dict[int, bool] = {}
        self._checked: set[str] = set()
        threat = recipe.threat
        self._threat = threat if self._fused is None else FusedThreat(threat.norm, threat.eps)
        self._graphs: dict[tuple[Phase, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, plan: Tensor, phase: Phase, key: int) -> None:
        """Make one update.

        Args:
            plan: [b, columns] rows of the data's plan with the objective's views.
            phase: of the three rules.
            key: seed of every random draw in this step.
        """
        self.generator.manual_seed(key)
        torch.manual_seed(_dropout(key))
        if not self.engine.settings.capture:
            self._body(plan, phase)
            return
        graph, static_plan = self._graphs.get((phase, len(plan))) or self._capture(plan, phase, key)
        static_plan.copy_(plan)
        graph.replay()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the steps that follow."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def forward(self, image: Tensor) -> Tensor:
        """The network in training precision, logits in float32."""
        with self.engine.autocast():
            return self._forward(image).float()

    def _body(self, plan: Tensor, phase: Phase) -> None:
        objective, label, views = self.recipe.objective, self.recipe.label, self.recipe.objective.views
        first = Mixture(self.data.batch(plan), self.data.share(plan))
        index, image = first.batch.index, first.batch.image
        if views > 1:
            image = torch.cat([image, *(self.data.batch(plan, view).image for view in range(1, views))])
        batch = Batch(index, image, first.label)
        away_from = first.attack_target(label, phase.label)
        away_from = away_from.repeat(views, *[1] * (away_from.ndim - 1))
        with frozen(self.net, self.recipe.attack_bn):
            forward = self._searching(batch.image)
            loss = objective.inner_loss(forward, batch, away_from)
            adversarial = self.attack(
                forward, batch.image, away_from, self._threat, loss=loss, generator=self.generator
            )
        self.optimizer.zero_grad(set_to_none=True)
        # A first look at the trained weights leaves running statistics to the second, at the perturbed ones.
        twice = self.weight.perturbs(phase.weight)
        mode: BNMode = "batch" if twice else "train"
        set_mode(self.net, mode)
        predictions = objective.predict(self.forward, batch.image, adversarial)
        seen = predictions.detach().first(len(index))
        if seen.clean is None and label.needs_clean(phase.label):
            seen = Predictions(seen.adversarial, self._clean(first.batch.image, mode))
        supervision = first.supervise(label, adversarial[: len(index)], seen, phase.label)
        self._check(supervision, seen, phase.label)
        total = objective.outer_loss(predictions, batch, supervision)
        if twice:
            with self.weight.perturbed(total):
                set_mode(self.net, "train")
                predictions = objective.predict(self.forward, batch.image, adversarial)
                self._update(objective.outer_loss(predictions, batch, supervision))
        else:
            self._update(total)
        self._measure(batch.label, seen, supervision, total)

    def _searching(self, image: Tensor) -> Forward:
        """The network as the attack asks it: fused kernels, where they do what it does on such a batch."""
        if self._fused is None:
            return self.forward
        self._fused.refresh()
        if len(image) not in self._agreed:  # in a rehearsal: never while a graph is recorded
            self._agreed[len(image)] = self._agrees(self._fused, image)
        return self._fused if self._agreed[len(image)] else self.forward

    def _agrees(self, kernels: FusedNet, image: Tensor) -> bool:
        why = "their logits or gradients are not the network's"
        try:
            if agree(kernels, self.net, image):
                return True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's, which knows many
            why = " ".join(str(error).split())[:160]
        what = f"batches of {len(image)} images are attacked without fused kernels, which is slower: {why}"
        warnings.warn(what, RuntimeWarning, stacklevel=2)
        return False

    def _check(self, said: Supervision, seen: Predictions, phase: str) -> None:
        """Refuse what is no label.

        Raises:
            SettingError: it is none.
        """
        label, (size, k) = self.recipe.label, seen.adversarial.shape
        _check_form(label, said, size, k)
        if phase not in self._checked:  # in a rehearsal: never while a graph is recorded
            _check_rows(label, said, seen)
            self._checked.add(phase)

    def _update(self, total: Tensor) -> None:
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def _clean(self, image: Tensor, mode: BNMode) -> Tensor:
        """Clean logits for the label rule; the network is left in ``mode``."""
        set_mode(self.net, self.recipe.label.clean_bn)
        logits = self.forward(image)
        set_mode(self.net, mode)
        return logits

    @torch.no_grad()
    def _measure(self, label: Tensor, seen: Predictions, supervision: Supervision, total: Tensor) -> None:
        size = len(label)
        right = (seen.adversarial.argmax(1) == label).sum()
        # NaN, not zero, where no clean forward was made: the epoch's figure is then absent.
        clean = right * torch.nan if seen.clean is None else (seen.clean.argmax(1) == label).sum()
        entropy = torch.special.entr(supervision.target).sum()
        count = torch.full_like(total, size)
        values = (count, total.detach() * size, right, clean, entropy)
        self.meters += torch.stack([v.to(self.meters.dtype) for v in values])

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        momentum = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        rules = (*self.recipe.label.state_dict().values(), *self.recipe.objective.state_dict().values())
        kept = [value for value in rules if isinstance(value, Tensor)]
        return [*self.net.parameters(), *self.net.buffers(), *momentum, *kept, self.meters]

    def _capture(self, plan: Tensor, phase: Phase, key: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step's kernels; the rehearsals that capture needs leave no trace in the state."""
        before = [tensor.detach().clone() for tensor in self._state()]
        static_plan = plan.clone()
        side = torch.cuda.Stream(self.engine.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._body(static_plan, phase)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # Without a stream torch takes one for the whole process, on the device of the first capture.
        with torch.cuda.graph(graph, stream=side):
            self._body(static_plan, phase)
        with torch.no_grad():
            for tensor, value in zip(self._state(), before, strict=True):
                tensor.copy_(value)
        self.generator.manual_seed(key)
        torch.manual_seed(_dropout(key))
        self._graphs[phase, len(plan)] = graph, static_plan
        return graph, static_plan
