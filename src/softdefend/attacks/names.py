"""Attacks by the short names that tables show: a registry that each attack's file adds itself to.

A name begins with the one an attack is registered under; what follows behind a hyphen, such as counts, is
understood by the attack's own :meth:`~softdefend.attacks.base.Attack.from_name`. Packages of others add
theirs by entry points of the group ``softdefend.attacks``, see :class:`~softdefend.core.registry.Registry`.
"""

from __future__ import annotations

from softdefend.attacks.base import Attack
from softdefend.core.errors import SettingError
from softdefend.core.registry import Registry

ATTACKS: Registry[type[Attack]] = Registry("attacks")
COUNTS = r"(?:-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)?"
"""A pattern for what may follow most names: ``-100`` steps, ``-100x5`` restarts."""
LOSS = r"(?:-(?P<loss>ce|margin|kl|match|[^\W\d][\w.]*:[^\W\d]\w*))?"
"""A pattern for a loss in a name: ``-margin``, or ``-package.module:function``."""
EOT = r"(?:-eot(?P<eot>\d+))?"
"""A pattern for ``-eot20``: gradients of twenty forwards averaged."""


def parse_attack(name: str) -> Attack:
    """The attack with its default settings, but for what the name says.

    ``fgsm``, ``pgd-20``, ``pgd-50x10`` (ten restarts), ``pgd-20-margin``, ``pgd-20-my.module:loss``,
    ``pgd-20-eot10`` (ten forwards a step); ``apgd-ce``, ``apgd-dlr``,
    ``apgd-t``, ``apgd-ce-100x5``, ``apgd-ce-eot20``; ``fab-t``, ``fab-t-50``, ``fab-100x5`` (untargeted);
    ``square``, ``square-1000`` (queries); ``cw-linf``, ``cw-linf-100``; ``cw-l2``, ``cw-l2-9x10000``
    (rounds, and steps in each); ``fmn``, ``fmn-200``, ``deepfool``, ``deepfool-100``, ``sigma-zero``,
    ``sigma-zero-100`` (steps). Steps of PGD are a quarter of eps long.

    >>> parse_attack("pgd-50x10-margin").name
    'pgd-50x10-margin'

    Raises:
        SettingError: any other name; a name that begins with ``transfer-``, because a transfer attack needs
            a second network.
    """
    registered = [known for known in ATTACKS.names() if name == known or name.startswith(f"{known}-")]
    if registered:
        # The longest one: fab-t-50 is fab-t with 50 steps.
        attack = ATTACKS[max(registered, key=len)].from_name(name)
        if attack is not None:
            return attack
    raise SettingError("attacks", repr(name), accepted_names())


def accepted_names() -> str:
    """Every name that is understood, for messages."""
    suffixes = {name: _suffix(name) for name in ATTACKS.names()}
    names = ", ".join(f"{name}{suffix}" for name, suffix in suffixes.items() if suffix is not None)
    return f"fgsm, pgd-20, pgd-50x10-margin or the like: {names}"


def _suffix(name: str) -> str | None:
    try:
        return ATTACKS[name].suffix
    except SettingError:  # a package of somebody else that cannot be imported
        return ""


def count_suffix(steps: int, restarts: int, default: int) -> str:
    """What :data:`COUNTS` reads: nothing for the default steps and one restart.

    >>> [count_suffix(100, 1, 100), count_suffix(50, 1, 100), count_suffix(100, 5, 100)]
    ['', '-50', '-100x5']
    """
    if restarts > 1:
        return f"-{steps}x{restarts}"
    return "" if steps == default else f"-{steps}"
