"""The paper's experiments, one command each: plan the runs, make them, write one table and one figure."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.store import ResultStore
from softdefend.experiments import pipeline
from softdefend.experiments.config import first_given
from softdefend.report import RunRecord, read_run, studies, write_report
from softdefend.report.embed import svg

_log = logging.getLogger(__name__)

QUICK = (
    *("--config", "digits_demo", "--data.train_size", "128", "--data.validation", "64", "--net.width", "8"),
    *("--optim.epochs", "4", "--attack.steps", "3", "--validate.test_size", "64", "--evaluate.size", "64"),
    *("--evaluate.curve_size", "0", "--evaluate.examples", "0"),
)
"""A protocol on digits that takes seconds on a CPU. It shows that a study runs, never what it finds."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        name: of its row and folder.
        arguments: of ``softdefend train``, after the protocol's.
        factors: what sets the row apart, for the table.
    """

    name: str
    arguments: tuple[str, ...]
    factors: dict[str, str]


@dataclass(frozen=True)
class Study:
    """A set of runs under one protocol.

    Attributes:
        name: of the study.
        title: of its report.
        protocol: arguments of ``softdefend train`` that all runs share.
        attacks: of the final evaluation of best and last checkpoint.
        runs: what is trained.
        split: whose figures the table shows: ``test``, or ``validation`` where the figures serve a choice.
    """

    name: str
    title: str
    protocol: tuple[str, ...]
    attacks: tuple[str, ...]
    runs: tuple[StudyRun, ...]
    split: Literal["test", "validation"] = "test"

    @property
    def measures(self) -> tuple[str, ...]:
        """Columns of the table."""
        return ("clean", *self.attacks) if self.split == "test" else ("val_clean", "val_robust")


def table1() -> Study:
    """PGD-AT and TRADES, each with and without SGLR: 200 epochs of ResNet-18, PGD-20 and AutoAttack.

    TRADES with SGLR twice: by the rule of the authors' code, and with the given label's share of the paper's.
    """
    shown = {"pgd-at": "PGD-AT", "sglr-reference": "PGD-AT + SGLR"}
    shown |= {"trades": "TRADES", "trades-sglr": "TRADES + SGLR", "trades-sglr-paper": "TRADES + SGLR, r 0.7"}
    return Study(
        "table1",
        "PGD-AT and TRADES with and without SGLR",
        ("--config", "cifar10_resnet18"),
        ("pgd-20", "autoattack"),
        tuple(StudyRun(name, ("--preset", name), {"recipe": recipe}) for name, recipe in shown.items()),
    )


def noise(human: Path | None = None) -> Study:
    """PGD-AT and SGLR under wrong training labels: drawn symmetrically, and human ones where a file is given.

    Args:
        human: CIFAR-10N's labels as an .npz file with arrays ``aggre_label`` and ``worse_label``.
    """
    kinds: dict[str, tuple[str, ...]] = {
        f"symmetric {percent}%": ("--data.noise", "symmetric", "--data.noise_rate", str(percent / 100))
        if percent
        else ("--data.noise", "none", "--data.noise_rate", "0")
        for percent in (0, 20, 40, 60)
    }
    if human is not None:
        for shown, key in (("CIFAR-10N aggregate", "aggre_label"), ("CIFAR-10N worst", "worse_label")):
            file = ("--data.noise_rate", "0", "--data.noise", "file", "--data.noise_file", str(human))
            kinds[shown] = (*file, "--data.noise_key", key)
    runs = tuple(
        StudyRun(f"{preset} {shown}", ("--preset", preset, *labels), {"recipe": preset, "noise": shown})
        for shown, labels in kinds.items()
        for preset in ("pgd-at", "sglr-reference")
    )
    return Study("noise", "SGLR under label noise", ("--config", "cifar10_resnet18_short"), ("pgd-20",), runs)


ABLATED: dict[str, tuple[str, ...]] = {
    "alpha": ("0.5", "0.7", "0.95", "0.99"),
    "clean_weight": ("0", "0.5", "1"),
    "r": ("0.3", "0.5", "0.7", "0.9"),
    "start": ("0", "0.25", "0.65"),
    "attack_label": ("refined",),
    "clean_bn": ("batch", "eval"),
}
"""SGLR's settings and the values tried beside those of ``sglr-reference``."""


