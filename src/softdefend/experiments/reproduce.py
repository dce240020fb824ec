"""The paper's experiments, one command each: plan the runs, make them, write one table and one figure."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.store import ResultStore
from softdefend.core.threat import Budget, Norm, ThreatModel
from softdefend.evaluation import EvaluateSettings
from softdefend.evaluation.autoattack import parse
from softdefend.evaluation.table import read_table
from softdefend.evaluation.union import KeptEvaluation, kept_evaluations, robust_in_union
from softdefend.experiments import paired, pipeline
from softdefend.experiments.config import first_given, resolve
from softdefend.experiments.evaluate import evaluate, open_run
from softdefend.report import RunRecord, read_run, studies, write_report
from softdefend.report.embed import svg
from softdefend.report.figures import Plot
from softdefend.training.plain import plain_config

_log = logging.getLogger(__name__)

QUICK = (
    *("--config", "digits_demo", "--data.train_size", "128", "--data.validation", "64", "--net.width", "8"),
    *("--optim.epochs", "4", "--attack.steps", "3", "--validate.test_size", "64", "--evaluate.size", "64"),
    *("--evaluate.curve_size", "0", "--evaluate.examples", "0"),
)
"""A protocol on digits that takes seconds on a CPU. It shows that a study runs, never what it finds."""
_QUICK_ATTACKS = {"autoattack": "apgd-ce-5", "pgd-100": "pgd-10", "square": "square-20"}


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        name: of its row and folder.
        arguments: of ``softdefend train``, after the protocol's.
        factors: what sets the row apart, for the table.
        protocol: arguments that a run in miniature leaves out, where the study's runs do not share theirs.
        start: name of the run whose last weights it starts from; empty for fresh weights.
        fixed: arguments that stay, whatever is given for all runs.
    """

    name: str
    arguments: tuple[str, ...]
    factors: dict[str, str]
    protocol: tuple[str, ...] = ()
    start: str = ""
    fixed: tuple[str, ...] = ()


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
        pairs: names of runs whose last checkpoints are compared image by image: a reference, and another.
        transfer: whether the runs of a pair are also attacked with images that were made on one another.
        threats: that every run is evaluated under, whatever it was trained against, one for each norm; the
            table then has a column for each and for their union, over all attacks. Under the threat of its
            training alone where there are none.
    """

    name: str
    title: str
    protocol: tuple[str, ...]
    attacks: tuple[str, ...]
    runs: tuple[StudyRun, ...]
    split: Literal["test", "validation"] = "test"
    pairs: tuple[tuple[str, str], ...] = ()
    transfer: bool = False
    threats: tuple[ThreatModel, ...] = ()

    @property
    def measures(self) -> tuple[str, ...]:
        """Columns of the table."""
        if self.threats:
            return ("clean", *(threat.norm for threat in self.threats), "union")
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
        pairs=(
            ("pgd-at", "sglr-reference"),
            ("trades", "trades-sglr"),
            ("trades", "trades-sglr-paper"),
        ),
    )


_SHORT = ("--config", "cifar10_resnet18_short", "--optim.epochs", "40")
_FGSM = '{"class_path": "FGSMRS", "init_args": {"alpha": 1.25}}'
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cifar10": (_SHORT, ()),
    "preact-resnet18": ((*_SHORT, "--net.name", "preact_resnet18"), ()),
    "wrn34-10": ((*_SHORT, "--net.name", "wrn34_10"), ()),
    "l2": (
        _SHORT,
        (
            *("--threat.norm", "l2", "--threat.eps", "0.5", "--attack.step_size", "0.125"),
            *("--validate.attack.step_size", "0.125"),
        ),
    ),
    "tiny-imagenet": (("--config", "tiny_imagenet32_resnet18"), ()),
    "fgsm-rs": (_SHORT, ("--objective", _FGSM, "--attack_bn", "train")),
    "cifar100": (("--config", "cifar100_resnet18"), ()),
    "svhn": (("--config", "svhn_resnet18"), ()),
}
"""Setting: protocol, and what a run in miniature keeps."""


def settings() -> Study:
    """PGD-AT against SGLR in several settings: data sets, networks, norms, a one-step attack in training."""
    runs = []
    for setting, (protocol, arguments) in _SETTINGS.items():
        for preset, recipe in (("pgd-at", "PGD-AT"), ("sglr-reference", "PGD-AT + SGLR")):
            words, factors = ("--preset", preset, *arguments), {"setting": setting, "recipe": recipe}
            runs.append(StudyRun(f"{setting} {preset}", words, factors, protocol))
    return Study(
        "settings",
        "PGD-AT and SGLR in several settings",
        (),
        ("pgd-20", "pgd-100", "pgd-30-margin", "autoattack", "square"),
        tuple(runs),
        pairs=tuple((f"{setting} pgd-at", f"{setting} sglr-reference") for setting in _SETTINGS),
        transfer=True,
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
    return Study(
        "noise",
        "SGLR under label noise",
        ("--config", "cifar10_resnet18_short"),
        ("pgd-20",),
        runs,
        pairs=tuple((f"pgd-at {shown}", f"sglr-reference {shown}") for shown in kinds),
    )


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


RADII: dict[Norm, str] = {"linf": "8/255", "l2": "128/255", "l1": "12"}
"""Of the balls for images of 32 pixels, as robust-finetuning and the presets have them."""
_QUICK_RADII: dict[Norm, str] = {"linf": "0.1", "l2": "0.5", "l1": "2"}
_UNION = {"e-at": "E-AT", "max-at": "MAX", "avg-at": "AVG", "msd": "MSD"}
"""Presets that train against several norms, and what the table calls them."""
_FINE_TUNING = (
    *("--optim.epochs", "3", "--optim.lr", "0.01", "--optim.schedule.warmup", "0"),
    *("--optim.schedule.kind", "step", "--optim.schedule.milestones", "[0.3333, 0.6667]"),
)
"""Of Croce & Hein (arXiv 2105.12508): three epochs; rate and drops are the defaults of their code."""


def norms(radii: Mapping[Norm, str] = RADII) -> Study:
    """Training in one norm and in several, evaluated in l-inf, l2, l1 and their union, image by image.

    Args:
        radii: of the balls, in training and in evaluation.
    """
    own_step = ("--attack.step_size", "null", "--validate.attack.step_size", "null")  # a quarter of eps
    runs = []
    for norm, eps in radii.items():
        ball = ("--threat.norm", norm, "--threat.eps", eps, *(() if norm == "linf" else own_step))
        runs.append(StudyRun(norm, ("--preset", "pgd-at", *ball), {"recipe": f"PGD-AT {norm}"}))
    balls = ("--threat.norm", "linf", "--threat.eps", radii["linf"])
    for preset, recipe in _UNION.items():
        trained: list[Norm] = ["linf", "l1"] if preset == "e-at" else ["linf", "l2", "l1"]
        against = (word for norm in trained for word in (f"--objective.{norm}", radii[norm]))
        runs.append(StudyRun(preset, ("--preset", preset, *balls, *against), {"recipe": recipe}))
    tuned = next(run for run in runs if run.name == "e-at")
    factors = {"recipe": "E-AT from PGD-AT linf"}
    runs.append(replace(tuned, name="e-at-tuned", factors=factors, start="linf", fixed=_FINE_TUNING))
    return Study(
        "norms",
        "Training against one norm and against several",
        ("--config", "cifar10_resnet18_short"),
        ("autoattack",),
        tuple(runs),
        pairs=tuple(("linf", name) for name in (*_UNION, "e-at-tuned")),
        threats=tuple(ThreatModel(norm, Budget(eps)) for norm, eps in radii.items()),
    )


def make_quick(study: Study) -> Study:
    """The study on digits in a few epochs, with an attack that takes seconds in place of AutoAttack."""
    if study.threats:
        study = norms(_QUICK_RADII)
    attacks = tuple(_QUICK_ATTACKS.get(name, name) for name in study.attacks)
    runs = tuple(replace(run, protocol=()) for run in study.runs if "--data.noise_file" not in run.arguments)
    names = {run.name for run in runs}
    pairs = tuple(pair for pair in study.pairs if names.issuperset(pair))
    return replace(study, protocol=QUICK, attacks=attacks, runs=runs, pairs=pairs)


_SET_BY_STUDY = {
    "--seed": ": --seeds",
    "--name": "",
    "--folder": ": one for each run",
    "--resume": "",
    "--evaluate.attacks": "",
    "--preset": "",
}
"""Arguments of ``softdefend train`` that a study gives every run, and what is given in their place."""
_SET_WITH_THREATS = {
    **{name: said for name, said in _SET_BY_STUDY.items() if name != "--evaluate.attacks"},
    **dict.fromkeys(("--threat", "--threat.norm", "--threat.eps", "--objective"), ""),
    **{f"--objective{part}.{norm}": "" for part in ("", ".init_args") for norm in RADII},
}
"""The same for a study with threats of its own, whose columns name no attack."""


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
    ``curves.svg``, ``report.html``, and where the study compares runs ``differences.json``,
    ``differences.md`` and ``differences.svg``. Tables and figures also have the rows of this study whose JSON
    file lies there from an earlier call, made on another machine perhaps.

    Args:
        study: what to run.
        folder: where to.
        overrides: further arguments of ``softdefend train`` for every run, such as ``--data.source DIR``.
        seeds: of each run.
        parallel: runs at a time; above one each is a process of its own.
        only: names of the runs to make, or of what sets several apart, such as ``l2``; all when empty.

    Returns:
        The rows of the table.

    Raises:
        SettingError: a name in ``only`` that the study does not have, a run to start from that is neither
            made nor there, an override of what the study sets, or one that its figures cannot come from.
    """
    set_by_study = _SET_WITH_THREATS if study.threats else _SET_BY_STUDY
    if given := first_given(overrides, set_by_study):
        raise SettingError(given, "a value for all runs", f"what the study sets itself{set_by_study[given]}")
    runs = _selected(study, only)
    _check_source(study, runs, overrides)
    selected = [(run, seed) for run in runs for seed in seeds]
    resolved = {run.name: resolve(_arguments(study, run, 0, folder, overrides)) for run in study.runs}
    for run in runs:
        _check_evaluation(study, resolved[run.name].evaluate)
    protocols = {name: _protocol(plain_config(made)) for name, made in resolved.items()}
    _check_starts(folder, selected, protocols)
    store = ResultStore(folder)
    folders = [folder / _stem(run.name, seed) for run, seed in selected]
    arguments = {
        _job(run.name, seed): _arguments(study, run, seed, place, overrides)
        for (run, seed), place in zip(selected, folders, strict=True)
    }
    after = {_job(run.name, seed): _job(run.start, seed) for run, seed in selected if run.start}
    pipeline.train_all(arguments, parallel=parallel, after=after, threats=study.threats)
    records = [read_run(place) for place in folders]
    for (run, seed), record in zip(selected, records, strict=True):
        inputs = _inputs(run, seed, _protocol(record.config))
        store.write(_stem(run.name, seed), inputs, _row(study, run, seed, record))
    _add_transfer(study, store, seeds)
    rows = _collect_rows(study, store, protocols)
    _write_table(study, folder, rows)
    _write_differences(study, folder, rows)
    _log.info("report: %s", write_report(records, folder / "report.html", study.title))
    return rows


