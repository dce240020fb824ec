"""The alarm for catastrophic overfitting: training on one gradient step may end in a network that withstands
exactly that step, and nothing else (Wong et al., arXiv 2001.03994)."""

from __future__ import annotations

from softdefend.training.config import Recipe

GAP = 0.2
"""FGSM must leave at least this much more accuracy than the validation attack; Wong et al. stop a run whose
PGD accuracy falls by as much."""
SHARE = 0.25
"""The validation attack must leave less than this share of what FGSM leaves."""


def trains_on_one_step(recipe: Recipe) -> bool:
    """Whether the training attack takes a single gradient step, whatever objective it belongs to."""
    return 0 < recipe.objective.attack_units(recipe.attack.steps) <= 2


def collapsed(fgsm: float, robust: float) -> bool:
    """Whether the network withstands one step and not several, on the same images.

    Both thresholds must be crossed: the gap alone would alarm at large eps, where FGSM is far weaker than
    PGD on sound networks too; the share alone at accuracies near zero, where it is a matter of a few images.
    The two figures are of one moment, so an alarm needs no history: not when it collapses in the first
    epoch, not after a resume.

    Args:
        fgsm: accuracy in [0, 1] under FGSM.
        robust: accuracy in [0, 1] under an attack of several steps, such as PGD-10.
    """
    return fgsm - robust >= GAP and robust < SHARE * fgsm


def describe(epoch: int, fgsm: float, robust: float, attack: str) -> str:
    """One line for people."""
    return (
        f"catastrophic overfitting in epoch {epoch}: validation accuracy is {100 * fgsm:.1f}% under FGSM "
        f"and {100 * robust:.1f}% under {attack}; a smaller eps, NFGSM with more noise or more attack steps "
        "may help"
    )
