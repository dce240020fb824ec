"""Image classifiers that withstand adversarial attack: train, evaluate, compare, explain."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from softdefend import __version__
from softdefend.cli import commands
from softdefend.cli.console import log_to_console
from softdefend.core.docstrings import field_docstrings
from softdefend.core.errors import DivergenceError, SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import DataSettings, describe, load
from softdefend.evaluation import EvaluateSettings, Requests
from softdefend.experiments import pipeline
from softdefend.experiments.complaints import parse
from softdefend.experiments.config import make_parser, resolve
from softdefend.experiments.evaluate import evaluate, evaluate_external, open_run
from softdefend.report import comparison_rows, markdown_table, read_run, text_table, write_report

EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 3, 130, 141


def _train(arguments: Sequence[str]) -> None:
    pipeline.train(resolve(arguments))


def _evaluate_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="softdefend evaluate",
        exit_on_error=False,
        allow_abbrev=False,
        description="Evaluate a run's best and last checkpoint on its test images; what is not given is as "
        "the run was configured. Under another norm or eps than the trained one the result is a file of its "
        "own, such as evaluation/best-linf-4_255.json, and the report keeps its figures. With --model a "
        "network that was not trained here is evaluated on --data.",
    )
    parser.add_argument("run", nargs="*", type=str, help="run folders")
    parser.add_argument(
        "--which", nargs="+", type=str, default=list(pipeline.WHICH), help="best, last or both"
    )
    parser.add_argument("--norm", type=str | None, help="linf or l2")
    parser.add_argument("--eps", type=Budget | None, help="radius in pixel units, such as 8/255")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    _add_settings(parser)
    for flag, text in _EXTRAS.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument(
        "--audit_size", type=int, default=250, help="test images that the audit looks at, from the first on"
    )
    parser.add_argument(
        "--transfer",
        nargs="+",
        type=str,
        default=[],
        help="run folders, or weights of the same network: surrogates for transfer attacks",
    )
    parser.add_argument("--robustbench", type=str | None, help="RobustBench's model_info JSON, to write")
    parser.add_argument("--log", type=str | None, help="log lines as AutoAttack writes them, to write")
    parser.add_argument("--model", type=str | None, help="package.module:function that makes the network")
    parser.add_argument(
        "--weights", type=str | None, help="with --model: safetensors, or a state dict from torch.save"
    )
    parser.add_argument("--output", type=str | None, help="with --model: the result folder")
    parser.add_argument("--data", type=DataSettings, default=DataSettings(), help="with --model")
    return parser


_EXTRAS = {
    "--audit": "look for signs of gradient masking",
    "--corruptions": "measure accuracy under common corruptions",
}


def _add_settings(parser: ArgumentParser) -> None:
    """One flag for each field of EvaluateSettings, absent from what is parsed unless it is given."""
    hints, texts = get_type_hints(EvaluateSettings), field_docstrings(EvaluateSettings)
    for name in (field.name for field in fields(EvaluateSettings)):
        text = texts[name].replace("%", "%%")  # argparse formats it
        several, absent = get_origin(hints[name]) is tuple, argparse.SUPPRESS
        kind = get_args(hints[name])[0] if several else hints[name]
        nargs = "+" if several else None
        parser.add_argument(f"--{name}", type=kind, nargs=nargs, default=absent, help=text)


def _evaluate(arguments: Sequence[str]) -> None:
    given = parse(_evaluate_parser(), arguments)
    _refuse_mixture(given, arguments)
    changes = {f.name: getattr(given, f.name) for f in fields(EvaluateSettings) if hasattr(given, f.name)}
    requests = Requests(
        audit=given.audit_size if given.audit else 0,
        corruptions=given.corruptions,
        robustbench=Path(given.robustbench) if given.robustbench else None,
        log=Path(given.log) if given.log else None,
    )
    also = {"requests": requests, "transfer": given.transfer, "device": given.device}
    if given.model:
        threat = ThreatModel(given.norm or "linf", given.eps or Budget("8/255"))
        settings = EvaluateSettings(**changes)
        evaluate_external(
            given.model,
            Path(given.weights),
            given.data,
            Path(given.output),
            threat=threat,
            settings=settings,
            **also,
        )
        return
    for folder in map(Path, given.run):
        experiment = open_run(folder)
        trained = experiment.recipe.threat
        threat = ThreatModel(given.norm or trained.norm, trained.eps if given.eps is None else given.eps)
        print(folder)
        evaluate(experiment, given.which, replace(experiment.evaluate, **changes), threat, **also)


def _refuse_mixture(given: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Flags that contradict each other, or lack each other."""
    for which in given.which:
        if which not in pipeline.WHICH:
            raise SettingError("--which", repr(which), " or ".join(pipeline.WHICH))
    if given.audit_size < 1:
        raise SettingError("--audit_size", given.audit_size, "a whole number >= 1")
    if given.model:
        if given.run:
            raise SettingError("run", f"{given.run[0]} with --model", "either run folders or --model")
        for flag in ("weights", "output"):
            if not getattr(given, flag):
                raise SettingError(f"--{flag}", "nothing", f"--{flag} PATH beside --model")
    else:
        for flag in ("--weights", "--output", "--data"):
            if any(word.partition("=")[0].partition(".")[0] == flag for word in arguments):
                accepted = f"{flag} only beside --model; a run brings its own"
                raise SettingError(flag, "given without --model", accepted)
        if not given.run:
            accepted = "run folders, or --model; see 'softdefend evaluate --help'"
            raise SettingError("run", "nothing", accepted)
    checkpoints = 1 if given.model else len(given.which) * len(given.run)
    for flag in ("robustbench", "log"):
        if getattr(given, flag) and checkpoints > 1:
            accepted = "one run and one checkpoint, such as --which best"
            raise SettingError(f"--{flag}", f"{checkpoints} checkpoints for one file", accepted)


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
    given = parse(_report_parser(), arguments)
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
    given = parse(_data_parser(), arguments)
    if given.action not in ("prepare", "describe"):
        raise SettingError("data", repr(given.action), "prepare or describe")
    bundle = load(given.data)
    sizes = f"{len(bundle.train)} train, {len(bundle.validation)} validation, {len(bundle.test)} test"
    print(describe(bundle) if given.action == "describe" else f"{bundle.name}: {sizes}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train, evaluate and report one recipe"),
    "evaluate": (_evaluate, "evaluate a run's checkpoints, or a network from elsewhere"),
    "compare": (commands.compare, "several recipes and seeds, one table, one report"),
    "distill": (commands.distill, "two teachers and the student that learns from both (KD-SWA)"),
    "report": (_report, "one page from run folders"),
    "analyze": (commands.analyze, "why it works: overfitting, gradients, labels, information, geometry"),
    "labels": (commands.labels, "audit: which training labels does the memory distrust?"),
    "reproduce": (commands.reproduce, "the paper's experiments: table1, noise, ablation"),
    "bench": (commands.bench, "how fast training steps are on this machine"),
    "methods": (commands.methods, "every rule and preset: cost, source, what goes together"),
    "data": (_data, "prepare or describe a data set"),
}


