"""Checkpoints of RobustBench's: each layout against torch's functions on the file's own names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.evaluation.robustbench_networks import load_robustbench
from softdefend.models import normalize
from softdefend.models.robustbench import choose_layout, names_there

K = 10
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
State = dict[str, Tensor]


# --- the networks, written from the papers over a state by name -------------------------------------------


def norm(x: Tensor, state: State, name: str) -> Tensor:
    values = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *values)


def wide(state: State, x: Tensor, depth: int, act: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    """TRADES' wide ResNet."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for place in range((depth - 4) // 6):
            name, stride = f"block{stage}.layer.{place}", 2 if stage > 1 and place == 0 else 1
            active = act(norm(x, state, f"{name}.bn1"))
            out = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = act(norm(out, state, f"{name}.bn2"))
            out = F.conv2d(out, state[f"{name}.conv2.weight"], padding=1)
            shortcut = state.get(f"{name}.convShortcut.weight")
            x = out + (x if shortcut is None else F.conv2d(active, shortcut, stride=stride))
    return F.linear(act(norm(x, state, "bn1")).mean((2, 3)), state["fc.weight"], state["fc.bias"])


def before(x: Tensor, stride: int) -> Tensor:
    """DeepMind's padding, with TensorFlow's rule SAME: the odd pixel goes right and below."""
    return F.pad(x, (1, 1, 1, 1)) if stride == 1 else F.pad(x, (0, 1, 0, 1))


def deepmind(state: State, x: Tensor, depth: int, act: Callable[[Tensor], Tensor]) -> Tensor:
    x = F.conv2d(x, state["init_conv.weight"], padding=1)
    for stage in range(3):
        for place in range((depth - 4) // 6):
            name, stride = f"layer.{stage}.block.{place}", 2 if stage and place == 0 else 1
            active = act(norm(x, state, f"{name}.batchnorm_0"))
            out = F.conv2d(before(active, stride), state[f"{name}.conv_0.weight"], stride=stride)
            out = act(norm(out, state, f"{name}.batchnorm_1"))
            out = F.conv2d(out, state[f"{name}.conv_1.weight"], padding=1)
            shortcut = state.get(f"{name}.shortcut.weight")
            x = out + (x if shortcut is None else F.conv2d(active, shortcut, stride=stride))
    x = act(norm(x, state, "batchnorm")).mean((2, 3))
    return F.linear(x, state["logits.weight"], state["logits.bias"])


def resnet(state: State, x: Tensor) -> Tensor:
    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), state, "bn1").relu()
    for stage in (1, 2, 3, 4):
        for place in (0, 1):
            name, stride = f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1
            out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(norm(out, state, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in state:
                x = F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride)
                x = norm(x, state, f"{name}.shortcut.1")
            x = (norm(out, state, f"{name}.bn2") + x).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def preact(state: State, x: Tensor) -> Tensor:
    """With a last BatchNorm the shortcut is of the activation, without one of the block's input."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for place in (0, 1):
            name, stride = f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1
            active = norm(x, state, f"{name}.bn1").relu()
            out = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(norm(out, state, f"{name}.bn2").relu(), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in state:
                x = active if "bn.weight" in state else x
                x = F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride)
            x = out + x
    if "bn.weight" in state:
        x = norm(x, state, "bn").relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def deepmind_preact(state: State, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    x = F.conv2d(x, state["conv_2d.weight"], padding=1)
    for stage in range(4):
        for place in (0, 1):
            name, stride = f"layer_{stage}.{place}", 2 if stage and place == 0 else 1
            active = act(norm(x, state, f"{name}.batchnorm_0"))
            out = F.conv2d(before(active, stride), state[f"{name}.conv_2d_1.weight"], stride=stride)
            out = act(norm(out, state, f"{name}.batchnorm_1"))
            out = F.conv2d(out, state[f"{name}.conv_2d_2.weight"], padding=1)
            shortcut = state.get(f"{name}.shortcut.weight")
            x = out + (x if shortcut is None else F.conv2d(before(x, stride), shortcut, stride=stride))
    x = act(norm(x, state, "batchnorm")).mean((2, 3))
    return F.linear(x, state["logits.weight"], state["logits.bias"])


CIFAR10 = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]]).view(2, 1, 3, 1, 1)
"""Mean and standard deviation by which DeepMind's code normalizes."""

CASES: dict[str, tuple[str, str, Callable[[State, Tensor], Tensor]]] = {
    "wide": ("WideResNet-16-2", "block1", lambda s, x: wide(s, x, 16)),
    "wide, SiLU": ("WideResNet-10-2-SiLU", "block1", lambda s, x: wide(s, x, 10, F.silu)),
    "wide, activation named": ("WideResNet-10-1-ReLU", "block1", lambda s, x: wide(s, x, 10)),
    "DeepMind's wide, SiLU": (
        "WideResNet-16-1-SiLU",
        "init_conv",
        lambda s, x: deepmind(s, (x - CIFAR10[0]) / CIFAR10[1], 16, F.silu),
    ),
    "DeepMind's wide, ReLU": (
        "WideResNet-10-2-ReLU",
        "init_conv",
        lambda s, x: deepmind(s, (x - CIFAR10[0]) / CIFAR10[1], 10, F.relu),
    ),
    "ResNet-18": ("ResNet-18", "layer4", resnet),
    "PreActResNet-18": ("PreActResNet-18", "bn", preact),
    "PreActResNet-18 without a last BatchNorm": ("PreActResNet-18", "layer4", preact),
    "DeepMind's PreActResNet-18": (
        "PreActResNet-18-SiLU",
        "conv_2d",
        lambda s, x: deepmind_preact(s, (x - CIFAR10[0]) / CIFAR10[1], F.silu),
    ),
}


def make_state(architecture: str, part: str) -> State:
    """Random weights by the names that RobustBench's code gives them, none of them as a fresh network has."""
    net = choose_layout(architecture, [part]).build(K, 3)
    names, generator = names_there(net), torch.Generator().manual_seed(7)
    state = {}
    for name, value in net.state_dict().items():
        drawn = (
            torch.randn(value.shape, generator=generator)
            / max(1, value[0].numel() if value.dim() else 1) ** 0.5
        )
        drawn = drawn.abs() + 0.5 if name.endswith("running_var") else drawn
        state[names.get(name, name)] = drawn if value.is_floating_point() else value
    return state


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return {name: make_state(*case[:2]) for name, case in CASES.items()}


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def load(architecture: str, path: Path, **more: object) -> tuple[nn.Module, list[str]]:
    return load_robustbench(architecture, path, num_classes=K, in_channels=3, **more)


@pytest.mark.parametrize("case", CASES)
def test_each_layout_computes_what_its_paper_says(
    case: str, states: dict[str, State], tmp_path: Path
) -> None:
    architecture, _, forward = CASES[case]
    net, _ = load(architecture, write(tmp_path / "weights.pt", states[case]))
    assert not net.training
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), forward(states[case], IMAGES), rtol=1e-4, atol=1e-4)


