"""Trackers: where a run's curves and results go beside its folder."""

from __future__ import annotations

from softdefend.training.trackers.base import TRACKERS, Outcome, TrackedRun, Tracker
from softdefend.training.trackers.csv_files import CSVFiles
from softdefend.training.trackers.mlflow import MLflow
from softdefend.training.trackers.session import Trackers
from softdefend.training.trackers.tensorboard import TensorBoard
from softdefend.training.trackers.wandb import WeightsAndBiases

__all__ = [
    "TRACKERS",
    "CSVFiles",
    "MLflow",
    "Outcome",
    "TensorBoard",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "WeightsAndBiases",
]
