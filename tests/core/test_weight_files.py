"""Weights from outside: what fits is loaded, what does not is named, what wants to run is not run."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.weight_files import load_weights_file, read_weights, save_weights, weights_digest
from softdefend.models import normalize


def make_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))


def equal(net: nn.Module, other: nn.Module) -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def with_training(s):
    """Weights side by side with all that a training continues from."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2, 1, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
    return {**s, "optimizer": optimizer, "epoch": 3}


TOOK = "took 'state_dict' from the file"


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: s, []),
        (lambda s: {"state_dict": s, "epoch": 3, "best": 0.5}, [TOOK]),
        (lambda s: {"model": s, "optimizer": {"lr": 0.1}}, ["took 'model' from the file"]),
        (lambda s: {"model_state_dict": s}, ["took 'model_state_dict' from the file"]),
        (lambda s: {"params": s}, ["took 'params' from the file"]),
        (lambda s: {"net": {"state_dict": s}}, ["took 'net' from the file", TOOK]),
        (lambda s: {"state_dict": s, "model": dict(s)}, [TOOK]),
        (with_training, ["left out optimizer, epoch"]),
        (lambda s: renamed(s, "module."), ["removed the prefix 'module.'"]),
        (lambda s: renamed(s, "backbone."), ["removed the prefix 'backbone.'"]),
        (
            lambda s: {"state_dict": renamed(s, "_orig_mod.module.")},
            [TOOK, "removed the prefix '_orig_mod.'", "removed the prefix 'module.'"],
        ),
        (
            lambda s: {"state_dict": {**renamed(s, "model."), "loss.weight": torch.zeros(3)}, "loops": {}},
            [TOOK, "removed the prefix 'model.'", "left out loss.weight"],
        ),
        (
            lambda s: {name.replace("3.", "3.module."): value for name, value in s.items()},
            ["matched names without 'module' and '_orig_mod' inside"],
        ),
        (
            lambda s: {n: v for n, v in s.items() if not n.endswith("num_batches_tracked")},
            ["kept the network's own 1.num_batches_tracked"],
        ),
    ],
    ids=[
        "flat",
        "state_dict",
        "model",
        "model_state_dict",
        "params",
        "nested twice",
        "saved twice",
        "optimizer beside",
        "module",
        "a name of its own",
        "compiled",
        "lightning",
        "wrapped inside",
        "no counts",
    ],
)
def test_weights_are_found_and_their_names_repaired(wrap, said, tmp_path):
    theirs, net = make_net(1), make_net(2)
    theirs[1].running_mean += 1
    torch.save(wrap(theirs.state_dict()), tmp_path / "weights.pt")
    assert load_weights_file(net, tmp_path / "weights.pt") == said
    assert equal(net, theirs)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, AveragedModel, lambda net: nn.DataParallel(torch.compile(net))],
    ids=["parallel", "compiled", "averaged", "both"],
)
def test_what_torch_wraps_is_read_into_the_plain_network_and_the_other_way_round(wrap, tmp_path):
    theirs, net = make_net(1), make_net(2)
    torch.save(wrap(theirs).state_dict(), tmp_path / "weights.pt")
    load_weights_file(net, tmp_path / "weights.pt")
    assert equal(net, theirs)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    wrapped = wrap(make_net(2))
    load_weights_file(wrapped, tmp_path / "weights.pt")
    assert all(map(torch.equal, wrapped.parameters(), theirs.parameters()))


def test_what_torch_takes_without_counts_of_batches_is_taken(tmp_path):
    """torch's own strict load is the judge of a state without metadata, as files from before 0.4.1 are."""
    theirs = make_net(1)
    old = {n: v for n, v in theirs.state_dict().items() if not n.endswith("num_batches_tracked")}
    make_net(2).load_state_dict(dict(old), strict=True)
    torch.save(old, tmp_path / "weights.pt")
    load_weights_file(make_net(2), tmp_path / "weights.pt")
    del old["1.running_mean"]
    torch.save(old, tmp_path / "weights.pt")
    with pytest.raises(SettingError, match=r"no 1\.running_mean; accepted"):
        load_weights_file(make_net(2), tmp_path / "weights.pt")


