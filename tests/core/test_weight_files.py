"""Weights from outside: what fits is loaded, what does not is named, what wants to run is not run."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.weight_files import load_weights_file, read_weights, save_weights, weights_digest


def make_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))


def equal(net: nn.Module, other: nn.Module) -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: s, []),
        (lambda s: {"state_dict": s, "epoch": 3, "best": 0.5}, ["took 'state_dict' from the file"]),
        (lambda s: {"model": s, "optimizer": {"lr": 0.1}}, ["took 'model' from the file"]),
        (lambda s: {"model_state_dict": s}, ["took 'model_state_dict' from the file"]),
        (
            lambda s: {"net": {"state_dict": s}},
            ["took 'net' from the file", "took 'state_dict' from the file"],
        ),
        (lambda s: renamed(s, "module."), ["removed the prefix 'module.'"]),
        (
            lambda s: {"state_dict": renamed(s, "_orig_mod.module.")},
            [
                "took 'state_dict' from the file",
                "removed the prefix '_orig_mod.'",
                "removed the prefix 'module.'",
            ],
        ),
    ],
    ids=["flat", "state_dict", "model", "model_state_dict", "twice", "module", "compiled"],
)
def test_weights_are_found_and_their_names_repaired(wrap, said, tmp_path):
    theirs, net = make_net(1), make_net(2)
    torch.save(wrap(theirs.state_dict()), tmp_path / "weights.pt")
    assert load_weights_file(net, tmp_path / "weights.pt") == said
    assert equal(net, theirs)


def test_safetensors_and_the_old_torch_format_are_read(tmp_path):
    theirs = make_net(1)
    save_file(renamed(theirs.state_dict(), "module."), tmp_path / "w.safetensors")
    torch.save(theirs.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pth"):
        net = make_net(2)
        load_weights_file(net, tmp_path / name)
        assert equal(net, theirs)


def test_a_prefix_of_the_network_itself_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.module = make_net(seed)

    theirs, net = Wrapped(1), Wrapped(2)
    torch.save(renamed(theirs.state_dict(), "module."), tmp_path / "weights.pt")
    with pytest.raises(SettingError, match=r"unexpected module\.module\."):
        load_weights_file(net, tmp_path / "weights.pt")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    assert load_weights_file(net, tmp_path / "weights.pt") == []
    assert equal(net, theirs)


def test_names_and_shapes_that_do_not_fit_are_named_in_one_line(tmp_path):
    state = make_net().state_dict()
    path = tmp_path / "weights.pt"
    del state["0.bias"]
    state["9.weight"] = torch.zeros(1)
    state["3.weight"] = torch.zeros(3, 40)
    torch.save(state, path)
    net = make_net(2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(SettingError) as caught:
        load_weights_file(net, path)
    assert str(caught.value) == (
        f"{path}: got weights that do not fit: no 0.bias; unexpected 9.weight; other shapes: "
        "3.weight [3, 40] for [3, 32]; accepted: the network's 9 weights by name"
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_of_many_names_the_first_are_given(tmp_path):
    torch.save(renamed(make_net().state_dict(), "backbone."), tmp_path / "weights.pt")
    with pytest.raises(
        SettingError, match=r"no 0\.weight, 0\.bias, 1\.weight, 1\.bias and 5 more; unexpected"
    ):
        load_weights_file(make_net(), tmp_path / "weights.pt")


class Evil:
    """Unpickled as usual, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "torch in the old format", "pickle", "pickle named safetensors"])
def test_a_pickle_that_wants_to_run_does_not(kind, tmp_path):
    path, mark = tmp_path / "weights.pt", tmp_path / "ran"
    content = {"state_dict": make_net().state_dict(), "extra": Evil(mark)}
    if kind.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    else:
        path = path.with_suffix(".safetensors") if "named" in kind else path
        path.write_bytes(pickle.dumps({"extra": Evil(mark)}, protocol=2))
    with pytest.raises(SettingError, match="accepted: safetensors, or a state dict") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert "named" in kind or "a pickle that would run posix.mkdir" in str(caught.value)
    assert not mark.exists()
    # the test can fail: executed, the same bytes make the folder
    (pickle.loads if "pickle" in kind else lambda _: torch.load(path, weights_only=False))(path.read_bytes())
    assert mark.is_dir()


@pytest.mark.parametrize(
    ("write", "given"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "a damaged or foreign file"),
        (lambda p: p.write_bytes(b""), "a damaged or foreign file"),
        (lambda p: p.write_bytes(b"hello world"), "a damaged or foreign file"),
        (lambda p: torch.save(nn.Linear(2, 2), p), "a pickle that would run torch.nn.modules.linear.Linear"),
        (lambda p: torch.save({"a": argparse.Namespace()}, p), "a pickle that would run argparse.Namespace"),
        (lambda p: torch.save([torch.zeros(1)], p), "a file that holds a list"),
        (lambda p: torch.save(torch.zeros(1), p), "a file that holds a Tensor"),
        (lambda p: torch.save({}, p), "a file without weights"),
        (lambda p: torch.save({"epoch": 3, "x": torch.zeros(1)}, p), "epoch beside weights"),
        (lambda p: p.write_bytes(pickle.dumps({"x": 1}, protocol=4)), "a damaged or foreign file"),
    ],
    ids=[
        "absent",
        "folder",
        "empty",
        "text",
        "module",
        "arguments",
        "list",
        "tensor",
        "nothing",
        "mixed",
        "pickle",
    ],
)
def test_files_without_weights_are_refused(write, given, tmp_path):
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(SettingError) as caught:
        load_weights_file(make_net(), path)
    assert f"{path}: got {given}; accepted: " in str(caught.value)


def test_truncated_files_are_refused(tmp_path):
    for name in ("w.pt", "w.safetensors"):
        path = tmp_path / name
        if name.endswith("pt"):
            torch.save(make_net().state_dict(), path)
        else:
            save_file(make_net().state_dict(), path)
        whole = path.read_bytes()
        for length in (10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(SettingError, match="accepted"):
                load_weights_file(make_net(), path)


def test_weights_are_written_once_and_tied_ones_too(tmp_path):
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    path = tmp_path / "w.safetensors"
    save_weights(net, path, {})
    os.utime(path, ns=(1, 1))
    save_weights(net, path, {})
    assert path.stat().st_mtime_ns == 1
    other = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    assert load_weights_file(other, path) == []
    assert equal(other, net)
    nn.init.zeros_(net[0].bias)
    save_weights(net, path, {})
    assert path.stat().st_mtime_ns > 1


def test_the_digest_is_that_of_the_bytes_and_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(make_net(), path, {"epoch": 1})
    assert weights_digest(path) == file_digest(path)
    for wrong, given in ((tmp_path / "none", "no such file"), (tmp_path, "a damaged or foreign file")):
        with pytest.raises(SettingError, match=rf"{wrong}: got {given}; accepted: safetensors weights"):
            weights_digest(wrong)
