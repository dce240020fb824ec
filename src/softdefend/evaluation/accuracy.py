"""Accuracy of a checkpoint on clean images and under attack: overall, by class, and against eps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from softdefend.attacks import PGD
from softdefend.core.environment import versions
from softdefend.core.files import write_atomic
from softdefend.core.processes import ALONE, Processes
from softdefend.core.store import plain
from softdefend.core.threat import LARGEST, Budget, ThreatModel
from softdefend.evaluation.adversarial import save_adversarial, saved_images
from softdefend.evaluation.autoattack import averages_draws, parse
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.evaluate import Evaluator, cost_line
from softdefend.evaluation.mask import mask_digest
from softdefend.evaluation.records import Evaluation, Rate
from softdefend.evaluation.resume import StateFile
from softdefend.evaluation.settings import EvaluateSettings, count_of, own_losses
from softdefend.execution.microbatch import fitting_microbatch

_log = logging.getLogger(__name__)

CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Multiples of the trained eps at which the robust-accuracy curve is measured."""
SAVE_EVERY = 30.0
"""Least seconds between two saves. AutoAttack's members save within a group of batches, all other attacks at
its end: a killed evaluation begins such a group again."""
_WITHOUT_EFFECT = ("microbatch", "compile", "examples")
"""Settings that change no figure but by rounding. With another value of these it is the same evaluation."""


def accuracy_inputs(checkpoint: Checkpoint, settings: EvaluateSettings) -> dict[str, Any]:
    """What accuracies are a function of, for the result store."""
    known = {name: value for name, value in asdict(settings).items() if name not in _WITHOUT_EFFECT}
    full = len(checkpoint.source.bundle.test)
    if {count_of(settings.size, full), count_of(settings.curve_size, full)} <= {0, full}:
        del known["subset"]
    if settings.targeted is None:
        del known["targeted"]
    if checkpoint.source.mask is not None:
        known["mask"] = mask_digest(checkpoint.source.mask)
    if losses := own_losses(settings.attacks):  # the name of a function does not say what is in it
        known["losses"] = {path: loss.digest() for path, loss in losses.items()}
    return checkpoint.inputs(known)


def evaluate_attacks(
    checkpoint: Checkpoint, settings: EvaluateSettings, *, save_images: bool = False
) -> dict[str, Any]:
    """Clean accuracy and accuracy under each attack, from the file where it is there already.

    A file that holds more than is asked for, further attacks or more images, will do; with ``save_images``
    only where the adversarial images lie beside it.

    Returns:
        What stands in ``evaluation/NAME.json``.
    """
    result = checkpoint.source.processes.from_first(lambda: _find(checkpoint, settings, save_images))
    if result is None:
        return measure_accuracies(checkpoint, settings, save_images=save_images)
    name = checkpoint.source.name
    _log.info(f"{name}: as evaluated before, on {result['n']} images; nothing is attacked anew")
    for line in cost_lines(result):
        _log.info(line)
    return result


def _find(checkpoint: Checkpoint, settings: EvaluateSettings, save_images: bool) -> dict[str, Any] | None:
    """A kept result, with its images where they are asked for; else None."""
    result = find_accuracies(checkpoint, settings)
    return None if result is None or (save_images and not saved_images(checkpoint, result)) else result


def find_accuracies(checkpoint: Checkpoint, settings: EvaluateSettings) -> dict[str, Any] | None:
    """A kept result that has all that is asked for, or None."""
    inputs = accuracy_inputs(checkpoint, settings)
    result = checkpoint.store.find(checkpoint.source.name, inputs, ignoring=("settings",))
    if result is None:
        return None
    known, asked = result["inputs"]["settings"], plain(inputs["settings"])
    open_settings = ("attacks", "size", "subset", "curve_size")
    same = all(known.get(name) == value for name, value in asked.items() if name not in open_settings)
    full = len(checkpoint.source.bundle.test)
    n = result["n"] + result.get("left_out", 0)
    curve, wanted = count_of(known["curve_size"], full), count_of(settings.curve_size, full)
    # Where all images were measured it does not matter in which order a part would be taken.
    whole = n == full and (wanted == 0 or curve == full)
    enough = (
        set(asked["attacks"]) <= set(result["attacks"])
        and n >= count_of(settings.size, full)
        and curve >= wanted
    )
    return result if same and enough and (whole or known.get("subset") == settings.subset) else None


def measure_accuracies(
    checkpoint: Checkpoint, settings: EvaluateSettings, *, save_images: bool = False
) -> dict[str, Any]:
    """Attack the test images, and write the result and one row an image in ``evaluation/NAME.parquet``.

    Killed at any moment, the same call continues from ``evaluation/NAME.state``, which is removed at the
    end, and writes the same records, on another number of processes too. With other inputs, versions or
    another device it starts anew. What it replaces is kept in ``evaluation/earlier``, see
    :meth:`~softdefend.evaluation.checkpoint.Checkpoint.set_aside`.

    Returns:
        What went into ``evaluation/NAME.json``.
    """
    if not averages_draws(settings.attacks):
        checkpoint.require_determinism()
    inputs, name, store = accuracy_inputs(checkpoint, settings), checkpoint.source.name, checkpoint.store
    identity = {**inputs, "versions": versions(checkpoint.device)} | ({"images": True} if save_images else {})
    state = StateFile(store.path(name, ".state"), identity, every=SAVE_EVERY)
    evaluation, report = _attack(checkpoint, settings, state, save_images)
    return checkpoint.source.processes.from_first(
        lambda: _write(checkpoint, inputs, state, evaluation, report, save_images)
    )