def ablation() -> Study:
    """SGLR with one factor at a time moved away from the reference's value; read on validation images."""
    base = ("--preset", "sglr-reference")
    runs = [StudyRun("sglr-reference", base, {"factor": "none", "value": "reference"})]
    for factor, values in ABLATED.items():
        for value in values:
            arguments = (*base, f"--label.{factor}", value)
            runs.append(StudyRun(f"{factor}={value}", arguments, {"factor": factor, "value": value}))
    return Study(
        "ablation",
        "SGLR, one factor at a time",
        ("--config", "cifar10_resnet18_short"),
        ("pgd-20",),
        tuple(runs),
        split="validation",
    )


def make_quick(study: Study) -> Study:
    """The study on digits in a few epochs, with an attack that takes seconds in place of AutoAttack."""
    attacks = tuple("apgd-ce-5" if name == "autoattack" else name for name in study.attacks)
    runs = tuple(run for run in study.runs if "--data.noise_file" not in run.arguments)
    return replace(study, protocol=QUICK, attacks=attacks, runs=runs)


_SET_BY_STUDY = {
    "--seed": ": --seeds",
    "--name": "",
    "--folder": ": one for each run",
    "--resume": "",
    "--evaluate.attacks": "",
    "--preset": "",
}
"""Arguments of ``softdefend train`` that a study gives every run, and what is given in their place."""


def reproduce(
    study: Study,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0,),
    parallel: int = 1,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Make a study's runs, each in a folder of its own, and write what they found.

    Finished runs are kept and unfinished ones continued, whatever stopped them. Writes into ``folder``:
    ``NAME-seedSEED.json`` per run, ``table.json``, ``table.md``, ``figure.svg`` (best and last of each row),
    ``curves.svg`` and ``report.html``. Table and figures also have the rows of this study whose JSON file
    lies there from an earlier call, made on another machine perhaps.

    Args:
        study: what to run.
        folder: where to.
        overrides: further arguments of ``softdefend train`` for every run, such as ``--data.source DIR``.
        seeds: of each run.
        parallel: runs at a time; above one each is a process of its own.
        only: names of the runs to make; all when empty.

    Returns:
        The rows of the table.

    Raises:
        SettingError: a name in ``only`` that the study does not have, or an override of what the study sets.
    """
    if given := first_given(overrides, _SET_BY_STUDY):
        raise SettingError(given, "a value for all runs", f"what the study sets itself{_SET_BY_STUDY[given]}")
    names = [run.name for run in study.runs]
    for name in only:
        if name not in names:
            raise SettingError("--only", repr(name), ", ".join(names))
    selected = [(run, seed) for run in study.runs if run.name in (only or names) for seed in seeds]
    store = ResultStore(folder)
    folders = [folder / _stem(run, seed) for run, seed in selected]
    arguments = {
        f"{run.name}, seed {seed}": _arguments(study, run, seed, place, overrides)
        for (run, seed), place in zip(selected, folders, strict=True)
    }
    pipeline.train_all(arguments, parallel=parallel)
    records = [read_run(place) for place in folders]
    for (run, seed), record in zip(selected, records, strict=True):
        inputs = _inputs(run, seed, _protocol(record.config))
        store.write(_stem(run, seed), inputs, _row(study, run, seed, record))
    rows = _collect_rows(study, store, _protocol(records[0].config))
    _write_table(study, folder, rows)
    _log.info("report: %s", write_report(records, folder / "report.html", study.title))
    return rows


def _write_table(study: Study, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table and the figures, and log the table."""
    factors = tuple(study.runs[0].factors)
    shown = ("name", *factors, "seed", "best", "last", "hours")
    brief = [{key: row[key] for key in shown} for row in rows]
    content = {"study": study.name, "title": study.title, "rows": brief}
    write_atomic(folder / "table.json", json.dumps(content, indent=1).encode() + b"\n")
    table = markdown(study, brief)
    write_atomic(folder / "table.md", table.encode())
    figures = {
        "curves": studies.curves(rows),
        "figure": studies.best_and_last(rows, factors, study.measures),
    }
    for name, plot in figures.items():
        if plot is not None:
            write_atomic(folder / f"{name}.svg", svg(plot.figure).encode())
    _log.info("%s", table)


