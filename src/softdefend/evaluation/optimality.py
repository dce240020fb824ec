"""How good is an attack? Distances of the closest wrong images that attacks find, against the closest known.

After AttackBench (Cina et al., arXiv 2404.19460): the smallest distance that any of the attacks found for an
image is what is known of the best attack, and an attack is judged by how near its curve of robust accuracy
over eps comes to that one's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from softdefend.attacks import Attack, MinimalAttack
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.threat import LARGEST, ThreatModel
from softdefend.data import Batch
from softdefend.evaluation.accuracy import make_evaluator, scaled
from softdefend.evaluation.autoattack import Ensemble, averages_draws, parse
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.evaluate import Evaluator, answers
from softdefend.evaluation.measurement import Measurement
from softdefend.evaluation.settings import EvaluateSettings, Size, count_of, own_losses
from softdefend.evaluation.table import parquet_bytes

SUFFIX = "-optimality"
"""Of the result files, behind the checkpoint's name."""
LADDER = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Multiples of eps at which an attack that does not look for the closest image is run; what it finds at the
smallest of them counts."""
_POINTS = 41


@dataclass(frozen=True)
class Quality:
    """What an attack found, against the best that is known."""

    optimality: float
    """1 where no attack found a closer image, 0 where it found none at all; see :func:`local_optimality`."""
    found: int
    """Images that it found a wrong image for."""
    closest: int
    """Images for which none of the attacks found one closer by more than a hundredth."""
    median_distance: float | None
    """Over all images; None where it found fewer than half."""
    median_ratio: float | None
    """Its distance over the best known one, where that is neither 0 nor infinite; None without any."""


def best_known(distances: Mapping[str, Tensor]) -> Tensor:
    """The smallest distance of each image over all attacks, [n]; infinite where no attack found a wrong
    image."""
    return torch.stack(list(distances.values())).amin(dim=0)


def local_optimality(distance: Tensor, best: Tensor) -> float:
    """Local optimality of an attack: one minus the area between its curve of robust accuracy over eps and the
    best known one, as a share of the area between the curve of an attack that finds nothing and the best.

    The areas reach to the largest distance that is known of any image. Below a curve lies the mean of the
    distances, cut there. Images that no attack found a wrong image for say nothing and are left out.

    Args:
        distance: of the attack, [n], infinite where it found nothing.
        best: the smallest of all attacks, [n].
    """
    known = best.isfinite()
    if not known.any():
        return 1.0
    distance, best = distance[known].double(), best[known].double()
    end = float(best.max())
    nothing = float(end * (best > 0).double().mean())
    area, least = float(distance.clamp_max(end).mean()), float(best.mean())
    if nothing <= least:  # all images are equally far
        return 1.0 if bool((distance <= best).all()) else 0.0
    return 1 - (area - least) / (nothing - least)


def qualities(distances: Mapping[str, Tensor]) -> dict[str, Quality]:
    """Every attack against the best of all, from distances [n] by the attack's name."""
    best = best_known(distances)
    return {name: _quality(distance, best) for name, distance in distances.items()}


def _quality(distance: Tensor, best: Tensor) -> Quality:
    found, ratio = distance.isfinite(), (distance / best)[(best > 0) & best.isfinite()]
    middle, between = float(distance.median()), float(ratio.median()) if len(ratio) else math.inf
    return Quality(
        local_optimality(distance, best),
        int(found.sum()),
        int((found & (distance <= 1.01 * best)).sum()),
        middle if math.isfinite(middle) else None,
        between if math.isfinite(between) else None,
    )


def robust_accuracy(distance: Tensor, eps: Sequence[float]) -> list[float]:
    """The share of images whose closest wrong image is farther than each eps."""
    return [float((distance > one).double().mean()) for one in eps]


def find_distances(evaluator: Evaluator, attack: Attack | Ensemble, index: Tensor) -> Tensor:
    """Distances of the closest wrong images that an attack finds for the images at ``index`` [n], float64 on
    the CPU: 0 where the network is wrong without an attack, infinite where nothing was found.

    An attack that looks for the closest image is asked for it; any other is run at the eps of
    :data:`LADDER` on the images that are left. No distance is believed before the network was asked again.
    """
    if isinstance(attack, MinimalAttack):
        return _minimal(evaluator, attack, index)
    distance = torch.full((len(index),), math.inf, dtype=torch.float64)
    left = torch.arange(len(index))
    threat = evaluator.threat
    for factor in LADDER:
        eps = scaled(threat.eps, factor)
        if eps > LARGEST[threat.norm] or not len(left):
            break
        found = evaluator.under(ThreatModel(threat.norm, eps))([attack], index=index[left])
        record = found.attacks[attack.name]
        wrong = found.clean_prediction != found.label
        reached = torch.where(wrong, torch.zeros_like(record.distance), record.distance).double()
        distance[left] = torch.where(record.robust, distance[left], reached)
        left = left[record.robust]
    return distance


