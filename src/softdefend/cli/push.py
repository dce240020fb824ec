"""``softdefend push``: a checkpoint as a model that others can load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli.flags import Flags, positional, switch
from softdefend.publish.hub import push


@dataclass(frozen=True)
class PushFlags:
    """Publish a checkpoint of an evaluated run on the Hugging Face hub: weights, configuration, evaluation,
    and a model card written from the run. softdefend.from_pretrained loads it, from the hub or from the
    folder."""

    run: str = positional()
    """A run folder."""
    address: str = positional()
    """owner/name on the hub."""
    which: str = "best"
    """best or last."""
    dry_run: bool = switch()
    """Write the folder and show the model card; upload nothing."""
    output: Path | None = None
    """The folder; hub in the run folder if not given."""
    license: str | None = None
    """License of the weights as the hub spells it, such as apache-2.0; the card says so if there is none."""
    private: bool = switch()
    """Let nobody else see a repository that is new."""


FLAGS = Flags("push", PushFlags)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Write the folder, and upload it."""
    flags = FLAGS.read(words).make(PushFlags)
    files, commit = push(
        Path(flags.run),
        flags.address,
        which=flags.which,
        output=flags.output,
        license=flags.license,
        private=flags.private,
        dry_run=flags.dry_run,
    )
    if commit is None:
        (card,) = (path for path in files if path.name == "README.md")
        print(card.read_text())
    for path in files:
        print(f"{path}  {path.stat().st_size:,} bytes")
    if commit is not None:
        print(f"published: {commit}")
