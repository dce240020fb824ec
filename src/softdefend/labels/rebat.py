"""ReBAT's pull towards the averaged network (Wang et al., NeurIPS 2023, arXiv 2310.19360)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.labels.base import LABELS, Predictions, SoftTerm, Supervision
from softdefend.labels.kd import mixture
from softdefend.labels.own_teacher import OwnTeacher

if TYPE_CHECKING:
    from softdefend.data import Batch


@LABELS.register("ReBAT")
class ReBAT(OwnTeacher):
    """The given label, and late in the run also what an average of the network's weights says of the
    adversarial image: CE(f(x'), y) + beta CE(f(x'), p_avg(x')).

    The second term has the gradient of the paper's beta KL(p_avg(x') || p(x')). The average is of weights and
    buffers, in eval mode; a copy of the network before the start. The attack climbs away from the given
    label. Defaults are those of the authors' code for CIFAR-10 and PreActResNet-18.

    Args:
        beta: weight of the pull, > 0.
        decay: weight of the average's old weights per step, in [0, 1).
        start: fraction of the run before average and pull, in [0, 1): the code's epoch 105 of 200, counted
            from zero.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Wang et al., NeurIPS 2023, arXiv 2310.19360"

    def __init__(self, beta: float = 1.0, decay: float = 0.999, start: float = 0.525) -> None:
        if not (beta > 0 and math.isfinite(beta)):
            raise SettingError("label.beta", beta, "a positive number")
        for name, value in (("decay", decay), ("start", start)):
            if not 0 <= value < 1:
                raise SettingError(f"label.{name}", value, "a number in [0, 1)")
        self.beta, self.decay, self.start = beta, decay, start

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        # 1e-9: 0.525 * 200 may round to just above 105, which must not become epoch 106.
        self.first_epoch = math.ceil(self.start * run.epochs - 1e-9)
        self._begun = self.first_epoch == 0

    def phase(self, epoch: int) -> str:
        return "pulled" if epoch >= self.first_epoch else "hard"

    def advance(self, epoch: float) -> None:
        self._begun = epoch >= self.first_epoch

    def supervise(
        self, batch: Batch, adversarial: Tensor, predictions: Predictions, phase: str
    ) -> Supervision:
        terms = self._terms(batch, adversarial, phase)
        return Supervision(batch.label, mixture(terms), terms=terms if len(terms) > 1 else ())

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        """The mixture by the average's prediction of the clean images; only :meth:`supervise` knows the
        adversarial ones."""
        return mixture(self._terms(batch, batch.image, phase))

    @torch.no_grad()
    def _terms(self, batch: Batch, image: Tensor, phase: str) -> tuple[SoftTerm, ...]:
        hard = SoftTerm(self.one_hot(batch.label), 1.0)
        if phase == "hard":
            return (hard,)
        return hard, SoftTerm(F.softmax(self.logits(image), dim=1), self.beta)

    def after_step(self) -> None:
        self.follow(self.decay if self._begun else 0.0)