def _selected(study: Study, only: Sequence[str]) -> list[StudyRun]:
    """The runs that are named, by themselves or by what sets them apart.

    Raises:
        SettingError: a name of neither.
    """
    known = [{run.name, *run.factors.values()} for run in study.runs]
    for name in only:
        if not any(name in names for names in known):
            kinds = dict.fromkeys(run.factors["setting"] for run in study.runs if "setting" in run.factors)
            raise SettingError("--only", repr(name), ", ".join([*kinds, *(run.name for run in study.runs)]))
    chosen = zip(study.runs, known, strict=True)
    return [run for run, names in chosen if not only or names.intersection(only)]


def _check_source(study: Study, runs: Sequence[StudyRun], overrides: Sequence[str]) -> None:
    """Refuse one source for runs on several data sets."""
    if first_given(overrides, ("--data.source",)) is None:
        return
    protocols = {(*study.protocol, *run.protocol) for run in runs}
    sources = {resolve(protocol).data.source for protocol in protocols}
    if len(sources) > 1:
        given = f"one source for runs on {' and '.join(sorted(sources))}"
        raise SettingError("--data.source", given, "it beside --only with the settings of one data set")


def _check_evaluation(study: Study, settings: EvaluateSettings) -> None:
    """Refuse an evaluation that does not give a row's figures."""
    if settings.targeted is not None:
        accepted = "null: a study counts every wrong class"
        raise SettingError("evaluate.targeted", settings.targeted, accepted)
    if study.threats and not settings.attacks:
        raise SettingError("evaluate.attacks", "none", "an attack for the columns of the norms")
    for threat in study.threats:
        for name in settings.attacks:
            parse(name).check(threat)


