"""What processes tell each other, each checking what it gets; a fault ends with its traceback."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softdefend.core.errors import SettingError
from softdefend.core.identity import RunIdentity
from softdefend.core.processes import Processes
from softdefend.core.rng import stream
from softdefend.execution.draws import WholeBatchDraws
from softdefend.execution.engine import Engine, RuntimeSettings
from softdefend.training import shares


def check_messages(ours: Processes) -> None:
    rank, size = ours.rank, ours.size
    assert torch.equal(ours.sum(torch.tensor([1.0, rank])), torch.tensor([size, sum(range(size))]).float())
    assert ours.mean(torch.tensor(float(rank))) == sum(range(size)) / size
    everything = torch.arange(size * 3 * 2).view(size * 3, 2)
    index, halves = ours.gather(ours.own(everything), ours.own(everything).to(torch.bfloat16)[:, :1] / 2)
    assert torch.equal(index, everything)
    assert halves.dtype == torch.bfloat16
    assert torch.equal(halves, everything.to(torch.bfloat16)[:, :1] / 2)
    (column,) = ours.gather(everything[rank : rank + 1, 1])  # of a share of one row
    assert torch.equal(column, everything[:size, 1])
    assert ours.tell({"rank": rank}) == [{"rank": one} for one in range(size)]
    tensors = [torch.full((2, 3), float(rank)), torch.full((4,), float(rank), dtype=torch.float64)]
    tensors.append(torch.full((1, 2, 2, 2), float(rank)).to(memory_format=torch.channels_last))
    ours.average_(tensors)
    assert all(bool((tensor == (size - 1) / 2).all()) for tensor in tensors)
    counts = [torch.tensor([rank, 5]), torch.tensor(float(rank))]
    ours.copy_first_(counts)
    assert [count.tolist() for count in counts] == [[0, 5], 0.0]
    items = list(range(2 * size + 1))
    assert ours.collect([item * 10 for item in ours.deal(items)], len(items)) == [item * 10 for item in items]
    shares = ours.tell(ours.own(torch.arange(2 * size + 1)).tolist())
    assert [item for share in shares for item in share] == items
    assert {len(share) for share in shares} == {2, 3}


def check_errors(ours: Processes) -> None:
    def refuse() -> None:
        assert ours.first
        raise SettingError("a", object(), "b")

    for work in (lambda: ours.from_first(refuse), lambda: ours.agree("a", ours.rank, "one")):
        try:
            work()
        except SettingError as error:
            texts = ours.tell(str(error))
            assert len(set(texts)) == 1
            assert texts[0].startswith("a: got ")
        else:
            raise AssertionError
    ours.agree("a", "the same", "one")
    assert ours.from_first(lambda: ours.rank) == 0


def check_agreements(ours: Processes) -> None:
    same, other = RunIdentity("settings", "data"), RunIdentity("settings", f"data of {ours.rank}")
    shares.check_agreement(ours, same)
    for run, code in ((other, "code"), (same, f"code of {ours.rank}")):
        shares._code = lambda code=code: code
        with pytest.raises(SettingError, match="in process 1, "):
            shares.check_agreement(ours, run)


def check_draws(ours: Processes) -> None:
    """Rows of two views of the whole batch's numbers, from the same state of the generator."""
    for function in (
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout2d(x, 0.5),
        lambda x: nn.Dropout(0.5, inplace=True)(x),
        lambda x: F.alpha_dropout(x, 0.5, training=True),
        lambda x: x + torch.randn_like(x),
        lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5),
    ):
        image = torch.rand(2 * 3 * ours.size, 2, 3, 3, generator=stream(0, "x"))
        own = torch.cat([ours.own(view) for view in image.chunk(2)])
        torch.manual_seed(3)
        wanted = function(image.clone())
        torch.manual_seed(3)
        with WholeBatchDraws(ours, 3):
            found = function(own.clone())
        assert torch.equal(found, torch.cat([ours.own(view) for view in wanted.chunk(2)]))


if __name__ == "__main__":
    warnings.simplefilter("error")
    together = Engine(RuntimeSettings(device="cpu")).processes
    assert together.size == int(sys.argv[1])
    for check in (
        check_messages,
        check_errors,
        check_agreements,
        check_draws,
    ):
        check(together)
