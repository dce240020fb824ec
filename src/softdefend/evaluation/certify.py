"""Certify a checkpoint by randomized smoothing, and keep the result beside its evaluation."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from softdefend.core.environment import versions
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.store import plain
from softdefend.core.threat import LARGEST
from softdefend.data import SubsetOrder
from softdefend.evaluation.checkpoint import Checkpoint, CheckpointSource
from softdefend.evaluation.records import Rate
from softdefend.evaluation.resume import StateFile
from softdefend.evaluation.settings import Size, check_size, check_writable, count_of
from softdefend.evaluation.smoothing import Certificates, Smoothed, Smoothing
from softdefend.evaluation.table import parquet_bytes
from softdefend.execution.microbatch import fitting_microbatch

_log = logging.getLogger(__name__)

SUFFIX = "-certificate"
"""Of the result files, behind the checkpoint's name."""
_SAVE_EVERY = 30.0
_STEP = 0.25
"""Of the curves' radii, in units of sigma."""


@dataclass(frozen=True)
class CertifySettings(Smoothing):
    """A certificate of the test images of a finished run."""

    size: Size | None = 500
    """Test images used, at most; all of them when all or null."""
    subset: SubsetOrder = "stratified"
    """Which they are where they are not all: stratified or first."""
    batch_size: int | None = None
    """Noisy images at once; found from the free memory when null. Changes no result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("certify.size", self.size, 1)
        if self.subset not in get_args(SubsetOrder):
            raise SettingError("certify.subset", repr(self.subset), " or ".join(get_args(SubsetOrder)))
        if self.batch_size is not None and self.batch_size < 1:
            raise SettingError("certify.batch_size", self.batch_size, "a whole number >= 1")


def certify_checkpoint(
    source: CheckpointSource, settings: CertifySettings, *, device: torch.device
) -> dict[str, Any]:
    """Certify a checkpoint on test images, unless the same certificate already lies in its folder.

    Killed at any moment, the same call continues from ``evaluation/NAME-certificate.state`` and writes the
    same records. A certificate by other settings is kept in ``evaluation/earlier``.

    Returns:
        What stands in ``evaluation/NAME-certificate.json``.

    Raises:
        SettingError: weights, data or a network that do not fit, or a file that cannot be written.
    """
    name = f"{source.name}{SUFFIX}"
    check_writable("evaluation", source.folder / "evaluation" / f"{name}.json")
    checkpoint = Checkpoint(source, device)
    inputs = checkpoint.inputs(_depends_on(settings, len(source.bundle.test)))
    store = checkpoint.store
    result, table = store.find(name, inputs), store.path(name, ".parquet")
    if result is None or not table.is_file():
        checkpoint.require_determinism()
        state = StateFile(
            store.path(name, ".state"), {**inputs, "versions": versions(device)}, every=_SAVE_EVERY
        )
        certificates, report = _certify(checkpoint, settings, state)
        checkpoint.set_aside(name, inputs)
        # Killed between these, no file is left that speaks of another certificate than the other.
        store.path(name).unlink(missing_ok=True)
        write_atomic(table, to_parquet(certificates))
        result = store.write(name, inputs, {"settings": plain(asdict(settings)), **report})
        state.remove()
    _log.info(certificate_text(source.name, result))
    return result


def _depends_on(settings: CertifySettings, full: int) -> dict[str, Any]:
    known = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    if count_of(settings.size, full) == full:
        known |= {"size": None, "subset": None}
    return known


def _certify(
    checkpoint: Checkpoint, settings: CertifySettings, state: StateFile
) -> tuple[Certificates, dict[str, Any]]:
    source = checkpoint.source
    index = checkpoint.subset(settings.size, settings.subset)
    batch_size = settings.batch_size
    if batch_size is None:
        batch_size = fitting_microbatch(checkpoint.net, checkpoint.test_images(1).image)
    smoothed = Smoothed(
        checkpoint.net, checkpoint.data, settings, batch_size=batch_size, progress=source.progress
    )
    certificates = smoothed.certify(index, state)
    right = certificates.prediction == certificates.label
    radii = list(curve_radii(settings, certificates))
    return certificates, {
        "which": source.which,
        "epoch": checkpoint.metadata.get("epoch"),
        "split": "test",
        **checkpoint.facts,
        "n": len(index),
        "abstained": int((certificates.prediction < 0).sum()),
        "average_radius": float((certificates.radius * right).mean()),
        "largest_radius": settings.largest_radius,
        "curve": [_point(radius, certificates.certified(radius)) for radius in radii],
        "empirical": _empirical(smoothed, index, certificates, radii) if settings.attack_draws else [],
        "interval": "wilson 95%",
    }


def curve_radii(settings: Smoothing, certificates: Certificates) -> Iterator[float]:
    """Multiples of sigma / 4 up to the first at which nothing is certified, or the largest l2 threat."""
    for number in itertools.count():
        radius = number * _STEP * settings.sigma
        if number and radius > LARGEST["l2"]:
            return
        yield radius
        if not certificates.certified(radius).any():
            return


def _empirical(
    smoothed: Smoothed, index: torch.Tensor, certificates: Certificates, radii: list[float]
) -> list[dict[str, Any]]:
    """What an attack on the smoothed classifier leaves at each radius; an image that fell at one counts as
    fallen at all larger ones."""
    image = smoothed.data.take(index.to(smoothed.data.labels.device)).image
    standing = smoothed.predict(image, index, "selection") == certificates.label
    points = [_point(0.0, standing)]
    for radius in radii[1:]:
        rows = standing.nonzero().flatten()
        if len(rows):
            standing[rows] = smoothed.attacked(index[rows], radius)
        points.append(_point(radius, standing))
    return points


def _point(radius: float, flags: torch.Tensor) -> dict[str, Any]:
    return {"radius": radius, **asdict(Rate.of(flags))}


def to_parquet(certificates: Certificates) -> bytes:
    """One row a sample: ``index``, ``label``, ``prediction`` (-1: it abstains), ``radius``, ``count``."""
    names = ("index", "label", "prediction", "radius", "count")
    return parquet_bytes({name: getattr(certificates, name).numpy() for name in names})


def certificate_text(name: str, result: dict[str, Any]) -> str:
    """Certified accuracy at each radius, as lines."""
    settings = result["settings"]
    head = (
        f"{name}: smoothed with sigma {settings['sigma']:g}, {settings['samples']:,} samples, alpha "
        f"{settings['alpha']:g}; average certified radius {result['average_radius']:.3f}, "
        f"{result['abstained']} of {result['n']} abstained"
    )
    attacked = {point["radius"]: f"{100 * point['rate']:.1f}%" for point in result["empirical"]}
    rows = [
        f"  l2 radius {point['radius']:.3f}: certified {100 * point['rate']:.1f}%"
        + (f", under attack {attacked[point['radius']]}" if attacked else "")
        for point in result["curve"]
    ]
    return "\n".join([head, *rows])
