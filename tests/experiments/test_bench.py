"""The step benchmark in miniature; its arithmetic against counts made by hand."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.experiments.bench import BenchSettings, bench_train, format_row
from softdefend.experiments.timed_step import ImageShape, forward_flops
from softdefend.models import NetSettings

FEW = {"presets": ("pgd-at",), "batch_sizes": (4,), "steps": 1, "repeats": 1, "warmup": 1}
QUICK = ["--runtime.device", "cpu", "--attack.steps", "1", "--optim.epochs", "2", "--runtime.threads", "1"]


class Flat(nn.Module):
    """Seven classes of images of 12 pixels square, and of no others; remembers the batches it has seen."""

    seen: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 12 * 12, 7)

    def forward(self, image):
        self.seen.add(len(image))
        return self.layer(image.flatten(1))


class Counting(nn.Module):
    """Counts its calls in a Python number, which a compiled program is made for."""

    def __init__(self, num_classes) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, num_classes), 0

    def forward(self, image):
        self.calls += 1
        return self.layer(image.mean((2, 3))) * self.calls


class Attention(nn.Module):
    """Self-attention of the pixels of an image, each three numbers."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, image):
        tokens = image.flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)) - 1


@pytest.fixture(autouse=True)
def nets(monkeypatch):
    """The networks above as a module of the user's."""
    module = ModuleType("test_bench_nets")
    for net in (Flat, Counting, Attention):
        setattr(module, net.__name__, net)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def without_code(monkeypatch):
    """torch.compile finds the graphs and makes no code of them, which takes minutes on a CPU."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


def test_rows_hold_what_was_asked_for_and_their_arithmetic_closes(tmp_path, caplog):
    caplog.set_level("INFO", logger="softdefend")
    settings = BenchSettings(
        nets=("small_cnn",),
        presets=("pgd-at", "sglr-reference"),
        batch_sizes=(2, 4),
        steps=2,
        repeats=1,
        warmup=1,
        images=100,
        output=str(tmp_path / "step.json"),
    )
    result = bench_train(settings, QUICK)
    assert json.loads((tmp_path / "step.json").read_text()) == result
    assert [(r["recipe"], r["batch_size"]) for r in result["rows"]] == [
        ("pgd-at", 2),
        ("sglr-reference", 2),
        ("pgd-at", 4),
        ("sglr-reference", 4),
    ]
    flops = forward_flops(NetSettings("small_cnn"), ImageShape())
    for row in result["rows"]:
        forwards = {"pgd-at": 2 + 3, "sglr-reference": 2 + 3 + 1}[row["recipe"]]
        assert row["tflop"] == pytest.approx(forwards * flops * row["batch_size"] / 1e12, abs=1e-5)
        share = row["tflop"] / (row["ms"] / 1e3) / result["ceiling_tflops"]
        assert row["ceiling_share"] == pytest.approx(share, rel=0.3, abs=1e-3)  # rounded figures
        assert row["seconds_per_epoch"] == pytest.approx(
            row["ms"] * (100 // row["batch_size"]) / 1e3, rel=0.01
        )
        assert "ratio" not in row
        assert format_row(row) in caplog.messages


def test_resnet18s_forward_is_the_1_11_gflop_that_the_field_counts():
    """0.556 G multiply-adds on 32x32 (He et al.'s ResNet-18 with a 3x3 stem), two operations each."""
    assert forward_flops(NetSettings("resnet18"), ImageShape()) == pytest.approx(1.11e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "gmacs"), [("resnet50", 4.1), ("convnext_tiny", 4.5), ("vit_small_patch16_224", 4.6)]
)
def test_timms_networks_take_the_published_multiply_adds_at_224_pixels(name, gmacs):
    """As torchvision states them for ResNet-50, and the papers of ConvNeXt and DeiT for the others. Where
    timm is installed."""
    try:
        importlib.import_module("timm")
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    flops = forward_flops(NetSettings(f"timm:{name}"), ImageShape(224, 1000))
    assert flops / 2e9 == pytest.approx(gmacs, abs=0.05)


def test_twice_the_size_takes_four_times_the_operations():
    """All but those of the last layer, whose size is that of the classes."""
    small, large = (forward_flops(NetSettings("resnet18"), ImageShape(size, 100)) for size in (16, 32))
    head = 2 * 512 * 100
    assert large - head == 4 * (small - head)


def test_attention_counts():
    """Two products of 64 x 64 tokens over three numbers each."""
    flops = forward_flops(NetSettings("test_bench_nets:Attention"), ImageShape(8, 3))
    assert flops == 2 * (2 * 64 * 64 * 3)


def test_images_have_the_size_and_the_classes_asked_for(tmp_path):
    settings = BenchSettings(
        nets=("test_bench_nets:Flat",), image_size=12, classes=7, **{**FEW, "batch_sizes": (130,)}
    )
    Flat.seen.clear()
    result = bench_train(settings, QUICK)
    assert (result["image_size"], result["classes"]) == (12, 7)
    assert forward_flops(NetSettings("test_bench_nets:Flat"), settings.shape) == 2 * 432 * 7
    assert max(Flat.seen) == 130  # a batch is not divided


