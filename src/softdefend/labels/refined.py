"""The base of rules that begin with the given label and later refine it with a memory of predictions."""

from __future__ import annotations

import math

from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.labels.base import BNMode, LabelRule
from softdefend.labels.memory import check_storage, make_memory


class RefinedRule(LabelRule):
    """Keeps one memory row per sample, averaged with ``alpha``. The phase is ``hard`` before the start and
    ``refined`` after it.

    Args:
        alpha: weight of the old memory row, in [0, 1].
        start: fraction of the run after which refinement begins, in [0, 1].
        clean_bn: batch normalization of the clean forward that refinement needs.
        storage: of the memory.

    Raises:
        SettingError: a value outside these ranges.
    """

    asks_clean = True
    mixes = False
    remembers = True

    def __init__(self, alpha: float, start: float, clean_bn: BNMode, storage: str) -> None:
        for name, value in (("alpha", alpha), ("start", start)):
            if not 0 <= value <= 1:
                raise SettingError(f"label.{name}", value, "a number in [0, 1]")
        if clean_bn not in ("train", "batch", "eval"):
            raise SettingError("label.clean_bn", repr(clean_bn), "train, batch or eval")
        check_storage(storage)
        self.alpha, self.start, self.clean_bn, self.storage = alpha, start, clean_bn, storage

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        # 1e-9: 0.45 * 200 may round to just above 90, which must not become epoch 91.
        self.first_epoch = max(0, math.ceil(self.start * run.epochs - 1e-9) - 1)
        self.memory = make_memory(self.storage, run.labels, run.k, self.alpha, run.processes)

    def phase(self, epoch: int) -> str:
        return "refined" if epoch >= self.first_epoch else "hard"

    def needs_clean(self, phase: str) -> bool:
        return phase == "refined"

    def state_dict(self) -> dict[str, Tensor]:
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.memory.load_state_dict(state)
