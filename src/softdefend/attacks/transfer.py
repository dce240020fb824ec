"""Transfer attacks (Papernot et al., arXiv 1605.07277): images made on one network, shown to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softdefend.attacks.base import Attack, Forward, larger
from softdefend.attacks.losses import AttackLoss, hard_label, margin
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.execution.network_mode import frozen


@dataclass(frozen=True)
class Transfer(Attack):
    """An attack on other networks, judged on the network it is called with.

    That network is asked for logits only, never for gradients: a robust accuracy that is lower under a
    transfer attack than under the same attack on the network itself speaks for masked gradients (Athalye et
    al., arXiv 1802.00420). Prefer an inner attack that goes on after the surrogate is fooled, such as
    ``PGD(steps=20, loss="margin")``: what barely fools one network seldom fools another, and an image that a
    surrogate gets wrong from the start is not changed by attacks that stop at the first wrong point.

    Args:
        surrogate: a network, or several, from images [b, c, h, w] in [0, 1] to logits [b, k] with the
            classes of the attacked one. Each is attacked in evaluation mode with frozen parameters and put
            back after.
        attack: what is run on each of them.
        source: what the surrogates are called, for the name; two transfers with the same inner attack need
            different names in one evaluation.

    Raises:
        SettingError: no surrogate, or something that is no network.
    """

    surrogate: nn.Module | tuple[nn.Module, ...]
    """One network or several."""
    attack: Attack
    """What is run on each of them."""
    source: str = ""
    """What the surrogates are called, for the name."""

    def __post_init__(self) -> None:
        nets = self._surrogates()
        if not nets or not all(isinstance(net, nn.Module) for net in nets):
            given = ", ".join(type(net).__name__ for net in nets) or "none"
            raise SettingError("attack.surrogate", given, "an nn.Module or a tuple of them")

    def _surrogates(self) -> tuple[nn.Module, ...]:
        return self.surrogate if isinstance(self.surrogate, tuple) else (self.surrogate,)

    @property
    def name(self) -> str:
        """``transfer-pgd-20``, or ``transfer-pgd-20-resnet18`` with a source."""
        return f"transfer-{self.attack.name}" + (f"-{self.source}" if self.source else "")

    def check(self, threat: ThreatModel) -> None:
        """See :meth:`Attack.check`: whatever the inner attack takes."""
        self.attack.check(threat)

    def __call__(
        self,
        forward: Forward,
        image: Tensor,
        target: Tensor,
        threat: ThreatModel,
        *,
        loss: AttackLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See :meth:`Attack.__call__`; ``loss`` and ``generator`` go to the inner attack. Cost: the inner
        attack on each surrogate, one forward of the attacked network and one more for each surrogate.

        Of the images made on several surrogates, each sample gets the one of largest margin on the attacked
        network.

        Raises:
            SettingError: a surrogate with another number of classes; what the inner attack refuses.
        """
        label = hard_label(target)
        with torch.no_grad():
            logits = forward(image)
        best, worst = image, torch.full_like(margin(logits, label), -torch.inf)
        for net in self._surrogates():
            with frozen(net, "eval"):
                made = self.attack(
                    _same_classes(net, logits.shape[1]), image, target, threat, loss=loss, generator=generator
                )
            with torch.no_grad():
                reached = margin(forward(made), label)
            best, worst = larger(made, reached, best, worst)
        return best


def _same_classes(net: nn.Module, k: int) -> Forward:
    def forward(image: Tensor) -> Tensor:
        logits: Tensor = net(image)
        if logits.shape[1] != k:
            given = f"a network with {logits.shape[1]} classes"
            raise SettingError("attack.surrogate", given, f"the {k} classes of the attacked network")
        return logits if logits.dtype == torch.float64 else logits.float()

    return forward
