"""Distillation from a standard and a robust teacher (Chen et al., ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.labels.base import LABELS, LabelRule, Predictions, SoftTerm, Supervision
from softdefend.labels.teachers import LoadedTeacher, Teacher, image_channels, load_teacher, weights_digest
from softdefend.models import check_logits

if TYPE_CHECKING:
    from softdefend.data import Batch

Source = str | Teacher | Callable[..., Any]
"""A path as :attr:`Teacher.weights` describes it, a :class:`Teacher`, or a module. The type is ``Callable``
because with ``nn.Module`` the command line's help would list every module of torch."""


def mixture(terms: tuple[SoftTerm, ...]) -> Tensor:
    """The mean of the terms' targets [b, k], weighted by their coefficients: rows sum to one."""
    total = sum(term.coefficient for term in terms)
    return torch.stack([term.coefficient / total * term.target for term in terms]).sum(dim=0)


@LABELS.register("KD")
class KD(LabelRule):
    """The given label and the softened predictions of two trained networks, each with its own loss term.

    The label loss of logits f is ``a CE(f, y) + b T^2 CE(f / T, p_std) + c T^2 CE(f / T, p_rob)``, where p is
    a teacher's softmax(g / T); PGD-AT takes it at f(x'). As the target the run reports the mixture of the
    three with weights a, b, c. The attack climbs away from the given label. Teachers are frozen and in eval
    mode. They are not part of checkpoints, but a resumed run refuses other teachers.

    Args:
        standard: a network trained on clean images: a run folder (its best weights), a weights file in one, a
            :class:`~softdefend.labels.teachers.Teacher`, or a module, which is copied.
        robust: one trained on adversarial images. Without one of the two its term is left out, and the other
            coefficients are scaled so that their sum stays the same.
        hard_weight: a, >= 0.
        standard_weight: b, >= 0.
        robust_weight: c, >= 0.
        temperature: T > 0.
        image: what the teachers predict: the ``adversarial`` image (the code) or the ``clean`` one.

    Raises:
        SettingError: a value outside these ranges; at setup no teacher with a coefficient above zero, or one
            that cannot be read or does not fit.
    """

    source = "Chen et al., ICLR 2021, openreview.net/forum?id=qZzy5urZw9"
    extra_units = 2.0

    def __init__(
        self,
        standard: Source | None = None,
        robust: Source | None = None,
        hard_weight: float = 0.3,
        standard_weight: float = 0.1,
        robust_weight: float = 0.6,
        temperature: float = 2.0,
        image: Literal["adversarial", "clean"] = "adversarial",
    ) -> None:
        for name, value in (
            ("hard_weight", hard_weight),
            ("standard_weight", standard_weight),
            ("robust_weight", robust_weight),
        ):
            if not (value >= 0 and math.isfinite(value)):
                raise SettingError(f"label.{name}", value, "a number >= 0")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise SettingError("label.temperature", temperature, "a positive number")
        if image not in ("adversarial", "clean"):
            raise SettingError("label.image", repr(image), "adversarial or clean")
        self.standard, self.robust = standard, robust
        self.hard_weight, self.standard_weight = hard_weight, standard_weight
        self.robust_weight = robust_weight
        self.temperature, self.image = temperature, image
        self.standard_net: nn.Module | None = None
        self.robust_net: nn.Module | None = None

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        weights = {"standard": self.standard_weight, "robust": self.robust_weight}
        named = {"standard": self.standard, "robust": self.robust}
        given = {name: source for name, source in named.items() if source is not None and weights[name] > 0}
        if not given:
            accepted = "the path of a trained run with a weight above zero, for one of the two at least"
            raise SettingError("label.standard, label.robust", "no teacher", accepted)
        present = self.hard_weight + sum(weights[name] for name in given)
        scale = (self.hard_weight + sum(weights.values())) / present
        self._hard = scale * self.hard_weight
        self._to_check = {name: _load(name, source, run) for name, source in given.items()}
        nets = {name: _on_device(loaded.net, run) for name, loaded in self._to_check.items()}
        self.standard_net, self.robust_net = nets.get("standard"), nets.get("robust")
        self._forwards = [(run.forward(net), scale * weights[name]) for name, net in nets.items()]
        self._digests = {name: weights_digest(net) for name, net in nets.items()}
        self._cached: tuple[Tensor, list[SoftTerm]] | None = None

    def supervise(
        self, batch: Batch, adversarial: Tensor, predictions: Predictions, phase: str
    ) -> Supervision:
        terms = self._terms(batch, adversarial if self.image == "adversarial" else batch.image)
        return Supervision(batch.label, mixture(terms), terms=terms)

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        """The mixture from the teachers' predictions of the clean images; only :meth:`supervise` knows the
        adversarial ones."""
        return mixture(self._terms(batch, batch.image))

    @torch.no_grad()
    def _terms(self, batch: Batch, image: Tensor) -> tuple[SoftTerm, ...]:
        hard = [SoftTerm(self.one_hot(batch.label), self._hard)] if self._hard else []
        # With CutMix a rule is called once for each of the two labels of the same images.
        if self._cached is None or self._cached[0] is not image:
            self._cached = image, self._soft_terms(image)
        return (*hard, *self._cached[1])

    def _soft_terms(self, image: Tensor) -> list[SoftTerm]:
        self._check(image)
        return [
            SoftTerm(F.softmax(forward(image) / self.temperature, dim=1), weight, self.temperature)
            for forward, weight in self._forwards
        ]

    def after_step(self) -> None:
        self._cached = None

    def _check(self, image: Tensor) -> None:
        """Check at the first batch that the teachers take such images and know as many classes.

        Raises:
            SettingError: one does not.
        """
        shape = tuple(image.shape[1:])
        while self._to_check:
            name, loaded = self._to_check.popitem()
            if loaded.shape not in (None, shape):
                what = f"a teacher trained on images {list(loaded.shape or ())}"
                raise SettingError(f"label.{name}", what, f"one trained on images {list(shape)}")
            try:
                check_logits(loaded.net, shape, self.k, image.device)
            except SettingError as error:
                raise SettingError(f"label.{name}", error.given, error.accepted) from error

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}_sha256": value for name, value in self._digests.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("standard", "robust"):
            then, now = state.get(f"{name}_sha256"), self._digests.get(name)
            if (None if then is None else then.tolist()) != (None if now is None else now.tolist()):
                raise SettingError(f"label.{name}", "another teacher", "the weights that the run began with")


def _load(name: str, given: Source, run: RunInfo) -> LoadedTeacher:
    """Load a teacher for the run's classes and images.

    Raises:
        SettingError: it cannot be used; the line has the name of the teacher's setting.
    """
    channels = 3 if run.net is None else image_channels(run.net)
    try:
        return load_teacher(given, run.k, channels)
    except SettingError as error:
        what = f"a teacher that cannot be used ({error.setting}: {error.given})"
        accepted = f"{error.accepted}; for {run.k} classes and {channels}-channel images"
        raise SettingError(f"label.{name}", what, accepted) from error


def _on_device(net: nn.Module, run: RunInfo) -> nn.Module:
    """``net`` on the run's device, in the memory order of the run's network."""
    net = net.to(run.labels.device)
    kernels = [] if run.net is None else [p for p in run.net.parameters() if p.ndim == 4]
    order = torch.channels_last
    if any(p.is_contiguous(memory_format=order) and not p.is_contiguous() for p in kernels):
        net = net.to(memory_format=order)  # type: ignore[call-overload]
    return net
