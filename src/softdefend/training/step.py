"""One training step: image, label, attack, loss, update, memory, meters.

Nothing in the step reads the device from the host, branches on data or changes a shape, so on a GPU the
whole of it can be captured as a CUDA graph, once per phase and batch size.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softdefend.attacks import AttackLoss, Forward
from softdefend.core import rng
from softdefend.core.errors import SettingError, one_line
from softdefend.core.processes import messages_within
from softdefend.core.threat import ThreatModel
from softdefend.data import Batch, Resident
from softdefend.execution.batch_norm import statistics
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.draws import ShareRandomness, WholeBatchDraws
from softdefend.execution.engine import Engine
from softdefend.execution.fused import FusedNet, FusedThreat, agree, fused, refusal
from softdefend.execution.network_mode import frozen, set_mode
from softdefend.labels import BNMode, Predictions, Supervision
from softdefend.training.buckets import Buckets
from softdefend.training.config import Recipe
from softdefend.training.mixture import Mixture, mixing_refusal
from softdefend.training.network_checks import draws_numbers
from softdefend.training.optim import OptimSettings, clip_gradients, state_tensors, trained
from softdefend.training.parts import check_division
from softdefend.training.ramp import scaled
from softdefend.training.target_checks import check_form, check_rows


class Phase(NamedTuple):
    """What each rule does in an epoch. A step is captured once for every phase that occurs."""

    label: str
    objective: str
    weight: str


METERS = ("samples", "loss", "adversarial_correct", "clean_correct", "target_entropy")
"""What a step adds up over an epoch."""


def _compiled(net: nn.Module) -> Forward:
    """The network compiled for every mode and batch size it will meet."""
    import torch._dynamo  # not part of torch's own import

    # Beyond this many versions in a process torch runs uncompiled. It allows 8, which is too few for a
    # comparison of many recipes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    compiled: Forward = torch.compile(net, dynamic=False)
    return compiled


def _fused(net: nn.Module, data: Resident, recipe: Recipe, engine: Engine) -> FusedNet | None:
    """The network as fused kernels for the attack; None where it has none.

    Raises:
        SettingError: ``runtime.fused`` is true and the network or the settings do not allow it.
    """
    wanted = engine.settings.fused
    if wanted is False:
        return None
    why = refusal(net, data.image_shape, engine.device)
    if engine.settings.precision != "bf16":
        why = f"precision {engine.settings.precision}; they compute in bf16"
    if recipe.objective.layers is not None:
        why = f"objective {type(recipe.objective).__name__}, which has layers of its own"
    if recipe.attack_bn != "eval":
        why = f"attack_bn {recipe.attack_bn}; they compute in evaluation mode"
    if why is None:
        return fused(net, data.image_shape, engine.device)
    if wanted:
        raise SettingError("runtime.fused", "true", f"false or null: {why}")
    return None


def _seed_dropout(key: int, device: torch.device) -> None:
    """Seed a network's dropout, otherwise than the attack's starts.

    On a CPU its generator alone: the seed of all kinds of devices takes as long as a small network's forward.
    """
    seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    seed(rng.key(key, "dropout"))


def _in_order(net: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What is trained, in the order in which it is computed with. Layers of the objective come first: they
    stand in for the network's throughout, so their gradients are complete at the end."""
    layers = recipe.objective.layers
    modules = [net] if layers is None else [layers, net]
    every = [parameter for module in modules for parameter in module.parameters()]
    place: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(every)}
    return sorted(trained(optimizer), key=lambda parameter: place.get(parameter, 0))


