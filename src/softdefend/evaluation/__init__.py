"""Evaluation: clean and robust accuracy that a reviewer can check, sample by sample."""

from softdefend.core.weight_files import load_weights
from softdefend.evaluation.autoattack import Ensemble, expand
from softdefend.evaluation.checkpoint import CheckpointSource
from softdefend.evaluation.evaluate import Evaluator
from softdefend.evaluation.pipeline import evaluate_checkpoint
from softdefend.evaluation.records import AttackRecord, Evaluation, Rate, Trial, robust_in_all
from softdefend.evaluation.settings import EvaluateSettings, Requests
from softdefend.evaluation.smoothing import Certificates, Smoothed, Smoothing

__all__ = [
    "AttackRecord",
    "Certificates",
    "CheckpointSource",
    "Ensemble",
    "EvaluateSettings",
    "Evaluation",
    "Evaluator",
    "Rate",
    "Requests",
    "Smoothed",
    "Smoothing",
    "Trial",
    "evaluate_checkpoint",
    "expand",
    "load_weights",
    "robust_in_all",
]
