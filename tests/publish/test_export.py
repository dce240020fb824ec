"""Exported files, run by other programs: the same logits, and what of the robust accuracy they keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from softdefend import SettingError, ThreatModel, from_pretrained
from softdefend.cli.main import main
from softdefend.data import DataSettings, load
from softdefend.evaluation.robustbench_networks import load_robustbench
from softdefend.models import normalize
from softdefend.models.resnet import ResNet18
from softdefend.publish import check_export
from softdefend.publish.check_export import ExportSettings, export_run, measure
from softdefend.publish.export import write_network

SIZE = ["--size", "40", "--attacks", "fgsm", "--device", "cpu"]

WITHOUT_US = """
import sys
sys.modules["softdefend"] = None  # an import of it fails
import warnings
warnings.simplefilter("ignore")
import torch
kind, path, images, output = sys.argv[1:]
net = torch.jit.load(path) if kind == "torchscript" else torch.export.load(path).module()
with torch.no_grad():
    torch.save(net(torch.load(images)), output)
"""


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@pytest.fixture
def images() -> Tensor:
    return load(DataSettings("digits", validation=32, train_size=64)).test.images[:7].float() / 255


def test_onnx_gives_the_networks_logits_at_any_batch(
    published: Path, evaluated: Path, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    assert main(["export", str(evaluated), "--output", str(path), *SIZE]) == 0
    with torch.no_grad():
        expected = from_pretrained(published)(images)
    for n in (1, 2, 7):
        logits = run_onnx(path, images[:n])
        torch.testing.assert_close(logits, expected[:n], rtol=0, atol=1e-4)
    about = json.loads((tmp_path / "net.onnx.json").read_text())
    assert about["n"] == 40
    assert about["largest_difference"] < 1e-4
    assert about["clean"]["file"] == about["clean"]["network"]
    assert about["robust"]["file"] == about["robust"]["network"]
    assert about["robust"]["file"]["count"] <= about["clean"]["file"]["count"]


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_torchs_own_formats_run_without_this_package(
    kind: str, published: Path, evaluated: Path, images: Tensor, tmp_path: Path
) -> None:
    suffix = ".pt2" if kind == "torch-export" else ".pt"
    path = tmp_path / f"net{suffix}"
    assert main(["export", str(evaluated), "--format", kind, "--output", str(path), *SIZE]) == 0
    torch.save(images, tmp_path / "images.pt")
    words = [kind, str(path), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_US, *words], check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        expected = from_pretrained(published)(images)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-4)


def test_an_export_by_other_settings_leaves_a_copy(evaluated: Path, tmp_path: Path) -> None:
    words = ["export", str(evaluated), "--format", "torchscript", "--output", str(tmp_path / "net.pt")]
    for _ in range(2):
        assert main([*words, *SIZE]) == 0
    assert not (tmp_path / "earlier").exists()
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*words, "--size", "8", "--which", "last", *SIZE[2:]]) == 0
    assert json.loads((tmp_path / "net.pt.json").read_text())["n"] == 8
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier" / "1").iterdir()} == first


def test_int8_says_what_it_costs(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against counts by hand: the adversarial images are made here, and tried by onnxruntime alone."""
    path = tmp_path / "small.onnx"
    words = ["--quantize", "int8", "--output", str(path), "--size", "all", *SIZE[2:]]
    assert main(["export", str(evaluated), *words]) == 0
    about = json.loads((tmp_path / "small.onnx.json").read_text())
    assert "found on the network" in capsys.readouterr().out
    graph = onnx.load(str(path)).graph
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= {node.op_type for node in graph.node}
    weights = [one for one in graph.initializer if len(one.dims) == 4 and one.dims[0] > 1]
    assert weights
    assert all(one.data_type == onnx.TensorProto.INT8 for one in weights)
    bundle = load(DataSettings("digits", validation=32, train_size=64))
    image, label = bundle.test.images.float() / 255, bundle.test.labels
    out = tmp_path / "hub"
    assert main(["push", str(evaluated), "me/x", "--dry_run", "--output", str(out)]) == 0
    net = from_pretrained(out)
    image.requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(image), label, reduction="sum"), image)
    adversarial = (image + 4 / 255 * gradient.sign()).clamp(0, 1).detach()
    clean = run_onnx(path, image.detach()).argmax(1) == label
    kept = clean & (run_onnx(path, adversarial).argmax(1) == label)
    assert about["n"] == len(label)
    assert about["clean"]["file"]["count"] == int(clean.sum())
    assert abs(about["robust"]["file"]["count"] - int(kept.sum())) <= 1  # a sign at the edge of rounding
    assert about["largest_difference"] > 1e-4


