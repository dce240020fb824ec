"""What a checkpoint holds: everything that the next step depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rule import Rule
from softdefend.training.checkpoint import CheckpointError
from softdefend.training.config import Recipe


class RunState:
    """Where a run stands, and the tensors that training changes.

    Args:
        net: the network that is trained.
        optimizer: its optimizer.
        recipe: whose rules have states of their own.
        meters: sums of the epoch so far.
        identity: what a checkpoint must share with the run that continues from it.
        place: the run folder, for messages.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.SGD,
        recipe: Recipe,
        meters: Tensor,
        *,
        identity: dict[str, Any],
        place: Path,
    ) -> None:
        self.net, self.optimizer, self.recipe, self.meters = net, optimizer, recipe, meters
        self.identity, self.place = identity, place
        self.epoch = 0
        """Epochs finished."""
        self.done = 0
        """Steps finished in the current epoch."""
        self.best: dict[str, Any] = {}
        """Epoch and ``val_robust`` of the best checkpoint so far; empty before the first."""
        self.first_loss: float | None = None
        """Loss of the first step."""
        self.metrics_bytes = 0
        """Size of ``metrics.jsonl``: what stands beyond it was written after the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Live tensors and plain values."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            **self.identity,
            "net": self.net.state_dict(),
            "momentum": self._momentum(),
            "weight": self.recipe.weight.state_dict(),
            "label": self.recipe.label.state_dict(),
            "objective": self.recipe.objective.state_dict(),
            "meters": self.meters,
            "best": json.dumps(self.best),
            "first_loss": self.first_loss,
            "metrics_bytes": self.metrics_bytes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, in place.

        Raises:
            CheckpointError: it is of other data, another seed, network or recipe.
        """
        if any(state.get(name) != value for name, value in self.identity.items()):
            raise CheckpointError(
                str(self.place),
                "a checkpoint of other data or another seed",
                "the data and seed it began with",
            )
        try:
            self.net.load_state_dict(state["net"])
            with torch.no_grad():
                for momentum, value in zip(self._momentum(), state["momentum"], strict=True):
                    momentum.copy_(value)
                self.meters.copy_(state["meters"])
            parts = [state[name] for name in ("label", "objective", "weight")]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                str(self.place),
                "a checkpoint of another network or recipe",
                "the settings it was written with",
            ) from error
        for rule, values in zip(self.recipe.rules, parts, strict=True):
            self._load_rule(rule, values)
        self.epoch, self.done, self.metrics_bytes = state["epoch"], state["done"], state["metrics_bytes"]
        self.best, self.first_loss = json.loads(state["best"]), state.get("first_loss")

    def _momentum(self) -> list[Tensor]:
        group = self.optimizer.param_groups[0]
        if not group["momentum"]:
            return []
        return [self.optimizer.state[parameter]["momentum_buffer"] for parameter in group["params"]]

    def _load_rule(self, rule: Rule, values: dict[str, Any]) -> None:
        try:
            rule.load_state_dict(values)
        except SettingError:
            raise
        except Exception as error:  # a rule of the user's own fails in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise CheckpointError(
                str(self.place),
                f"a checkpoint whose state {type(rule).__name__} does not take ({reason})",
                "the settings it was written with, and a load_state_dict that takes what state_dict gave",
            ) from error
