import errno
import fcntl
import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.core.files import Writer, sweep, write_atomic
from softdefend.training import checkpoint
from softdefend.training.checkpoint import CheckpointError, CheckpointFolder

STATE = {
    "epoch": 3,
    "net": {"w": torch.arange(6.0).view(2, 3)},
    "best": "{}",
    "list": [torch.ones(2)],
    "none": None,
}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "a.ckpt", STATE)
    back = checkpoint.load(tmp_path / "a.ckpt")
    assert torch.equal(back["net"]["w"], STATE["net"]["w"])
    assert torch.equal(back["list"][0], torch.ones(2))
    assert (back["epoch"], back["best"], back["none"]) == (3, "{}", None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("where", [0, 10, 30, 60, 70, 200, -1])
def test_a_flipped_bit_anywhere_is_refused(tmp_path, where):
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, STATE)
    content = bytearray(path.read_bytes())
    content[where] ^= 0b100
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"another kind|truncated|altered"):
        checkpoint.load(path)


@pytest.mark.parametrize("kept", [0, 5, 24, 40, 63, 64, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, STATE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"another kind|truncated"):
        checkpoint.load(path)


class Bomb:
    """A pickle that would create a file when loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_body_with_code_is_refused_and_does_not_run_even_with_a_right_checksum(tmp_path):
    buffer = io.BytesIO()
    torch.save({"net": Bomb(tmp_path / "boom")}, buffer)
    body = buffer.getvalue()
    head = checkpoint._MAGIC + hashlib.sha256(body).digest() + len(body).to_bytes(8, "little")
    path = tmp_path / "a.ckpt"
    path.write_bytes(head + body)
    with pytest.raises(CheckpointError, match="not plain data"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(CheckpointError, match="another kind"):
        checkpoint.load(path)
    assert not (tmp_path / "boom").exists()


def test_a_body_that_is_no_dictionary_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a.ckpt", [1, 2])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="got a list"):
        checkpoint.load(tmp_path / "a.ckpt")


def test_the_folder_keeps_the_newest_and_loads_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load() is None
    for step in (5, 10, 100, 1000):
        folder.save(step, {"step": step})
    assert [int(p.stem.removeprefix("step-")) for p in folder.paths()] == [100, 1000]
    assert folder.load()["step"] == 1000
    assert folder.load(folder.paths()[0])["step"] == 100


def test_every_so_many_steps_a_checkpoint_stays(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.stride = 20
    for step in range(10, 80, 10):
        folder.save(step, {"step": step})
    assert [int(p.stem.removeprefix("step-")) for p in folder.paths()] == [20, 40, 60, 70]


def test_what_changes_after_saving_is_not_in_the_file(tmp_path):
    """Training goes on while the file is written."""
    gate, weight, folder = threading.Event(), torch.zeros(3), CheckpointFolder(tmp_path)
    folder.writer(gate.wait)
    folder.save(1, {"net": {"w": weight}, "list": [weight]})
    weight.fill_(1.0)
    gate.set()
    state = folder.load()
    assert torch.equal(state["net"]["w"], torch.zeros(3))
    assert torch.equal(state["list"][0], torch.zeros(3))


def test_a_disk_that_fills_up_in_the_background_is_reported_and_the_last_good_one_stands(
    tmp_path, monkeypatch
):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"step": 1})
    folder.paths()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    folder.save(2, {"step": 2})
    with pytest.raises(SettingError, match="No space left on device"):
        folder.paths()
    assert CheckpointFolder(tmp_path).load()["step"] == 1  # as the next process finds it


def test_pieces_are_written_in_order_and_few_wait():
    gate, done, writer = threading.Event(), [], Writer()
    writer(gate.wait)
    writer(lambda: done.append(0))
    writer(lambda: done.append(1))
    late = threading.Thread(target=lambda: writer(lambda: done.append(2)))
    late.start()  # waits: each piece holds a whole state in memory
    late.join(0.2)
    assert late.is_alive()
    assert done == []
    gate.set()
    late.join(10)
    writer.wait()
    assert done == [0, 1, 2]


def test_a_damaged_newest_offers_the_previous_good_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    paths = [folder.save(step, {"step": step}) for step in (1, 2, 3)]
    assert folder.paths() == paths
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"truncated.*continue from it with --resume {paths[1]}"
    ) as caught:
        folder.load()
    assert "\n" not in str(caught.value)
    paths[1].write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=f"--resume {paths[0]}"):
        folder.load()
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"a whole checkpoint$"):
        folder.load()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SettingError, match="No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingError, match=r"Not a directory|File exists"):
        write_atomic(tmp_path / "file" / "a.txt", b"new")


def test_a_file_of_another_name_is_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(3, {"epoch": 1})
    (tmp_path / "step-final.ckpt").write_bytes(b"mine")
    assert folder.load() == {"epoch": 1}


def test_a_chosen_file_that_is_not_there_is_named_as_such(tmp_path):
    for chosen in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=r"^resume: got .*; accepted: a checkpoint file"):
            CheckpointFolder(tmp_path).load(chosen)


def test_several_processes_may_write_one_file(tmp_path):
    """Each its own content at once; the file is whole at every moment and nothing is left beside it."""
    path = tmp_path / "report.html"
    script = (
        "import sys; from pathlib import Path; from softdefend.core.files import write_atomic\n"
        "for _ in range(100): write_atomic(Path(sys.argv[1]), sys.argv[2].encode() * 200_000)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), letter]) for letter in "abc"]
    seen = set()
    while any(process.poll() is None for process in processes):
        if path.exists():
            content = path.read_bytes()
            seen.add((content[:1], content == content[:1] * 200_000))
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {whole for _, whole in seen} == {True}
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(tmp_path):
    left, held, other, mine = (
        tmp_path / name for name in (".a.txt.17.tmp", ".a.txt.18.tmp", ".b.txt.17.tmp", ".a.txt.tmp")
    )
    for path in (left, held, other, mine):
        path.write_bytes(b"half")
    with open(held, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(tmp_path / "a.txt", b"whole")
        found = sorted(path.name for path in tmp_path.iterdir())
        assert found == sorted([held.name, other.name, mine.name, "a.txt"])
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "a.txt"])


def test_a_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def late(file, kind):
        calls.append(kind)
        if len(calls) == 1:  # somebody sweeps between the opening and the lock
            sweep(tmp_path)
        real(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomic(tmp_path / "a.txt", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"whole"
    assert len(calls) == 3
