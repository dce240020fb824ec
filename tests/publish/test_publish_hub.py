"""Publishing on a stand-in of the hub, and loading from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from torch import nn

import softdefend
from hub_server import Hub
from softdefend import SettingError
from softdefend.cli.main import main
from softdefend.publish.network import RobustClassifier

# The hub's client uploads with an argument that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_is_pushed_comes_back_bit_for_bit(evaluated: Path, tmp_path: Path, hub: Hub) -> None:
    assert main(["push", str(evaluated), "me/digits", "--output", str(tmp_path / "out")]) == 0
    trained = (evaluated / "best.safetensors").read_bytes()
    assert hub.files["me/digits"]["model.safetensors"] == trained
    net = softdefend.from_pretrained("me/digits")
    assert not net.training
    assert net.state_dict().keys() == from_bytes(trained).keys()
    for name, value in from_bytes(trained).items():
        assert torch.equal(net.state_dict()[name], value)
    with torch.no_grad():
        # The first layer normalizes; the rest by hand, from torch's own functions.
        weights = from_bytes(trained)
        first = (IMAGES - weights["normalize.mean"]) / weights["normalize.std"]
        assert torch.equal(net(IMAGES), net[1](first))
    again = RobustClassifier.from_pretrained("me/digits")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))


def test_nothing_is_downloaded_twice(published: Path, hub: Hub) -> None:
    hub.files["me/digits"] = {path.name: path.read_bytes() for path in published.iterdir()}
    softdefend.from_pretrained("me/digits")
    softdefend.from_pretrained("me/digits")
    assert hub.downloads("model.safetensors") == [None]
    assert hub.downloads("training_curve.png") == []  # of no use for loading


def test_a_download_that_breaks_off_goes_on_where_it_stopped(published: Path, hub: Hub) -> None:
    hub.files["me/digits"] = {path.name: path.read_bytes() for path in published.iterdir()}
    hub.cut.add("model.safetensors")
    net = softdefend.from_pretrained("me/digits")
    half = len(hub.files["me/digits"]["model.safetensors"]) // 2
    first, second = hub.downloads("model.safetensors")
    assert first is None
    assert second == f"bytes={half // 256 * 256}-"  # by chunks of 256 bytes
    expected = load_file(published / "model.safetensors")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in expected.items())


def test_a_file_that_was_damaged_is_downloaded_again(published: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files["me/digits"] = {path.name: path.read_bytes() for path in published.iterdir()}
    softdefend.from_pretrained("me/digits")
    (kept,) = (tmp_path / "hub-cache").glob("models--me--digits/snapshots/*/model.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.resolve().write_bytes(content)
    net = softdefend.from_pretrained("me/digits")
    expected = load_file(published / "model.safetensors")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in expected.items())
    assert len(hub.downloads("model.safetensors")) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_hub_that_serves_other_bytes_is_refused(name: str, published: Path, hub: Hub) -> None:
    """Large files have sha256 as their name there, small ones git's sha1."""
    hub.files["me/digits"] = {path.name: path.read_bytes() for path in published.iterdir()}
    content = hub.files["me/digits"][name]
    hub.altered[name] = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    with pytest.raises(SettingError, match=f"me/digits, of which {name} does not have the hash"):
        softdefend.from_pretrained("me/digits")


def test_an_unknown_model_is_one_line(hub: Hub) -> None:
    with pytest.raises(SettingError, match=r"^model: got me/nothing .*; accepted: owner/name on the hub"):
        softdefend.from_pretrained("me/nothing")
    for address in ("nothing", "a/b/c", "me/../x", "./missing/folder"):
        with pytest.raises(SettingError, match=r"^model: got '"):
            softdefend.from_pretrained(address)


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_like_a_model_of_the_hub(published: Path, evaluated: Path) -> None:
    net = softdefend.from_pretrained(published)
    trained = load_file(evaluated / "best.safetensors")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in trained.items())


