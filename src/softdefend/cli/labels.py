"""``softdefend labels``: the label audit from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from softdefend.analysis import audit_run, check_output, write_audit
from softdefend.analysis.label_scores import DEFAULT_SCORE, SCORES
from softdefend.core.errors import SettingError
from softdefend.execution.engine import resolve_device
from softdefend.experiments.complaints import parse


def audit_parser() -> ArgumentParser:
    """The parser of ``softdefend labels``."""
    parser = ArgumentParser(
        prog="softdefend labels",
        exit_on_error=False,
        allow_abbrev=False,
        description="'audit' ranks the training images of a run by how strongly its label memory, or the "
        "network itself, distrusts their labels: a CSV file, a page with the images, and figures where the "
        "truth is known.",
    )
    parser.add_argument("action", type=str, help="audit")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--output", type=str, default="label-audit", help="folder of the results")
    parser.add_argument("--score", type=str, default=DEFAULT_SCORE, help=", ".join(SCORES))
    parser.add_argument(
        "--source",
        type=str,
        default="memory",
        help="what is asked: memory, or prediction (of the newest weights on the clean training images)",
    )
    parser.add_argument("--top", type=int, default=120, help="images on the page")
    parser.add_argument(
        "--baseline",
        type=bool | None,
        default=None,
        help="compare with cleanlab; where it is installed when not given",
    )
    parser.add_argument("--at", nargs="+", type=int, default=[100, 1000], help="k of precision at k")
    parser.add_argument("--batch_size", type=int, default=500, help="images in a batch")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def audit_labels(arguments: Sequence[str]) -> None:
    """``softdefend labels audit RUN``.

    Raises:
        SettingError: arguments that cannot be used, or a run without what is asked for.
    """
    given = parse(audit_parser(), arguments)
    if given.action != "audit":
        raise SettingError("labels", repr(given.action), "audit")
    if given.top < 1:
        raise SettingError("--top", given.top, "a whole number >= 1")
    output = Path(given.output)
    check_output(output, [given.run])
    audit = audit_run(
        given.run,
        score=given.score,
        source=given.source,
        baseline=given.baseline,
        at=given.at,
        batch_size=given.batch_size,
        device=resolve_device(given.device),
    )
    write_audit(audit, output, given.top)
    known = "" if audit.wrong is None else f"; {audit.wrong:,} are wrong"
    print(f"{len(audit.rows):,} labels, another class believed for {audit.flagged:,}{known}")
    for line in audit.comparison:
        if line["auroc"] is not None:
            print(f"AUROC {line['auroc']:.4f}  {line['name']}")
    print(f"table: {output / 'labels.csv'}\npage: {output / 'audit.html'}")
