"""``softdefend methods``: the catalog of rules and presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softdefend.cli.flags import Flags
from softdefend.experiments.catalog import catalog, table


@dataclass(frozen=True)
class MethodsFlags:
    """Every label rule, objective, weight rule and preset: what it is, who published it, what a training step
    costs in forward units with PGD-10, and which combinations are published, possible or refused."""

    markdown: bool = False
    """As Markdown."""


FLAGS = Flags("methods", MethodsFlags)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Print the catalog."""
    flags = FLAGS.read(words).make(MethodsFlags)
    print(table(catalog(), markdown=flags.markdown))