def test_loading_draws_no_random_numbers(published: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    softdefend.from_pretrained(published)
    assert torch.equal(torch.rand(2), expected)


def test_another_file_of_weights_is_refused(published: Path, evaluated: Path) -> None:
    (published / "model.safetensors").write_bytes((evaluated / "last.safetensors").read_bytes())
    with pytest.raises(SettingError, match=r"got sha256 .*; accepted: the published file, sha256"):
        softdefend.from_pretrained(published)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"net": {"name": "os:system"}}, "net.name: got os:system"),
        ({"net": {"name": "timm:hf-hub:me/x"}}, "net.name: got timm:hf-hub:me/x"),
        ({"net": {"name": "small_cnn", "depth": 3}}, "net.depth: got an unknown setting"),
        ({"net": "small_cnn"}, "net: got small_cnn"),
        ({"net": {"name": "resnet18", "pretrained": "/etc/passwd"}}, "weights that do not fit"),
        ({"num_classes": None}, "num_classes: got None"),
        ({"num_classes": 10**9}, "num_classes: got 1000000000"),
        ({"in_channels": "many"}, "in_channels: got 'many'"),
        ({"net": {"name": "small_cnn", "width": 5}}, "weights that do not fit: other shapes"),
        ({"sha256": "0" * 64}, "accepted: the published file, sha256 000000000000"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(change: dict, given: str, published: Path) -> None:
    path = published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SettingError, match=re.escape(given)):
        softdefend.from_pretrained(published)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_folder_of_something_else_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SettingError, match=r"accepted: .*softdefend push w"):
        softdefend.from_pretrained(tmp_path)


def test_the_networks_own_code_can_be_brought(published: Path, evaluated: Path) -> None:
    path = published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "net": {"name": "mine:make"}}))
    with pytest.raises(SettingError, match=r"from_pretrained net=NETWORK"):
        softdefend.from_pretrained(published)
    mine = RobustClassifier({"name": "small_cnn", "width": 4}, 10, 1)
    assert softdefend.from_pretrained(published, net=mine) is mine
    trained = load_file(evaluated / "best.safetensors")
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in trained.items())
    with pytest.raises(SettingError, match="weights that do not fit"):
        softdefend.from_pretrained(published, net=nn.Linear(2, 2))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_mixins_own_functions_work(normalize: bool, tmp_path: Path) -> None:
    net = RobustClassifier({"name": "preact_resnet18", "normalize": normalize}, 3, 1).eval()
    net.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    for back in (RobustClassifier.from_pretrained(saved), softdefend.from_pretrained(saved)):
        assert not back.training
        assert all(torch.equal(back.state_dict()[name], value) for name, value in net.state_dict().items())