def _check_starts(
    folder: Path, selected: Sequence[tuple[StudyRun, int]], protocols: Mapping[str, dict[str, Any]]
) -> None:
    """Refuse a run without the finished run that it starts from."""
    made = {(run.name, seed) for run, seed in selected}
    for run, seed in selected:
        if not run.start or (run.start, seed) in made:
            continue
        base = folder / _stem(run.start, seed)
        done = (base / "evaluation" / "last.json").is_file()
        if not done or _protocol(read_run(base).config) != protocols[run.start]:
            given = f"{run.name} without {run.start}, whose last weights it starts from"
            accepted = f"{run.start} beside it, or its finished run, made with the same settings, in {base}"
            raise SettingError("--only", given, accepted)


def _add_transfer(study: Study, store: ResultStore, seeds: Sequence[int]) -> None:
    """Attack the last checkpoints of a pair, where both runs lie in the folder, with images that were made on
    one another, and add the robust accuracy to their rows."""
    runs = {run.name: run for run in study.runs}
    for names in study.pairs if study.transfer else ():
        for seed in seeds:
            stems = [_stem(runs[name].name, seed) for name in names]
            weights = [store.folder / stem / "last.safetensors" for stem in stems]
            if not all(path.is_file() for path in weights):
                continue
            for stem, other in zip(stems, reversed(weights), strict=True):
                if (row := store.read(stem)) is not None:
                    last = {**row["last"], "transfer": _withstood(store.folder / stem, other)}
                    store.write(stem, row["inputs"], {**row, "last": last})


