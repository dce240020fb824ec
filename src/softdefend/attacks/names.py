"""Attacks by the short names that tables show."""

from __future__ import annotations

import re

from softdefend.attacks.apgd import APGD, TargetedAPGD
from softdefend.attacks.base import Attack
from softdefend.attacks.fab import FAB
from softdefend.attacks.pgd import FGSM, PGD
from softdefend.attacks.square import Square
from softdefend.errors import SettingError

_NAME = re.compile(r"(?:fgsm|pgd-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)(?:-(?P<loss>ce|margin|kl))?")
_APGD = re.compile(r"apgd-(?P<loss>ce|dlr|t)(?:-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)?")
_COUNTED = re.compile(r"(?P<attack>square|fab-t)(?:-(?P<count>\d+))?")


def parse_attack(name: str) -> Attack:
    """The attack with its default settings: ``fgsm``, ``pgd-20``, ``pgd-50x10`` (ten restarts),
    ``pgd-20-margin``; ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``apgd-ce-100x5``; ``square``,
    ``square-1000`` (queries), ``fab-t``, ``fab-t-50`` (steps). Steps of PGD are a quarter of eps long.

    >>> parse_attack("pgd-50x10-margin").name
    'pgd-50x10-margin'

    Raises:
        SettingError: any other name.
    """
    if match := _APGD.fullmatch(name):
        counts = {"steps": int(match["steps"] or 100), "restarts": int(match["restarts"] or 1)}
        return TargetedAPGD(**counts) if match["loss"] == "t" else APGD(loss=match["loss"], **counts)  # type: ignore[arg-type]
    if match := _COUNTED.fullmatch(name):
        count = match["count"]
        if match["attack"] == "square":
            return Square(queries=int(count)) if count else Square()
        return FAB(steps=int(count)) if count else FAB()
    match = _NAME.fullmatch(name)
    if match is None:
        raise SettingError(
            "attacks",
            repr(name),
            "fgsm, pgd-STEPS or pgd-STEPSxRESTARTS, with -margin or -kl behind, apgd-ce, apgd-dlr, "
            "apgd-t, fab-t or square",
        )
    loss = match["loss"] or "ce"
    if match["steps"] is None:
        return FGSM(loss=loss)  # type: ignore[arg-type]
    return PGD(steps=int(match["steps"]), restarts=int(match["restarts"] or 1), loss=loss)  # type: ignore[arg-type]
