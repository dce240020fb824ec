"""Evaluation: clean and robust accuracy that a reviewer can check, sample by sample."""

from softdefend.evaluation.evaluate import AttackRecord, Evaluation, Evaluator, Rate
from softdefend.evaluation.run import EvaluateSettings, evaluate_checkpoint, load_weights

__all__ = [
    "AttackRecord",
    "EvaluateSettings",
    "Evaluation",
    "Evaluator",
    "Rate",
    "evaluate_checkpoint",
    "load_weights",
]
