"""What is measured after an epoch."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from softdefend.attacks import FGSM
from softdefend.data import DataBundle, Resident, describe_subset, subset
from softdefend.evaluation.autoattack import Ensemble
from softdefend.evaluation.evaluate import Evaluator
from softdefend.evaluation.settings import Size, count_of
from softdefend.execution.engine import Engine
from softdefend.training.alarm import trains_on_one_step
from softdefend.training.config import TrainConfig

_log = logging.getLogger(__name__)


class Validator:
    """Measures clean and robust accuracy on validation and, for the learning curve only, on test images.

    Args:
        bundle: gives both splits.
        config: of the run.
        engine: of the run.
    """

    def __init__(self, bundle: DataBundle, config: TrainConfig, engine: Engine) -> None:
        self.config, self.settings, self.processes = config, config.validate, engine.processes
        order = bool(engine.settings.channels_last)
        self.validation_data = Resident(bundle.validation, engine.device, channels_last=order)
        self.test_data = Resident(bundle.test, engine.device, channels_last=order)
        self.parts = {
            "val": self._part("size", bundle.validation.labels, self.settings.size),
            "test": self._part("test_size", bundle.test.labels, self.settings.test_size),
        }
        self.watched = self.settings.alarm != "off" and trains_on_one_step(config.recipe)
        """Whether validation images are attacked with FGSM too, for the alarm."""
        self._evaluators: dict[str, tuple[nn.Module, Evaluator]] = {}

    def measure(self, net: nn.Module, epoch: int) -> dict[str, float | None]:
        """Accuracies in [0, 1] of the network that predicts, by name; None for what is not measured.

        Args:
            net: the network.
            epoch: how many are finished. Only every ``validate.every``-th is measured, and the last.
        """
        figures: dict[str, float | None] = dict.fromkeys(
            ("val_clean", "val_robust", "test_clean", "test_robust") + ("val_fgsm",) * self.watched
        )
        if epoch % self.settings.every and epoch < self.config.optim.epochs:
            return figures
        for name, data in (("val", self.validation_data), ("test", self.test_data)):
            if len(self.parts[name]):
                also = [FGSM()] if self.watched and name == "val" else []
                # As ensembles of one: an image that is wrong as it is counts as lost and is not attacked.
                attacks = [Ensemble(attack.name, (attack,)) for attack in (self.settings.attack, *also)]
                result = self._evaluator(name, net, data)(attacks, index=self.parts[name])
                figures[f"{name}_clean"] = result.clean.rate
                figures[f"{name}_robust"] = result.robust(self.settings.attack.name).rate
                if also:
                    figures["val_fgsm"] = result.robust("fgsm").rate
        return figures

    def _part(self, setting: str, labels: Tensor, size: Size | None) -> Tensor:
        """Positions of the images that are measured, with a line where they may not have all classes."""
        how, classes = self.settings.subset, len(set(labels.tolist()))
        part = subset(labels, count_of(size, len(labels)), how)
        if 0 < len(part) < len(labels) and (how == "first" or len(part) < classes):
            _log.info(f"validate.{setting}: {describe_subset(labels, part, how)}")
        return part

    def _evaluator(self, name: str, net: nn.Module, data: Resident) -> Evaluator:
        """The evaluator of a split, made anew only where another network predicts than before."""
        known = self._evaluators.get(name)
        if known is None or known[0] is not net:
            known = self._evaluators[name] = (
                net,
                Evaluator(
                    net,
                    data,
                    self.config.recipe.threat,
                    batch_size=self.settings.batch_size,
                    seed=self.config.seed,
                    precision=self.settings.precision,
                    processes=self.processes,
                ),
            )
        return known[1]
