"""Beside RobustBench's own code: its networks, its loader of checkpoints, its readers of ``model_info``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, Union

import pytest
import torch
from torch import Tensor, nn

import beside
from beside import definitions, load, needs
from softdefend.evaluation.robustbench import model_info
from softdefend.evaluation.robustbench_networks import load_robustbench
from softdefend.models import NetSettings, build
from softdefend.models.robustbench import choose_layout, names_there
from softdefend.models.wide_resnet import WideResNet
from softdefend.publish.export import write_network

REPOSITORY = "robustbench"
pytestmark = needs(REPOSITORY)

ARCHITECTURES = "robustbench/model_zoo/architectures"
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def theirs(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(REPOSITORY, f"{ARCHITECTURES}/{name}.py", monkeypatch)


def shaken(net: nn.Module) -> nn.Module:
    """With statistics and scales that no fresh network has."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point() and name not in ("mu", "sigma"):
                drawn = torch.rand(value.shape, generator=generator)
                moved = value + 0.2 * drawn * value.abs().mean()
                value.copy_(drawn + 0.5 if name.endswith("running_var") else moved)
    return net.eval()


def normalizing(module: type[nn.Module]) -> type[nn.Module]:
    """As ``Rice2020OverfittingNetL2`` and others wrap a network there."""

    class Net(module):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.register_buffer("mu", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))
            self.register_buffer("sigma", torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward((x - self.mu) / self.sigma)
            return logits

    return Net


CASES = {
    # Carmon et al.: WideResNet(depth=28, widen_factor=10, sub_block1=True) under state_dict with module.
    "WideResNet-28-2 with unused blocks": (
        "WideResNet-28-2",
        lambda m: m("wide_resnet").WideResNet(28, widen_factor=2, sub_block1=True),
    ),
    "WideResNet-34-1": ("WideResNet-34-1", lambda m: m("wide_resnet").WideResNet(34, widen_factor=1)),
    "WideResNet-34-1 that normalizes": (
        "WideResNet-34-1",
        lambda m: normalizing(m("wide_resnet").WideResNet)(depth=34, widen_factor=1),
    ),
    "DeepMind's, Swish": (
        "WideResNet-28-1-SiLU",
        lambda m: m("dm_wide_resnet").DMWideResNet(
            10, 28, 1, m("dm_wide_resnet").Swish, *cifar10(m("dm_wide_resnet"))
        ),
    ),
    "DeepMind's, SiLU, as deep as 70": (
        "WideResNet-70-1-SiLU",
        lambda m: m("dm_wide_resnet").DMWideResNet(10, 70, 1, nn.SiLU, *cifar10(m("dm_wide_resnet"))),
    ),
    "DeepMind's, ReLU": (
        "WideResNet-28-1-ReLU",
        lambda m: m("dm_wide_resnet").DMWideResNet(10, 28, 1, nn.ReLU, *cifar10(m("dm_wide_resnet"))),
    ),
    "DeepMind's PreActResNet-18": (
        "PreActResNet-18-SiLU",
        lambda m: m("dm_wide_resnet").DMPreActResNet(activation_fn=nn.SiLU),
    ),
    "ResNet-18": ("ResNet-18", lambda m: m("resnet").ResNet18()),
    "Rice et al.'s PreActResNet-18": (
        "PreActResNet-18",
        lambda m: normalizing(m("resnet").PreActResNet)(
            m("resnet").PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True
        ),
    ),
    "Rice et al.'s for CIFAR-100": (
        "PreActResNet-18",
        lambda m: m("resnet").PreActResNet(
            m("resnet").PreActBlock, [2, 2, 2, 2], bn_before_fc=True, out_shortcut=True
        ),
    ),
    "Wong et al.'s PreActResNet-18": ("PreActResNet-18", lambda m: m("resnet").PreActResNet18()),
}


def cifar10(module: ModuleType) -> tuple[Any, Any]:
    return module.CIFAR10_MEAN, module.CIFAR10_STD


@pytest.mark.parametrize("case", CASES)
def test_its_checkpoints_give_its_logits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, make = CASES[case]
    net = shaken(make(lambda name: theirs(name, monkeypatch)))
    saved = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": saved, "epoch": 200}, tmp_path / "model.pt")
    mine, _ = load_robustbench(architecture, tmp_path / "model.pt", num_classes=10, in_channels=3)
    with torch.no_grad():
        expected = net(IMAGES)
        torch.testing.assert_close(mine(IMAGES), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["WideResNet-28-10", "WideResNet-34-10", "WideResNet-70-16"])
@pytest.mark.parametrize("deepmind", [False, True], ids=["TRADES", "DeepMind"])
def test_the_published_sizes_have_its_names_and_shapes(
    name: str, deepmind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, widen = map(int, name.split("-")[1:])
    module = theirs("dm_wide_resnet" if deepmind else "wide_resnet", monkeypatch)
    with torch.device("meta"):
        made = choose_layout(f"{name}-SiLU" if deepmind else name, ["init_conv" if deepmind else "block1"])
        mine = made.build(10, 3)
    monkeypatch.setattr(Tensor, "normal_", lambda self, *_: self)  # its code draws on the meta device
    with torch.device("meta"):
        net = module.DMWideResNet(10, depth, widen) if deepmind else module.WideResNet(depth, 10, widen)
    names = names_there(mine)
    found = {names.get(key, key): value.shape for key, value in mine.state_dict().items()}
    assert found == {key: value.shape for key, value in net.state_dict().items()}


UTILS = "robustbench/utils.py"


def utilities(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its functions that load weights and read ``model_info``; the module itself imports what is not here."""
    enums = load(REPOSITORY, "robustbench/model_zoo/enums.py", monkeypatch)
    metrics = {enums.ThreatModel.L2: ("external", "autoattack_acc")}
    metrics[enums.ThreatModel.Linf] = metrics[enums.ThreatModel.L2]
    given: dict[str, Any] = {
        "BenchmarkDataset": enums.BenchmarkDataset,
        "ThreatModel": enums.ThreatModel,
        "ACC_FIELDS": metrics,
        "all_models": {},
        "OrderedDict": OrderedDict,
        "nn": nn,
        "torch": torch,
        "json": json,
        "os": os,
        "Path": Path,
        "dataclasses": dataclasses,
        "math": math,
        "Dict": dict,
        "Optional": Optional,
        "Union": Union,
        "__name__": "theirs_utils",
    }
    monkeypatch.setitem(sys.modules, "theirs_utils", ModuleType("theirs_utils"))  # which dataclasses look up
    names = (
        *("rm_substr_from_state_dict", "_safe_load_state_dict", "update_json", "ModelInfo"),
        *("list_available_models", "get_key", "_get_bibtex_entry", "get_leaderboard_bibtex"),
        "get_leaderboard_latex",
    )
    found = definitions(REPOSITORY, UTILS, *names, **given)
    return {**found, **{name: given[name] for name in ("BenchmarkDataset", "ThreatModel", "all_models")}}


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wide"])
def test_its_loader_takes_a_network_of_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``softdefend export --format robustbench`` writes, into its own classes by its own functions."""
    resnets = theirs("resnet", monkeypatch)
    rivals = {
        "resnet18": lambda: normalizing(resnets.ResNet)(resnets.BasicBlock, [2, 2, 2, 2]),
        "preact_resnet18": lambda: normalizing(resnets.PreActResNet)(
            resnets.PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True
        ),
        "wide": lambda: theirs("wide_resnet", monkeypatch).WideResNet(28, widen_factor=1),
    }
    mine = WideResNet(10, 3, 28, 1)
    if name != "wide":
        statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
        mine = build(NetSettings(name), num_classes=10, in_channels=3, **statistics)
    shaken(mine)
    write_network(mine, IMAGES, tmp_path / "m.pt", "robustbench")
    utils = utilities(monkeypatch)
    state = utils["rm_substr_from_state_dict"](torch.load(tmp_path / "m.pt", weights_only=True), "module.")
    dataset = utils["BenchmarkDataset"].cifar_10
    net = utils["_safe_load_state_dict"](rivals[name](), "Ours2026", state, dataset).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), mine(IMAGES), rtol=1e-4, atol=1e-4)


def test_its_readers_accept_our_model_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the only model of the leaderboard: the table, the bibliography, LaTeX, and its own update."""
    utils = utilities(monkeypatch)
    dataset, threat = utils["BenchmarkDataset"].cifar_10, utils["ThreatModel"].Linf
    result = {
        "attacks": {"autoattack": {"count": 5123}},
        "n": 10000,
        "name_of_data": "cifar-10-batches-py",
        "eps": "8/255",
        "norm": "linf",
        "clean": {"rate": 0.8246},
        "worst": {"count": 5123},
    }
    content = model_info(result, None, full=10000, architecture="resnet18", additional_data=False)
    folder = tmp_path / "model_info" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    path = folder / "Ours2026.json"
    path.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    utils["all_models"][dataset] = {threat: {"Ours2026": None}}
    utils["list_available_models"](dataset, threat)
    assert "82.46%" in (table := capsys.readouterr().out)
    assert "51.23%" in table
    assert "ResNet-18" in table
    assert "Unpublished" in table  # nobody has said the venue yet
    utils["get_leaderboard_bibtex"](dataset, threat)
    latex = utils["get_leaderboard_latex"](dataset, threat, sort_by="autoattack_acc")
    assert "82.46 & 51.23 & N & RN-18" in latex
    utils["update_json"](dataset, threat, "Ours2026", 0.8246, 0.5123, 8 / 255)
    renewed = json.loads(path.read_text())
    assert {key: renewed[key] for key in content if key != "eps"} == {
        key: content[key] for key in content if key != "eps"
    }
    published = beside.FOLDER / REPOSITORY / "model_info/cifar10/Linf/Carmon2019Unlabeled.json"
    other = json.loads(published.read_text())
    for key, value in content.items():
        if key in other and value is not None:
            assert type(value) is type(other[key]), key
