"""Two GPUs train and evaluate what one does, by NCCL; run with ``pytest -m gpu``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from grid_of_processes import PAIRS, VARIANTS

import processes
from softdefend.cli.main import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.filterwarnings("default"),
]
SCRIPT = str(Path(__file__).with_name("grid_of_processes.py"))
BUCKETS = str(Path(__file__).with_name("buckets_of_processes.py"))
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1", "GRID_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
RUN = [
    *("--config", "digits_demo", "--preset", "sglr-ema", "--data.train_size", "512"),
    *("--optim.epochs", "3", "--optim.batch_size", "64", "--net.width", "16", "--attack.steps", "2"),
    *("--label.start", "0.2", "--evaluate.size", "128", "--evaluate.curve_size", "0"),
    *("--evaluate.attacks", "[pgd-5, apgd-ce-5]", "--runtime.device", "cuda"),
    *("--runtime.deterministic", "true", "--progress", "false"),
]
MODES = {
    "eager": (),
    "captured": ("--runtime.capture", "true"),
    "compiled": ("--runtime.compile", "true", "--runtime.capture", "true"),
    "bf16": ("--runtime.precision", "bf16", "--runtime.capture", "true"),
    "per process": ("--runtime.batch_norm", "per_process", "--runtime.capture", "true"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """As in test_grid_of_processes.py."""
    folder = tmp_path_factory.mktemp("ends")
    for size in (1, 2):
        for code, errors in processes.ended(processes.start(size, SCRIPT, str(folder), "pairs", **GPUS), 500):
            assert code == 0, errors
    return {tuple(map(int, path.stem.split("-"))): torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("name", ["-".join(names) for names in PAIRS] + list(VARIANTS))
def test_two_gpus_train_what_one_does(ends, name):
    for key, value in ends[1, 0][name].items():
        rtol = 1e-5 if key == "meters" else 0
        torch.testing.assert_close(ends[2, 0][name][key], value, rtol=rtol, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_run_on_two_gpus_comes_out_as_on_one(tmp_path, mode):
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        words = ["train", *RUN, *MODES[mode], "--folder", str(folder), "--runtime.devices", str(count)]
        assert main(words) == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found[count] = [json.loads(line)["loss"] for line in lines]
        assert (folder / "evaluation" / "last.parquet").exists()
    assert found[2] == pytest.approx(found[1], rel=0.1)
    assert found[2] != found[1] or mode != "per process"


def test_two_gpus_end_in_the_same_bits_twice(tmp_path):
    for name in ("a", "b"):
        words = ["train", *RUN, "--folder", str(tmp_path / name), "--runtime.devices", "2"]
        assert main([*words, "--runtime.capture", "true"]) == 0
    one, other = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


CHECKS = ["averages", "overlap", "capture", "training", "captured_training", "branches", "captured_branches"]


@pytest.mark.parametrize("check", CHECKS)
def test_two_gpus_average_gradients_during_the_backward_pass(check):
    """Eager and captured; as in test_buckets.py."""
    for code, errors in processes.ended(processes.start(2, BUCKETS, check, **GPUS), 500):
        assert code == 0, errors