def _top_parser() -> ArgumentParser:
    """The whole command line in one parser, for help, version and shell completion."""
    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog="softdefend", version=__version__, description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    subcommands = parser.add_subcommands()
    for name, make in (
        ("train", make_parser),
        ("evaluate", _evaluate_parser),
        ("report", _report_parser),
        ("data", _data_parser),
    ):
        subcommands.add_subcommand(name, make(), help=COMMANDS[name][1])
    for name, make in commands.PARSERS.items():
        subcommands.add_subcommand(name, make(), help=COMMANDS[name][1])
    return parser


def run(arguments: Sequence[str]) -> None:
    """Run one command; errors are raised.

    Raises:
        SettingError: input that cannot be used.
        DivergenceError: training diverged.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the words below settings are their help
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]][0](arguments[1:])
        return
    if not arguments or not arguments[0].startswith("-"):
        given = repr(arguments[0]) if arguments else "nothing"
        raise SettingError("command", given, f"{', '.join(COMMANDS)}; see softdefend --help")
    # jsonargparse puts the completion library's name before the shell's.
    parse(
        _top_parser(),
        [re.sub(r"^(--print_completion=)?(bash|zsh)$", r"\1shtab-\2", word) for word in arguments],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 bad input, 3 training diverged, 130 interrupted,
    141 nobody reads our output any more."""
    try:
        with log_to_console():
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
