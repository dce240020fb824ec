"""Parquet files in hub layout: a column of encoded images and a column of integer labels."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.files import check_regular, parse_json
from softdefend.core.memory import check_memory
from softdefend.data.base import Split, split
from softdefend.data.cache import read_or_build, source_key
from softdefend.data.decode import check_size, decode
from softdefend.data.holdout import complement
from softdefend.data.raw import Labels, RawData, number_classes
from softdefend.data.settings import DataSettings
from softdefend.data.sources import encoded as listed
from softdefend.data.sources.base import COLUMNS, DECODING, LOOKING, SOURCES, Source
from softdefend.data.sources.folder import class_folders
from softdefend.data.sources.walk import list_folder, walk_files
from softdefend.data.table import Row

_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation"} | {
    "val": "validation",
    "dev": "validation",
}
_SPLIT_WORD = re.compile(rf"(?:^|[^a-z0-9])({'|'.join(_SPLITS)})(?=$|[^a-z0-9])")
_FEW = 64
"""Rows of a file that are in memory at once where images stay encoded."""
_LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels")


@SOURCES.register("parquet")
class Parquet(Source):
    """A Parquet file, or a folder of them."""

    address = "a Parquet file or a folder of them"
    columns = COLUMNS
    decodes = True
    streams = True

    def recognizes(self, address: str, path: Path) -> bool:
        if path.is_file():
            return _is_parquet(path) or _starts_as_parquet(path)
        return path.is_dir() and holds_files(path)

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        if path.is_dir():
            _refuse_images(path)
        return read_files(path, settings, cache, path.resolve().name)

    def read_encoded(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        if path.is_dir():
            _refuse_images(path)
        return read_encoded(path, settings, cache, path.resolve().name)


def read_files(
    path: Path,
    settings: DataSettings,
    cache: Path,
    name: str,
    *,
    check: Callable[[], None] = lambda: None,
) -> RawData:
    """Read a Parquet file, or a folder of them.

    In a folder the split is told from the file's name (``train-00000-of-00001.parquet``) or its folder's
    (``train/0000.parquet``); several shards are read in the order of their names. Files without a split in
    their name are training data. Where there are validation files but no test files, they are the test
    split; where there are both, the validation files are not read, because the validation split of a run is
    held out of its training data. A single file is training data only.

    Args:
        path: file or folder.
        settings: ``image_column`` is struct{bytes, path} or binary; None: the ``Image`` feature of the
            ``huggingface`` schema metadata, else the only column of such a type. ``label_column`` is of an
            integer type, or has names, whose order is that of the classes; None: the ``ClassLabel`` feature,
            else a column called label, labels, fine_label or fine_labels, else the only integer column.
            Labels without names that begin at 1 are classes of these numbers, and there is no class 0.
            The others say how images are decoded.
        cache: folder of decoded images.
        name: what tables call the data.
        check: of the files, before they are decoded; what is cached was checked before.

    Raises:
        SettingError: files that are not Parquet, columns or labels that cannot be used, files whose classes
            have other names or another order, undecodable images.
    """
    train, test, notes = _splits(path)
    key = _key("parquet", train, test, settings, name, DECODING)

    def build() -> RawData:
        check()
        rows, names = _rows(train, test, settings)
        remarks: list[str] = []
        parts = [part.decode(remarks) for part in rows]
        first = _first_label(names, parts)
        parts = [Split(part.images, part.labels - first) for part in parts]
        both = parts[0], parts[1] if len(parts) > 1 else None
        known = {**notes, "images": "; ".join(remarks)} if remarks else notes
        return RawData(name, *both, names or number_classes(*both, first=first), known, first)

    return read_or_build(cache, key, build)


def read_encoded(
    path: Path,
    settings: DataSettings,
    cache: Path,
    name: str,
    *,
    check: Callable[[], None] = lambda: None,
) -> RawData:
    """As :func:`read_files`, with images that stay encoded; their bytes are copied into a file in ``cache``
    from which single ones can be read."""
    train, test, notes = _splits(path)

    def describe() -> tuple[listed.Source, dict[str, listed.Listing]]:
        check()
        rows, names = _rows(train, test, settings, images=False)
        parts = [Labels(torch.tensor(part.labels)) for part in rows]
        first = _first_label(names, parts)
        parts = [Labels(part.labels - first) for part in parts]
        classes = names or number_classes(parts[0], parts[1] if len(parts) > 1 else None, first=first)
        splits = zip(("train", "test"), rows, parts, strict=False)
        listings = {kind: _listing(part, own.labels) for kind, part, own in splits}
        return listed.Source(name, classes, first, dict(notes)), listings

    key = _key("encoded parquet", train, test, settings, name, LOOKING)
    return listed.read_or_list(cache, key, settings, describe)


def _splits(path: Path) -> tuple[list[Path], list[Path] | None, dict[str, object]]:
    """Files of training and test data, and what to note of them."""
    shards = {"train": [path]} if path.is_file() else _shards(path)
    if "test" not in shards and "validation" in shards:
        return shards["train"], shards["validation"], {"test_split": "the source's validation split"}
    return shards["train"], shards.get("test"), {}


def _key(
    reader: str,
    train: list[Path],
    test: list[Path] | None,
    settings: DataSettings,
    name: str,
    options: tuple[str, ...],
) -> str:
    columns = [settings.image_column, settings.label_column]
    values = {option: getattr(settings, option) for option in options}
    return source_key([*train, *(test or ())], reader=reader, columns=columns, name=name, **values)


def _rows(
    train: list[Path], test: list[Path] | None, settings: DataSettings, *, images: bool = True
) -> tuple[list[_Rows], tuple[str, ...] | None]:
    """The rows of each split, and the names of the classes where there are some."""
    schema = _schema(train[0])
    image_column = _image_column(schema, settings.image_column, train[0])
    columns = image_column, _label_column(schema, settings.label_column, train[0])
    names = _class_names([*train, *(test or ())], columns[1])
    rows = [_Rows(files, *columns, settings, images=images) for files in (train, test) if files is not None]
    return rows, _number_names(rows) if rows[0].named else names


def _first_label(names: tuple[str, ...] | None, parts: Sequence[Split | Labels]) -> int:
    """What the source has for class 0: MATLAB and others count from one; no class 0 is to be learned."""
    return int(names is None and min(int(part.labels.min()) for part in parts) == 1)


def _listing(rows: _Rows, labels: Tensor) -> listed.Listing:
    def give() -> Iterator[Row]:
        numbers = enumerate(zip(labels.tolist(), rows.encoded(), strict=True))
        return (Row(rows.name(i), label, data) for i, (label, data) in numbers)

    return listed.Listing(give, len(labels), None)


def holds_files(root: Path) -> bool:
    """Whether ``root`` has Parquet files where hub layout has them.

    These are in it, in its folders, and one deeper in ``data`` and in folders named for a split. No other
    folder is listed, however many there are.

    Raises:
        SettingError: naming what cannot be read.
    """
    folders, files = list_folder(root)
    if any(_is_parquet(path) for path in files):
        return True
    for folder in folders:
        inner, files = list_folder(folder)
        deeper = (f for f in inner if folder.name == "data" or f.name.lower() in _SPLITS)
        if any(_is_parquet(path) for path in files) or any(
            _is_parquet(path) for f in deeper for path in list_folder(f)[1]
        ):
            return True
    return False


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _starts_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _refuse_images(root: Path) -> None:
    """Refuse two data sets in one folder. One folder of images is none: it may hold a page's figures."""
    beside = class_folders(root)
    if len(beside) > 1:
        raise SettingError(
            "data.source",
            f"{root} with Parquet files and with images in {beside[0].name} and {beside[1].name}",
            "a folder of Parquet files or of images, not both",
        )


