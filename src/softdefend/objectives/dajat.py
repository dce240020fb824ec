"""DAJAT: joint adversarial training on plain and augmented views (Addepalli et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.attacks import Forward
from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.execution.second_norms import SecondNorms
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.base import OBJECTIVES
from softdefend.objectives.trades import TRADES

if TYPE_CHECKING:
    from softdefend.data import Batch


def disagreement(logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the predictions of each sample's views, [b], in [0, log v]: the mean over
    views of KL(p_v || m), m being the views' mean prediction.

    Args:
        logits: [v, b, k].
    """
    log_p = F.log_softmax(logits, dim=-1)
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(logits))
    return (log_p.exp() * (log_p - log_mean)).sum(dim=-1).mean(dim=0)


@OBJECTIVES.register("DAJAT")
class DAJAT(TRADES):
    """TRADES on several views of each image, the mean over them, and the disagreement of their clean
    predictions: mean_v [CE(f(x_v), target) + beta KL(p(x_v) || p(x'_v))] + weight JSD(p(x_1), ..., p(x_v)).

    The views after the first have batch normalization of their own, weights and statistics, in attack and
    update; it is trained with the network and not part of it. Each view is a forward by itself.
    ``augment.plain_first`` makes the first view a plain one. 81 forward units with PGD-10 and three views.

    Args:
        beta: weight of TRADES's divergence, >= 0; the code's 11 for ResNet-18 on CIFAR-10.
        weight: of the disagreement, >= 0.
        augmented: views after the first, >= 1.
        separate_bn: whether these have batch normalization of their own.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Addepalli et al., NeurIPS 2022, arXiv 2210.15318"
    joins_views = False

    def __init__(
        self, beta: float = 11.0, weight: float = 2.0, augmented: int = 2, separate_bn: bool = True
    ) -> None:
        super().__init__(beta)
        if not (weight >= 0 and math.isfinite(weight)):
            raise SettingError("objective.weight", weight, "a number >= 0")
        if not 1 <= augmented <= 16:
            raise SettingError("objective.augmented", augmented, "1 to 16 views")
        self.weight, self.augmented, self.separate_bn = weight, augmented, separate_bn
        self.views = 1 + augmented
        self._norms: SecondNorms | None = None

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        if self.separate_bn and run.net is not None:
            self._norms = SecondNorms(run.net)

    @property
    def layers(self) -> nn.Module | None:
        return self._norms

    def view_forward(self, net: Forward) -> Forward:
        if self._norms is None:
            return net

        def forward(image: Tensor) -> Tensor:
            return torch.cat([self._look(net, part, view) for view, part in enumerate(self._parts(image))])

        return forward

    def _parts(self, image: Tensor) -> tuple[Tensor, ...]:
        """The views of a batch, [b, ...] each."""
        return image.chunk(self.views)

    def _look(self, net: Forward, image: Tensor, view: int) -> Tensor:
        """Logits [b, k] of one view."""
        if view == 0 or self._norms is None:
            return net(image)
        with self._norms.active():
            return net(image)

    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        clean: list[Tensor] = []
        attacked: list[Tensor] = []
        for view, parts in enumerate(zip(self._parts(image), self._parts(adversarial), strict=True)):
            for found, part in zip((clean, attacked), parts, strict=True):
                found.append(self._look(net, part, view))
        return Predictions(torch.cat(attacked), torch.cat(clean))

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        base = super().outer_loss(predictions, batch, supervision.repeat(self.views))
        assert predictions.clean is not None
        views = torch.stack(predictions.clean.float().chunk(self.views))
        return base + self.weight * disagreement(views).mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._norms is None else self._norms.tensors()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.state_dict().items():
                value.copy_(state[name])
