"""What processes tell each other, each checking what it gets; a fault ends with its traceback."""

from __future__ import annotations

import copy
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
from softdefend.execution.batch_norm import separate, statistics, synchronize
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


def without(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        setattr(layer, name, None)
    return layer


def check_batch_norm(ours: Processes, compiled: bool = False) -> None:
    """Against torch's own layer on the whole batch: outputs, slopes, running statistics."""
    layers = (
        (nn.BatchNorm2d(3), (2 * ours.size + 1, 3, 4, 4)),
        (nn.BatchNorm1d(3, momentum=None), (ours.size, 3)),
        (nn.BatchNorm3d(3, affine=False), (2 * ours.size, 3, 2, 2, 2)),
        (without(nn.BatchNorm1d(3), "weight"), (2 * ours.size, 3)),
        (without(nn.BatchNorm1d(3), "bias", "num_batches_tracked"), (2 * ours.size, 3)),
        (nn.BatchNorm2d(3, track_running_stats=False), (ours.size, 3, 2, 2)),
        (nn.Sequential(nn.SyncBatchNorm(3)), (2 * ours.size, 3, 4, 4)),
        (nn.BatchNorm1d(3), (ours.size - 1, 3)),  # the first has no image
    )
    for layer, shape in layers[:5] if compiled else layers:
        draw = stream(0, "layer")
        image = 3 * torch.randn(shape, generator=draw) + 7
        scale = torch.randn(shape, generator=draw)
        whole = nn.BatchNorm2d(3) if isinstance(layer, nn.Sequential) else copy.deepcopy(layer)
        synchronize(layer, ours)
        assert type(copy.deepcopy(layer)) is type(layer)
        uncut = getattr(layer, "momentum", 0.1) is not None
        called = torch.compile(layer, backend="aot_eager", fullgraph=uncut) if compiled else layer
        for _ in range(2):
            outs, slopes = {}, {}
            for name, module, part, factor in (
                ("whole", whole, image.clone(), scale),
                ("share", called, ours.own(image).clone(), ours.own(scale)),
            ):
                part.requires_grad_(True)
                outs[name] = module(part)
                (outs[name] * factor).sum().backward()
                slopes[name] = part.grad
        assert_close(outs["share"], ours.own(outs["whole"]))
        assert_close(slopes["share"], ours.own(slopes["whole"]))
        for one, other in zip(statistics(layer), statistics(whole), strict=True):
            assert_close(one, other)
        for one, other in zip(layer.parameters(), whole.parameters(), strict=True):
            assert_close(ours.sum(one.grad), other.grad)
        layer.eval(), whole.eval()
        assert_close(layer(image), whole(image))
        kind = nn.SyncBatchNorm if isinstance(layer, nn.Sequential) else type(whole)
        separate(layer)
        assert type(next(m for m in layer.modules() if not isinstance(m, nn.Sequential))) is kind


def check_compiled_batch_norm(ours: Processes) -> None:
    """Messages of plain layers are part of one graph with the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated")  # torch's compiler does so
        check_batch_norm(ours, compiled=True)


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


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


if __name__ == "__main__":
    warnings.simplefilter("error")
    together = Engine(RuntimeSettings(device="cpu")).processes
    assert together.size == int(sys.argv[1])
    for check in (
        check_messages,
        check_errors,
        check_agreements,
        check_batch_norm,
        check_compiled_batch_norm,
        check_draws,
    ):
        check(together)