class TrainStep:
    """Runs steps, eagerly or from captured graphs.

    Args:
        net: the network, on the engine's device; its own object is never wrapped or replaced. Of several
            processes each has the same weights.
        data: the training split; plain, or :class:`~softdefend.data.Augmented`.
        recipe: what to train; its rules have been set up.
        optimizer: from :func:`~softdefend.training.optim.make_optimizer`.
        engine: device and precision.
        optim: how a batch is divided and gradients are clipped; neither when None.

    Raises:
        SettingError: a rule that cannot be trained on images that ``data`` mixes; in a step, a label rule
            that returns no distributions.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Resident,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        optim: OptimSettings | None = None,
    ) -> None:
        self.net, self.data, self.recipe, self.optimizer, self.engine = net, data, recipe, optimizer, engine
        for rule in recipe.rules if data.mixes else ():
            if reason := mixing_refusal(rule):
                given = f"CutMix with {type(rule).__name__}"
                raise SettingError("augment.cutmix", given, f"0: {reason}")
        self.optim = optim or OptimSettings()
        check_division(recipe, self.optim, mixes=data.mixes)
        self.attack = recipe.objective.training_attack(recipe.attack, recipe.threat)
        self.generator = torch.Generator(engine.device)
        self.meters = torch.zeros(len(METERS), device=engine.device, dtype=torch.float64)
        self._forward: Forward = _compiled(net) if engine.settings.compile else net
        self._fused = _fused(net, data, recipe, engine)
        self._agreed: dict[int, bool] = {}
        self._checked: set[str] = set()
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._draws = engine.processes.size > 1 and draws_numbers(net, data, engine)
        """Whether the network draws random numbers of which each process is to have its rows."""
        for name in ("compile", "recompute"):
            if self._draws and getattr(engine.settings, name):
                given = "true on several processes, with a network that draws random numbers as dropout does"
                raise SettingError(f"runtime.{name}", given, "false")
        self._buckets = Buckets(engine.processes, _in_order(net, recipe, optimizer))
        self._share = 0
        """Images that this process has in the step's batch."""
        self._threat = self._kernels_of(recipe.threat)
        self._graphs: dict[tuple[Phase, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.captured = 0
        """CUDA graphs recorded so far."""

    def __call__(self, plan: Tensor, phase: Phase, key: int) -> None:
        """Make one update.

        Args:
            plan: [b, columns] rows of the data's plan with the objective's views: the whole batch, of which
                each process takes its share.
            phase: of the three rules.
            key: seed of every random draw in this step.
        """
        self.data.load(self.own_rows(plan))
        self.generator.manual_seed(key)
        _seed_dropout(key, self.engine.device)
        with messages_within():
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

    def set_eps(self, factor: float) -> None:
        """Train at ``factor`` times the threat's eps, with steps of the attack in proportion. Recorded steps
        are forgotten where it changes."""
        threat, attack = scaled(self.recipe, factor)
        if float(threat.eps) != float(self._threat.eps):
            self._graphs.clear()
            self._threat = self._kernels_of(threat)
            self.attack = self.recipe.objective.training_attack(attack, threat)

    @property
    def eps(self) -> float:
        """That of the steps that follow, in pixel units."""
        return float(self._threat.eps)

    def _kernels_of(self, threat: ThreatModel) -> ThreatModel:
        return threat if self._fused is None else FusedThreat(threat.norm, threat.eps)

    def forward(self, image: Tensor) -> Tensor:
        """The network in training precision, logits in float32."""
        with self.engine.autocast(), self._drawing():
            return self._forward(image).float()

    def _drawing(self) -> AbstractContextManager[object]:
        """What gives a network that draws random numbers those of its rows of the whole batch."""
        if not (self._draws and self.net.training):
            return nullcontext()
        return WholeBatchDraws(self.engine.processes, self._share)

    def _body(self, plan: Tensor, phase: Phase) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        parts = plan.tensor_split(self.optim.parts(len(plan)))
        for number, rows in enumerate(parts):
            self._part(rows, phase, len(rows) / len(plan), number, last=rows is parts[-1])

    def _part(self, plan: Tensor, phase: Phase, share: float, number: int = 0, *, last: bool) -> None:
        """Add up gradients of a part of the batch, which is ``share`` of it; update after the last one."""
        (label, objective, weight), views = self.recipe.rules, self.recipe.objective.views
        first = self._first_view(plan, number)
        plan, processes = self.engine.processes.own(plan), self.engine.processes
        index, image = first.batch.index, first.batch.image
        self._share = len(index)
        if views > 1:
            image = torch.cat([image, *(self.data.batch(plan, view).image for view in range(1, views))])
        batch = Batch(index, image, first.label)
        attack_target = first.attack_target(label, phase.label)
        attack_target = attack_target.repeat(views, *[1] * (attack_target.ndim - 1))
        with frozen(self.net, self.recipe.attack_bn):
            forward = objective.view_forward(self._attack_forward(batch.image))
            loss = objective.inner_loss(forward, batch, attack_target)
            adversarial = self._attacked(forward, batch.image, attack_target, loss)
        # With perturbed weights only the second forward, which is at these, moves running statistics.
        perturbs = weight.perturbs(phase.weight)
        mode: BNMode = "batch" if perturbs else "train"
        set_mode(self.net, mode)
        predictions = objective.predict(self.forward, batch.image, adversarial)
        seen = predictions.detach().first(len(index))
        if seen.clean is None and label.needs_clean(phase.label):
            seen = Predictions(seen.adversarial, self._clean(first.batch.image, mode))
        supervision = first.supervise(label, adversarial[: len(index)], seen, phase.label)
        self._check(supervision, seen, phase.label)
        total = objective.outer_loss(predictions, batch, supervision)
        if perturbs:
            with weight.perturbed(total):
                set_mode(self.net, "train")
                predictions = objective.predict(self.forward, batch.image, adversarial)
                self._update(objective.outer_loss(predictions, batch, supervision))
        else:
            self._update(total * share if share < 1 else total, last=last)
        if processes.size > 1 and self.engine.settings.batch_norm == "per_process":
            layers = self.recipe.objective.layers
            processes.copy_first_([*statistics(self.net), *(() if layers is None else layers.buffers())])
        self._measure(batch.label, seen, supervision, total)

    def _known(self, plan: Tensor, number: int) -> Tensor | None:
        """Rows of the images that the label rule remembers, which are the same in every batch; None where it
        is asked about all. A part of a batch has its own."""
        if not (self.data.has_extra and self.recipe.label.remembers):
            return None
        key = number, len(plan)
        if key not in self._rows:  # in a rehearsal: never while a graph is recorded
            self._rows[key] = (plan[:, 0] < self.data.n).nonzero().flatten()
        return self._rows[key]

    def own_rows(self, plan: Tensor) -> Tensor:
        """The rows of a batch's plan whose images this process needs."""
        processes = self.engine.processes
        if processes.size == 1 or self.data.mixes:
            return plan
        return torch.cat([processes.own(part) for part in plan.tensor_split(self.optim.parts(len(plan)))])

    def _first_view(self, plan: Tensor, number: int) -> Mixture:
        """This process's share of the first view of a batch."""
        processes = self.engine.processes
        if processes.size == 1:
            return Mixture(self.data.batch(plan), self.data.share(plan), self._known(plan, number))
        if self.data.mixes:  # images that lie in other shares are mixed in
            return Mixture(self.data.batch(plan), self.data.share(plan)).own(processes)
        return Mixture(self.data.batch(processes.own(plan)), None)

    def _attacked(self, forward: Forward, image: Tensor, target: Tensor, loss: AttackLoss) -> Tensor:
        """Adversarial images; where several processes train, from the whole batch's random numbers."""
        processes, views = self.engine.processes, len(image) // self._share
        if processes.size == 1:
            return self.attack(forward, image, target, self._threat, loss=loss, generator=self.generator)
        self.attack.check(self._threat)
        net = CountingModel(forward, len(image))
        random = ShareRandomness(self.generator, len(image), views, processes)
        return self.attack.run(net, image, target, self._threat, AttackContext(net, random, loss=loss))

    def _attack_forward(self, image: Tensor) -> Forward:
        """The network for the attack: fused kernels where they compute the same on such a batch."""
        if self._fused is None:
            return self.forward
        self._fused.refresh()
        if len(image) not in self._agreed:  # in a rehearsal: never while a graph is recorded
            self._agreed[len(image)] = self._all_agree(self._fused, image)
        return self._fused if self._agreed[len(image)] else self.forward

    def _all_agree(self, kernels: FusedNet, image: Tensor) -> bool:
        """Whether the kernels do what the network does, in every process: the others would wait for one that
        goes without."""
        everyone = self.engine.processes.tell(self._disagreement(kernels, image))
        for rank, why in enumerate(everyone):
            if why is not None:
                where = f"process {rank}: " if len(everyone) > 1 else ""
                what = f"batches of {len(image)} images are attacked without fused kernels, which is slower"
                warnings.warn(f"{what}: {where}{why}", RuntimeWarning, stacklevel=2)
                return False
        return True

    def _disagreement(self, kernels: FusedNet, image: Tensor) -> str | None:
        """Why the kernels cannot stand for the network on such a batch; None where they can."""
        try:
            kernels.compile([len(image)], tuple(image.shape[1:]))
            if agree(kernels, self.net, image):
                return None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways
            return one_line(error)
        return "their logits or gradients are not the network's"

    def _check(self, supervision: Supervision, seen: Predictions, phase: str) -> None:
        """Check what the label rule returned.

        Raises:
            SettingError: targets that are no distributions.
        """
        label, (size, k) = self.recipe.label, seen.adversarial.shape
        check_form(label, supervision, size, k)
        if phase not in self._checked:  # in a rehearsal: never while a graph is recorded
            check_rows(label, supervision, seen)
            self._checked.add(phase)

    def _update(self, total: Tensor, *, last: bool = True) -> None:
        if not last:
            total.backward()  # type: ignore[no-untyped-call]
            return
        self._buckets.backward(total)
        clip_gradients(self.optimizer, self.optim.clip)
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
        self.meters += self.engine.processes.sum(torch.stack([v.to(self.meters.dtype) for v in values]))

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        rules = (*self.recipe.label.state_dict().values(), *self.recipe.objective.state_dict().values())
        kept = [value for value in rules if isinstance(value, Tensor)]
        return [
            *self.net.parameters(),
            *self.net.buffers(),
            *state_tensors(self.optimizer),
            *kept,
            self.meters,
        ]

    def _capture(self, plan: Tensor, phase: Phase, key: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step's kernels. Capture needs rehearsals; the state is then put back as it was."""
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
        # Of several processes another thread watches the messages, and asks the device meanwhile.
        errors = "global" if self.engine.processes.size == 1 else "thread_local"
        # Without a stream torch takes one for the whole process, on the device of the first capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode=errors):
            self._body(static_plan, phase)
        with torch.no_grad():
            for tensor, value in zip(self._state(), before, strict=True):
                tensor.copy_(value)
        self.generator.manual_seed(key)
        _seed_dropout(key, self.engine.device)
        self._graphs[phase, len(plan)] = graph, static_plan
        self.captured += 1
        return graph, static_plan
