"""Evaluation: clean and robust accuracy that a reviewer can check, sample by sample."""

from softdefend.core.weight_files import load_weights
from softdefend.evaluation.autoattack import Ensemble, expand
from softdefend.evaluation.evaluate import Evaluator
from softdefend.evaluation.records import AttackRecord, Evaluation, Rate, Trial
from softdefend.evaluation.run import EvaluateSettings, evaluate_checkpoint

__all__ = [
    "AttackRecord",
    "Ensemble",
    "EvaluateSettings",
    "Evaluation",
    "Evaluator",
    "Rate",
    "Trial",
    "evaluate_checkpoint",
    "expand",
    "load_weights",
]