def _write(
    checkpoint: Checkpoint,
    inputs: dict[str, Any],
    state: StateFile,
    evaluation: Evaluation,
    report: dict[str, Any],
    save_images: bool,
) -> dict[str, Any]:
    """The files of a finished evaluation; the content of the JSON file."""
    name, store = checkpoint.source.name, checkpoint.store
    kept = checkpoint.set_aside(name, inputs)
    # Killed between these, no file is left that speaks of another evaluation than the others.
    pictures = f"{name}-gallery", f"{name}-examples"
    for stale in (store.path(name), *(store.path(picture, ".safetensors") for picture in pictures)):
        stale.unlink(missing_ok=True)
    for stale in store.folder.glob(f"{name}-adversarial-*.safetensors"):
        if kept is None:
            stale.unlink()
        else:
            stale.rename(kept.with_name(kept.stem + stale.name.removeprefix(name)))
    if save_images:
        save_adversarial(checkpoint, inputs, evaluation)
    write_atomic(store.path(name, ".parquet"), evaluation.to_parquet())
    result = store.write(name, inputs, report)
    state.remove()
    return result


def _attack(
    checkpoint: Checkpoint, settings: EvaluateSettings, state: StateFile, save_images: bool
) -> tuple[Evaluation, dict[str, Any]]:
    """The attacks on the test images, and the content of the JSON file."""
    source = checkpoint.source
    evaluator = make_evaluator(checkpoint, settings, source.processes)
    evaluator.keep_images = save_images
    attacks = [parse(attack, len(source.bundle.classes)) for attack in settings.attacks]
    index, of_curve = (
        checkpoint.subset(size, settings.subset) for size in (settings.size, settings.curve_size)
    )
    evaluation = evaluator(attacks, index=index, progress=source.progress, state=state, log_costs=True)
    evaluator.keep_images = False
    evaluator.microbatch = evaluation.how["microbatch"]  # as many as have fitted into memory
    threat = {"norm": source.threat.norm, "eps": str(source.threat.eps)}
    return evaluation, {
        "which": source.which,
        "epoch": checkpoint.metadata.get("epoch"),
        "split": "test",
        "name_of_data": source.bundle.name,
        **checkpoint.facts,
        "settings": plain({**asdict(settings), **threat}),
        **evaluation.to_dict(),
        "per_class": per_class(evaluation, source.bundle.classes),
        "eps_curve": eps_curve(evaluator, of_curve, evaluation),
    }


def make_evaluator(
    checkpoint: Checkpoint, settings: EvaluateSettings, processes: Processes = ALONE
) -> Evaluator:
    """The evaluator of a checkpoint under its threat; of these processes, which all have to use it."""
    microbatch = settings.microbatch
    if microbatch is None:
        fitting = fitting_microbatch(checkpoint.net, checkpoint.test_images(1).image)
        microbatch = min(processes.tell(fitting))
    return Evaluator(
        checkpoint.net,
        checkpoint.data,
        checkpoint.source.threat,
        batch_size=settings.batch_size,
        seed=settings.seed,
        microbatch=microbatch,
        precision=settings.precision,
        compile=settings.compile,
        targeted=settings.targeted,
        mask=checkpoint.source.mask,
        processes=processes,
    )


def per_class(evaluation: Evaluation, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Clean and worst-case accuracy of each class that has images."""
    rows = []
    right = evaluation.clean_prediction == evaluation.label
    for number, name in enumerate(classes):
        members = evaluation.label == number
        n = int(members.sum())
        if n:
            clean, robust = int(right[members].sum()) / n, int(evaluation.worst[members].sum()) / n
            rows.append({"class": name, "clean": clean, "robust": robust, "n": n})
    return rows


def eps_curve(evaluator: Evaluator, index: Tensor, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Robust accuracy under PGD-20 at multiples of eps, of the images at ``index`` that were evaluated.

    It starts from clean accuracy at zero and ends at the largest eps that a threat model takes. There is none
    in l0, which PGD does not know, and of a targeted evaluation.
    """
    index, threat = index[torch.isin(index, evaluation.index)], evaluation.threat
    if not len(index) or threat.norm == "l0" or evaluation.target is not None:
        return []
    right = (evaluation.clean_prediction == evaluation.label)[torch.isin(evaluation.index, index)]
    clean = Rate.of(right)
    points = [{"eps": "0", "value": 0.0, **asdict(clean)}]
    for factor in CURVE:
        eps = scaled(threat.eps, factor)
        if eps > LARGEST[threat.norm]:
            break
        rate = evaluator.under(ThreatModel(threat.norm, eps))([PGD(steps=20)], index=index).robust("pgd-20")
        points.append({"eps": str(eps), "value": float(eps), **asdict(rate)})
    return points


def scaled(eps: Budget, factor: float) -> Budget:
    """``eps`` times ``factor``, written as eps is: 8/255 times 0.5 is 4/255."""
    above, slash, below = str(eps).partition("/")
    return Budget(f"{float(above) * factor:g}{slash}{below}")


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """What an evaluation logged after each attack, from its JSON."""
    rows: list[Mapping[str, Any]] = []
    for name, row in result["attacks"].items():
        rows += row.get("members") or [{"name": name, "attacked": row["n"], **row}]
    return [cost_line(row) for row in rows]


def summary_line(name: str, result: Mapping[str, Any]) -> str:
    """Clean accuracy and accuracy under each attack in one line.

    Args:
        name: of the result.
        result: ``evaluation/NAME.json``.
    """
    figures = [f"{attack} {100 * figure['rate']:.1f}%" for attack, figure in result["attacks"].items()]
    epoch = "" if result["epoch"] is None else f" (epoch {result['epoch']})"
    return f"{name}{epoch}: " + "  ".join([f"clean {100 * result['clean']['rate']:.1f}%", *figures])