def _collect_rows(study: Study, store: ResultStore, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one protocol that lie in a folder, in the study's order, by seed."""
    rows: list[dict[str, Any]] = []
    for run in study.runs:
        pattern = re.compile(re.escape(_stem(run, "")) + r"(-?\d+)")
        found = (pattern.fullmatch(path.stem) for path in store.folder.glob("*.json"))
        for seed in sorted(int(match[1]) for match in found if match):
            row = store.find(_stem(run, seed), _inputs(run, seed, protocol))
            if row is not None:
                rows.append(row)
            else:
                reason = "damaged or made under another protocol, left out of the table"
                _log.info("%s, seed %d: %s", run.name, seed, reason)
    return rows


def _stem(run: StudyRun, seed: int | str) -> str:
    """Of the names of a run's folder and files."""
    safe = "".join(letter if letter.isalnum() or letter in "=.-" else "_" for letter in run.name)
    return f"{safe}-seed{seed}"


def _inputs(run: StudyRun, seed: int, protocol: dict[str, Any]) -> dict[str, Any]:
    """What a row is found again by."""
    return {"name": run.name, "seed": seed, "protocol": protocol}


def _protocol(config: dict[str, Any]) -> dict[str, Any]:
    """What rows of one table have in common, whichever machine made them."""
    return {
        "data": {name: config["data"][name] for name in ("name", "train_size", "validation")},
        "net": config["net"],
        "threat": config["threat"],
        "epochs": config["optim"]["epochs"],
        "batch_size": config["optim"]["batch_size"],
        "optim": {name: config["optim"][name] for name in ("lr", "momentum", "weight_decay", "schedule")},
        "attack": {name: config["attack"]["init_args"][name] for name in ("steps", "step_size")},
        "evaluate": {name: config["evaluate"][name] for name in ("attacks", "size", "precision")},
    }


def _arguments(study: Study, run: StudyRun, seed: int, folder: Path, overrides: Sequence[str]) -> list[str]:
    """One run's arguments of ``softdefend train``."""
    attacks = f"--evaluate.attacks={json.dumps(study.attacks)}"
    own = ["--name", run.name, "--seed", str(seed), attacks]
    return [*study.protocol, *run.arguments, *own, *overrides, f"--folder={folder}"]


def _row(study: Study, run: StudyRun, seed: int, record: RunRecord) -> dict[str, Any]:
    """What one finished run contributes."""
    row: dict[str, Any] = {"name": run.name, **run.factors, "seed": seed}
    for which in ("best", "last"):
        result = record.evaluations[which]
        figures = {"epoch": result["epoch"], "clean": result["clean"]["rate"]}
        figures |= {attack: robust_rate(result, attack) for attack in study.attacks}
        epoch = next(line for line in record.metrics if line["epoch"] == result["epoch"])
        row[which] = figures | {"val_clean": epoch["val_clean"], "val_robust": epoch["val_robust"]}
    row["hours"] = sum({line["epoch"]: line["seconds"] for line in record.timing}.values()) / 3600
    return {**row, "environment": record.environment, "curve": record.metrics}


def robust_rate(evaluation: dict[str, Any], attack: str) -> float:
    """Robust accuracy in [0, 1] under an attack or an ensemble of them, from an evaluation's JSON."""
    if attack not in evaluation["attacks"]:
        raise SettingError("evaluation", f"without {attack}", "an evaluation that ran it")
    return float(evaluation["attacks"][attack]["rate"])


def markdown(study: Study, rows: Iterable[dict[str, Any]]) -> str:
    """The table: best, last and their difference, in percent, for clean accuracy and every attack."""
    rows = list(rows)
    factors = list(study.runs[0].factors)
    columns = [f"{measure} {which}" for measure in study.measures for which in ("best", "last", "diff.")]
    header = [*factors, "seed", *columns, "hours"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [str(row[factor]) for factor in factors] + [str(row["seed"])]
        for measure in study.measures:
            best, last = (100 * row[which][measure] for which in ("best", "last"))
            cells += [f"{best:.1f}", f"{last:.1f}", f"{best - last:+.1f}"]
        lines.append([*cells, f"{row['hours']:.2f}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
