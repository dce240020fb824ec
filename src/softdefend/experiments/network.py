"""The network of an experiment, and what is asked of it before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.data import Batch, DataBundle, Resident, Split, channel_stats, subset
from softdefend.evaluation.autoattack import averages_draws
from softdefend.evaluation.preflight import (
    LOOK,
    check_determinism,
    check_pixels,
    own_random_numbers,
    preflight_training,
)
from softdefend.evaluation.settings import check_attacks
from softdefend.execution.engine import resolve_device
from softdefend.execution.network_mode import frozen
from softdefend.experiments.config import Experiment
from softdefend.models import build, check_logits
from softdefend.models.network import check_parameters, check_state
from softdefend.models.normalization import find_normalizations
from softdefend.training import TrainConfig

_log = logging.getLogger(__name__)


def make_net(experiment: Experiment, bundle: DataBundle, *, pretrained: bool = False) -> nn.Module:
    """The experiment's network with first weights, a function of its seed.

    Args:
        experiment: which network.
        bundle: what it is for.
        pretrained: whether to get the weights that a name of timm's asks for; False where others follow.
    """
    mean, std = channel_stats(bundle.train)
    shape = tuple(bundle.train.images.shape[1:])
    with torch.random.fork_rng(devices=[]):  # the network is drawn on the CPU
        torch.manual_seed(rng.key(experiment.seed, "init"))
        net = build(
            experiment.net,
            num_classes=len(bundle.classes),
            in_channels=shape[0],
            mean=mean,
            std=std,
            image_size=shape[1:],
            pretrained=pretrained,
        )
    check_logits(net, shape, len(bundle.classes), "cpu")
    return net


def check_trainable(net: nn.Module, bundle: DataBundle, config: TrainConfig) -> None:
    """Refuse before anything is written what only the evaluation of the trained network would refuse.

    A network whose logits move is refused unless the evaluation's attacks average over its draws. Where the
    caller evaluates himself, who may use such attacks, a warning says so instead.

    Args:
        net: moved to the run's device.
        bundle: of which some test images are shown to the network, as in an evaluation.
        config: of the run.

    Raises:
        SettingError: what :func:`~softdefend.evaluation.preflight.preflight_training` and
            :func:`~softdefend.evaluation.settings.check_attacks` refuse.
    """
    device, threat, k = resolve_device(config.runtime.device), config.recipe.threat, len(bundle.classes)
    check_parameters(net)
    check_state(net)
    net.to(device)
    check_logits(net, tuple(bundle.train.images.shape[1:]), k, device)
    if config.evaluate is not None:
        check_attacks(config.evaluate.with_classes(bundle.classes), threat, k, device)
    images = bundle.train.images
    check_pixels(images if isinstance(images, Tensor) else images[:LOOK])
    shown = _some(bundle.test, min(LOOK, max(config.optim.batch_size, 8)), device)
    steady = config.evaluate is not None and not averages_draws(config.evaluate.attacks)
    preflight_training(
        net,
        shown.image,
        shown.label,
        threat,
        classes=k,
        assumes_determinism=steady,
        attacked_in_training=config.recipe.objective.attack_units(config.recipe.attack.steps) > 0,
    )
    _warn_of_normalizations(net, shown.image, config)
    if config.evaluate is None:
        try:
            with frozen(net, "eval"):
                check_determinism(net, shown.image)
        except SettingError as error:
            _log.warning("an evaluation will refuse this network: %s", error)


def check_folder(folder: object) -> Path:
    """The path of a run folder that somebody gives from Python.

    Raises:
        SettingError: something else, or a path that no system has.
    """
    path = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
    if not isinstance(path, str):
        given = "None" if folder is None else f"a {type(folder).__name__}"
        raise SettingError("folder", given, "the path of a run folder")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        path = ""
    if not path or "\0" in path:
        raise SettingError("folder", repr(folder), "the path of a run folder")
    return Path(path)


def check_data(data: object) -> None:
    """Refuse what is neither a bundle nor a pair of images and labels.

    Raises:
        SettingError: something else.
    """
    if not (isinstance(data, DataBundle) or (isinstance(data, (tuple, list)) and len(data) == 2)):
        raise SettingError("data", f"a {type(data).__name__}", "a DataBundle, or a pair (images, labels)")


def check_surrogate(setting: str, net: nn.Module, shape: Sequence[int], k: int, device: torch.device) -> None:
    """Refuse a network, of which images are to be tried on another, that does not take such images.

    Args:
        setting: what the user knows it by.
        net: on the device, or without parameters.
        shape: (c, h, w) of the images.
        k: classes of the attacked network.
        device: of the evaluation.

    Raises:
        SettingError: see :func:`~softdefend.models.check_logits`.
    """
    try:
        check_parameters(net)
        check_logits(net, shape, k, device)
    except SettingError as error:
        raise SettingError(setting, error.given, error.accepted) from error


def _warn_of_normalizations(net: nn.Module, image: Tensor, config: TrainConfig) -> None:
    """Say loudly that images are normalized twice, and not loudly that nothing normalizes them."""
    with own_random_numbers(image.device):
        found = find_normalizations(net, image)
    if len(found) > 1:
        steps = ", then ".join(
            f"mean {_numbers(mean)} and standard deviation {_numbers(std)}" for mean, std in found
        )
        remedy = "softdefend.normalize is needed once"
        if config.net is not None:
            remedy = "net.normalize false leaves it to the network"
        _log.warning("the network normalizes twice what it is given (%s): %s", steps, remedy)
    elif not found and config.net is not None and not config.net.normalizes:
        text = "%s gets pixels in [0, 1] as they are; net.normalize true normalizes them first"
        _log.info(text, config.net.name)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _some(part: Split, most: int, device: torch.device) -> Batch:
    """Images of a split on a device, of every class its share."""
    shown = part.subset(subset(part.labels, most))
    return Resident(shown, device).take(torch.arange(len(shown), device=device))