def test_several_attacks_leave_what_withstands_all(evaluated: Path, tmp_path: Path) -> None:
    counts = []
    for attacks in (("fgsm",), ("fgsm", "pgd-20")):
        settings = ExportSettings("torchscript", size="all", attacks=attacks)
        _, about = export_run(evaluated, settings, tmp_path / "x.pt", device="cpu")
        counts.append(about["robust"]["file"]["count"])
    assert counts[1] <= counts[0]


def test_robustbench_names_come_back_bit_for_bit(tmp_path: Path) -> None:
    net = normalize(ResNet18(10, 3), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]).eval()
    write_network(net, torch.zeros(2, 3, 8, 8), tmp_path / "net.pt", "robustbench")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert {"mu", "sigma", "conv1.weight", "layer4.1.bn2.running_var", "linear.bias"} <= state.keys()
    back, _ = load_robustbench("ResNet-18", tmp_path / "net.pt", num_classes=10, in_channels=3)
    for name, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


class Branches(nn.Module):
    """Has a branch on its input, which a trace would lose."""

    def forward(self, image: Tensor) -> Tensor:
        logits = image.flatten(1)[:, :10]
        return -logits if logits.sum() > 1 else logits


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "torch-export"])
def test_a_network_that_cannot_be_traced_is_one_line(kind: str, tmp_path: Path) -> None:
    said = f"^--format: got {kind} of Branches, which cannot be traced"
    with pytest.raises(SettingError, match=said) as caught:
        write_network(Branches().eval(), torch.rand(2, 1, 8, 8), tmp_path / "net", kind)
    assert "\n" not in str(caught.value)


def test_a_file_that_computes_something_else_is_refused(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = check_export.open_exported

    def wrong(*args: object, **more: object) -> Callable[[Tensor], Tensor]:
        run = right(*args, **more)
        return lambda image: run(image) + 0.01 * torch.arange(10)

    monkeypatch.setattr(check_export, "open_exported", wrong)
    settings = ExportSettings("torchscript", size=20)
    with pytest.raises(SettingError, match=r"^--format: got torchscript whose logits differ by up to 0.09"):
        export_run(evaluated, settings, tmp_path / "out" / "x.pt", device="cpu")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_knows_one_batch_size_only_is_refused(evaluated: Path) -> None:
    bundle = load(DataSettings("digits", validation=32, train_size=64))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()

    def run(image: Tensor) -> Tensor:
        logits: Tensor = net(image) + len(image)
        return logits

    settings, cpu = ExportSettings(size=20), torch.device("cpu")
    with pytest.raises(SettingError, match="depend on the batch"):
        measure(net, run, bundle, ThreatModel(), settings, cpu)


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(
    missing: str, refused, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    words = ["export", str(evaluated), "--output", str(tmp_path / "x.onnx"), *SIZE]
    refused(words, "--format", f"onnx without {missing}", "pip install 'softdefend[export]'")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("words", "setting", "given", "accepted"),
    [
        (["--format", "tflite"], "--format", "'tflite'", "onnx, torchscript"),
        (["--quantize", "int4"], "--quantize", "'int4'", "int8"),
        (
            ["--quantize", "int8", "--format", "torchscript"],
            "--quantize",
            "with --format torchscript",
            "onnx",
        ),
        (["--format", "robustbench"], "--format", "robustbench of", "a built-in residual network"),
        (["--which", "first"], "--which", "'first'", "best or last"),
        (["--attacks", "nothing"], "attacks", "nothing", "pgd"),
        (["--size", "0"], "--size", "0", "1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_settings_are_refused(
    words, setting, given, accepted, refused, evaluated: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "x.pt"
    refused(["export", str(evaluated), "--output", str(path), *words], setting, given, accepted)
    assert not path.exists()
