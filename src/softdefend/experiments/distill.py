"""Two teachers and a student in one go: KD-SWA (Chen et al., ICLR 2021) and its like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softdefend.core.errors import SettingError
from softdefend.experiments import pipeline
from softdefend.experiments.config import Experiment, first_given, resolve
from softdefend.labels import KD
from softdefend.labels.teachers import check_teacher_path
from softdefend.training.plain import plain_config

_log = logging.getLogger(__name__)

_CLEAN = {"class_path": "PGD", "init_args": {"steps": 0, "start": "none"}}
"""The attack that leaves images as they are: it makes PGD-AT standard training, and clean accuracy what the
best checkpoint is chosen by."""

_SET_BY_STAGE = ("--preset", "--folder", "--resume", "--label.standard", "--label.robust")
"""Arguments that differ from stage to stage."""


def kd_swa(
    arguments: Sequence[str],
    folder: Path,
    *,
    preset: str = "kd-swa",
    standard: str | None = None,
    robust: str | None = None,
) -> Path:
    """Train a standard teacher, a robust one (PGD-AT) and the student that learns from both.

    Every stage is a run in a folder of its own, with evaluation and report; the teachers' best weights teach,
    the standard one's chosen by clean accuracy. Stages share every setting (protocol, seed, data split,
    schedule, BN mode of the attack) but label rule, objective and weight rule. Called again with the same
    arguments it keeps what is finished and continues what is not, so that it may be killed anywhere.

    Args:
        arguments: of ``softdefend train``: the protocol and overrides.
        folder: gets ``standard/``, ``robust/`` and ``student/``.
        preset: of the student; its label rule is :class:`~softdefend.labels.KD`.
        standard, robust: teachers that exist already, as paths that ``label.standard`` and ``label.robust``
            take; that stage is left out.

    Returns:
        The student's run folder.

    Raises:
        SettingError: a setting that differs from stage to stage, a preset without KD, or whatever training
            refuses. The settings of all stages are checked before the first one trains.
    """
    if name := first_given(arguments, _SET_BY_STAGE):
        accepted = "settings that all stages share; this one differs from stage to stage"
        raise SettingError(name, "a value for all stages", accepted)
    for role, given in (("--standard", standard), ("--robust", robust)):
        if given is not None:
            check_teacher_path(given, role)
    teachers = [
        f"--label.standard={standard or folder / 'standard'}",
        f"--label.robust={robust or folder / 'robust'}",
    ]
    own = [f"--preset={preset}", f"--folder={folder / 'student'}"]
    if not isinstance(resolve([*arguments, *own]).recipe.label, KD):
        raise SettingError("--preset", repr(preset), "a preset whose label rule is KD, such as kd-swa")
    student = resolve([*arguments, *own, *teachers])
    stages = {"student": student}
    if robust is None:
        stages = {"robust teacher": _teacher(student, folder / "robust"), **stages}
    if standard is None:
        validate = {**plain_config(student)["validate"], "attack": _CLEAN}
        clean = _teacher(student, folder / "standard", attack=_CLEAN, validate=validate)
        stages = {"standard teacher": clean, **stages}
    for number, (stage, experiment) in enumerate(stages.items(), start=1):
        _log.info("stage %d of %d: %s", number, len(stages), stage)
        pipeline.train(experiment)
    return student.folder


def _teacher(student: Experiment, folder: Path, **changes: Any) -> Experiment:
    """PGD-AT with the student's settings."""
    return resolve(
        {
            **plain_config(student),
            "name": f"{student.name}-{folder.name}",
            "folder": str(folder),
            "label": {"class_path": "Hard"},
            "objective": {"class_path": "PGDAT"},
            "weight": {"class_path": "Plain"},
            **changes,
        }
    )