def _shards(root: Path) -> dict[str, list[Path]]:
    """Split name to files, for the one configuration under ``root``."""
    configs: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    found = walk_files(root) if root.is_dir() else ()
    for file in sorted(path for path in found if _is_parquet(path)):
        if (word := _SPLIT_WORD.search(file.stem.lower())) is not None:
            configs[file.parent][_SPLITS[word[1]]].append(file)
        elif file.parent != root and (folder := file.parent.name.lower()) in _SPLITS:
            configs[file.parent.parent][_SPLITS[folder]].append(file)
        else:
            configs[file.parent]["train"].append(file)
    if not configs:
        raise SettingError("data.source", f"{root} without Parquet files", "a folder of Parquet files")
    if len(configs) > 1:
        names = ", ".join(sorted(str(folder.relative_to(root)) for folder in configs))
        raise SettingError("data.source", f"{root} with several data sets", f"one of its folders: {names}")
    (shards,) = configs.values()
    if "train" not in shards:
        raise SettingError(
            "data.source",
            f"{root} with only {', '.join(sorted(shards))} files",
            "a folder with training files",
        )
    return dict(shards)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        check_regular(path)
        # Opened here, since pyarrow takes names in UTF-8 only.
        with path.open("rb") as content, pq.ParquetFile(content, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SettingError("data.source", f"{path} ({reason})", "an intact Parquet file") from None


def _metadata(path: Path) -> pq.FileMetaData:
    with _opened(path) as file:
        return file.metadata


def _schema(path: Path) -> pa.Schema:
    with _opened(path) as file:
        return file.schema_arrow


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The hub's description of the columns; empty where there is none."""
    try:
        features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _class_names(files: list[Path], column: str) -> tuple[str, ...] | None:
    """The names that the files give the classes; None where none of them does."""
    first: tuple[Path, tuple[str, ...]] | None = None
    for path in files:
        names = _features(_schema(path)).get(column, {}).get("names")
        if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
            continue
        own = tuple(str(name) for name in names)
        first = first or (path, own)
        if own != first[1]:
            raise SettingError(
                "data.source",
                f"{path} {_difference(own, first[1], first[0].name)}",
                f"files with the same class names of {column}, in the same order",
            )
    return first and first[1]


def _difference(own: tuple[str, ...], other: tuple[str, ...], name: str) -> str:
    for i, (one, two) in enumerate(zip(own, other, strict=False)):
        if one != two:
            return f"whose class {i} is {one}, not {two} as in {name}"
    return f"with {len(own)} classes, not {len(other)} as in {name}"


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(schema: pa.Schema, wanted: str | None, path: Path) -> str:
    usable = _usable(schema, _holds_images, path)
    marked = [
        n for n, feature in _features(schema).items() if feature.get("_type") == "Image" and n in usable
    ]
    return _choose(
        "data.image_column", wanted, usable, marked, f"encoded images (bytes){_present(schema, path)}"
    )


def _label_column(schema: pa.Schema, wanted: str | None, path: Path) -> str:
    usable = _usable(schema, pa.types.is_integer, path)
    texts = _usable(schema, _holds_names, path)
    features = _features(schema).items()
    marked = [n for n, feature in features if feature.get("_type") == "ClassLabel" and n in usable]
    if len(marked) != 1:  # CIFAR-100 has a fine and a coarse label
        marked = [name for name in _LABEL_NAMES if name in (marked or [*usable, *texts])][:1]
    if wanted is not None:
        usable += texts
    accepted = f"integer labels, or of names of classes{_present(schema, path)}"
    return _choose("data.label_column", wanted, usable, marked, accepted)


def _usable(schema: pa.Schema, fits: Callable[[pa.DataType], bool], path: Path) -> list[str]:
    """Names of the columns of a type.

    Raises:
        SettingError: two of them have the same name.
    """
    names = [field.name for field in schema if fits(field.type)]
    twice = sorted({name for name in names if schema.names.count(name) > 1})
    if twice:
        given = f"{path} with several columns {twice[0]}"
        raise SettingError("data.source", given, "files whose columns have different names")
    return names


def _holds_names(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_names(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _present(schema: pa.Schema, path: Path) -> str:
    return f"; {path.name} has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _choose(setting: str, wanted: str | None, usable: list[str], marked: list[str], accepted: str) -> str:
    candidates = [wanted] if wanted in usable else [] if wanted is not None else marked or usable
    if len(candidates) != 1:
        found = f"{len(candidates)} candidates ({', '.join(candidates)})" if candidates else "no such column"
        raise SettingError(setting, wanted or found, f"the name of a column of {accepted}")
    return candidates[0]


def _bytes(column: Any) -> Any:
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


class _Rows:
    """The rows of one split: encoded images and labels, from one file after the other."""

    def __init__(
        self,
        files: list[Path],
        image_column: str,
        label_column: str,
        how: DataSettings,
        *,
        images: bool = True,
    ) -> None:
        self.labels: list[Any] = []
        self._column, self._reads_images = image_column, images
        self._encoded: list[bytes | None] = []
        self._files, self._starts, self._how = files, list[int](), how
        self.named = False
        """Whether the labels are names rather than numbers."""
        for path in files:
            self._starts.append(len(self.labels))
            with _opened(path) as file:
                self._read(file, image_column, label_column, path)
        if not self.labels:
            raise SettingError("data.source", f"{files[0]} without rows", "at least one image")
        if None in self.labels:
            row = self.labels.index(None)
            raise SettingError("data.label_column", f"no label at {self.name(row)}", "a label per image")

    def _read(self, file: pq.ParquetFile, image_column: str, label_column: str, path: Path) -> None:
        schema = file.schema_arrow
        # Every shard must have the columns that were found in the first.
        _image_column(schema, image_column, path)
        _label_column(schema, label_column, path)
        named = _holds_names(schema.field(label_column).type)
        if named != self.named and self.labels:
            given = f"{path} with labels of another type than {self._files[0].name}"
            raise SettingError("data.label_column", given, "numbers in all files, or names in all")
        self.named = named
        if self._reads_images:
            self._read_images(file, image_column, path)
        labels = file.read(columns=[label_column]).column(label_column)
        self.labels += labels.cast(pa.string() if named else pa.int64()).to_pylist()

    def _read_images(self, file: pq.ParquetFile, image_column: str, path: Path) -> None:
        if path == self._files[0]:
            self._check_size(file, image_column)
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        check_memory(size, "data.source", f"the rows of {path.name}")
        self._encoded += _bytes(file.read(columns=[image_column]).column(image_column)).to_pylist()

    def encoded(self) -> Iterator[bytes | None]:
        """The encoded images, read a few at a time."""
        for path in self._files:
            with _opened(path) as file:
                for batch in file.iter_batches(_FEW, columns=[self._column]):
                    yield from _bytes(batch.column(0)).to_pylist()

    def _check_size(self, file: pq.ParquetFile, image_column: str) -> None:
        """Refuse more images than fit into memory, from the first image and the number of rows."""
        for batch in file.iter_batches(batch_size=1, columns=[image_column]):
            (cell,) = batch.column(0).to_pylist()
            encoded = cell.get("bytes") if isinstance(cell, dict) else cell
            rows = sum(_metadata(path).num_rows for path in self._files)
            check_size(rows, encoded or b"", self._how)
            break

    def name(self, i: int) -> str:
        """What messages call a row."""
        shard = bisect_right(self._starts, i) - 1
        return f"row {i - self._starts[shard]} of {self._files[shard].name}"

    def content(self, i: int) -> bytes:
        """The encoded image of a row."""
        data = self._encoded[i]
        if data is None:
            raise SettingError("data.source", f"{self.name(i)} (no bytes)", "images stored in the file")
        return data

    def decode(self, remarks: list[str]) -> Split:
        """The split, in the order of the rows."""
        count, skipped = len(self._encoded), list[int]()
        images = decode(count, self.content, self.name, "decoding", self._how, skipped, remarks)
        kept = complement(torch.tensor(skipped, dtype=torch.int64), count)
        return split(images, torch.tensor(self.labels)[kept], labels_name="data.label_column")


def _number_names(rows: list[_Rows]) -> tuple[str, ...]:
    """Put numbers in place of labels that are names; the classes are the names of training, sorted."""
    classes = tuple(sorted(set(rows[0].labels)))
    number = {name: i for i, name in enumerate(classes)}
    for part in rows:
        for row, name in enumerate(part.labels):
            if name not in number:
                given = f"{name} at {part.name(row)}, which no training image has"
                raise SettingError("data.label_column", given, f"training's classes: {', '.join(classes)}")
        part.labels = [number[name] for name in part.labels]
    return classes
