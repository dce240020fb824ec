"""Attacks by the short names that tables show."""

from __future__ import annotations

import re

from softdefend.attacks.base import Attack
from softdefend.attacks.pgd import FGSM, PGD
from softdefend.errors import SettingError

_NAME = re.compile(r"(?:fgsm|pgd-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)(?:-(?P<loss>ce|margin|kl))?")


def parse_attack(name: str) -> Attack:
    """The attack with its default settings: ``fgsm``, ``pgd-20``, ``pgd-50x10`` (ten restarts),
    ``pgd-20-margin``. Steps are a quarter of eps long.

    >>> parse_attack("pgd-50x10-margin").name
    'pgd-50x10-margin'

    Raises:
        SettingError: any other name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise SettingError(
            "attacks", repr(name), "fgsm, pgd-STEPS or pgd-STEPSxRESTARTS, with -margin or -kl behind"
        )
    loss = match["loss"] or "ce"
    if match["steps"] is None:
        return FGSM(loss=loss)  # type: ignore[arg-type]
    return PGD(steps=int(match["steps"]), restarts=int(match["restarts"] or 1), loss=loss)  # type: ignore[arg-type]
