"""A training small enough to run in a second, and files for it to read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from softdefend.cli.main import main

_SMALL = """
    --data.train_size 64 --data.validation 32 --optim.epochs 2 --optim.batch_size 8 --optim.lr 0.05
    --net.name small_cnn --net.width 4 --augment.pad 1 --threat.eps 4/255 --attack.steps 2
    --validate.attack.steps 2 --evaluate.size 64 --evaluate.curve_size 16 --progress false
    --runtime.device cpu --runtime.threads 1
"""
SMALL = _SMALL.split()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def done(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that ends well and has nothing to warn of."""
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n: int, seed: int = 0, side: int = 8) -> list[bytes]:
    """Grey images [side, side]; image i is brighter in its upper half if i is odd."""
    pixels = np.random.default_rng(seed).integers(0, 128, (n, side, side), dtype=np.uint8)
    pixels[1::2, : side // 2] += 127
    return [png(image) for image in pixels]


def write_parquet(
    path: Path, images: Sequence[bytes], labels: Sequence[int], names: tuple[str, str] = ("image", "label")
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {names[0]: pa.array(encoded, kind), names[1]: pa.array(labels, pa.int64())}
    pq.write_table(pa.table(columns), path)
    return path