# --- the card -----------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_measured(run_folder: Path, tmp_path: Path) -> None:
    result = json.loads((run_folder / "evaluation" / "best.json").read_text())
    last = json.loads((run_folder / "evaluation" / "last.json").read_text())
    audit = {"findings": [], "verdict": "suspicious", "summary": "One check failed."}
    audit |= {name: result[name] for name in ("epoch", "weights", "test_data", "norm", "eps")}
    (run_folder / "evaluation" / "best-audit.json").write_text(json.dumps(audit))
    folder = tmp_path / "out"
    assert main(["push", str(run_folder), "me/digits", "--dry_run", "--output", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert json.loads((folder / "audit.json").read_text()) == audit
    assert json.loads((folder / "evaluation.json").read_text()) == result
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["metrics"]) == (
        "softdefend",
        "image-classification",
        ["accuracy"],
    )
    assert {"adversarial-robustness", "linf"} <= set(data["tags"])
    assert [round(one.metric_value, 4) for one in card.data.eval_results] == [
        round(result[name]["rate"] if name in result else result["attacks"][name]["rate"], 4)
        for name in ("clean", "fgsm", "pgd-20", "worst")
    ]
    for name, rate in {"clean": result["clean"], "PGD-20": result["attacks"]["pgd-20"]}.items():
        low, high = (f"{100 * rate[end]:.2f}" for end in ("low", "high"))
        assert f"| {name} | {100 * rate['rate']:.2f} | {low} to {high} |" in card.text
    assert "**suspicious**. One check failed." in card.text
    clean = result["clean"]["rate"], last["clean"]["rate"]
    assert f"{100 * clean[1]:.2f} (difference {100 * (clean[0] - clean[1]):+.2f}) clean" in card.text
    assert "AutoAttack was not run" in card.text
    assert "stated no license" in card.text
    assert 'softdefend.from_pretrained("me/digits")' in card.text
    assert "arXiv 1706.06083" in card.text  # PGD-AT's paper
    assert (folder / "training_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_says_what_other_threats_leave(run_folder: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(run_folder), "--which", "best", "--curve_size", "0"]
    assert main([*words, "--norm", "l2", "--eps", "0.3", "--attacks", "pgd-3"]) == 0
    assert main([*words, "--norm", "l0", "--eps", "2", "--attacks", "sigma-zero-5", "sigma-zero-3"]) == 0
    folder = tmp_path / "published"
    assert main(["push", str(run_folder), "me/digits", "--dry_run", "--output", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    robust = []
    for name, shown in (
        ("best", "ℓ∞ perturbations of 4/255: FGSM, PGD-20"),
        ("best-l2-0.3", "ℓ₂ perturbations of 0.3: PGD-3"),
        ("best-l0-2", "ℓ₀ perturbations of 2: SIGMA-ZERO-5, SIGMA-ZERO-3"),
    ):
        table = pq.read_table(run_folder / "evaluation" / f"{name}.parquet")
        flags = [table[column].to_numpy() for column in table.column_names if column.endswith("/robust")]
        robust.append(np.all(flags, axis=0))
        assert f"| {shown} | {100 * robust[-1].mean():.2f} |" in text
    assert f"| all of these, image by image | {100 * np.all(robust, axis=0).mean():.2f} |" in text
    assert "The accuracies hold for these threats" in text
    l2 = ["--norm", "l2", "--eps", "0.3", "--attacks", "pgd-2", "--size", "20"]
    assert main([*words, *l2]) == 0
    assert main(["push", str(run_folder), "me/digits", "--dry_run", "--output", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "| ℓ₂ perturbations of 0.3: PGD-2, 20 images |" in text
    assert "all of these" not in text


def test_a_stated_license_is_in_front_matter_and_text(evaluated: Path, tmp_path: Path) -> None:
    words = ["push", str(evaluated), "me/x", "--dry_run", "--output", str(tmp_path), "--license", "mit"]
    assert main(words) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert "Weights: mit." in card.text


def test_no_path_of_the_publishers_machine_is_published(run_folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["data"]["cache"] = str(tmp_path / "secret-cache")
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "out"
    assert main(["push", str(run_folder), "me/x", "--dry_run", "--output", str(folder)]) == 0
    for path in folder.glob("*"):
        assert str(tmp_path).encode() not in path.read_bytes()
    training = yaml.safe_load((folder / "training.yaml").read_text())
    assert training["data"]["source"] == "digits"
    assert training["threat"] == {"norm": "linf", "eps": "4/255"}
    assert training["optim"] == config["optim"]


def test_a_dry_run_shows_the_card_and_asks_nobody(
    evaluated: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(evaluated), "me/x", "--dry_run", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").read_text() in said
    assert "model.safetensors" in said
    assert hub.asked == []


def test_what_cannot_be_published_is_refused(refused, run_folder: Path, tmp_path: Path, hub: Hub) -> None:
    run, out = str(run_folder), ["--output", str(tmp_path / "out")]
    refused(["push", run, "digits", *out], "address", "'digits'", "owner/name")
    refused(["push", run, "me/x", "--which", "first", *out], "--which", "'first'", "best or last")
    refused(["push", str(tmp_path), "me/x", *out], "run", str(tmp_path), "a run folder")
    evaluation = run_folder / "evaluation" / "best.json"
    content = evaluation.read_text()
    evaluation.unlink()
    refused(["push", run, "me/x", *out], "run", "without evaluation/best.json", f"softdefend evaluate {run}")
    evaluation.write_text(content)
    last = (run_folder / "last.safetensors").read_bytes()
    (run_folder / "best.safetensors").write_bytes(last)
    best = str(run_folder / "best.safetensors")
    refused(["push", run, "me/x", *out], best, "the weights 'last' of this run", "its weights 'best'")
    assert not (tmp_path / "out").exists()
    assert hub.asked == []


def test_an_upload_that_fails_is_one_line(
    refused, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("nobody there\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    words = ["push", str(evaluated), "me/x", "--output", str(tmp_path / "out")]
    refused(words, "address", "me/x (nobody there)", "hf auth login")
