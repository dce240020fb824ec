"""AutoAttack (Croce & Hein, arXiv 2003.01690): fixed ensembles of attacks without settings to tune.

Members, order, steps, restarts and targets are those of the authors' code (github.com/fra31/auto-attack at
a392200, ``set_version``). Each member sees only the images that all before it left right. In l1 the authors'
code has the standard ensemble alone, with more restarts and fewer targets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from softdefend.attacks import APGD, FAB, Attack, Square, TargetedAPGD
from softdefend.attacks.names import ATTACKS, parse_attack
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.registry import Registry
from softdefend.core.threat import Norm, ThreatModel

ENSEMBLES: Registry[tuple[Attack, ...]] = Registry("ensembles")
"""Members in order by the ensemble's name; packages of others add theirs by entry points of the group
``softdefend.ensembles``. Those here are ``standard``, ``plus`` and ``rand`` of the authors' code."""
ENSEMBLES.register("autoattack")((APGD(), TargetedAPGD(), FAB(), Square()))
ENSEMBLES.register("autoattack-plus")(
    (
        APGD(restarts=5),
        APGD(restarts=5, loss="dlr"),
        FAB(restarts=5, targeted=False),
        Square(),
        TargetedAPGD(),
        FAB(),
    )
)
ENSEMBLES.register("autoattack-rand")((APGD(eot=20), APGD(loss="dlr", eot=20)))

IN_L1: dict[str, tuple[Attack, ...]] = {
    "autoattack": (APGD(restarts=5), TargetedAPGD(targets=5), FAB(), Square()),
    "autoattack-plus": (),
    "autoattack-rand": (),
}
"""What stands for an ensemble in l1; nothing where the authors' code has no such version. Those that are not
here have the same members in every norm."""


@dataclass(frozen=True)
class Ensemble:
    """Attacks that run one after the other, each on the images that are still classified right.

    Args:
        name: for tables and files.
        members: attacks of different names, at least one.
        in_l1: the members in l1, none where the ensemble is not made for it; ``members`` when None.

    Raises:
        SettingError: no members, or two of one name.
    """

    name: str
    members: tuple[Attack, ...]
    in_l1: tuple[Attack, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names or len(set(names)) < len(names):
            raise SettingError(
                f"members of {self.name}", ", ".join(names) or "none", "attacks of different names"
            )

    def check(self, threat: ThreatModel) -> None:
        """Refuse a threat model that a member is not made for; see :meth:`Attack.check`."""
        members = self.under(threat.norm)
        if not members:
            raise SettingError("threat.norm", threat.norm, f"linf or l2 under {self.name}; l1 has autoattack")
        for member in members:
            member.check(threat)

    def check_target(self) -> None:
        """Refuse classes to be reached where a member has no targeted form; see
        :meth:`Attack.check_target`."""
        for member in self.members:
            member.check_target()

    def under(self, norm: Norm) -> tuple[Attack, ...]:
        """The members in a norm."""
        return self.members if norm != "l1" or self.in_l1 is None else self.in_l1


def averages_draws(names: Sequence[str]) -> bool:
    """Whether an attack of these names averages over what a network draws: it may then be a random one."""
    draws = (re.search(r"-eot(\d+)", name) for name in names)
    return "autoattack-rand" in names or any(found and int(found[1]) > 1 for found in draws)


def expand(name: str, k: int) -> list[Attack]:
    """The members of an ensemble against a network with k classes, in order.

    Targeted members try the 9 likeliest wrong classes; with fewer than 10 classes there are k - 1 of them.
    Where the difference-of-logits ratio lacks a logit it needs (below 3 classes, targeted below 4) it is the
    bare difference, so every member runs with any k >= 2; the authors' code stops with an error there.

    Raises:
        SettingError: unknown name, or fewer than two classes.
    """
    if name not in ENSEMBLES:
        raise SettingError("attacks", repr(name), ", ".join(ENSEMBLES.names()))
    if k < 2:
        raise SettingError(
            "attacks", f"{name} on a network with {k} class", "a network with at least 2 classes"
        )
    return list(_for_classes(ENSEMBLES[name], k))


def _for_classes(members: Sequence[Attack], k: int) -> tuple[Attack, ...]:
    return tuple(
        replace(member, targets=min(member.targets, k - 1))
        if isinstance(member, TargetedAPGD | FAB)
        else member
        for member in members
    )


def parse(name: str, k: int = 10) -> Attack | Ensemble:
    """A single attack, or an ensemble against k classes, by its name.

    Raises:
        SettingError: unknown name; fewer than two classes.
    """
    if name in ENSEMBLES:
        members, in_l1 = tuple(expand(name, k)), IN_L1.get(name)
        return Ensemble(name, members, None if in_l1 is None else _for_classes(in_l1, k))
    try:
        return parse_attack(name)
    except SettingError as error:
        if error.setting != "attacks":  # the name is understood, a number in it is not accepted
            raise
        names = ENSEMBLES.names()
        hint = did_you_mean(re.sub(r"-\d.*", "", name), [*ATTACKS.names(), *names])
        accepted = f"{error.accepted}; or {', '.join(names)}{hint}"
        raise SettingError(error.setting, error.given, accepted) from error


def check_list(attacks: Sequence[Attack | Ensemble], threat: ThreatModel, *, targeted: bool) -> None:
    """Refuse attacks that one evaluation cannot make.

    Raises:
        SettingError: two share a name, or one is not made for the threat, or has no targeted form where that
            is asked for.
    """
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise SettingError("evaluate.attacks", ", ".join(names), "attacks with different names")
    for attack in attacks:
        attack.check(threat)
        if targeted:
            attack.check_target()
