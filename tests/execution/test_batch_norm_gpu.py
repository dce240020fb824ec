"""Batch normalization over two GPUs, as in test_batch_norm.py; run with ``pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SCRIPT = str(Path(__file__).with_name("batch_norm_of_processes.py"))
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1", "GRID_DEVICE": "cuda"}


@pytest.mark.parametrize("check", ["layers", "compiled_layers", "bfloat16", "compiled_bfloat16", "no_image"])
def test_two_gpus_normalize_as_torch_does_the_whole_batch(check):
    for code, errors in processes.ended(processes.start(2, SCRIPT, check, **GPUS), 300):
        assert code == 0, errors