def test_other_images_than_a_network_takes_are_refused_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr("softdefend.experiments.bench.measure_ceiling", None)
    for shape in ({"image_size": 13, "classes": 7}, {"image_size": 12, "classes": 8}):
        with pytest.raises(SettingError, match=r"^net: got a network that"):
            bench_train(BenchSettings(nets=("test_bench_nets:Flat",), **shape), QUICK)


@pytest.mark.parametrize(("drop_last", "sizes"), [("true", 1), ("false", 2)])
def test_a_compiled_step_is_compiled_in_the_first_epoch_alone(without_code, caplog, drop_last, sizes):
    """One graph for the attack and one for the update, for each size of batch."""
    words = ["--runtime.compile", "true", "--optim.drop_last", drop_last, "--validate.attack.steps", "1"]
    settings = BenchSettings(nets=("small_cnn",), image_size=8, against_eager=True, **FEW)
    caplog.set_level("INFO", logger="softdefend")
    (row,) = bench_train(settings, [*QUICK, *words])["rows"]
    assert (row["compiled"], row["captured"], row["recompiled_after_warmup"]) == (2 * sizes, 0, 0)
    assert row["eager_ratio"] == pytest.approx(row["eager_ms"] / row["ms"], rel=0.01)
    assert "times the eager step" in caplog.messages[-1]


def test_what_is_compiled_again_is_counted(without_code, caplog):
    """The two forwards of the step that is timed, and of that after the first epoch."""
    words = ["--runtime.compile", "true", "--validate.attack.steps", "1"]
    settings = BenchSettings(nets=("test_bench_nets:Counting",), image_size=8, **FEW)
    caplog.set_level("INFO", logger="softdefend")
    (row,) = bench_train(settings, [*QUICK, *words])["rows"]
    assert (row["compiled"], row["recompiled_after_warmup"]) == (2, 4)
    assert "4 programs made after the first epoch" in caplog.messages[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")
def test_a_captured_step_is_captured_in_the_first_epoch_alone():
    """Once for each size of batch; so is each of the two graphs in it compiled."""
    words = ["--runtime.fused", "false", "--optim.drop_last", "false", "--attack.steps", "1"]
    settings = BenchSettings(nets=("small_cnn",), against_eager=True, **{**FEW, "batch_sizes": (16,)})
    (row,) = bench_train(settings, ["--runtime.device", "cuda", *words])["rows"]
    assert (row["compiled"], row["captured"], row["recompiled_after_warmup"]) == (4, 2, 0)


def test_an_eager_step_is_not_timed_against_itself():
    with pytest.raises(SettingError, match=r"bench\.against_eager: got true .* runtime\.compile true"):
        bench_train(BenchSettings(nets=("small_cnn",), against_eager=True), QUICK)


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"batch_sizes": (8, 2)}, ["--optim.accumulate", "4"], r"optim\.accumulate: got 4"),
        ({"presets": ("sglr-reference", "pgd-at")}, ["--label.start", "0.5"], "start"),
        ({"output": "/proc/none/step.json"}, [], "/proc/none/step.json: got No such file"),
    ],
    ids=["parts of the second batch", "a setting that one recipe lacks", "nowhere to write"],
)
def test_what_does_not_fit_a_later_row_is_refused_before_the_first(monkeypatch, settings, words, message):
    monkeypatch.setattr("softdefend.experiments.bench._time_ours", lambda *_: pytest.fail("a step was timed"))
    with pytest.raises(SettingError, match=message):
        bench_train(BenchSettings(nets=("small_cnn",), **{**FEW, **settings}), [*QUICK, *words])


def test_the_references_networks_get_no_large_images(tmp_path):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "loss.py").touch()
    BenchSettings(reference=str(tmp_path), image_size=32)
    with pytest.raises(SettingError, match=r"bench\.image_size: got 64; accepted: 32 with bench\.reference"):
        BenchSettings(reference=str(tmp_path), image_size=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, r"bench\.image_size: got 0"),
        ({"image_size": 10**6}, r"bench\.image_size: got 1000000"),
        ({"classes": 1}, r"bench\.classes: got 1"),
        ({"classes": 10**8}, r"bench\.classes: got 100000000"),
        ({"images": 127}, r"bench\.images: got 127; accepted: at least bench\.batch_sizes, here 128"),
        ({"steps": 0}, r"bench\.steps: got 0"),
        ({"batch_sizes": (128, 0)}, r"bench\.batch_sizes: got 0"),
        ({"presets": ("pgd-it",)}, "--preset: got 'pgd-it'"),
        ({"reference": "/nowhere"}, r"bench\.reference: got /nowhere"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        BenchSettings(**settings)
