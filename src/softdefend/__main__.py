"""The command line: train, evaluate, compare, report, data."""

from __future__ import annotations

import argparse
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from softdefend import __version__, pipeline
from softdefend.complaints import readable
from softdefend.config import make_parser, packaged, resolve
from softdefend.data import DataSettings, describe, load
from softdefend.errors import DivergenceError, SettingError
from softdefend.evaluation import EvaluateSettings
from softdefend.report import comparison_rows, markdown_table, read_run, text_table, write_report
from softdefend.threat import Budget, ThreatModel

EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 3, 130, 141


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    try:
        parsed = parser.parse_args(list(arguments))
        made: argparse.Namespace = parser.instantiate(parsed)
    except ArgumentError as error:
        raise readable(error, parser) from error
    return made


def _train(arguments: Sequence[str]) -> None:
    pipeline.train(resolve(arguments))


def _evaluate_parser() -> ArgumentParser:
    defaults = EvaluateSettings()
    parser = ArgumentParser(
        prog="softdefend evaluate",
        exit_on_error=False,
        allow_abbrev=False,
        description="Evaluate a run's best and last checkpoint on its test images; what is not given is as "
        "the run was configured. Under another norm or eps than the trained one the result is a file of its "
        "own, such as evaluation/best-linf-4_255.json, and the report keeps its figures.",
    )
    parser.add_argument("run", nargs="+", type=str, help="run folders")
    parser.add_argument(
        "--which", nargs="+", type=str, default=list(pipeline.WHICH), help="best, last or both"
    )
    parser.add_argument("--attacks", nargs="+", type=str, help="such as fgsm pgd-20 pgd-50x10 pgd-20-margin")
    parser.add_argument("--norm", type=str | None, help="linf or l2")
    parser.add_argument("--eps", type=Budget | None, help="radius in pixel units, such as 8/255")
    parser.add_argument("--size", type=int | None, help="test images used")
    parser.add_argument("--curve_size", type=int | None, help="images of the eps curve; 0 leaves it out")
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size, help="images at once")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the attacks' random starts")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def _evaluate(arguments: Sequence[str]) -> None:
    given = _parse(_evaluate_parser(), arguments)
    for which in given.which:
        if which not in pipeline.WHICH:
            raise SettingError("--which", repr(which), " or ".join(pipeline.WHICH))
    for folder in map(Path, given.run):
        experiment = pipeline.open_run(folder)
        trained, settings = experiment.recipe.threat, experiment.evaluate
        eps = trained.eps if given.eps is None else given.eps
        threat = ThreatModel(given.norm or trained.norm, eps)
        chosen = EvaluateSettings(
            attacks=tuple(given.attacks or settings.attacks),
            size=given.size if given.size is not None else settings.size,
            curve_size=given.curve_size if given.curve_size is not None else settings.curve_size,
            examples=settings.examples,
            batch_size=given.batch_size,
            seed=given.seed,
        )
        print(folder)
        pipeline.evaluate(experiment, given.which, chosen, threat, device=given.device)


def _compare_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softdefend compare",
        allow_abbrev=False,
        description="Train several recipes with several seeds under one protocol: one table, one report. "
        "Every setting of 'softdefend train' is accepted beside these. Finished runs are kept, unfinished "
        "ones continued.",
    )
    presets = ", ".join(packaged("preset"))
    parser.add_argument("--presets", nargs="+", required=True, help=f"recipes, by name or path: {presets}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/compare"), help="where the runs and report go"
    )
    return parser


def _compare(arguments: Sequence[str]) -> None:
    given, rest = _compare_parser().parse_known_args(list(arguments))
    table, report = pipeline.compare(rest, given.presets, given.seeds, given.folder)
    print(f"\n{table}\n\nreport: {report}")


def _report_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="softdefend report",
        exit_on_error=False,
        allow_abbrev=False,
        description="One table and one self-contained HTML page from finished or running runs.",
    )
    parser.add_argument("run", nargs="+", type=str, help="run folders")
    parser.add_argument("--output", type=str, default="report.html", help="the page to write")
    parser.add_argument("--title", type=str | None, default=None)
    parser.add_argument("--markdown", type=bool, default=False, help="print the table as Markdown")
    return parser


def _report(arguments: Sequence[str]) -> None:
    given = _parse(_report_parser(), arguments)
    runs = [read_run(Path(folder)) for folder in given.run]
    rows = comparison_rows(runs)
    print(markdown_table(rows) if given.markdown else text_table(rows))
    print(f"\nreport: {write_report(runs, Path(given.output), given.title)}")


def _data_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="softdefend data",
        exit_on_error=False,
        allow_abbrev=False,
        description="'prepare' reads, checks and caches a data set; 'describe' also prints what is in it.",
    )
    parser.add_argument("action", type=str, help="prepare or describe")
    parser.add_argument("--data", type=DataSettings, default=DataSettings())
    return parser


def _data(arguments: Sequence[str]) -> None:
    given = _parse(_data_parser(), arguments)
    if given.action not in ("prepare", "describe"):
        raise SettingError("data", repr(given.action), "prepare or describe")
    bundle = load(given.data)
    sizes = f"{len(bundle.train)} train, {len(bundle.validation)} validation, {len(bundle.test)} test"
    print(describe(bundle) if given.action == "describe" else f"{bundle.name}: {sizes}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train, evaluate and report one recipe"),
    "evaluate": (_evaluate, "evaluate a run's checkpoints"),
    "compare": (_compare, "several recipes and seeds, one table, one report"),
    "report": (_report, "one page from run folders"),
    "data": (_data, "prepare or describe a data set"),
}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are our one line."""

    def error(self, message: str) -> NoReturn:
        raise readable(message, self)


def _top_parser() -> ArgumentParser:
    """The whole command line in one parser, for help, version and shell completion."""
    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog="softdefend", version=__version__, description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    commands = parser.add_subcommands()
    for name, make in (
        ("train", make_parser),
        ("evaluate", _evaluate_parser),
        ("report", _report_parser),
        ("data", _data_parser),
    ):
        commands.add_subcommand(name, make(), help=COMMANDS[name][1])
    compare = make_parser("softdefend compare")
    compare.add_argument("--presets", type=list[str], help="recipes, by name or path")
    compare.add_argument("--seeds", type=list[int], default=[0])
    commands.add_subcommand("compare", compare, help=COMMANDS["compare"][1])
    return parser


def run(arguments: Sequence[str]) -> None:
    """Run one command; errors are raised.

    Raises:
        SettingError: input that cannot be used.
        DivergenceError: training diverged.
    """
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]][0](arguments[1:])
        return
    if not arguments or not arguments[0].startswith("-"):
        given = repr(arguments[0]) if arguments else "nothing"
        raise SettingError("command", given, f"{', '.join(COMMANDS)}; see softdefend --help")
    # jsonargparse puts the completion library's name before the shell's.
    _parse(
        _top_parser(),
        [re.sub(r"^(--print_completion=)?(bash|zsh)$", r"\1shtab-\2", word) for word in arguments],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 bad input, 3 training diverged, 130 interrupted,
    141 nobody reads our output any more."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except SettingError as error:
        print(f"softdefend: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except DivergenceError as error:
        print(f"softdefend: stopped: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; the interpreter must not try to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(
            "softdefend: interrupted; the same command continues where the last checkpoint stands",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
