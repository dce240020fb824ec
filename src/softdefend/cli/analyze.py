"""``softdefend analyze``: words to a request, results to a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from softdefend.analysis import PARTS, AnalysisRequest, AnalyzeSettings, analyze_runs
from softdefend.execution.engine import resolve_device
from softdefend.experiments.complaints import parse

_HELP = {
    "probe": "training images",
    "whole": "of these, with a gradient over the whole network; 0 for none",
    "chunk": "such gradients in memory together",
    "test": "test images",
    "steps": "of PGD on the test images",
    "bins": "of calibration",
    "components": "principal components for mutual information",
    "neighbors": "for mutual information",
    "contrast_steps": "of training the critic of the contrastive bound",
    "points": "of each axis of the loss surface, odd; 0 for none",
    "span": "of the loss surface, in filter norms",
    "eigen_steps": "Hessian-vector products at most in each of two rounds; 0 for none",
    "linearity_steps": "of the search for the largest departure from linearity",
    "batch_size": "images in a batch",
    "seed": "of all draws",
}


def analyze_parser() -> ArgumentParser:
    """The parser of ``softdefend analyze``."""
    parser = ArgumentParser(
        prog="softdefend analyze",
        exit_on_error=False,
        allow_abbrev=False,
        description="Why it works: overfitting, gradient norms, label quality, information and geometry of "
        "finished or running runs, side by side. Run folders are read only; results go to --output, and what "
        "lies there already is not measured again.",
    )
    parser.add_argument("run", nargs="+", type=str, help="run folders")
    parser.add_argument("--output", type=str, default="analysis", help="folder of the results")
    parser.add_argument("--parts", nargs="+", type=str, default=PARTS.names(), help=", ".join(PARTS.names()))
    parser.add_argument(
        "--which",
        nargs="+",
        type=str,
        default=["best", "last"],
        help="best, last; checkpoints: all that the run has kept; archived: those of save.archive",
    )
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="a run whose best network judges labels where clean ones are not known",
    )
    parser.add_argument(
        "--train_votes", type=str | None, default=None, help=".npz of human labels of the training images"
    )
    parser.add_argument(
        "--train_keys",
        nargs="+",
        type=str,
        default=["random_label1", "random_label2", "random_label3"],
        help="its arrays, one for each annotator, as CIFAR-10N names them",
    )
    parser.add_argument(
        "--test_votes",
        type=str | None,
        default=None,
        help=".npz with counts [n, k] for the test images: CIFAR-10H",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--progress", type=bool, default=True, help="show progress bars")
    for one in fields(AnalyzeSettings):
        kind = float if one.name == "span" else int
        parser.add_argument(f"--{one.name}", type=kind, default=one.default, help=_HELP[one.name])
    return parser


def analyze(arguments: Sequence[str]) -> None:
    """``softdefend analyze RUN...``.

    Raises:
        SettingError: arguments, runs or files that cannot be used.
    """
    given = parse(analyze_parser(), arguments)
    request = AnalysisRequest(
        parts=tuple(given.parts),
        which=tuple(given.which),
        settings=AnalyzeSettings(**{one.name: getattr(given, one.name) for one in fields(AnalyzeSettings)}),
        reference=given.reference,
        train_votes=given.train_votes,
        train_keys=tuple(given.train_keys),
        test_votes=given.test_votes,
    )
    output = Path(given.output)
    analysis = analyze_runs(given.run, output, request, resolve_device(given.device), progress=given.progress)
    print(f"results: {output / 'analysis.json'}\npage: {output / 'analysis.html'}")
    overfitting = analysis.parts.get("overfitting")
    for one in overfitting.measurements if overfitting else ():
        best, last = one.result["best"], one.result["last"]
        if best and last:
            print(f"{one.run}: robust validation accuracy {_ends(best, last)}")


def _ends(best: dict[str, Any], last: dict[str, Any]) -> str:
    ends = ((words, row["epoch"], row["val_robust"]) for words, row in (("best", best), ("last", last)))
    return ", ".join(f"{words} {100 * v:.1f}% (epoch {e})" for words, e, v in ends if v is not None)