def _minimal(evaluator: Evaluator, attack: MinimalAttack, index: Tensor) -> Tensor:
    network, threat, parts = evaluator.search_network, evaluator.threat, []
    device = evaluator.data.labels.device
    with network.search_mode():
        for rows in torch.split(index, evaluator.microbatch):
            batch: Batch = evaluator.data.take(rows.to(device))
            x_adv, _ = attack.minimal(network.strict, batch.image.clone(), batch.label, threat.norm)
            x_adv = torch.where(x_adv.isfinite(), x_adv, batch.image).clamp(0, 1)
            with torch.no_grad():
                wrong = answers(network.strict(x_adv), batch.label) != batch.label
                unattacked = answers(network.strict(batch.image), batch.label) != batch.label
            distance = threat.distance(batch.image, x_adv).double().masked_fill(~wrong, math.inf)
            parts.append(distance.masked_fill(unattacked, 0.0).cpu())
    return torch.cat(parts)


def optimality_measurement(
    checkpoint: Checkpoint, settings: EvaluateSettings, names: Sequence[str], size: Size
) -> Measurement:
    """The quality of attacks on some test images, their curves, and ``NAME-optimality.parquet``: one row an
    image with ``index``, ``label``, the ``best`` known distance, and for each attack A ``A/distance`` and
    ``A/gap``, how much farther it is than the best.

    Distances of each attack are kept by themselves: a further one costs only itself, and so does a kill.
    """
    full = len(checkpoint.source.bundle.test)
    count = count_of(size, full)
    images: dict[str, Any] = {"size": None if count == full else count}
    if count < full:
        images["subset"] = settings.subset
    same = ("seed", "batch_size", "precision")
    shared = {**images, **{name: getattr(settings, name) for name in same}}
    losses = {path: loss.digest() for path, loss in own_losses(names).items()}
    index = checkpoint.subset(size, settings.subset)

    def measure() -> dict[str, Any]:
        if not averages_draws(names):
            checkpoint.require_determinism()
        evaluator = make_evaluator(checkpoint, settings)
        known = {**shared, "losses": losses}
        distances = {name: _kept(checkpoint, evaluator, name, index, known) for name in names}
        table = checkpoint.store.path(f"{checkpoint.source.name}{SUFFIX}", ".parquet")
        write_atomic(table, to_parquet(index, evaluator.data.labels.cpu()[index], distances))
        return optimality_report(distances)

    return Measurement(SUFFIX, {**shared, "attacks": list(names), "losses": losses}, measure, optimality_text)


def _kept(
    checkpoint: Checkpoint, evaluator: Evaluator, name: str, index: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Distances from their file where they were found before."""
    file = f"distances/{checkpoint.source.name}-{name}"
    inputs = checkpoint.inputs({**settings, "attack": name})
    kept = checkpoint.store.find_tensors(file, inputs)
    if kept is not None:
        return kept[0]["distance"]
    distance = find_distances(evaluator, parse(name, len(checkpoint.source.bundle.classes)), index)
    checkpoint.store.write_tensors(file, inputs, {"distance": distance, "index": index})
    return distance


def to_parquet(index: Tensor, label: Tensor, distances: Mapping[str, Tensor]) -> bytes:
    """See :func:`optimality_measurement`."""
    best = best_known(distances)
    columns = {"index": index.numpy(), "label": label.numpy(), "best": best.numpy()}
    for name, distance in distances.items():
        gap = torch.where(distance == best, torch.zeros_like(best), distance - best)
        columns |= {f"{name}/distance": distance.numpy(), f"{name}/gap": gap.numpy()}
    return parquet_bytes(columns)


def optimality_report(distances: Mapping[str, Tensor]) -> dict[str, Any]:
    """Qualities and curves as plain values."""
    best = best_known(distances)
    known = best[best.isfinite()]
    end = float(known.max()) if len(known) else 0.0
    eps = [1.05 * end * number / (_POINTS - 1) for number in range(_POINTS)] if end else [0.0]
    curves = {name: robust_accuracy(distance, eps) for name, distance in distances.items()}
    return {
        "n": len(best),
        "unknown": int(best.isinf().sum()),
        "attacks": {name: asdict(quality) for name, quality in qualities(distances).items()},
        "grid": eps,
        "curves": {"best known": robust_accuracy(best, eps), **curves},
    }


def optimality_text(result: dict[str, Any]) -> str:
    """A line for each attack, the best first."""
    ranked = sorted(result["attacks"].items(), key=lambda item: -item[1]["optimality"])
    width = max(len(name) for name, _ in ranked)
    lines = [f"distances of the closest wrong images, {result['n']} images ({result['norm']}):"]
    for name, row in ranked:
        middle = "none" if row["median_distance"] is None else f"{row['median_distance']:.4g}"
        lines.append(
            f"  {name:<{width}}  optimality {row['optimality']:.3f}, median {middle}, found {row['found']}, "
            f"closest of all {row['closest']}"
        )
    return "\n".join(lines)


def check_optimality(names: Sequence[str], threat: ThreatModel, k: int) -> None:
    """Refuse attacks that cannot be compared.

    Raises:
        SettingError: an unknown attack, one that is given twice or is not made for the threat or for k
            classes.
    """
    if len(set(names)) < len(names):
        raise SettingError("--optimality", ", ".join(names), "different attacks")
    for name in names:
        parse(name, max(2, k)).check(threat)
