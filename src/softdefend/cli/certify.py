"""``softdefend certify``: certificates by randomized smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli.flags import Flags, positional
from softdefend.core.errors import SettingError
from softdefend.evaluation.certify import CertifySettings
from softdefend.experiments.certify import certify, trained_sigma
from softdefend.experiments.evaluate import open_run
from softdefend.experiments.pipeline import WHICH


@dataclass(frozen=True)
class CertifyFlags:
    """Certify a run's checkpoints on its test images: how far in l2 no change of an image can change the
    answer of the smoothed classifier (Cohen et al., arXiv 1902.02918). Networks trained with the preset
    gaussian-noise bring their sigma; for others give it."""

    run: tuple[str, ...] = positional()
    """Run folders."""
    which: tuple[str, ...] = WHICH
    """best, last or both."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


FLAGS = Flags("certify", CertifyFlags, CertifySettings)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Certify run folders one after another."""
    given = FLAGS.read(words)
    flags = given.make(CertifyFlags)
    for which in flags.which:
        if which not in WHICH:
            raise SettingError("--which", repr(which), " or ".join(WHICH))
    changes = given.changes(CertifySettings)
    experiments = [open_run(Path(folder)) for folder in flags.run]
    settings = []
    for experiment in experiments:  # all of them before hours go into the first
        sigma = changes.get("sigma", trained_sigma(experiment))
        if sigma is None:
            missing = f"nothing, and {experiment.folder} was not trained with noise"
            raise SettingError("--sigma", missing, "the noise in pixel units, such as 0.25")
        settings.append(CertifySettings(**{**changes, "sigma": sigma}))
    for experiment, one in zip(experiments, settings, strict=True):
        print(experiment.folder)
        certify(experiment, flags.which, one, device=flags.device)
