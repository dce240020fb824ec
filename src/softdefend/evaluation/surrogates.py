"""Transfer attacks on a checkpoint: adversarial images that were made on other networks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from softdefend.attacks import PGD, Transfer
from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.evaluate import Evaluator
from softdefend.evaluation.measurement import Measurement
from softdefend.evaluation.settings import EvaluateSettings


def surrogate_names(paths: Sequence[str]) -> list[str]:
    """What surrogates are called: the names of their run folders or weight files.

    Raises:
        SettingError: two have one name.
    """
    names = [os.path.basename(os.path.realpath(path)).removesuffix(".safetensors") for path in paths]
    if len(set(names)) < len(names):
        raise SettingError("--transfer", ", ".join(paths), "surrogates with different names")
    return names


def weights_of(net: nn.Module) -> str:
    """Digest of a network's weights. The file they came from may hold others next time."""
    return checksum((name, value.cpu()) for name, value in net.state_dict().items())


def transfer_measurement(
    checkpoint: Checkpoint, settings: EvaluateSettings, surrogates: Mapping[str, nn.Module]
) -> Measurement:
    """Robust accuracy under each surrogate's images (PGD-20 on the margin), and under all together."""

    def measure() -> dict[str, Any]:
        attacks = [
            Transfer(net.to(checkpoint.device), PGD(steps=20, loss="margin"), source)
            for source, net in surrogates.items()
        ]
        evaluator = Evaluator(
            checkpoint.net,
            checkpoint.data,
            checkpoint.source.threat,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        index = checkpoint.subset(settings.size, settings.subset)
        return evaluator(attacks, index=index, progress=checkpoint.source.progress).to_dict()

    depends_on = {
        **settings.images(len(checkpoint.source.bundle.test)),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "surrogates": {name: weights_of(net) for name, net in surrogates.items()},
    }
    return Measurement("-transfer", depends_on, measure, transfer_text)


def transfer_text(result: dict[str, Any]) -> str:
    """Robust accuracy under each surrogate's images in one line."""
    return "  ".join(f"{name} {100 * rate['rate']:.1f}%" for name, rate in result["attacks"].items())


def transfer_warning(result: Mapping[str, Any], transferred: Mapping[str, Any]) -> str | None:
    """A line where images made elsewhere do more than all attacks on the network itself; else None.

    Args:
        result: of the attacks on the network.
        transferred: of the transfer attacks. They are comparable only where both are of as many images.
    """
    own, other = result["worst"], transferred["worst"]
    if result["n"] != transferred["n"] or other["count"] >= own["count"]:
        return None
    return (
        f"images made against other networks leave {100 * other['rate']:.1f}% robust, all attacks on "
        f"this one {100 * own['rate']:.1f}%: its gradients mislead, or the attacks were too weak"
    )
