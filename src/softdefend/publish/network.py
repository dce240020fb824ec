"""A published network: built from a few plain values, with weights in safetensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.files import parse_json, read_bytes
from softdefend.core.hints import check_type
from softdefend.core.weight_files import load_weights_file, save_weights
from softdefend.models import NAMES, NetSettings, build
from softdefend.publish.download import locate

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_LARGEST = 100_000
"""Classes, channels and pixels of a side: more is no network for images."""
_LARGEST_CONFIG = 2**20
"""Bytes."""
_FETCHES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Names by which timm reads a configuration from elsewhere."""


class RobustClassifier(
    nn.Sequential,
    PyTorchModelHubMixin,
    library_name="softdefend",
    pipeline_tag="image-classification",
    tags=["adversarial-robustness"],
):
    """A network as it is published, built in or timm's: images [b, c, h, w] in [0, 1] to logits [b, k].

    Its ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` are those of huggingface_hub's mixin. The
    normalization is inside, so that the weights cannot be run on pixels of another scale.

    Args:
        net: what :class:`~softdefend.models.NetSettings` takes.
        num_classes: k.
        in_channels: c.
        image_size: height and width of the images, for networks that are made for one size.

    Raises:
        SettingError: a name that is no built-in or timm's network, or a value that does not fit.
    """

    def __init__(
        self,
        net: dict[str, Any],
        num_classes: int,
        in_channels: int = 3,
        image_size: list[int] | None = None,
    ) -> None:
        settings = _settings(net)
        height_width = dict(zip(("height", "width"), image_size or (), strict=False))
        numbers = {"num_classes": num_classes, "in_channels": in_channels, **height_width}
        for name, value in numbers.items():
            if not 1 <= check_type(name, value, int) <= _LARGEST:
                raise SettingError(name, value, f"1 to {_LARGEST}")
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
            made = build(
                settings,
                num_classes=num_classes,
                in_channels=in_channels,
                mean=[0.0] * in_channels,  # the file of weights has the statistics
                std=[1.0] * in_channels,
                image_size=image_size,
                pretrained=False,
            )
        super().__init__(OrderedDict(made.named_children() if settings.normalizes else {"net": made}))

    @property
    def trained(self) -> nn.Module:
        """The network under whose names its weights are saved: what was trained."""
        trained: nn.Module = self if len(self) == 2 else self[0]
        return trained

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self.trained, save_directory / WEIGHTS, {})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **arguments: Any) -> RobustClassifier:
        client = {
            name: arguments.pop(name)
            for name in ("cache_dir", "force_download", "local_files_only", "token")
            if name in arguments
        }
        folder = locate(model_id, revision=revision, **client)
        net = cls(**arguments)
        load_published(net, folder)
        return net


def _settings(net: Mapping[str, Any]) -> NetSettings:
    """Settings that somebody else wrote: none that runs code or downloads anything."""
    known = [field.name for field in fields(NetSettings)]
    for key in net:
        if key not in known:
            accepted = ", ".join(known) + did_you_mean(key, known)
            raise SettingError(f"net.{key}", "an unknown setting", accepted)
    settings = NetSettings(**{**net, "pretrained": None})
    timm = settings.name.removeprefix("timm:")
    if settings.name not in NAMES and (timm == settings.name or timm.startswith(_FETCHES)):
        accepted = f"{', '.join(NAMES)} or timm:NAME; for any other network give from_pretrained net=NETWORK"
        raise SettingError("net.name", settings.name, accepted)
    return settings


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a published model.

    Raises:
        SettingError: there is none, or it is no JSON object.
    """
    path = folder / CONFIG
    try:
        content = parse_json(read_bytes(path, _LARGEST_CONFIG))
    except (OSError, ValueError) as error:
        given = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable JSON ({error})"
        raise SettingError(str(path), given, "what softdefend push wrote") from error
    if not isinstance(content, dict):
        raise SettingError(str(path), f"a {type(content).__name__}", "what softdefend push wrote")
    return content


def load_published(net: nn.Module, folder: Path) -> nn.Module:
    """Put the weights of a published model into a network, in eval mode.

    Args:
        net: what takes them.
        folder: of the model. Its configuration has the sha256 of the weights, where softdefend wrote it.

    Raises:
        SettingError: a file is missing, has another digest, or weights that do not fit.
    """
    sha256 = read_config(folder).get("sha256")
    if sha256 is not None:
        check_digest(folder / WEIGHTS, str(sha256))
    load_weights_file(net, folder / WEIGHTS)
    return net.eval()


def check_digest(path: Path, sha256: str) -> None:
    """Refuse a file with another digest than the one that was published.

    Raises:
        SettingError: no such file, or another digest.
    """
    try:
        found = file_digest(path)
    except OSError as error:
        raise SettingError(str(path), error.strerror or error, "a file of weights") from error
    if found != sha256:
        raise SettingError(str(path), f"sha256 {found[:12]}", f"the published file, sha256 {sha256[:12]}")
