"""Which recipes can be computed in parts of a batch."""

from __future__ import annotations

from softdefend.core.errors import SettingError
from softdefend.labels import SAT
from softdefend.objectives import MultiNorm
from softdefend.training.config import Recipe
from softdefend.training.optim import OptimSettings


def check_division(recipe: Recipe, optim: OptimSettings, *, mixes: bool) -> None:
    """Refuse to divide batches where something is done for a batch as a whole.

    Args:
        recipe: what is trained.
        optim: says in how many parts.
        mixes: whether images of a batch are mixed.

    Raises:
        SettingError: saying what would be another.
    """
    label, objective, weight = recipe.rules
    reasons = {
        type(weight).__name__: weight.passes > 1 and "its perturbation is that of a whole batch",
        type(label).__name__: isinstance(label, SAT)
        and label.weighted
        and "its sample weights have mean one in a whole batch (label.weighted false has none)",
        "MultiNorm": isinstance(objective, MultiNorm)
        and objective.how == "mixed"
        and "each image of a whole batch has its own norm in turn (other values of objective.how have none)",
        "CutMix": mixes and "images are mixed within a whole batch",
    }
    for name, reason in reasons.items() if optim.accumulate > 1 else ():
        if reason:
            raise SettingError("optim.accumulate", f"{optim.accumulate} with {name}", f"1: {reason}")
