"""Transfer attacks (Papernot et al., arXiv 1605.07277): images made on one network, shown to another."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from softdefend.attacks.base import Attack, larger
from softdefend.attacks.losses import hard_label, margin
from softdefend.attacks.names import ATTACKS
from softdefend.attacks.transferable import diverse, smooth_gradient
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
        fused: attack the mean of all surrogates' logits instead of one after the other (Dong et al., arXiv
            1710.06081, equation 11).
        diversity: probability that a surrogate sees the image shrunk by up to a tenth and padded with black
            at a random place, in [0, 1] (Xie et al., arXiv 1803.06978).
        smoothing: side of the Gaussian window that the surrogates' gradients are smoothed with, odd, >= 1; 1
            leaves them as they are (Dong et al., arXiv 1904.02884).

    Raises:
        SettingError: no surrogate, or something that is no network.
    """

    surrogate: nn.Module | tuple[nn.Module, ...]
    """One network or several."""
    attack: Attack
    """What is run on each of them."""
    source: str = ""
    """What the surrogates are called, for the name."""
    fused: bool = False
    """Attack the mean of the surrogates' logits."""
    diversity: float = 0.0
    """Probability that a surrogate sees a shrunken image, in [0, 1]."""
    smoothing: int = 1
    """Side of the window that smooths the surrogates' gradients, odd, >= 1."""
    suffix: ClassVar[str | None] = None
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        nets = self.surrogates
        if not nets or not all(isinstance(net, nn.Module) for net in nets):
            given = ", ".join(type(net).__name__ for net in nets) or "none"
            raise SettingError("attack.surrogate", given, "an nn.Module or a tuple of them")
        if not 0 <= self.diversity <= 1:
            raise SettingError("attack.diversity", self.diversity, "a probability in [0, 1]")
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise SettingError("attack.smoothing", self.smoothing, "an odd number of pixels >= 1")

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
        parties = [self.surrogates] if self.fused else [(one,) for one in self.surrogates]
        for party in parties:
            with ExitStack() as stack:
                for surrogate in party:
                    stack.enter_context(frozen(surrogate, "eval"))
                x_adv = self.attack(
                    self._seen_by(party, logits.shape[1], context.generator),
                    image,
                    label,
                    threat,
                    mask=None if net.mask is None else net.mask.free,
                    loss=context.loss,
                    generator=context.generator,
                )
            with torch.no_grad():
                reached = worse(net(x_adv))
            best, value = larger(x_adv, reached, best, value)
        return best

    def _seen_by(
        self, surrogates: tuple[nn.Module, ...], k: int, generator: torch.Generator | None
    ) -> Forward:
        """The mean logits of surrogates, and what their gradients are to be."""
        nets = [_same_classes(net, k) for net in surrogates]

        def forward(image: Tensor) -> Tensor:
            if self.smoothing > 1:
                image = smooth_gradient(image, self.smoothing)
            seen = [diverse(image, self.diversity, generator) if self.diversity else image for _ in nets]
            logits = [net(one) for net, one in zip(nets, seen, strict=True)]
            return logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)

        return forward


def _same_classes(net: nn.Module, k: int) -> Forward:
    def forward(image: Tensor) -> Tensor:
        logits: Tensor = net(image)
        if logits.shape[1] != k:
            given = f"a network with {logits.shape[1]} classes"
            raise SettingError("attack.surrogate", given, f"the {k} classes of the attacked network")
        return logits

    return forward
