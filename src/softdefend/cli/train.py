"""``softdefend train``: one recipe, trained, evaluated and reported."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from softdefend.cli.flags import HELP
from softdefend.experiments import pipeline
from softdefend.experiments.config import make_parser, resolve


def run(words: Sequence[str]) -> None:
    """Train one run, or continue it."""
    if HELP & set(words):
        completion().print_help()
        raise SystemExit(0)
    pipeline.train(resolve(words))


def completion(prog: str = "softdefend train") -> ArgumentParser:
    """A parser of every setting of a run, for help and completion."""
    parser = make_parser(prog)
    # Presets are put in the place of their names before anything is parsed.
    parser.add_argument("--preset", type=str, help="a recipe, by name or path; it wins over a protocol")
    return parser
