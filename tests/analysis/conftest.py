"""Two runs small enough to be trained in seconds, and bytes to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train

SMALL = """
    --data.train_size 96 --data.validation 32 --optim.epochs 3 --optim.batch_size 16 --optim.lr 0.05
    --net.name small_cnn --net.width 4 --augment.pad 1 --threat.eps 0.1 --attack.steps 2
    --validate.attack.steps 2 --validate.test_size 32 --evaluate.size 32 --evaluate.curve_size 0
    --evaluate.examples 0 --progress false --runtime.device cpu --runtime.threads 1
"""


def _train(folder: Path, cache: Path, *words: str) -> Path:
    run = ["--folder", str(folder), "--data.cache", str(cache), *SMALL.split(), *words]
    return train(resolve(run))


@pytest.fixture(scope="session")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGLR with averaged weights on labels of which 30% are wrong; to be read only."""
    root = tmp_path_factory.mktemp("analyzed")
    words = "--name refined --data.noise symmetric --data.noise_rate 0.3 --label SGLR --label.start 0.3"
    return _train(root / "refined", root / "cache", *words.split(), "--weight", "EMA")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PGD-AT with clean labels; to be read only."""
    root = tmp_path_factory.mktemp("analyzed")
    return _train(root / "plain", root / "cache", "--name", "plain")


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[[str], Path]:
    """A function that trains one epoch with some words and returns the run folder."""
    return lambda words: _train(
        tmp_path / "run", tmp_path / "cache", "--optim.epochs", "2", "--validate.every", "2", *words.split()
    )