STATE = "wide, activation named"


@pytest.mark.parametrize(
    "wrap",
    {
        "DataParallel": lambda s: {f"module.{name}": value for name, value in s.items()},
        "under state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}}},
        "both": lambda s: {"state_dict": {f"module.{n}": v for n, v in s.items()}, "best_acc": 0.5},
        "under model_state_dict, model.": lambda s: {
            "model_state_dict": {f"model.{n}": v for n, v in s.items()}
        },
        "with blocks that no forward uses": lambda s: {
            **s,
            **{n.replace("block1", "sub_block1"): v + 1 for n, v in s.items() if n.startswith("block1")},
        },
    }.items(),
    ids=lambda pair: pair[0],
)
def test_whatever_the_file_nests_and_prefixes(wrap, states: dict[str, State], tmp_path: Path) -> None:
    state = states[STATE]
    net, notes = load("WideResNet-10-1", write(tmp_path / "weights.pt", wrap[1](state)))
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), wide(state, IMAGES, 10), rtol=1e-4, atol=1e-4)
    assert "does not normalize" in notes
    assert any("sub_block1" in note for note in notes) == ("no forward" in wrap[0])


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std")])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1)])
def test_statistics_in_the_file_normalize(names, shape, states: dict[str, State], tmp_path: Path) -> None:
    state, mean, std = states[STATE], torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    inner = "model." if "." in names[0] else ""
    content = {f"{inner}{name}": value for name, value in state.items()}
    content |= {names[0]: mean.view(shape), names[1]: std.view(shape)}
    path = write(tmp_path / "weights.pt", {"state_dict": content})
    net, notes = load("WideResNet-10-1", path)
    with torch.no_grad():
        shifted = (IMAGES - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(net(IMAGES), wide(state, shifted, 10), rtol=1e-4, atol=1e-4)
    assert "normalizes by the file's statistics" in notes
    with pytest.raises(SettingError, match=r"^--mean: got .* where the file has statistics"):
        load("WideResNet-10-1", path, mean=[0.5] * 3, std=[0.5] * 3)


def test_what_the_code_outside_of_the_file_normalizes_by_can_be_said(
    states: dict[str, State], tmp_path: Path
) -> None:
    """Hendrycks et al. (2019) take 2 x - 1."""
    path, half = write(tmp_path / "weights.pt", states[STATE]), [0.5] * 3
    net, _ = load("WideResNet-10-1", path, mean=half, std=half)
    with torch.no_grad():
        expected = wide(states[STATE], 2 * IMAGES - 1, 10)
        torch.testing.assert_close(net(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_one_of_several_sets_is_chosen_by_its_key(states: dict[str, State], tmp_path: Path) -> None:
    """Andriushchenko and Flammarion (2020) save ``last`` and ``best``."""
    state = states[STATE]
    other = {name: value + 1 for name, value in state.items()}
    path = write(tmp_path / "weights.pt", {"last": state, "best": other})
    with pytest.raises(SettingError, match="2 sets of weights that fit"):
        load("WideResNet-10-1", path)
    net, _ = load("WideResNet-10-1", path, key="last")
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), wide(state, IMAGES, 10), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "case", "said"),
    [
        ("WRN-16", "wide", "--architecture: got 'WRN-16'; accepted: WideResNet-DEPTH-WIDTH"),
        ("WideResNet-15-2", "wide", "a depth of 6 n + 4"),
        ("WideResNet-22-2", "wide", "weights that do not fit"),
        ("WideResNet-16-3", "wide", "weights that do not fit"),
        ("ResNet-18", "PreActResNet-18", "weights that do not fit"),
        (
            "WideResNet-16-1",
            "DeepMind's wide, SiLU",
            "do not say their activation; accepted: WideResNet-16-1-SiLU (as all on RobustBench)",
        ),
        ("PreActResNet-18", "DeepMind's PreActResNet-18", "accepted: PreActResNet-18-SiLU"),
        ("ResNet-18", "DeepMind's PreActResNet-18", "weights that do not fit"),
    ],
)
def test_an_architecture_that_does_not_fit_is_one_line(
    architecture: str, case: str, said: str, states: dict[str, State], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=re.escape(said)) as caught:
        load(architecture, write(tmp_path / "weights.pt", states[case]))
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pt", {"state_dict": {"conv1.weight": torch.zeros(1)}, "hook": print})
    with pytest.raises(SettingError, match="a pickle that would run"):
        load("ResNet-18", path)