def _withstood(folder: Path, surrogate: Path) -> float:
    """Robust accuracy of a run's last checkpoint on images that were made on other weights of its network."""
    experiment = open_run(folder)
    evaluate(
        experiment,
        ("last",),
        experiment.evaluate,
        [experiment.recipe.threat],
        transfer=[str(surrogate)],
        device=experiment.runtime.device,
    )
    content = ResultStore(folder / "evaluation").read("last-transfer")
    assert content is not None
    return float(content["worst"]["rate"])


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
    _write_figures(folder, figures)
    _log.info("%s", table)


def _write_figures(folder: Path, figures: Mapping[str, Plot | None]) -> None:
    for name, plot in figures.items():
        if plot is not None:
            write_atomic(folder / f"{name}.svg", svg(plot.figure).encode())


def compared(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The study's pairs at the last epoch, seed by seed, where both rows are there and know the same images.

    Returns:
        Rows with ``reference`` and ``other`` (names), ``seed``, ``differences`` by measure, and robust
        accuracies ``transfer`` of the two, if both have one.
    """
    by_place = {(row["name"], row["seed"]): row for row in rows}
    found = []
    for first, second in study.pairs:
        for seed in sorted({row["seed"] for row in rows}):
            pair = [by_place.get((name, seed)) for name in (first, second)]
            if None in pair:
                continue
            one, other = (row.get("verdicts", {}) for row in pair if row is not None)
            differences = {name: paired.compare(one, other, name) for name in study.measures}
            known = {name: value for name, value in differences.items() if value is not None}
            transfer = [row["last"].get("transfer") for row in pair if row is not None]
            if known:
                found.append(
                    {
                        "reference": first,
                        "other": second,
                        "seed": seed,
                        "differences": known,
                        "transfer": None if None in transfer else transfer,
                    }
                )
    return found


def _write_differences(study: Study, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write and log the differences between the runs of a pair, and their figure."""
    pairs = compared(study, rows)
    if not pairs:
        return
    plain = [
        {**pair, "differences": {name: {**asdict(one), "error": one.error} for name, one in known.items()}}
        for pair in pairs
        for known in [pair["differences"]]
    ]
    content = {"study": study.name, "title": study.title, "checkpoint": "last", "pairs": plain}
    write_atomic(folder / "differences.json", json.dumps(content, indent=1).encode() + b"\n")
    table = differences_table(study, pairs)
    write_atomic(folder / "differences.md", table.encode())
    _write_figures(folder, {"differences": studies.forest(pairs, study.measures)})
    _log.info("%s", table)


def differences_table(study: Study, pairs: Iterable[Mapping[str, Any]]) -> str:
    """Last checkpoints of each pair in percent, with the paired difference, its standard error, and the p of
    McNemar's test."""
    measures = study.measures
    header = ["reference", "other", "seed", *measures, *(["transfer"] if study.transfer else [])]
    lines = [header, ["---"] * len(header)]
    for pair in pairs:
        cells = [pair["reference"], pair["other"], str(pair["seed"])]
        for measure in measures:
            one = pair["differences"].get(measure)
            cells.append("–" if one is None else _in_words(one))
        if study.transfer:
            rates = pair["transfer"]
            cells.append("–" if rates is None else " / ".join(f"{100 * rate:.1f}" for rate in rates))
        lines.append(cells)
    note = "\nDifference with its standard error over test images, and the p of McNemar's exact test."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n{note}\n"


def _in_words(one: paired.Difference) -> str:
    first, second = 100 * one.first, 100 * one.second
    p = "p < 0.001" if one.p < 0.001 else f"p {one.p:.3f}"
    return f"{first:.1f} to {second:.1f}: {100 * one.value:+.1f} ± {100 * one.error:.1f}, {p}"


def _collect_rows(
    study: Study, store: ResultStore, protocols: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows that lie in a folder and were made under their run's protocol, in the study's order, by
    seed."""
    rows: list[dict[str, Any]] = []
    for run in study.runs:
        pattern = re.compile(re.escape(_stem(run.name, "")) + r"(-?\d+)")
        found = (pattern.fullmatch(path.stem) for path in store.folder.glob("*.json"))
        for seed in sorted(int(match[1]) for match in found if match):
            row = store.find(_stem(run.name, seed), _inputs(run, seed, protocols[run.name]))
            if row is not None:
                rows.append(row)
            else:
                reason = "damaged or made under another protocol, left out of the table"
                _log.info("%s, seed %d: %s", run.name, seed, reason)
    return rows


def _stem(name: str, seed: int | str) -> str:
    """Of the names of a run's folder and files."""
    safe = "".join(letter if letter.isalnum() or letter in "=.-" else "_" for letter in name)
    return f"{safe}-seed{seed}"


def _job(name: str, seed: int) -> str:
    """What messages call a run."""
    return f"{name}, seed {seed}"


def _inputs(run: StudyRun, seed: int, protocol: dict[str, Any]) -> dict[str, Any]:
    """What a row is found again by."""
    return {"name": run.name, "seed": seed, "protocol": protocol}


def _protocol(config: dict[str, Any]) -> dict[str, Any]:
    """What rows of one table have in common, whichever machine made them."""
    return {
        "data": {name: config["data"][name] for name in ("name", "train_size", "validation")},
        # Rows that are committed are from before there were other activations.
        "net": {key: value for key, value in config["net"].items() if (key, value) != ("activation", "relu")},
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
    last = [*run.fixed, f"--folder={folder}"]
    if run.start:
        last.append(f"--init_from={folder.parent / _stem(run.start, seed) / 'last.safetensors'}")
    return [*study.protocol, *run.protocol, *run.arguments, *own, *overrides, *last]


def _row(study: Study, run: StudyRun, seed: int, record: RunRecord) -> dict[str, Any]:
    """What one finished run contributes."""
    row: dict[str, Any] = {"name": run.name, **run.factors, "seed": seed}
    for which in ("best", "last"):
        result = record.evaluations[which]
        figures: dict[str, Any] = {"epoch": result["epoch"]}
        if study.threats:
            kept = _under_threats(study, record, which)
            right = _right_in_union(kept, record.config["evaluate"]["attacks"])
            figures |= {name: float(flags.mean()) for name, flags in right.items()}
            row["verdicts"] = paired.verdicts(kept[0].table, right)
        else:
            figures["clean"] = result["clean"]["rate"]
            figures |= {attack: robust_rate(result, attack) for attack in study.attacks}
        epoch = next(line for line in record.metrics if line["epoch"] == result["epoch"])
        row[which] = figures | {"val_clean": epoch["val_clean"], "val_robust": epoch["val_robust"]}
    if not study.threats:
        table = read_table(record.folder / "evaluation" / "last.parquet")
        row["verdicts"] = {} if table is None else paired.verdicts(table)
    row["hours"] = sum({line["epoch"]: line["seconds"] for line in record.timing}.values()) / 3600
    return {**row, "environment": record.environment, "curve": record.metrics}


def _under_threats(study: Study, record: RunRecord, which: str) -> list[KeptEvaluation]:
    """A checkpoint's evaluations under the study's threats, in their order."""
    own = record.config["threat"]
    trained = ThreatModel(own["norm"], own["eps"])
    kept = kept_evaluations(record.folder / "evaluation", which, trained, record.evaluations[which])
    by_threat = {one.threat: one for one in kept}
    return [by_threat[threat] for threat in study.threats]


def _right_in_union(kept: Sequence[KeptEvaluation], attacks: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which images [n] are right: clean, under these attacks in each norm, and in all of them."""
    only = [replace(one, table=one.table.of_attacks(attacks)) for one in kept]
    union = robust_in_union(only)
    return {"clean": only[0].table.right, **{one.threat.norm: one.robust for one in only}, "union": union}


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
