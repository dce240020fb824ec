"""Label smoothing, in both conventions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.labels.base import LABELS, LabelRule, Predictions

if TYPE_CHECKING:
    from softdefend.data import Batch

Convention = Literal["others", "uniform"]


def smooth(one_hot: Tensor, smoothing: float, convention: Convention) -> Tensor:
    """Soften one-hot rows [b, k].

    Args:
        one_hot: [b, k].
        smoothing: mass s taken from the true class, in [0, 1).
        convention: ``others`` gives the true class 1 - s and every other s / (k - 1) (Bag of Tricks for AT,
            arXiv 2010.00467); ``uniform`` mixes with the uniform distribution: 1 - s + s / k and s / k
            (Szegedy et al., arXiv 1512.00567; torch's ``label_smoothing``).
    """
    k = one_hot.shape[1]
    if convention == "others":
        return one_hot * (1 - smoothing) + (1 - one_hot) * (smoothing / (k - 1))
    return one_hot * (1 - smoothing) + smoothing / k


@LABELS.register("Smooth")
class Smooth(LabelRule):
    """Smoothed targets.

    Args:
        smoothing: mass taken from the true class, in [0, 1).
        convention: ``others`` or ``uniform``, see :func:`smooth`.
        attack_label: what the attack climbs away from: the ``hard`` label, or the ``smoothed`` target.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Szegedy et al., CVPR 2016, arXiv 1512.00567; Pang et al., ICLR 2021, arXiv 2010.00467"

    def __init__(
        self,
        smoothing: float = 0.1,
        convention: Convention = "others",
        attack_label: Literal["hard", "smoothed"] = "hard",
    ) -> None:
        if not 0 <= smoothing < 1:
            raise SettingError("label.smoothing", smoothing, "a number in [0, 1)")
        if convention not in ("others", "uniform"):
            raise SettingError("label.convention", repr(convention), "others or uniform")
        if attack_label not in ("hard", "smoothed"):
            raise SettingError("label.attack_label", repr(attack_label), "hard or smoothed")
        self.smoothing, self.convention, self.attack_label = smoothing, convention, attack_label

    def attack_target(self, batch: Batch, phase: str) -> Tensor:
        if self.attack_label == "hard":
            return batch.label
        return smooth(self.one_hot(batch.label), self.smoothing, self.convention)

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        return smooth(self.one_hot(batch.label), self.smoothing, self.convention)
