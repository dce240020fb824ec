"""Which of several processes attacks which batches, and how what they found comes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdefend.core.processes import Processes
from softdefend.evaluation.records import Trial
from softdefend.evaluation.resume import Saved

_TOTALS = ("total_forwards", "total_backwards")


@dataclass(frozen=True)
class Shares:
    """How the batches of a trial are shared.

    Args:
        processes: who attack them.
        batch_size: images of a batch.
        unit: batches that follow each other and go to one process.
    """

    processes: Processes
    batch_size: int
    unit: int = 1

    def batches(self, attacked: Tensor) -> Sequence[Tensor]:
        """Rows of each batch, from flags [n] of the samples attacked."""
        rows = attacked.nonzero().squeeze(1)
        return torch.split(rows, self.batch_size) if len(rows) else ()

    def own(
        self, attacked: Tensor, carried: Tensor | None, processes: Processes | None = None
    ) -> list[tuple[int, Tensor]]:
        """Numbers and rows of the batches that a process attacks.

        Args:
            attacked: flags [n] of the samples.
            carried: flags of the batches that are done already.
            processes: this one's place when None.
        """
        batches = list(enumerate(self.batches(attacked)))
        if carried is not None:
            batches = [batch for batch, done in zip(batches, carried.tolist(), strict=True) if not done]
        units = [batches[start : start + self.unit] for start in range(0, len(batches), self.unit)]
        return [batch for unit in (processes or self.processes).deal(units) for batch in unit]

    def merge(self, trial: Trial, carried: Tensor | None) -> Trial:
        """A trial with what each process found in its batches; what was carried over is the first's."""
        if self.processes.size == 1:
            return trial
        rows = [rows for _, rows in self.own(trial.attacked, carried)]
        if self.processes.first and carried is not None:
            rows += [batch for batch, done in zip(self.batches(trial.attacked), carried, strict=True) if done]
        whole = Trial.of(trial.attacked)
        found = _part(trial, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64))
        for part in self.processes.tell(found):
            _write(whole, *part)
        return whole


def carry_over(saved: Sequence[Saved | None], shares: Shares) -> Saved:
    """What several processes saved, for another number of them: all that was finished is the first's.

    Args:
        saved: by rank; None of a process that saved nothing.
        shares: as they will be.

    Returns:
        What the process whose place ``shares`` has would have saved.
    """
    first = saved[0]
    assert first is not None
    tensors: dict[str, Tensor] = {"clean": first[0]["clean"]}
    trials: dict[str, dict[str, Any]] = {}
    before = Shares(Processes(0, len(saved)), shares.batch_size, first[1]["unit"])
    for key in sorted({key for state in saved if state is not None for key in state[1]["trials"]}):
        whole, carried = _together(key, saved, before)
        mine = whole if shares.processes.first else Trial.of(whole.attacked)
        tensors |= {f"{key}/{name}": tensor for name, tensor in mine.tensors().items()}
        tensors[f"{key}/carried"] = carried
        totals = {name: getattr(mine, name) for name in (*_TOTALS, "seconds")}
        trials[key] = {"done": 0, **totals}
    microbatch = min(state[1]["microbatch"] for state in saved if state is not None)
    return tensors, {"microbatch": microbatch, "group": 0, "trials": trials}


def _together(key: str, saved: Sequence[Saved | None], before: Shares) -> tuple[Trial, Tensor]:
    """A trial as far as all processes had come, and the batches that are finished."""
    states = [(rank, *state) for rank, state in enumerate(saved) if state and key in state[1]["trials"]]
    whole = Trial.of(states[0][1][f"{key}/attacked"])
    finished = torch.zeros(len(before.batches(whole.attacked)), dtype=torch.bool)
    for rank, tensors, values in states:
        carried, plain = tensors.get(f"{key}/carried"), values["trials"][key]
        place = Processes(rank, before.processes.size)
        done = before.own(whole.attacked, carried, place)[: plain["done"]]
        numbers = [number for number, _ in done]
        if rank == 0 and carried is not None:
            numbers += carried.nonzero().squeeze(1).tolist()
        rows = [before.batches(whole.attacked)[number] for number in numbers]
        trial = Trial.of(whole.attacked)
        for name in trial.tensors():
            setattr(trial, name, tensors[f"{key}/{name}"])
        trial.adversarial = tensors.get(f"{key}/adversarial")
        for name in (*_TOTALS, "seconds"):
            setattr(trial, name, plain[name])
        finished[numbers] = True
        _write(whole, *_part(trial, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)))
    return whole, finished


def _part(trial: Trial, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, int], float]:
    """What a process found in ``rows``, and what it cost."""
    found = {name: tensor[rows] for name, tensor in trial.tensors().items()}
    return rows, found, {name: getattr(trial, name) for name in _TOTALS}, trial.seconds


def _write(
    whole: Trial, rows: Tensor, found: dict[str, Tensor], totals: dict[str, int], seconds: float
) -> None:
    if "adversarial" in found and whole.adversarial is None:
        shape = found["adversarial"].shape[1:]
        whole.adversarial = torch.zeros(len(whole.attacked), *shape)
    for name, tensor in found.items():
        getattr(whole, name)[rows] = tensor
    for name, count in totals.items():
        setattr(whole, name, getattr(whole, name) + count)
    whole.seconds = max(whole.seconds, seconds)
