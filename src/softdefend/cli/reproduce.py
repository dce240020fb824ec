"""``softdefend reproduce``: the paper's experiments."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli import train
from softdefend.cli.flags import Flags, positional, switch
from softdefend.core.errors import SettingError
from softdefend.experiments import reproduce as studies

STUDIES = ("table1", "settings", "noise", "ablation", "norms")


@dataclass(frozen=True)
class ReproduceFlags:
    """The paper's experiments: 'table1' (PGD-AT and TRADES with and without SGLR, 200 epochs, AutoAttack),
    'settings' (PGD-AT and SGLR with other data, networks, norms), 'noise' (wrong training labels), 'ablation'
    (SGLR, one factor at a time), 'norms' (training against one norm and several). Finished runs are kept,
    unfinished ones continued."""

    study: str = positional()
    """table1, settings, noise, ablation or norms."""
    folder: Path | None = None
    """Where runs, table, figures and report go; runs/STUDY if not given."""
    seeds: tuple[int, ...] = (0,)
    """Of the runs: each is made with each of them."""
    parallel: int = 1
    """Runs at a time, each a process of its own; spread over the GPUs that are visible."""
    only: tuple[str, ...] = ()
    """Names of the runs to make, such as pgd-at; with settings also those of a setting, such as l2."""
    human: Path | None = None
    """noise: CIFAR-10N's labels, an .npz file."""
    quick: bool = switch()
    """In miniature: digits, a few epochs, a CPU."""


FLAGS = Flags("reproduce", ReproduceFlags, passes_on=train.completion)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Make the study's runs that are not there yet, and gather all of them."""
    given = FLAGS.read(words)
    flags = given.make(ReproduceFlags)
    study = _study(flags)
    folder = flags.folder or Path("runs") / (f"{study.name}-quick" if flags.quick else study.name)
    studies.reproduce(study, folder, given.rest, seeds=flags.seeds, parallel=flags.parallel, only=flags.only)


def _study(flags: ReproduceFlags) -> studies.Study:
    if flags.study not in STUDIES:
        raise SettingError("study", repr(flags.study), ", ".join(STUDIES))
    if flags.human is not None and flags.study != "noise":
        raise SettingError("--human", f"{flags.human} with {flags.study}", "it with noise only")
    if flags.human is not None and not os.path.isfile(flags.human):
        raise SettingError("--human", flags.human, "an .npz file of labels")
    plans: dict[str, Callable[[], studies.Study]] = {
        "table1": studies.table1,
        "settings": studies.settings,
        "noise": lambda: studies.noise(flags.human),
        "ablation": studies.ablation,
        "norms": studies.norms,
    }
    study = plans[flags.study]()
    return studies.make_quick(study) if flags.quick else study
