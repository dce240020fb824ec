"""Transfer attacks (Papernot et al., arXiv 1605.07277): images made on one network, shown to another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from softdefend.attacks.base import Attack, larger
from softdefend.attacks.losses import hard_label, margin
from softdefend.attacks.names import ATTACKS
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel, Forward
from softdefend.execution.network_mode import frozen


@ATTACKS.register("transfer")
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
    suffix: ClassVar[str | None] = None
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        nets = self.surrogates
        if not nets or not all(isinstance(net, nn.Module) for net in nets):
            given = ", ".join(type(net).__name__ for net in nets) or "none"
            raise SettingError("attack.surrogate", given, "an nn.Module or a tuple of them")

    @property
    def surrogates(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return self.surrogate if isinstance(self.surrogate, tuple) else (self.surrogate,)

    @property
    def name(self) -> str:
        """``transfer-pgd-20``, or ``transfer-pgd-20-resnet18`` with a source."""
        return f"transfer-{self.attack.name}" + (f"-{self.source}" if self.source else "")

    def check(self, threat: ThreatModel) -> None:
        """See :meth:`Attack.check`: whatever the inner attack takes."""
        self.attack.check(threat)

    def check_target(self) -> None:
        """See :meth:`Attack.check_target`: what the inner attack refuses."""
        self.attack.check_target()

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        """Never: a name cannot bring a network along.

        Raises:
            SettingError: always.
        """
        accepted = "Transfer(other_net, attack) in Python: a transfer attack needs a second network"
        raise SettingError("attacks", repr(name), accepted)

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`; the caller's loss and generator go to the inner attack. Cost: the inner
        attack on each surrogate, one forward of the attacked network and one more for each surrogate.

        Of the images made on several surrogates, each sample gets the one of largest margin on the attacked
        network, or of largest loss there where the caller brings one.

        Raises:
            SettingError: a surrogate with another number of classes; what the inner attack refuses.
        """
        true = hard_label(label)
        with torch.no_grad():
            logits = net(image)
        worse = context.loss or partial(margin, target=true)
        best, value = image, torch.full_like(worse(logits), -torch.inf)
        for surrogate in self.surrogates:
            with frozen(surrogate, "eval"):
                x_adv = self.attack(
                    _same_classes(surrogate, logits.shape[1]),
                    image,
                    label,
                    threat,
                    loss=context.loss,
                    generator=context.generator,
                )
            with torch.no_grad():
                reached = worse(net(x_adv))
            best, value = larger(x_adv, reached, best, value)
        return best


def _same_classes(net: nn.Module, k: int) -> Forward:
    def forward(image: Tensor) -> Tensor:
        logits: Tensor = net(image)
        if logits.shape[1] != k:
            given = f"a network with {logits.shape[1]} classes"
            raise SettingError("attack.surrogate", given, f"the {k} classes of the attacked network")
        return logits

    return forward
