"""Fine-tuning: weights from a file, with a last layer for other classes drawn anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.weight_files import save_weights
from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train
from softdefend.models import NetSettings, build


def make(
    path: Path | str | None = None, classes: int = 5, mean: float = 0.5, seed: int = 0, **more
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = NetSettings("small_cnn", width=4, pretrained=None if path is None else str(path))
        return build(settings, num_classes=classes, in_channels=1, mean=[mean], std=[0.2], **more)


@pytest.fixture
def weights(tmp_path) -> Path:
    """Of a network for seven classes, as a run writes them."""
    save_weights(make(classes=7, mean=0.1, seed=1), tmp_path / "seven.safetensors", {})
    return tmp_path / "seven.safetensors"


@pytest.mark.parametrize("form", ["run", "bare", "torch"])
def test_everything_but_the_last_layer_is_the_files(weights, tmp_path, form, caplog):
    source = make(classes=7, mean=0.1, seed=1)
    if form == "bare":  # without the normalization in front, as other people's files are
        save_file(dict(source.net.state_dict()), weights := tmp_path / "bare.safetensors")
    if form == "torch":
        torch.save({"model": source.state_dict(), "epoch": 3}, weights := tmp_path / "theirs.pt")
    with caplog.at_level("INFO"):
        net = make(weights, seed=2)
    fresh, theirs = make(seed=2).state_dict(), source.state_dict()
    for name, value in net.state_dict().items():
        own = name.startswith("net.linear") or (form == "bare" and name.startswith("normalize"))
        assert torch.equal(value, (fresh if own else theirs)[name]), name
    assert "linear.weight of 7 classes drawn anew for 5" in caplog.text


def test_a_file_for_as_many_classes_is_taken_as_it_is(weights):
    source = make(classes=7, mean=0.1, seed=1).state_dict()
    assert all(torch.equal(value, source[name]) for name, value in make(weights, 7).state_dict().items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"net\.pretrained: got .*none\.safetensors \(no such file\)"),
        ({"other": torch.zeros(3)}, r"net\.pretrained: got .*given\.safetensors"),
    ],
    ids=["missing", "another network"],
)
def test_files_that_do_not_fit_are_one_line(tmp_path, content, said):
    path = tmp_path / ("none.safetensors" if content is None else "given.safetensors")
    if content is not None:
        save_file(content, path)
    with pytest.raises(SettingError, match=said):
        make(path)


def test_the_word_timm_is_for_networks_of_timm():
    with pytest.raises(SettingError, match=r"net\.pretrained: got timm with net\.name resnet18"):
        NetSettings("resnet18", pretrained="timm")
    assert NetSettings("timm:resnet18", pretrained="timm").asks_timm
    assert not NetSettings("timm:resnet18").asks_timm


def words(folder: Path, *more: str) -> list[str]:
    sizes = ["--data.train_size=32", "--data.validation=10", "--data.test_fraction=0.02"]
    quick = ["--attack.steps=1", "--validate.attack.steps=1", "--evaluate.attacks=[fgsm]", "--progress=false"]
    net = ["--net.name=small_cnn", "--net.width=4", "--optim.epochs=1", "--optim.batch_size=16"]
    return [*sizes, *quick, *net, f"--folder={folder}", "--runtime.device=cpu", *more]


def test_a_run_begins_with_the_files_weights_and_needs_it_no_more_to_continue(weights, tmp_path):
    """With a rate near zero what is trained stays where it began."""
    arguments = words(tmp_path / "run", f"--net.pretrained={weights}", "--optim.lr=1e-12")
    train(resolve(arguments))
    theirs = make(classes=7, mean=0.1, seed=1).state_dict()
    weights.unlink()
    train(resolve(arguments))
    last = load_file(tmp_path / "run" / "last.safetensors")
    torch.testing.assert_close(last["net.features.0.weight"], theirs["net.features.0.weight"])
    assert last["net.linear.weight"].shape[0] == 10


def test_two_starts_are_one_too_many(weights, tmp_path):
    arguments = words(tmp_path / "run", f"--net.pretrained={weights}", f"--init_from={weights}")
    with pytest.raises(SettingError, match=r"net\.pretrained: got .* beside init_from"):
        train(resolve(arguments))
    assert not (tmp_path / "run").exists()
