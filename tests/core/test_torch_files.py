"""Files of torch that ask for more time or memory than they are worth."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from softdefend.core import memory
from softdefend.core.errors import SettingError
from softdefend.core.pickles import BoundsError
from softdefend.core.torch_files import check_torch_file
from softdefend.core.weight_files import read_metadata, read_safetensors, read_weights, weights_digest

DOUBLED = b"K\x01q\xff" + b"h\xff\x86q\xff" * 60
"""Tuples that hold each other twice: 2**60 numbers."""


def archive(path: Path, content: bytes, *, compress: bool = False, **records: bytes) -> Path:
    """A zip archive as torch writes it, around a pickle."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in {"data.pkl": content, "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", data)
    return path


def older(path: Path, content: bytes) -> Path:
    """The format of torch before 1.6, around a pickle."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + content + pickle.dumps([], 2))
    return path


PICKLES = {
    "a key of doubled tuples": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "a set of doubled tuples": b"\x80\x02c__builtin__\nset\n]" + DOUBLED + b"a\x85R.",
    "a size of doubled tuples": b"\x80\x02ctorch\nSize\n" + DOUBLED + b"\x85R.",
    "lists of doubled lists": b"\x80\x02]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b".",
    "many operations": b"\x80\x02" + b"K\x010" * 1_100_000 + b"N.",
    "a memo of 2**30 entries": b"\x80\x02Nr\x00\x00\x00\x40.",
    "memory for nothing": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
}


@pytest.mark.parametrize("wrap", [archive, older])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_asks_for_much_is_refused_at_once(kind: str, wrap, tmp_path: Path) -> None:
    path = wrap(tmp_path / "weights.pt", PICKLES[kind])
    began = time.process_time()
    with pytest.raises(SettingError, match=r"weights\.pt: got a damaged or foreign file \(.*accepted: safet"):
        read_weights(path)
    assert time.process_time() - began < 5


def storage(elements: int) -> bytes:
    key = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
    return key + struct.pack("<i", elements) + b"tQ"


def tensor(elements: int, size: int) -> bytes:
    shape = b"J" + struct.pack("<i", size) + b"\x85K\x01\x85"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage(elements) + b"K\x00" + shape + b"\x89}tR."
    )


def test_weights_that_the_file_does_not_hold_are_not_given_memory(tmp_path: Path) -> None:
    for wrap in (archive, older):
        with pytest.raises(SettingError, match=r"\(weights that are not in the file\)"):
            read_weights(wrap(tmp_path / "w.pt", tensor(2**31 - 1, 4)))
        with pytest.raises(SettingError, match=r"\(a tensor larger than its weights in the file\)"):
            read_weights(wrap(tmp_path / "w.pt", tensor(4, 2**31 - 1)))


def test_an_archive_that_unpacks_to_much_more_than_it_has_is_refused(tmp_path: Path) -> None:
    good = {"a": torch.zeros(2, 3)}
    buffer = io.BytesIO()
    torch.save(good, buffer)
    records = {
        info.filename.partition("/")[2]: data
        for file in [zipfile.ZipFile(buffer)]
        for info in file.infolist()
        for data in [file.read(info)]
    }
    content = records.pop("data.pkl")
    assert torch.equal(
        read_weights(archive(tmp_path / "w.pt", content, compress=True, **records))["a"], good["a"]
    )
    for compress, data in ((True, bytes(50_000_000)), (False, b"x")):
        path = archive(tmp_path / "w.pt", content, compress=compress, **{**records, "data/1": data})
        if not compress:
            # The size that the list of records claims, as overlapping records would have it.
            whole = bytearray(path.read_bytes())
            at = whole.rfind(b"archive/data/1") - 46
            whole[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
            path.write_bytes(whole)
        with pytest.raises(
            SettingError, match=r"got a damaged or foreign file \(\d+ bytes packed into \d+\)"
        ):
            read_weights(path)


def test_an_archive_in_itself_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", b"\x80\x02}.")
    for _ in range(20):
        inner = path.read_bytes()
        archive(path, inner, **{"data/0": inner} if len(inner) < 10**6 else {})
    began = time.process_time()
    with pytest.raises(SettingError, match="got a damaged or foreign file"):
        read_weights(path)
    assert time.process_time() - began < 5


def test_a_list_of_records_of_any_length_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", b"\x80\x02}.", **{f"data/{i}": b"x" for i in range(100)})
    with open(path, "rb") as file:
        check_torch_file(file, "w")
    monkeypatch.setattr("softdefend.core.torch_files._LONGEST_DIRECTORY", 1000)
    with open(path, "rb") as file, pytest.raises(BoundsError, match="whose list of records has 6"):
        check_torch_file(file, "w")


def test_what_torch_saves_passes_in_both_formats(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.rand(6).half()[1:5:2],
        "tied": [net[0].weight] * 2,
        "expanded": torch.zeros(1).expand(10**9),
        "no": torch.zeros(0, 3),
        "bytes": b"\xff\x00",
        "complex": torch.zeros(2, dtype=torch.complex128),
        "size": torch.Size([1, 2]),
        "parameter": nn.Parameter(torch.zeros(2)),
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        found = read_weights(tmp_path / "w.pt")
        assert found.keys() == content.keys()
        assert torch.equal(found["half"], content["half"])
        buffer = io.BytesIO((tmp_path / "w.pt").read_bytes())
        check_torch_file(buffer, "in memory")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_no_regular_file_is_not_read(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    for read in (read_weights, weights_digest, lambda p: read_safetensors(p, "weights")):
        with pytest.raises(SettingError, match=rf"{name}: got no regular file; accepted"):
            read(path)
    with pytest.raises(OSError, match="no regular file"):
        read_metadata(path)


@pytest.mark.parametrize("name", ["a\0b.pt", "\ud800.pt", "x" * 300 + ".pt", "a\0b.safetensors"])
def test_names_that_no_file_can_have_are_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="; accepted: safetensors") as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).isprintable()


def test_a_file_larger_than_memory_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pt")
    monkeypatch.setattr(memory, "available_memory", lambda: 3000)
    with pytest.raises(
        SettingError, match=r"got a file of weights that take \S+ kB of memory; accepted: at most the 3 kB"
    ):
        read_weights(tmp_path / "w.pt")


def test_metadata_nested_beyond_reading_are_damage(tmp_path: Path) -> None:
    text = "[" * 100_000 + "]" * 100_000
    header = b'{"__metadata__":{"softdefend":"' + text.encode() + b'"}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SettingError, match="got a damaged or foreign file"):
        read_weights(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="nested too deeply"):
        read_metadata(tmp_path / "w.safetensors")
