"""What a checkpoint holds: everything that the next step depends on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError, one_line
from softdefend.core.hints import arguments_of, import_path
from softdefend.core.rule import Rule
from softdefend.training.checkpoint import CheckpointError
from softdefend.training.config import Recipe
from softdefend.training.optim import memory_name, state_tensors

KINDS = ("label", "objective", "weight")
"""The names of the rules' states, in the order of :attr:`Recipe.rules`."""


class RunState:
    """Where a run stands, and the tensors that training changes.

    Args:
        net: the network that is trained.
        optimizer: its optimizer.
        recipe: whose rules have states of their own.
        meters: sums of the epoch so far.
        identity: what a checkpoint must share with the run that continues from it: ``fingerprint`` of the
            data, ``seed``, and the digest of all ``settings``.
        place: the run folder, for messages.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
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
        self.metrics = ""
        """The rows of ``metrics.jsonl``: by them a checkpoint tells an altered file, and writes a lost end
        again."""

    def state_dict(self) -> dict[str, Any]:
        """Live tensors and plain values."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            **self.identity,
            "net": self.net.state_dict(),
            "optimizer": {"name": memory_name(self.optimizer), "tensors": state_tensors(self.optimizer)},
            "kinds": dict(zip(KINDS, map(_kind, self.recipe.rules), strict=True)),
            **{name: rule.state_dict() for name, rule in zip(KINDS, self.recipe.rules, strict=True)},
            "meters": self.meters,
            "best": json.dumps(self.best),
            "first_loss": self.first_loss,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, in place.

        Raises:
            CheckpointError: it is of another run, network or recipe.
        """
        self._check_identity(state)
        try:
            self.net.load_state_dict(state["net"])
            with torch.no_grad():
                for tensor, value in zip(
                    state_tensors(self.optimizer), state["optimizer"]["tensors"], strict=True
                ):
                    tensor.copy_(value)
                self.meters.copy_(state["meters"])
            parts = [state[name] for name in KINDS]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                str(self.place),
                "a checkpoint of another network or recipe",
                "the settings it was written with",
            ) from error
        for rule, values in zip(self.recipe.rules, parts, strict=True):
            self._load_rule(rule, values)
        self.epoch, self.done, self.metrics = state["epoch"], state["done"], state["metrics"]
        self.best, self.first_loss = json.loads(state["best"]), state.get("first_loss")

    def start_from(self, state: dict[str, Any]) -> str:
        """Take over what fits from another run's state; the network has its weights already.

        What an optimizer of the same kind remembers; the state of a rule of the same kind, which for labels
        and objectives may be of single images and is taken for the same data only; and the epochs finished.

        Returns:
            What was taken and what begins anew, in words.
        """
        found = {"network": True}
        if state_tensors(self.optimizer):
            found[memory_name(self.optimizer)] = self._takes_optimizer(state)
        same_data = state.get("fingerprint") == self.identity["fingerprint"]
        for name, rule in zip(KINDS, self.recipe.rules, strict=True):
            fits = state.get("kinds", {}).get(name) == _kind(rule) and (same_data or name == "weight")
            if rule.state_dict():
                found[f"state of {type(rule).__name__}"] = fits and self._takes(rule, state[name])
        self.epoch = state["epoch"]
        taken, anew = (", ".join(name for name in found if found[name] is fate) for fate in (True, False))
        return f"taken: {taken}; anew: {anew or 'nothing'}"

    def _takes_optimizer(self, state: dict[str, Any]) -> bool:
        own, other = state_tensors(self.optimizer), state.get("optimizer", {})
        values, same = other.get("tensors", []), other.get("name") == memory_name(self.optimizer)
        fits = same and [value.shape for value in values] == [value.shape for value in own]
        if fits:
            with torch.no_grad():
                for buffer, value in zip(own, values, strict=True):
                    buffer.copy_(value)
        return fits

    def _takes(self, rule: Rule, values: dict[str, Any]) -> bool:
        """Whether a rule takes the state; KD does not where it has other teachers.

        Raises:
            CheckpointError: it fails.
        """
        try:
            self._load_rule(rule, values)
        except CheckpointError:
            raise
        except SettingError:
            return False
        return True

    def _check_identity(self, state: dict[str, Any]) -> None:
        for names, what in ((("fingerprint", "seed"), "data and seed"), (("settings",), "settings")):
            if any(state.get(name) != self.identity[name] for name in names):
                given = f"a checkpoint of other {what.replace('and', 'or another')}"
                raise CheckpointError(str(self.place), given, f"the {what} it began with")

    def _load_rule(self, rule: Rule, values: dict[str, Any]) -> None:
        try:
            rule.load_state_dict(values)
        except SettingError:
            raise
        except Exception as error:  # a rule of the user's own fails in any way
            reason = one_line(f"{type(error).__name__}: {error}")
            raise CheckpointError(
                str(self.place),
                f"a checkpoint whose state {type(rule).__name__} does not take ({reason})",
                "the settings it was written with, and a load_state_dict that takes what state_dict gave",
            ) from error


def _kind(rule: Rule) -> list[str]:
    """The class of a rule, and those of the rules among its arguments, as AWP has one."""
    arguments = (getattr(rule, name, None) for name in arguments_of(type(rule)))
    inner = [_kind(value) for value in arguments if isinstance(value, Rule)]
    return [import_path(type(rule)), *itertools.chain(*inner)]
