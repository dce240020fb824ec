"""Commands of many runs, or about runs: each reads its own words and passes on the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from softdefend.core.errors import SettingError
from softdefend.experiments import pipeline
from softdefend.experiments.complaints import parse, readable
from softdefend.experiments.config import make_parser, packaged


class WordsParser(argparse.ArgumentParser):
    """argparse whose errors are our one line."""

    def error(self, message: str) -> NoReturn:
        raise readable(message, self)


PASSES_ON = " Every setting of 'softdefend train' is accepted beside these."
PARALLEL = "runs at a time, each a process of its own; spread over the GPUs that are visible"


def _compare_parser() -> argparse.ArgumentParser:
    parser = WordsParser(
        prog="softdefend compare",
        allow_abbrev=False,
        description="Train several recipes with several seeds under one protocol: one table, one report. "
        "Finished runs are kept, unfinished ones continued." + PASSES_ON,
    )
    presets = ", ".join(packaged("preset"))
    parser.add_argument("--presets", nargs="+", required=True, help=f"recipes, by name or path: {presets}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/compare"), help="where the runs and report go"
    )
    parser.add_argument("--parallel", type=int, default=1, help=PARALLEL)
    return parser


def compare(arguments: Sequence[str]) -> None:
    """``softdefend compare``."""
    given, rest = _compare_parser().parse_known_args(list(arguments))
    table, report = pipeline.compare(rest, given.presets, given.seeds, given.folder, parallel=given.parallel)
    print(f"\n{table}\n\nreport: {report}")


def _distil_parser() -> argparse.ArgumentParser:
    parser = WordsParser(
        prog="softdefend distill",
        allow_abbrev=False,
        description="Train a standard teacher, a robust one and the student that learns from both (Chen et "
        "al., ICLR 2021). Stages that are finished are kept, unfinished ones continued." + PASSES_ON,
    )
    parser.add_argument("--preset", default="kd-swa", help="of the student; its label rule is KD")
    parser.add_argument("--standard", help="a finished run as the standard teacher, in place of training one")
    parser.add_argument("--robust", help="a finished run as the robust teacher, in place of training one")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/distill"), help="gets standard/, robust/ and student/"
    )
    return parser


def distill(arguments: Sequence[str]) -> None:
    """``softdefend distill``."""
    from softdefend.experiments.distill import kd_swa

    given, rest = _distil_parser().parse_known_args(list(arguments))
    student = kd_swa(rest, given.folder, preset=given.preset, standard=given.standard, robust=given.robust)
    print(f"student: {student}")


STUDIES = ("table1", "noise", "ablation")


def _reproduce_parser() -> argparse.ArgumentParser:
    parser = WordsParser(
        prog="softdefend reproduce",
        allow_abbrev=False,
        description="The paper's experiments: 'table1' (PGD-AT and TRADES with and without SGLR, 200 epochs, "
        "AutoAttack), 'noise' (wrong training labels), 'ablation' (SGLR, one factor at a time). Finished "
        "runs are kept, unfinished ones continued." + PASSES_ON,
    )
    parser.add_argument("study", help=", ".join(STUDIES))
    parser.add_argument("--folder", type=Path, help="where runs, table, figures and report go (runs/STUDY)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--parallel", type=int, default=1, help=PARALLEL)
    parser.add_argument("--only", nargs="+", default=[], help="names of the runs to make, such as pgd-at")
    parser.add_argument("--human", type=Path, help="noise: CIFAR-10N's labels, an .npz file")
    parser.add_argument("--quick", action="store_true", help="in miniature: digits, a few epochs, a CPU")
    return parser


def reproduce(arguments: Sequence[str]) -> None:
    """``softdefend reproduce``."""
    from softdefend.experiments import reproduce as studies

    given, rest = _reproduce_parser().parse_known_args(list(arguments))
    if given.study not in STUDIES:
        raise SettingError("study", repr(given.study), ", ".join(STUDIES))
    if given.human is not None and given.study != "noise":
        raise SettingError("--human", f"{given.human} with {given.study}", "it with noise only")
    if given.human is not None and not given.human.is_file():
        raise SettingError("--human", given.human, "an .npz file of labels")
    study = studies.noise(given.human) if given.study == "noise" else getattr(studies, given.study)()
    if given.quick:
        study = studies.make_quick(study)
    folder = given.folder or Path("runs") / (f"{study.name}-quick" if given.quick else study.name)
    studies.reproduce(study, folder, rest, seeds=given.seeds, parallel=given.parallel, only=given.only)


def _bench_parser() -> argparse.ArgumentParser:
    from softdefend.experiments.bench import BenchSettings

    parser = WordsParser(
        prog="softdefend bench",
        allow_abbrev=False,
        description="'train' measures milliseconds per training step on random images of CIFAR-10's shape, "
        "against the machine's own matrix ceiling and, with --reference, the reference code's step."
        + PASSES_ON,
    )
    parser.add_argument("what", help="train")
    defaults = BenchSettings()
    for field in fields(BenchSettings):
        value = getattr(defaults, field.name)
        many = isinstance(value, tuple)
        kind: Any = type(value[0] if many else "" if value is None else value)
        parser.add_argument(f"--{field.name}", type=kind, nargs="+" if many else None, default=value)
    return parser


def bench(arguments: Sequence[str]) -> None:
    """``softdefend bench train``."""
    from softdefend.experiments.bench import BenchSettings, bench_train

    given, rest = _bench_parser().parse_known_args(list(arguments))
    if given.what != "train":
        raise SettingError("bench", repr(given.what), "train")
    settings = BenchSettings(**{field.name: getattr(given, field.name) for field in fields(BenchSettings)})
    bench_train(settings, rest)


def _methods_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="softdefend methods",
        exit_on_error=False,
        allow_abbrev=False,
        description="Every label rule, objective, weight rule and preset: what it is, who published it, what "
        "a training step costs in forward units with PGD-10, and which combinations are published, possible "
        "or refused.",
    )
    parser.add_argument("--markdown", type=bool, default=False, help="as Markdown")
    return parser


def methods(arguments: Sequence[str]) -> None:
    """``softdefend methods``."""
    from softdefend.experiments.catalog import catalog, table

    given = parse(_methods_parser(), arguments)
    sys.stdout.write(table(catalog(), markdown=given.markdown) + "\n")


def analyze(arguments: Sequence[str]) -> None:
    """``softdefend analyze``; imported here, for it takes seconds."""
    from softdefend.cli.analyze import analyze as command

    command(arguments)


def labels(arguments: Sequence[str]) -> None:
    """``softdefend labels``."""
    from softdefend.cli.labels import audit_labels

    audit_labels(arguments)


def _analyze_parser() -> ArgumentParser:
    from softdefend.cli.analyze import analyze_parser

    return analyze_parser()


def _labels_parser() -> ArgumentParser:
    from softdefend.cli.labels import audit_parser

    return audit_parser()


def _with_train(words: Callable[[], argparse.ArgumentParser]) -> Callable[[], ArgumentParser]:
    """A command's parser together with that of training, for help and completion."""

    def make() -> ArgumentParser:
        own = words()
        parser = make_parser(own.prog)
        taken = {option for action in parser._actions for option in action.option_strings}
        for action in own._actions:
            name = next(iter(action.option_strings), action.dest)
            if name not in taken and action.dest not in ("help", "study", "what"):
                parser.add_argument(name, type=str, help=action.help)
        return parser

    return make


PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "compare": _with_train(_compare_parser),
    "distill": _with_train(_distil_parser),
    "reproduce": _with_train(_reproduce_parser),
    "bench": _with_train(_bench_parser),
    "methods": _methods_parser,
    "analyze": _analyze_parser,
    "labels": _labels_parser,
}
"""For the top level's help and completion only: every command reads its words with a parser of its own."""
