"""The benchmark of streaming, in miniature."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def streaming(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    yield importlib.import_module("streaming")
    for name in ("streaming", "common"):
        sys.modules.pop(name, None)


def test_it_measures_loader_and_training(streaming, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert 0 < streaming.make_images(tmp_path / "jpegs", 24, 40, 30) < 10_000
    assert len(list((tmp_path / "jpegs").glob("*/*.jpg"))) == 24
    args = argparse.Namespace(size=16, batch=4, batches=2, repeats=1, device="cpu", precision="fp32")
    loader = streaming.loader_row(tmp_path / "jpegs", 0, args)
    assert loader["per_core"] == loader["images_per_second"] > 0
    assert loader["per_core_time"] == pytest.approx(1000 / loader["main_ms"], rel=0.01)
    assert loader["worker_ms"] == 0
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 1000))
    training = streaming.training_row(tmp_path / "jpegs", 0, args, net)
    assert 0 <= training["share_waiting"] < 1
    assert 0 < training["seconds_not_ready"] <= training["seconds_in_load"] < training["seconds_streamed"]


def test_time_of_processes_is_that_of_their_cores(streaming):
    """Python, which begins in a new process, takes some; waiting for it takes none."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    try:
        limit = time.monotonic() + 60
        while streaming.worker_seconds() == 0 and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(1.5)  # it has imported what it needs, and sleeps
        begun = streaming.worker_seconds()
        time.sleep(0.5)
        assert begun <= streaming.worker_seconds() < begun + 0.2
        assert begun > 0
    finally:
        process.terminate()
        process.join()


def test_its_network_is_resnet_50(streaming):
    """25,557,032 parameters, as published."""
    with torch.device("meta"):
        net = streaming.resnet50(1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == 25_557_032
