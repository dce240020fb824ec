"""Everything that is asked about one checkpoint, in files beside each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.data import describe_subset, subset
from softdefend.evaluation.accuracy import evaluate_attacks, find_accuracies, summary_line
from softdefend.evaluation.audit import audit_measurement
from softdefend.evaluation.autoattack import averages_draws
from softdefend.evaluation.autoattack_log import log_lines
from softdefend.evaluation.checkpoint import Checkpoint, CheckpointSource
from softdefend.evaluation.corruptions import corruption_measurement
from softdefend.evaluation.mask import check_mask
from softdefend.evaluation.measurement import measured
from softdefend.evaluation.optimality import check_optimality, optimality_measurement
from softdefend.evaluation.pictures import renew_pictures
from softdefend.evaluation.robustbench import issue_text, model_info, read_known
from softdefend.evaluation.settings import (
    EvaluateSettings,
    Requests,
    check_attacks,
    check_requests,
    check_writable,
    count_of,
)
from softdefend.evaluation.surrogates import transfer_measurement, transfer_warning
from softdefend.evaluation.table import Table, read_table
from softdefend.evaluation.union import check_images, kept_evaluations, title_of, union_text

_log = logging.getLogger(__name__)


def evaluate_checkpoint(
    source: CheckpointSource,
    settings: EvaluateSettings,
    requests: Requests | None = None,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Attack a checkpoint and measure what else is asked, unless the same results already lie in its folder.

    Before anything runs, :func:`~softdefend.evaluation.preflight.preflight` refuses what cannot be evaluated.
    The audit comes first. A network whose logits move is refused after it: the audit has that among its
    findings.

    Returns:
        What stands in ``evaluation/{source.name}.json``.

    Raises:
        SettingError: weights, data or a network that do not fit, or a file that cannot be written or filled.
    """
    requests = requests or Requests()
    check_evaluation(source, settings, requests, device)
    _say_which_images(source.bundle.test.labels, settings, requests)
    steady = not averages_draws(settings.attacks)
    checkpoint = Checkpoint(source, device, assumes_determinism=steady and not requests.audit)
    audit = transferred = None
    first = source.processes.first
    if requests.audit and first:
        audit = measured(checkpoint, audit_measurement(checkpoint, settings, requests))
    result = evaluate_attacks(checkpoint, settings, save_images=requests.adversarial)
    if requests.corruptions and not first:
        measured(checkpoint, corruption_measurement(checkpoint, settings))
    if not first:
        return result
    table = read_table(checkpoint.store.path(source.name, ".parquet"))
    renew_pictures(checkpoint, settings, result, table)
    _log.info(summary_line(source.name, result))
    if requests.surrogates:
        transferred = measured(checkpoint, transfer_measurement(checkpoint, settings, requests.surrogates))
        if warning := transfer_warning(result, transferred):
            _log.info(warning)
    if requests.corruptions:
        measured(checkpoint, corruption_measurement(checkpoint, settings))
    if requests.optimality:
        compared = optimality_measurement(checkpoint, settings, requests.optimality, requests.optimality_size)
        measured(checkpoint, compared)
    if requests.union:
        kept = kept_evaluations(checkpoint.store.folder, source.which, source.trained, result)
        _log.info(union_text(source.which, kept))
    if requests.robustbench:
        _write_model_info(requests.robustbench, source, result, table, audit, transferred)
    if requests.log:
        write_atomic(requests.log, ("\n".join(log_lines(result, table)) + "\n").encode())
        _log.info(f"log: {requests.log}")
    return result


def check_union(
    sources: Sequence[CheckpointSource], settings: EvaluateSettings, device: torch.device
) -> None:
    """Refuse evaluations whose union will not be known, before they are made.

    Args:
        sources: of one checkpoint, under each threat that it is to be evaluated under.
        settings: of the evaluations.
        device: of the checkpoint.

    Raises:
        SettingError: with what is kept there are fewer than two threats, or other images under one.
    """
    asked = {source.name for source in sources}
    any_ = Checkpoint(sources[0], device)
    about = {**any_.facts, "which": any_.source.which}
    kept = kept_evaluations(any_.store.folder, any_.source.which, any_.source.trained, about)
    known = {one.name: one for one in kept}
    images = {one.title: one.table.index for one in kept if one.name not in asked}
    for source in sources:
        if source.name in known and find_accuracies(Checkpoint(source, device), settings) is not None:
            images[known[source.name].title] = known[source.name].table.index
        else:
            images[title_of(source.threat)] = any_.subset(settings.size, settings.subset).numpy()
    check_images(images)


def _say_which_images(labels: Tensor, settings: EvaluateSettings, requests: Requests) -> None:
    """A line for each part of the test images that may not have all classes."""
    classes = len(set(labels.tolist()))
    for setting, size in (
        ("size", settings.size),
        ("curve_size", settings.curve_size),
        ("audit_size", requests.audit),
    ):
        count = count_of(size, len(labels))
        if 0 < count < len(labels) and (settings.subset == "first" or count < classes):
            part = subset(labels, count, settings.subset)
            _log.info(f"{setting}: {describe_subset(labels, part, settings.subset)}")


def check_evaluation(
    source: CheckpointSource, settings: EvaluateSettings, requests: Requests, device: torch.device
) -> None:
    """Refuse what would fail only after hours; nothing is written.

    Raises:
        SettingError: files that cannot be written or filled, attacks, requests or a mask that do not fit the
            threat, the classes or the images.
    """
    check_requests(settings, requests, len(source.bundle.test))
    if source.mask is not None:
        check_mask(source.mask, len(source.bundle.test), tuple(source.bundle.test.images.shape[1:]))
    check_writable("evaluation", source.folder / "evaluation" / f"{source.name}.json")
    check_attacks(settings, source.threat, len(source.bundle.classes), device)
    if source.threat.norm == "l0" and (requests.audit or requests.surrogates):
        raise SettingError("threat.norm", "l0", "linf, l2 or l1 with --audit or --transfer")
    if source.threat.norm not in ("linf", "l2") and requests.robustbench:
        raise SettingError("--robustbench", f"an evaluation in {source.threat.norm}", "linf or l2, its norms")
    check_optimality(requests.optimality, source.threat, len(source.bundle.classes))


def _write_model_info(
    path: Path,
    source: CheckpointSource,
    result: dict[str, Any],
    table: Table | None,
    audit: dict[str, Any] | None,
    transferred: dict[str, Any] | None,
) -> None:
    """The evaluation for RobustBench; what people wrote into the file is kept."""
    content = model_info(
        result,
        table,
        full=len(source.bundle.test),
        architecture=source.architecture,
        additional_data=source.additional_data,
        unreliable=None if audit is None else audit["verdict"] == "suspicious",
        transferred=None if transferred is None else transferred["worst"]["count"],
        known=read_known(path),
    )
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
    issue = path.with_suffix(".md")
    write_atomic(issue, issue_text(content, result).encode())
    _log.info(f"text of RobustBench's issue for a new model: {issue}")
    _log.info(f"RobustBench model_info: {path}")
