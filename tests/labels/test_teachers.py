"""Teachers from folders, files and modules; what is wrong with one is a line that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.weight_files import to_bytes
from softdefend.labels.teachers import Teacher, image_channels, load_teacher, weights_digest
from softdefend.models import NetSettings, build

NET = NetSettings("small_cnn", width=4)


def make(k: int = 4, channels: int = 1, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(NET, num_classes=k, in_channels=channels, mean=[0.3] * channels, std=[0.2] * channels)


def images(channels: int = 1) -> torch.Tensor:
    return torch.rand(3, channels, 8, 8, generator=stream(0, "images"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it: two checkpoints of different weights and example images."""
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"net": {"name": "small_cnn", "width": 4}}))
    for seed, which in enumerate(("best", "last")):
        save_file(
            make(seed=seed).state_dict(),
            folder / f"{which}.safetensors",
            {"softdefend": json.dumps({"epoch": seed})},
        )
    save_file({"image": torch.zeros(2, 1, 8, 8)}, folder / "evaluation" / "last-examples.safetensors")
    return folder


def assert_same(net: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(net(images()), other.eval()(images()))


def test_a_run_folder_gives_its_best_weights_and_a_file_in_it_its_own(run: Path):
    for given, seed in ((run, 0), (run / "best.safetensors", 0), (run / "last.safetensors", 1)):
        loaded = load_teacher(str(given), 4, 1)
        assert_same(loaded.net, make(seed=seed))
        assert not any(module.training for module in loaded.net.modules())
        assert not any(p.requires_grad for p in loaded.net.parameters())
        assert loaded.shape == (1, 8, 8)


def test_loading_draws_no_random_number(run: Path):
    before = torch.get_rng_state()
    load_teacher(str(run), 4, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_any_file_of_weights_with_the_settings_of_its_network(tmp_path: Path):
    net = make(seed=3)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pt")
    loaded = load_teacher(Teacher(str(tmp_path / "a.pt"), NET), 4, 1)
    assert_same(loaded.net, net)
    assert loaded.shape is None
    # without a normalizing layer: the bare network, on pixels as they are
    torch.save(net.get_submodule("net").state_dict(), tmp_path / "bare.pt")
    assert_same(load_teacher(Teacher(str(tmp_path / "bare.pt"), NET), 4, 1).net, net.get_submodule("net"))


def test_a_file_that_holds_itself_and_the_same_again_and_again_is_read_once(tmp_path: Path):
    held: dict[str, object] = {"state_dict": make().state_dict()}
    for _ in range(40):
        held = {"one": held, "other": held}
    content = {"state_dict": make().state_dict(), "beside": held}
    content["itself"] = content
    torch.save(content, tmp_path / "weights.pt")
    assert_same(load_teacher(Teacher(str(tmp_path / "weights.pt"), NET), 4, 1).net, make())


def test_a_module_is_copied_and_left_alone():
    net = make().train()
    loaded = load_teacher(net, 4, 1)
    assert_same(loaded.net, make())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        next(net.parameters()).zero_()
    assert_same(loaded.net, make())


def test_digests_tell_weights_names_and_shapes_apart():
    net = make()
    assert weights_digest(net).shape == (32,)
    assert torch.equal(weights_digest(net), weights_digest(make()))
    others = [make(seed=1), make(k=5), nn.Sequential(net)]
    changed = make()
    with torch.no_grad():
        changed.get_buffer("net.features.1.running_mean")[0] += 1e-7
    for other in [*others, changed]:
        assert not torch.equal(weights_digest(net), weights_digest(other))


def test_channels_are_read_off_the_first_convolution():
    assert [image_channels(make(channels=c)) for c in (1, 3)] == [1, 3]
    assert image_channels(nn.Linear(2, 2)) == 3


def refused(given: object, *said: str, k: int = 4, channels: int = 1) -> None:
    with pytest.raises(SettingError) as raised:
        load_teacher(given, k, channels)
    for fragment in said:
        assert fragment in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_a_teacher_is_refused_in_one_line(run: Path, tmp_path: Path):
    refused(str(tmp_path / "nowhere"), "nowhere", "no such file or folder", "a run folder")
    refused(Teacher(str(tmp_path / "nowhere.pt"), NET), "nowhere.pt", "no such file")
    refused(str(tmp_path), str(tmp_path), "no run folder", "a run folder")
    refused(str(run), "other shapes", "net.linear.weight [4, 8] for [10, 8]", k=10)
    refused(str(run), "other shapes", "normalize.mean [1, 1, 1, 1] for [1, 3, 1, 1]", channels=3)
    refused(Teacher(str(run), NetSettings("resnet18")), "weights that do not fit")
    refused(7, "a int", "a path")
    (run / "best.safetensors").write_bytes((run / "last.safetensors").read_bytes()[:900])
    refused(str(run), "best.safetensors", "damaged or foreign")
    content = bytearray(to_bytes(dict(make().state_dict()), {}))
    content[-9] ^= 1
    (run / "best.safetensors").write_bytes(content)
    refused(str(run), "best.safetensors", "an altered file")
    (run / "best.safetensors").unlink()
    refused(str(run), "best.safetensors", "no such file")
    (run / "config.yaml").write_text("name: mine\n")
    refused(str(run / "last.safetensors"), "trained from Python")
    (run / "config.yaml").write_text("net: {name: small_cnn, depth: 3}\n")
    refused(str(run / "last.safetensors"), "config.yaml", "depth")
    (run / "config.yaml").write_text("net: small_cnn\n")
    refused(str(run / "last.safetensors"), "config.yaml", "small_cnn")


def test_nothing_in_a_file_is_executed(tmp_path: Path):
    class Bad:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": Bad()}, tmp_path / "bad.pt")
    refused(Teacher(str(tmp_path / "bad.pt"), NET), "a pickle that would run")
    assert not (tmp_path / "touched").exists()
