"""Certify the checkpoints of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softdefend.core.errors import SettingError
from softdefend.data import load
from softdefend.evaluation import CheckpointSource
from softdefend.evaluation.certify import CertifySettings, certify_checkpoint
from softdefend.execution.engine import resolve_device
from softdefend.experiments.config import Experiment
from softdefend.experiments.evaluate import run_identity
from softdefend.experiments.network import make_net
from softdefend.objectives import GaussianNoise
from softdefend.report import read_run, write_report


def trained_sigma(experiment: Experiment) -> float | None:
    """Standard deviation of the noise that a run was trained with, or None."""
    objective = experiment.recipe.objective
    return objective.sigma if isinstance(objective, GaussianNoise) else None


def certify(
    experiment: Experiment, which: Sequence[str], settings: CertifySettings, *, device: str = "auto"
) -> list[dict[str, Any]]:
    """Certify checkpoints of a run on its test images and renew its report.

    Args:
        experiment: see :func:`~softdefend.experiments.evaluate.open_run`.
        which: checkpoints.
        settings: of the certificate.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        SettingError: a checkpoint that is not there, or what does not fit.
    """
    chosen = resolve_device(device)
    for name in which:
        if not (path := experiment.folder / f"{name}.safetensors").is_file():
            accepted = "a finished run (the same train command goes on), or another --which"
            raise SettingError(str(path), "no such file", accepted)
    bundle = load(experiment.data)
    net = make_net(experiment, bundle)
    threat = experiment.recipe.threat
    results = []
    for name in which:
        source = CheckpointSource(
            net,
            bundle,
            experiment.folder,
            name,
            trained=threat,
            threat=threat,
            architecture=experiment.net.name,
            run=run_identity(experiment, bundle),
            progress=experiment.progress,
        )
        results.append(certify_checkpoint(source, settings, device=chosen))
    write_report([read_run(experiment.folder)], experiment.folder / "report.html")
    return results
