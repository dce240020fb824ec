"""What is measured after an epoch."""

from __future__ import annotations

from torch import nn

from softdefend.attacks import FGSM
from softdefend.data import DataBundle, Resident
from softdefend.evaluation.autoattack import Ensemble
from softdefend.evaluation.evaluate import Evaluator
from softdefend.execution.engine import Engine
from softdefend.training.alarm import trains_on_one_step
from softdefend.training.config import TrainConfig


class Validator:
    """Measures clean and robust accuracy on validation and, for the learning curve only, on test images.

    Args:
        bundle: gives both splits.
        config: of the run.
        engine: of the run.
    """

    def __init__(self, bundle: DataBundle, config: TrainConfig, engine: Engine) -> None:
        self.config, self.settings = config, config.validate
        order = bool(engine.settings.channels_last)
        self.validation_data = Resident(bundle.validation, engine.device, channels_last=order)
        self.test_data = Resident(bundle.test, engine.device, channels_last=order)
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
        for name, data, size in (
            ("val", self.validation_data, self.settings.size),
            ("test", self.test_data, self.settings.test_size),
        ):
            if size != 0:
                also = [FGSM()] if self.watched and name == "val" else []
                # As ensembles of one: an image that is wrong as it is counts as lost and is not attacked.
                attacks = [Ensemble(attack.name, (attack,)) for attack in (self.settings.attack, *also)]
                result = self._evaluator(name, net, data)(attacks, limit=size)
                figures[f"{name}_clean"] = result.clean.rate
                figures[f"{name}_robust"] = result.robust(self.settings.attack.name).rate
                if also:
                    figures["val_fgsm"] = result.robust("fgsm").rate
        return figures

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
                ),
            )
        return known[1]
