"""Training: the loop, the step, checkpoints and the run folder."""

from softdefend.execution.engine import Engine, RuntimeSettings
from softdefend.training.config import Recipe, TrainConfig
from softdefend.training.optim import OptimSettings
from softdefend.training.schedules import Schedule
from softdefend.training.settings import SaveSettings, ValidateSettings
from softdefend.training.trainer import Trainer

__all__ = [
    "Engine",
    "OptimSettings",
    "Recipe",
    "RuntimeSettings",
    "SaveSettings",
    "Schedule",
    "TrainConfig",
    "Trainer",
    "ValidateSettings",
]
