"""The order from hard to easy against a sort written out, and the file against the images it is made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from softdefend.core.rng import stream
from softdefend.core.store import ResultStore
from softdefend.data import Resident, split
from softdefend.evaluation.gallery import choose_gallery, hardest_first
from softdefend.evaluation.table import AttackColumns, Table

N, EPS = 30, 0.1


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 3))
    image = torch.rand(N, 2, 3, 4, generator=stream(0, "gallery"))
    with torch.no_grad():
        clean = net(image).argmax(1).numpy()
    random = np.random.default_rng(0)
    label = np.where(random.random(N) < 0.8, clean, (clean + 1) % 3)
    attacks = {}
    for name in ("fab-t", "pgd-20"):
        said = np.where(random.random(N) < 0.5, clean, (label + 1) % 3)
        distance = (
            (EPS * random.random(N)).astype(np.float32) if name == "fab-t" else np.full(N, EPS, np.float32)
        )
        attacks[name] = AttackColumns(said, distance, (clean == label) & (said == label))
    return net, split(image, torch.from_numpy(label)), Table(np.arange(len(label)), label, clean, attacks)


def test_the_order_is_attacks_survived_then_distance_then_margin(case):
    _, _, table = case
    margin = np.random.default_rng(1).random(N).astype(np.float32)

    def key(i):
        fell = [columns for columns in table.attacks.values() if not columns.robust[i]]
        nearest = min((float(columns.distance[i]) for columns in fell), default=np.inf)
        return 2 - len(fell), np.round(nearest / EPS, 2), margin[i]

    right = [i for i in range(N) if table.clean_prediction[i] == table.label[i]]
    assert hardest_first(table, margin, EPS).tolist() == sorted(right, key=key)


def test_equal_use_of_the_budget_is_no_difference():
    """0.1 and 0.1 less a rounding error are one distance: the margin decides."""
    distance = np.array([0.1, np.nextafter(np.float32(0.1), np.float32(0))], np.float32)
    label, nothing = np.zeros(2, np.int64), np.zeros(2, bool)
    table = Table(
        np.arange(len(label)), label, label, {"pgd-20": AttackColumns(label + 1, distance, nothing)}
    )
    assert hardest_first(table, np.array([1, 2], np.float32), 0.1).tolist() == [0, 1]
    assert hardest_first(table, np.array([2, 1], np.float32), 0.1).tolist() == [1, 0]


@pytest.mark.parametrize("count", [3, 100])
def test_the_file_holds_the_two_ends_of_the_order(case, count, tmp_path):
    net, data, table = case
    tensors = choose_gallery(net, Resident(data, "cpu"), table, eps=EPS, count=count, batch_size=7)
    store = ResultStore(tmp_path)
    store.write_tensors("best-gallery", {"images": count}, tensors)
    with safe_open(store.path("best-gallery", ".safetensors"), "numpy") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    with torch.no_grad():
        logits = net(data.images).numpy()
    at = np.arange(N), table.label
    others = logits.copy()
    others[at] = -np.inf
    order = hardest_first(table, logits[at] - others.max(1), EPS)
    half = min(count, len(order) // 2)
    index = [*order[:half], *order[len(order) - half :]]
    assert kept["index"].tolist() == index
    assert kept["hard"].tolist() == [1] * half + [0] * half
    np.testing.assert_array_equal(kept["image"], data.images[index])
    np.testing.assert_array_equal(kept["label"], table.label[index])
    np.testing.assert_array_equal(kept["survived"], table.survived[index])
    np.testing.assert_array_equal(kept["prediction"], table.worst_prediction[index])
    np.testing.assert_array_equal(kept["distance"], table.smallest_distance[index])
