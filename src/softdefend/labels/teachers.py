"""Trained networks to learn from: any run folder, any file of weights, any module."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.core.identity import check_place
from softdefend.core.safetensors_files import open_safetensors
from softdefend.core.weight_files import load_weights_file, read_weights
from softdefend.core.weight_names import mappings
from softdefend.core.yaml_files import read_yaml
from softdefend.execution.network_mode import frozen_copy
from softdefend.models import NetSettings, build

_ACCEPTED = "a run folder, a weights file in one, or a weights file with the settings of its network"


@dataclass(frozen=True)
class Teacher:
    """A file of weights and its network, for files that are not in the folder of a run."""

    weights: str
    """A run folder (its best weights are taken), one of its weights files such as RUN/last.safetensors, or
    another file of weights: safetensors, or a state dict written by torch.save."""
    net: NetSettings | None = None
    """The network that the weights belong to; null for the one that the run folder names. Weights without a
    normalizing first layer get pixels as they are."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in eval mode, frozen, on the CPU."""

    net: nn.Module
    shape: tuple[int, ...] | None = None
    """[c, h, w] of the images it was trained on, where its run folder shows some."""


def check_teacher_path(given: str, setting: str) -> None:
    """Check that there is a teacher at a path, before anything is trained for it.

    Raises:
        SettingError: there is nothing, or a run folder without weights.
    """
    path = Path(given).expanduser()
    if not os.path.exists(path):
        raise SettingError(setting, f"{path}, no such file or folder", _ACCEPTED)
    if os.path.isdir(path) and not (path / "best.safetensors").is_file():
        raise SettingError(setting, f"{path}, without best.safetensors", _ACCEPTED)


def load_teacher(given: object, k: int, channels: int) -> LoadedTeacher:
    """A teacher for images of ``channels`` channels and ``k`` classes.

    Args:
        given: a path as :attr:`Teacher.weights` describes it, a :class:`Teacher`, or a module, which is
            copied.
        k, channels: of the data.

    Raises:
        SettingError: nothing there, a damaged file, or weights that do not fit such a network.
    """
    if isinstance(given, nn.Module):
        return LoadedTeacher(frozen_copy(given).cpu())
    if not isinstance(given, (str, Path, Teacher)):
        raise SettingError("teacher", f"a {type(given).__name__}", "a path, a Teacher or a torch.nn.Module")
    teacher = given if isinstance(given, Teacher) else Teacher(str(given))
    path = Path(teacher.weights).expanduser()
    if not os.path.exists(path):
        raise SettingError(str(path), "no such file or folder", _ACCEPTED)
    if os.path.isdir(path):
        path = path / "best.safetensors"
    config = path.parent / "config.yaml"
    settings = teacher.net or _trained_net(config)
    if path.suffix == ".safetensors":
        check_place(path)
    content = read_weights(path)
    normalizes = any(name.endswith("normalize.mean") for _, held in mappings(content) for name in held)
    shape = _trained_shape(path.parent) if config.is_file() else None
    with torch.random.fork_rng(devices=[]):  # the network is drawn on the CPU
        net = build(
            settings,
            num_classes=k,
            in_channels=channels,
            mean=[0.0] * channels,
            std=[1.0] * channels,
            image_size=None if shape is None else shape[1:],
            pretrained=False,
        )
    bare = settings.normalizes and not normalizes
    load_weights_file(net.get_submodule("net") if bare else net, path, content)
    return LoadedTeacher(_frozen(net), shape)


def weights_digest(net: nn.Module) -> Tensor:
    """sha256 of the weights, names and shapes included, as [32] uint8: a checkpoint holds tensors."""
    digest = checksum((name, value.detach().cpu()) for name, value in net.state_dict().items())
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def image_channels(net: nn.Module) -> int:
    """Channels of the images that a network takes, by its first convolution; 3 where it has none."""
    return next((p.shape[1] for p in net.parameters() if p.ndim == 4), 3)


def _frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def _trained_net(config: Path) -> NetSettings:
    """The network of the run that ``config`` belongs to."""
    if not config.is_file():
        accepted = (
            "a run folder of softdefend, a weights file in one, or weights with the settings of their net"
        )
        raise SettingError(str(config.parent), "no run folder (it holds no config.yaml)", accepted)
    named = read_yaml(config).get("net")
    if named is None:
        accepted = "weights with the settings of their net, or from Python the network itself"
        raise SettingError(str(config), "a run trained from Python, which names no network", accepted)
    try:
        return NetSettings(**named)
    except TypeError as error:
        raise SettingError(str(config), f"net {named!r}", "the settings of a network") from error


def _trained_shape(folder: Path) -> tuple[int, ...] | None:
    """Shape of the example images that an evaluated run keeps."""
    for which in ("best", "last"):
        path = folder / "evaluation" / f"{which}-examples.safetensors"
        with contextlib.suppress(OSError, SafetensorError), open_safetensors(path) as file:
            return tuple(file.get_slice("image").get_shape()[1:])
    return None
