"""Tensors without plain values are told from plain ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.masked import MaskedTensor

from softdefend.core.tensors import unusual_form


def unusual() -> dict[str, torch.Tensor]:
    plain = torch.rand(4, 3)
    with warnings.catch_warnings():  # of prototypes
        warnings.simplefilter("ignore")
        return {
            "masked": MaskedTensor(plain, plain > 0.5),
            "nested": torch.nested.nested_tensor([plain[0], plain[1]]),
            "jagged, which is nested": torch.nested.nested_tensor([plain, plain[:2]], layout=torch.jagged),
            "meta": plain.to("meta"),
            "quantized": torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8),
            "sparse": plain.to_sparse(),
            "sparse by rows": plain.to_sparse_csr(),
            "mkldnn": plain.to_mkldnn(),
        }


@pytest.mark.parametrize("kind", unusual())
def test_unusual_tensors_are_named(kind):
    words = unusual_form(unusual()[kind])
    assert words is not None
    assert any(word in words for word in kind.split())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(2, 3).T,
        torch.zeros(0),
        torch.tensor(3),
        torch.rand(2, 3).bfloat16().requires_grad_(True),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64).conj(),
        nn.Parameter(torch.zeros(2)),
        torch.zeros(2).expand(3, 2),
        nn.UninitializedParameter(),
    ],
)
def test_plain_tensors_are_plain(tensor):
    assert unusual_form(tensor) is None