def test_of_two_sets_of_weights_none_is_taken_unless_it_is_named(tmp_path):
    path, live, mean = tmp_path / "weights.pt", make_net(1), make_net(3)
    torch.save({"model": live.state_dict(), "ema": renamed(mean.state_dict(), "module.")}, path)
    with pytest.raises(SettingError) as caught:
        load_weights_file(make_net(2), path)
    assert str(caught.value) == (
        f"{path}: got 2 sets of weights that fit: 'model', 'ema.module'; "
        "accepted: a file with one of them (softdefend evaluate chooses by --weights_key)"
    )
    for key, theirs in (("model", live), ("ema.module", mean)):
        net = make_net(2)
        load_weights_file(net, path, key=key)
        assert equal(net, theirs)
    with pytest.raises(SettingError, match="got no weights under 'other'; accepted"):
        load_weights_file(make_net(2), path, key="other")


def test_normalization_in_the_network_may_stay_and_in_the_file_may_not_be_lost(tmp_path):
    theirs, net, path = make_net(1), make_net(2), tmp_path / "weights.pt"
    torch.save(theirs.state_dict(), path)
    behind = normalize(net, [0.5], [0.25])
    said = load_weights_file(behind, path)
    assert said == ["kept the network's own normalize.mean, normalize.std"]
    assert equal(net, theirs)
    assert float(behind.normalize.std) == 0.25
    torch.save(normalize(theirs, [0.1], [0.3]).state_dict(), path)
    assert load_weights_file(behind, path) == []
    assert float(behind.normalize.std) == float(torch.tensor(0.3))
    with pytest.raises(SettingError, match=r"behind normalize\.mean and normalize\.std, which the network"):
        load_weights_file(net, path)


@pytest.mark.parametrize(
    ("mean", "std"),
    [("mu", "sigma"), ("normalizer.new_mean", "normalizer.new_std"), ("attacker._mean", "attacker._std")],
)
def test_a_normalization_of_any_name_in_the_file_may_not_be_lost(mean, std, tmp_path):
    """Names in the files of RobustBench's networks and of the library robustness."""
    theirs, net, path = make_net(1), make_net(2), tmp_path / "weights.pt"
    beside = {mean: torch.full((1, 1, 1), 0.1), std: torch.full((1, 1, 1), 0.3)}
    torch.save({**renamed(theirs.state_dict(), "model."), **beside}, path)
    with pytest.raises(SettingError, match=rf"trained behind {mean} and {std}, which the network lacks;"):
        load_weights_file(net, path)
    with pytest.raises(SettingError, match=r"where the network has normalize\.mean and normalize\.std;"):
        load_weights_file(normalize(net, [0.1], [0.25]), path)
    behind = normalize(net, [0.1], [0.3])
    assert load_weights_file(behind, path)[-1] == "kept the network's own normalize.mean, normalize.std"
    assert equal(behind.net, theirs)


@pytest.mark.parametrize("value", [torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to_sparse()])
def test_weights_of_another_kind_do_not_fit(value, tmp_path):
    torch.save({**make_net().state_dict(), "3.bias": value}, tmp_path / "weights.pt")
    with pytest.raises(SettingError, match=r"other shapes: 3\.bias \[3\] torch\.\w+ torch"):
        load_weights_file(make_net(), tmp_path / "weights.pt")


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
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    assert load_weights_file(net, tmp_path / "weights.pt") == []
    assert equal(net, theirs)
    net = Wrapped(2)
    torch.save(renamed(theirs.state_dict(), "module."), tmp_path / "weights.pt")
    assert load_weights_file(net, tmp_path / "weights.pt") == ["removed the prefix 'module.'"]
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
    state = {name.replace(".", "-"): value for name, value in make_net().state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        SettingError, match=r"no 0\.weight, 0\.bias, 1\.weight, 1\.bias and 4 more; unexpected"
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
        (lambda p: torch.save({"epoch": 3, "x": torch.zeros(1)}, p), "weights that do not fit"),
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
    assert re.search(rf"{path}: got {given}[^;]*(; unexpected x)?; accepted: ", str(caught.value))


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
