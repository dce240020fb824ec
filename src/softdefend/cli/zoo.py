"""``softdefend zoo``: published models, with digest, figures and audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli.flags import Flags, positional, switch
from softdefend.core.errors import SettingError
from softdefend.evaluation.settings import Size, check_size
from softdefend.publish.zoo import PACKAGED, Entry, add, read_zoo, verify
from softdefend.report.figures import norm_label

ACTIONS = ("list", "verify", "add")


@dataclass(frozen=True)
class ZooFlags:
    """Published models: 'list' shows them with their figures and the verdict of their audit, 'verify NAME'
    evaluates one again and compares, 'add NAME SOURCE' writes one into a list of your own."""

    action: str = positional("list")
    """list, verify or add."""
    name: str | None = positional(None)
    """Of the model."""
    source: str | None = positional(None)
    """add: owner/name on the hub, or a folder that softdefend push wrote."""
    list: Path | None = None
    """The list; the package's if not given."""
    revision: str | None = None
    """add: branch, tag or commit on the hub."""
    output: Path | None = None
    """verify: the result folder; zoo/NAME if not given."""
    data: str | None = None
    """verify: where the data are, if the model does not say it."""
    tolerance: float = 0.5
    """verify: points by which an accuracy may differ."""
    audit: bool = switch()
    """verify: look for signs of gradient masking again."""
    audit_size: Size = 250
    """verify: test images that the audit looks at."""
    device: str = "auto"
    """verify: auto, cpu, cuda or cuda:N."""
    progress: bool = True
    """verify: show progress bars."""


FLAGS = Flags("zoo", ZooFlags)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """List models, verify one, or add one."""
    flags = FLAGS.read(words).make(ZooFlags)
    _check(flags)
    if flags.action == "verify":
        _verify(flags)
    elif flags.action == "add":
        assert flags.name is not None
        assert flags.source is not None
        assert flags.list is not None
        made = add(flags.name, flags.source, flags.list, revision=flags.revision)
        print("\n".join(_table({flags.name: made})))
    else:
        print("\n".join(_table(read_zoo(flags.list or PACKAGED))))


def _check(flags: ZooFlags) -> None:
    if flags.action not in ACTIONS:
        raise SettingError("action", repr(flags.action), ", ".join(ACTIONS))
    needed = {"list": (), "verify": ("name",), "add": ("name", "source", "list")}[flags.action]
    for name in needed:
        if getattr(flags, name) is None:
            accepted = {"name": "the name of a model", "source": "owner/name or a folder", "list": "a file"}
            raise SettingError("--list" if name == "list" else name, "nothing", accepted[name])
    if flags.source is not None and flags.action != "add":
        raise SettingError("source", flags.source, "it with add only")
    if flags.tolerance < 0:
        raise SettingError("--tolerance", flags.tolerance, "0 or more points")
    check_size("--audit_size", flags.audit_size, 1)


def _verify(flags: ZooFlags) -> None:
    assert flags.name is not None
    rows = verify(
        flags.name,
        flags.list or PACKAGED,
        flags.output or Path("zoo") / flags.name,
        data=flags.data,
        audit=flags.audit_size if flags.audit else 0,
        device=flags.device,
        progress=flags.progress,
    )
    for row in rows:
        verdict = "agrees" if row.agrees(flags.tolerance) else "differs"
        print(f"{row.name}: published {row.published}, here {row.found}: {verdict}")
    for row in rows:
        if not row.agrees(flags.tolerance):
            given = f"{flags.name}, whose {row.name} is {row.found} here and {row.published} in the list"
            raise SettingError("name", given, f"figures within {flags.tolerance:g} points")


def _table(models: dict[str, Entry]) -> list[str]:
    if not models:
        return ["no models are published yet; --list FILE reads another list"]
    header = ("name", "network", "data", "threat", "clean %", "worst %", "audit", "source")
    rows = [header] + [
        (
            name,
            one.network,
            one.data,
            f"{norm_label(one.norm)} {one.eps}",
            f"{one.clean:.2f}",
            f"{one.worst:.2f}",
            one.audit or "none",
            one.source,
        )
        for name, one in models.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