def test_statistics_that_contradict_each_other_are_refused(states: dict[str, State], tmp_path: Path) -> None:
    """DeepMind's layout with 100 classes has others, with 7 none that anybody knows."""
    state = dict(states["DeepMind's wide, ReLU"])
    for name in ("logits.weight", "logits.bias"):
        state[name] = state[name][:7]
    path = write(tmp_path / "weights.pt", state)
    with pytest.raises(SettingError, match=r"^--mean: got nothing for 7 classes and 3 channels in DeepMind"):
        load_robustbench("WideResNet-10-2-ReLU", path, num_classes=7, in_channels=3)
    with pytest.raises(SettingError, match=r"^--mean: got 3 numbers beside 0 of --std"):
        load_robustbench("WideResNet-10-2-ReLU", path, num_classes=7, in_channels=3, mean=[0.5] * 3)
    with pytest.raises(SettingError, match=r"^--mean: got 2 numbers for 3 channels"):
        load_robustbench(
            "WideResNet-10-2-ReLU", path, num_classes=7, in_channels=3, mean=[0.5] * 2, std=[1] * 2
        )
    two = {**states[STATE], "mu": torch.zeros(3), "sigma": torch.ones(3)}
    path = write(tmp_path / "two.pt", {"a": two, "b": {"mu": torch.ones(3), "sigma": torch.ones(3)}})
    with pytest.raises(SettingError, match="two normalizations that differ"):
        load("WideResNet-10-1", path)


@pytest.mark.parametrize("architecture", ["WideResNet-16-2", "ResNet-18", "PreActResNet-18"])
def test_our_own_weights_by_their_names_and_back(architecture: str, tmp_path: Path) -> None:
    bare = choose_layout(architecture, ["bn"]).build(K, 3)
    net = normalize(bare, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]).eval()
    names = names_there(net)
    state = {names.get(name, name): value for name, value in net.state_dict().items()}
    assert len(state) == len(net.state_dict())
    back, _ = load(architecture, write(tmp_path / "weights.pt", state))
    for name, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
