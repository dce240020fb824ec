"""Checks of what a label rule returns: targets that are no distributions would train to nonsense."""

from __future__ import annotations

from typing import NoReturn

import torch

from softdefend.core.errors import SettingError
from softdefend.labels import LabelRule, Predictions, Supervision

_DRIFT = 0.05
"""How far the sum of a row may lie from one: a float16 memory whose momentum is 0.99 comes to 0.02."""


def check_form(rule: LabelRule, supervision: Supervision, size: int, k: int) -> None:
    """Check shapes and types. Reads nothing from the device, so it may be captured.

    Raises:
        SettingError: targets that are not [size, k], or not floating-point numbers.
    """
    terms = {f"a term {n} with a target": term.target for n, term in enumerate(supervision.terms)}
    for name, rows in {"a target": supervision.target, **terms}.items():
        if tuple(rows.shape) != (size, k) or not rows.is_floating_point():
            dtype = str(rows.dtype).removeprefix("torch.")
            _refuse(rule, f"{name} {list(rows.shape)} of {dtype}", size, k)
    weight = supervision.weight
    if weight is not None and tuple(weight.shape) != (size,):
        given = f"{type(rule).__name__}, which returned sample weights {list(weight.shape)}"
        raise SettingError("label", given, f"[b] = [{size}], mean one, or None")


@torch.no_grad()
def check_rows(rule: LabelRule, supervision: Supervision, seen: Predictions) -> None:
    """Check that every row is a distribution. Reads the device, so it must not be captured.

    Raises:
        SettingError: rows with a negative or an unbounded entry, or that do not sum to one.
    """
    logits = [seen.adversarial] if seen.clean is None else [seen.adversarial, seen.clean]
    if not all(bool(rows.isfinite().all()) for rows in logits):
        return  # The network has diverged, which the trainer finds out.
    for rows in (supervision.target, *(term.target for term in supervision.terms)):
        size, k = rows.shape
        if not rows.isfinite().all():
            _refuse(rule, "a target that is not finite", size, k)
        least, sums = float(rows.min()), rows.float().sum(dim=1)
        worst = float(sums[(sums - 1).abs().argmax()])
        if least < 0:
            _refuse(rule, f"a target with an entry of {least:.4g}", size, k)
        if abs(worst - 1) > _DRIFT:
            _refuse(rule, f"a target with a row that sums to {worst:.4g}", size, k)


def _refuse(rule: LabelRule, what: str, size: int, k: int) -> NoReturn:
    accepted = f"[b, k] = [{size}, {k}] of floating-point numbers >= 0, rows summing to one"
    raise SettingError("label", f"{type(rule).__name__}, which returned {what}", accepted)
