"""Training: the loop, the step, checkpoints and the run folder."""

from softdefend.execution.engine import Engine, RuntimeSettings
from softdefend.training.schedules import Schedule
from softdefend.training.step import OptimSettings, Recipe
from softdefend.training.trainer import SaveSettings, Trainer, ValidateSettings

__all__ = [
    "Engine",
    "OptimSettings",
    "Recipe",
    "RuntimeSettings",
    "SaveSettings",
    "Schedule",
    "Trainer",
    "ValidateSettings",
]
