"""Image classifiers that withstand adversarial attack: train, evaluate, compare, explain."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Protocol, cast

from jsonargparse import ArgumentParser, set_parsing_settings

from softdefend.cli.console import HELP, log_to_console
from softdefend.core.errors import (
    EXIT_LOST,
    DivergenceError,
    LostProcessError,
    ReportedError,
    SettingError,
    did_you_mean,
)
from softdefend.core.version import VERSION
from softdefend.execution.launched import place_of_this_process, started_here

EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 2, 3, 130, 141

COMMANDS = {
    "demo": "PGD-AT against SGLR on 8x8 digits, in two minutes on a CPU",
    "train": "train, evaluate and report one recipe",
    "evaluate": "evaluate a run's checkpoints, or a network from elsewhere",
    "certify": "radii in which no change of an image changes the answer (randomized smoothing)",
    "compare": "several recipes and seeds, one table, one report",
    "distill": "two teachers and the student that learns from both (KD-SWA)",
    "report": "one page from run folders",
    "analyze": "why it works: overfitting, gradients, labels, information, geometry",
    "labels": "audit: which training labels does the memory distrust?",
    "reproduce": "the paper's experiments: table1, noise, ablation",
    "bench": "how fast training steps are on this machine",
    "push": "publish a checkpoint on the Hugging Face hub, with a model card",
    "export": "a checkpoint as ONNX, TorchScript or torch.export, checked and attacked",
    "zoo": "published models with their figures; verify evaluates one again",
    "methods": "every rule and preset: cost, source, what goes together",
    "data": "prepare or describe a data set",
}
"""Every command and what it does; each is a module of this folder, imported when it is needed."""

TOGETHER = ("train", "evaluate", "distill", "bench")
"""Commands that torchrun or srun may start several times; others start processes themselves."""

_WHILE = 5.0
"""Seconds that other processes leave the first one to say the same. Theirs is shown if it does not."""

SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")
_COMPLETION = "--print_completion"


class Command(Protocol):
    """What the module of a command has."""

    def run(self, words: Sequence[str]) -> None:
        """Do what the words after the command's name ask for."""

    def completion(self) -> ArgumentParser:
        """A parser that knows all of its flags."""


def load(name: str) -> Command:
    """The module of a command."""
    return cast(Command, importlib.import_module(f"softdefend.cli.{name}"))


def run(words: Sequence[str]) -> None:
    """Run one command; errors are raised.

    Raises:
        SettingError: input that cannot be used.
        DivergenceError: training diverged.
        SystemExit: help, version or completion was printed.
    """
    first = words[0] if words else ""
    if first in COMMANDS:
        if first not in TOGETHER and place_of_this_process() is not None:
            raise SettingError(first, "several processes", f"one, or {', '.join(TOGETHER)}")
        load(first).run(words[1:])
    elif first in HELP:
        help_parser().print_help()
        raise SystemExit(EXIT_DONE)
    elif first == "--version":
        print(f"softdefend {VERSION}")
        raise SystemExit(EXIT_DONE)
    elif first.partition("=")[0] == _COMPLETION:
        _print_completion(" ".join(words).removeprefix(_COMPLETION)[1:])
    elif first.startswith("-"):
        name = first.lstrip("-").partition("=")[0]
        raise SettingError(name, "an unknown setting", "a command or one of the options of softdefend --help")
    else:
        accepted = f"{', '.join(COMMANDS)}; see softdefend --help{did_you_mean(first, COMMANDS)}"
        raise SettingError("command", repr(first) if first else "nothing", accepted)


def help_parser() -> argparse.ArgumentParser:
    """The commands and what they do; for help only."""
    parser = argparse.ArgumentParser(prog="softdefend", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        _COMPLETION, metavar="SHELL", help=f"print a completion script and exit: {', '.join(SHELLS)}"
    )
    commands = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        description="'softdefend COMMAND --help' shows a command's options.",
    )
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def _print_completion(shell: str) -> None:
    """Print a shell's completion script for all commands, and exit.

    Raises:
        SettingError: a shell that there is no completion for.
    """
    shell = shell.removeprefix("shtab-")
    if shell not in SHELLS:
        raise SettingError(_COMPLETION, repr(shell) if shell else "no value", ", ".join(SHELLS))
    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(prog="softdefend", version=VERSION, description=__doc__)
    subcommands = parser.add_subcommands()
    for name, summary in COMMANDS.items():
        subcommands.add_subcommand(name, load(name).completion(), help=summary)
    parser.parse_args([f"{_COMPLETION}=shtab-{shell}"])


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line; an error is one line on standard error.

    Args:
        words: without the program's name; None for those of this process.

    Returns:
        The exit code: 0 done, 2 bad input, 3 training diverged, 130 interrupted, 141 nobody reads the output
        any more. A process that is terminated while it runs others ends them and exits with 143.
    """
    try:
        with log_to_console():
            run(sys.argv[1:] if words is None else words)
            sys.stdout.flush()
    except SettingError as error:
        return _end(f"error: {error}", EXIT_BAD_INPUT)
    except argparse.ArgumentError as error:  # a fault of ours: what is wrong outside is found before
        return _end(f"error: {SettingError('command line', error, 'what --help shows')}", EXIT_BAD_INPUT)
    except DivergenceError as error:
        return _end(f"stopped: {error}", EXIT_DIVERGED)
    except ReportedError as error:
        return error.code
    except LostProcessError as error:
        return EXIT_LOST if started_here() else _end(f"stopped: {error}", EXIT_LOST)
    except KeyboardInterrupt:
        if started_here():
            return EXIT_INTERRUPTED
        text = "interrupted; the same command continues where the last checkpoint stands"
        return _end(text, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; the interpreter must not try to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return EXIT_DONE


def _end(line: str, code: int) -> int:
    place = place_of_this_process()
    which = "" if place is None or place.rank == 0 else f" (process {place.rank})"
    print(f"softdefend{which}: {line}", file=sys.stderr)
    if which and started_here():
        time.sleep(_WHILE)
    return code


if __name__ == "__main__":
    sys.exit(main())
