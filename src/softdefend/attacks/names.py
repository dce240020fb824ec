"""Attacks by the short names that tables show."""

from __future__ import annotations

import re

from softdefend.attacks.apgd import APGD, TargetedAPGD
from softdefend.attacks.base import Attack
from softdefend.attacks.cw import CWL2, CWLinf
from softdefend.attacks.deepfool import DeepFool
from softdefend.attacks.fab import FAB
from softdefend.attacks.fmn import FMN
from softdefend.attacks.pgd import FGSM, PGD
from softdefend.attacks.square import Square
from softdefend.core.errors import SettingError

_COUNTS = r"(?:-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)?"
_GRADIENT = re.compile(r"(?:fgsm|pgd-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)(?:-(?P<loss>ce|margin|kl))?")
_APGD = re.compile(rf"apgd-(?:(?P<loss>ce|dlr)|t){_COUNTS}(?:-eot(?P<eot>\d+))?")
_FAB = re.compile(rf"fab(?P<targeted>-t)?{_COUNTS}")
_CW_LINF = re.compile(rf"cw-linf{_COUNTS}")
_CW_L2 = re.compile(r"cw-l2(?:-(?P<rounds>\d+)x(?P<steps>\d+))?")
_COUNTED = re.compile(r"(?P<attack>square|fmn|deepfool)(?:-(?P<count>\d+))?")
_ACCEPTED = (
    "fgsm, pgd-STEPS or pgd-STEPSxRESTARTS, with -margin or -kl behind; apgd-ce, apgd-dlr, apgd-t, fab, "
    "fab-t, cw-linf, with -STEPS or -STEPSxRESTARTS behind; square-QUERIES, fmn-STEPS, deepfool-STEPS, "
    "cw-l2-ROUNDSxSTEPS, with or without the counts"
)


def parse_attack(name: str) -> Attack:
    """The attack with its default settings, but for what the name says.

    ``fgsm``, ``pgd-20``, ``pgd-50x10`` (ten restarts), ``pgd-20-margin``; ``apgd-ce``, ``apgd-dlr``,
    ``apgd-t``, ``apgd-ce-100x5``, ``apgd-ce-eot20``; ``fab-t``, ``fab-t-50``, ``fab-100x5`` (untargeted);
    ``square``, ``square-1000`` (queries); ``cw-linf``, ``cw-linf-100``; ``cw-l2``, ``cw-l2-9x10000``
    (rounds, and steps in each); ``fmn``, ``fmn-200``, ``deepfool``, ``deepfool-100`` (steps). Steps of PGD
    are a quarter of eps long.

    >>> parse_attack("pgd-50x10-margin").name
    'pgd-50x10-margin'

    Raises:
        SettingError: any other name; a name that begins with ``transfer-``, because a transfer attack needs
            a second network.
    """
    if match := _APGD.fullmatch(name):
        counts = _numbers(match, "steps", "restarts", "eot")
        if match["loss"]:
            return APGD(loss=match["loss"], **counts)  # type: ignore[arg-type]
        if "eot" not in counts:
            return TargetedAPGD(**counts)
    if match := _FAB.fullmatch(name):
        return FAB(targeted=match["targeted"] is not None, **_numbers(match, "steps", "restarts"))
    if match := _CW_LINF.fullmatch(name):
        return CWLinf(**_numbers(match, "steps", "restarts"))  # type: ignore[arg-type]
    if match := _CW_L2.fullmatch(name):
        return CWL2(**_numbers(match, "rounds", "steps"))
    if match := _COUNTED.fullmatch(name):
        counts = _numbers(match, "count")
        if match["attack"] == "square":
            return Square(*counts.values())
        return FMN(*counts.values()) if match["attack"] == "fmn" else DeepFool(*counts.values())
    if match := _GRADIENT.fullmatch(name):
        loss, counts = match["loss"] or "ce", _numbers(match, "steps", "restarts")
        return PGD(loss=loss, **counts) if counts else FGSM(loss=loss)  # type: ignore[arg-type]
    if name.startswith("transfer-"):
        accepted = "Transfer(other_net, attack) in Python: a transfer attack needs a second network"
        raise SettingError("attacks", repr(name), accepted)
    raise SettingError("attacks", repr(name), _ACCEPTED)


def _numbers(match: re.Match[str], *groups: str) -> dict[str, int]:
    """Those of the groups that matched."""
    return {group: int(match[group]) for group in groups if match[group] is not None}
