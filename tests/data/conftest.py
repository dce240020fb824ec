from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_tools import encode

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: $SOFTDEFEND_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("SOFTDEFEND_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "cifar10-jpeg").is_dir():
        pytest.skip(f"no real data: {folder / 'cifar10-jpeg'} does not exist (set SOFTDEFEND_DATA)")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "softdefend"


@pytest.fixture
def pictures() -> np.ndarray:
    """[12, 5, 7, 3] uint8: random, and wider than high, so that no mixed-up axis goes unnoticed."""
    return np.random.default_rng(3).integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)


WriteParquet = Callable[..., Path]


@pytest.fixture
def write_parquet() -> WriteParquet:
    """Writes encoded images and labels as the hub does: struct{bytes, path} and int64."""

    def write(
        path: Path,
        images: list[bytes | None],
        labels: list[int | None],
        *,
        names: tuple[str, str] = ("img", "label"),
        metadata: str | None = None,
    ) -> Path:
        cells = [{"bytes": data, "path": None} for data in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {names[0]: pa.array(cells, kind), names[1]: pa.array(labels, pa.int64())}
        table = pa.table(columns)
        if metadata is not None:
            table = table.replace_schema_metadata({"huggingface": metadata})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        return path

    return write


@pytest.fixture
def hub_folder(tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet) -> Path:
    """Two training shards of 5 and 4 images and a test shard of 3, three classes with names."""
    features = '{"img": {"_type": "Image"}, "label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}'
    metadata = f'{{"info": {{"features": {features}}}}}'
    encoded = [encode(picture) for picture in pictures]
    labels = [i % 3 for i in range(12)]
    for name, part in (
        ("train-00000-of-00002", slice(0, 5)),
        ("train-00001-of-00002", slice(5, 9)),
        ("test-00000-of-00001", slice(9, 12)),
    ):
        write_parquet(
            tmp_path / "hub" / "data" / f"{name}.parquet", encoded[part], labels[part], metadata=metadata
        )
    return tmp_path / "hub"
