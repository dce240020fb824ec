"""The label memory's storages against a float64 table that forgets nothing."""

from __future__ import annotations

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels.memory import DenseMemory, TopMemory, make_memory

N, K = 40, 100


def peaked(step: int, sharpness: float = 3.0) -> torch.Tensor:
    """Predictions [n, k] of a network that changes its mind a little at every step."""
    own = torch.randn(N, K, generator=stream(0, "own"))
    return (sharpness * (own + 0.3 * torch.randn(N, K, generator=stream(step, "noise")))).softmax(1)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.5])
def test_float16_rows_stay_within_the_stated_error_for_any_number_of_updates(momentum):
    labels = torch.arange(N) % K
    memory = make_memory("float16", labels, K, momentum)
    exact = torch.nn.functional.one_hot(labels, K).double()
    bound = 2**-12 / (1 - momentum) + 1e-6  # float32's own rounding
    index = torch.arange(N)
    for step in range(200):
        probability = peaked(step)
        exact = momentum * exact + (1 - momentum) * probability.double()
        memory.update(index, probability)
        assert (memory.read(index) - exact).abs().max() <= bound


def test_top_rows_differ_by_no_more_than_what_was_left_out():
    """Over one write: kept entries to float16's rounding, the others by at most the largest left out."""
    labels = torch.arange(N) % K
    memory, index = TopMemory(labels, K, 0.9, m=8), torch.arange(N)
    for step in range(50):
        before = memory.read(index)
        rows = memory.update(index, peaked(step))
        torch.testing.assert_close(rows, 0.9 * before + 0.1 * peaked(step))
        kept = memory.read(index)
        ranked = rows.sort(dim=1, descending=True)
        error = (kept - rows).abs().gather(1, ranked.indices)
        assert (error[:, :8] <= 2**-12).all()
        assert (error[:, 8:] <= ranked.values[:, 8:9] + 2**-9 / K).all()
        assert (ranked.values[:, 8] <= 1 / 9).all()
        torch.testing.assert_close(kept.sum(1), torch.ones(N), atol=8 * 2**-12, rtol=0)


def test_top_keeps_what_matters_of_a_long_average():
    """After 200 updates the believed class and its probability are the exact table's."""
    labels, index = torch.arange(N) % K, torch.arange(N)
    memory, exact = TopMemory(labels, K, 0.9, m=32), torch.nn.functional.one_hot(labels, K).double()
    for step in range(200):
        exact = 0.9 * exact + 0.1 * peaked(step).double()
        memory.update(index, peaked(step))
    kept = memory.read(index)
    assert torch.equal(kept.argmax(1), exact.argmax(1))
    assert (kept - exact).abs().max() < 0.01


@pytest.mark.parametrize("storage", ["float32", "float16", "top-3"])
def test_every_storage_starts_at_the_label_and_forgets_it_as_alpha_to_the_m(storage):
    labels, index = torch.tensor([3, 0, 4]), torch.arange(3)
    memory = make_memory(storage, labels, 5, 0.5)
    assert torch.equal(memory.read(index), torch.nn.functional.one_hot(labels, 5).float())
    elsewhere = torch.nn.functional.one_hot((labels + 1) % 5, 5).float()
    for m in range(1, 8):
        memory.update(index, elsewhere)
        assert torch.equal(memory.read(index)[index, labels], torch.full((3,), 0.5**m))


@pytest.mark.parametrize("storage", ["float32", "float16", "top-3"])
def test_state_returns_in_place_and_untouched_rows_stay(storage):
    labels = torch.arange(6) % 5
    first, second = (make_memory(storage, labels, 5, 0.9) for _ in range(2))
    probability = torch.rand(2, 5, generator=stream(0, "p")).softmax(1)
    first.update(torch.tensor([4, 1]), probability)
    second.load_state_dict(first.state_dict())
    everything = torch.arange(6)
    assert torch.equal(first.read(everything), second.read(everything))
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(second.read(others), torch.nn.functional.one_hot(labels[others], 5).float())


def test_a_thousand_classes_of_imagenet_fit_into_300_megabytes():
    bytes_of_a_sample = sum(
        tensor.element_size() * tensor.shape[1]
        for tensor in TopMemory(torch.arange(10), 1000, 0.9, m=32).state_dict().values()
    )
    assert bytes_of_a_sample * 1_281_167 < 300e6
    dense = DenseMemory(torch.arange(10), 1000, 0.9).state_dict()["memory"]
    assert dense.element_size() * dense.shape[1] * 1_281_167 > 5e9


@pytest.mark.parametrize("storage", ["float64", "top-0", "top-", "top-5", "top-9", ""])
def test_unknown_storage_is_refused(storage):
    with pytest.raises(SettingError, match=r"label\.storage"):
        make_memory(storage, torch.arange(5), 5, 0.9)
