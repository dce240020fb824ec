"""Analyses and label audits of runs: results as JSON and CSV, and one page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from softdefend.analysis import calibration, gradients, information, landscape
from softdefend.analysis.label_audit import DEFAULT_SCORE, Audit, as_csv, audit
from softdefend.analysis.label_audit import predictions as all_predictions
from softdefend.analysis.overfitting import overfitting
from softdefend.analysis.page import Analysis, Found, analysis_page, audit_page
from softdefend.analysis.store import finite, kept
from softdefend.analysis.subjects import (
    Opened,
    Subject,
    Weights,
    open_runs,
    open_subject,
    source_positions,
    weights_of,
)
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.training.checkpoint import CheckpointError

PARTS = ("overfitting", "gradients", "labels", "information", "geometry")

REVISION = 3
"""Raised when a part changes what it computes: results kept by an older one no longer count."""


@dataclass(frozen=True)
class AnalyzeSettings:
    """How much is measured, and on what.

    Raises:
        SettingError: a number outside its range.
    """

    probe: int = 1000
    """Training images that gradients, information and geometry are measured on; drawn, the same in all runs
    of one size."""
    whole: int = 128
    """Of these, images whose gradient is taken over the whole network; 0 for none."""
    chunk: int = 16
    """Such gradients held in memory at once, each as large as the network."""
    test: int = 1000
    """Test images."""
    steps: int = 20
    """Steps of PGD on the test images."""
    bins: int = 15
    """Bins of calibration errors and reliability diagrams."""
    components: int = 8
    """Principal components of images and representations in the estimates of mutual information."""
    neighbors: int = 3
    """Neighbors in these estimates."""
    contrast_steps: int = 300
    """Training steps of the contrastive bound's critic."""
    points: int = 11
    """Points of each axis of the loss surface, odd; 0 for no surface."""
    span: float = 1.0
    """The surface reaches so far from the network, in units of its filters' norms."""
    eigen_steps: int = 50
    """Hessian-vector products for the largest eigenvalue, at most, in each of two rounds; 0 for none."""
    linearity_steps: int = 10
    """Steps of the search for the largest departure from linearity."""
    batch_size: int = 250
    """Images at once. Random starts are drawn per batch, so it is part of the result."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        least = {"probe": 16, "test": 16, "whole": 0, "points": 0, "eigen_steps": 0, "seed": 0}
        for one in fields(self):
            value, low = getattr(self, one.name), least.get(one.name, 1)
            if one.name == "span":
                if not 0 < value < float("inf"):
                    raise SettingError("--span", value, "a positive number")
            elif value < low:
                raise SettingError(f"--{one.name}", value, f"a whole number >= {low}")
        if self.points and self.points % 2 == 0:
            raise SettingError(
                "--points", self.points, "an odd number, so that the network is one of them, or 0"
            )


@dataclass(frozen=True)
class Wishes:
    """What an analysis is to contain; see the flags of the command."""

    parts: tuple[str, ...] = PARTS
    which: tuple[str, ...] = ("best", "last")
    settings: AnalyzeSettings = field(default_factory=AnalyzeSettings)
    reference: str | None = None
    train_votes: str | None = None
    train_keys: tuple[str, ...] = ("random_label1", "random_label2", "random_label3")
    test_votes: str | None = None


def analyze_runs(
    folders: Sequence[str], output: Path, wishes: Wishes, device: torch.device, *, progress: bool = False
) -> Analysis:
    """Analyze runs and write what was found to ``output``.

    What was measured before with the same weights, data and settings is read from ``output/results``.

    Raises:
        SettingError: an output folder inside a run, or runs or files that cannot be used.
    """
    refuse_inside(output, folders)
    # Kept results would answer for a file that is not there.
    calibration.check_there("--train_votes", wishes.train_votes)
    calibration.check_there("--test_votes", wishes.test_votes)
    runs = open_runs(folders, device)
    network_parts = tuple(part for part in wishes.parts if part != "overfitting")
    work = [(run, weights) for run in runs for weights in weights_of(run.folder, wishes.which)]
    if network_parts and not work:
        raise SettingError(
            "run",
            f"{', '.join(folders)} without saved weights",
            "runs with a finished epoch, or --parts overfitting",
        )
    measure = _Measure(output / "results", wishes, runs, device, progress)
    parts: dict[str, list[Found]] = {part: [] for part in network_parts}
    with tqdm(total=len(work) * len(network_parts), disable=None if progress else True, leave=False) as bar:
        for run, weights in work if network_parts else []:
            for part, found in measure(run, weights, bar.set_description):
                parts[part].append(found)
                bar.update()
    wanted = runs if "overfitting" in wishes.parts else []
    curves = {run.name: finite(overfitting(run.record)) for run in wanted}
    analysis = Analysis({run.name: run.record for run in runs}, curves, parts)
    content: dict[str, Any] = {
        "runs": {run.name: {"folder": str(run.folder), "data": run.bundle.name} for run in runs},
        "settings": asdict(wishes.settings) | _files(wishes) | {"device": str(device)},
        "overfitting": curves,
    }
    content |= {part: [vars(found) for found in several] for part, several in parts.items()}
    write_atomic(output / "analysis.json", json.dumps(content, indent=1, allow_nan=False).encode())
    write_atomic(output / "analysis.html", analysis_page(analysis))
    return analysis


def refuse_inside(output: Path, folders: Sequence[str]) -> None:
    """Refuse an output folder inside a run: run folders stay as they are."""
    for folder in folders:
        if output.resolve().is_relative_to(Path(folder).resolve()):
            raise SettingError("--output", f"{output}, inside the run {folder}", "a folder outside the runs")


def _files(wishes: Wishes) -> dict[str, Any]:
    return {name: getattr(wishes, name) for name in ("reference", "train_votes", "train_keys", "test_votes")}


# Which settings each part's result is a function of.
_USED = {
    "gradients": ("probe", "whole"),
    "labels": ("test", "steps", "bins"),
    "information": ("probe", "test", "components", "neighbors", "contrast_steps"),
    "geometry": ("probe", "points", "span", "eigen_steps", "linearity_steps"),
}


class _Measure:
    """Measures parts of one network after another, from kept results where there are some."""

    def __init__(
        self, folder: Path, wishes: Wishes, runs: Sequence[Opened], device: torch.device, progress: bool
    ) -> None:
        self.folder, self.wishes, self.device, self.progress = folder, wishes, device, progress
        self.judges: dict[str, Tensor] = {}
        self.memories: dict[Path, str | None] = {}
        self.reference: tuple[Opened, Weights] | None = None
        if wishes.reference is not None and "gradients" in wishes.parts:
            self.reference = _judge(wishes.reference, runs, device)

    def __call__(
        self, run: Opened, weights: Weights, say: Callable[[str], None]
    ) -> Iterator[tuple[str, Found]]:
        """Every wanted part but overfitting; nothing where a running run has let the file go meanwhile."""
        subject: Subject | None = None

        def opened() -> Subject:
            nonlocal subject
            subject = subject or open_subject(run, weights)
            return subject

        for part in self.wishes.parts:
            if part == "overfitting":
                continue
            say(f"{run.name}, {weights.name}: {part}")
            try:
                result = self._kept(part, run, weights, opened)
            except CheckpointError:
                if weights.path.is_file():
                    raise
                return
            yield part, Found(run.name, weights.name, result.pop("epoch", None), result)

    def _kept(
        self, part: str, run: Opened, weights: Weights, opened: Callable[[], Subject]
    ) -> dict[str, Any]:
        identity = self._identity(part, run, weights)
        return kept(self.folder, identity, lambda: self._part(part, opened()))

    def _identity(self, part: str, run: Opened, weights: Weights) -> dict[str, Any]:
        wishes = self.wishes
        used = (*_USED[part], "batch_size", "seed")
        memory = weights.sha256 if weights.path.suffix == ".ckpt" else self._memory(run.folder)
        identity: dict[str, Any] = {
            "part": part,
            "revision": REVISION,
            "weights": weights.sha256,
            "memory": memory if weights.name != "best" else None,
            "data": run.identity,
            "threat": [run.threat.norm, str(run.threat.eps)],
            "attack": repr(run.training_attack),
            "device": self.device.type,
            "settings": {name: getattr(wishes.settings, name) for name in used},
        }
        if part == "labels":
            identity["files"] = [_digest(wishes.train_votes), _digest(wishes.test_votes), wishes.train_keys]
        if part == "gradients":
            identity["reference"] = self.reference[1].sha256 if self.reference else None
        if part == "information":
            identity["initial"] = run.experiment.seed
        return identity

    def _memory(self, folder: Path) -> str | None:
        if folder not in self.memories:
            self.memories[folder] = _digest(_newest(folder))
        return self.memories[folder]

    def _part(self, part: str, subject: Subject) -> dict[str, Any]:
        s = self.wishes.settings
        shared = {"batch_size": s.batch_size, "seed": s.seed}
        if part == "gradients":
            judgement = gradients.judge(subject, self._reference(subject.run), self.wishes.reference or "")
            result = gradients.measure(
                subject, judgement, probe=s.probe, whole=s.whole, chunk=s.chunk, **shared
            )
        elif part == "labels":
            wishes = self.wishes
            people = calibration.read_people(
                subject.run, wishes.train_votes, wishes.train_keys, wishes.test_votes
            )
            result = calibration.measure(subject, people, test=s.test, steps=s.steps, bins=s.bins, **shared)
        elif part == "information":
            result = information.measure(
                subject,
                probe=s.probe,
                test=s.test,
                components=s.components,
                neighbors=s.neighbors,
                contrast_steps=s.contrast_steps,
                **shared,
            )
        else:
            result = landscape.measure(
                subject,
                probe=s.probe,
                points=s.points,
                span=s.span,
                eigen_steps=s.eigen_steps,
                linearity_steps=s.linearity_steps,
                **shared,
            )
        return {"epoch": subject.epoch, **result}

    def _reference(self, run: Opened) -> Tensor | None:
        """The reference network's predictions on the run's training images, [n]."""
        if self.reference is None or run.bundle.train.clean_labels is not None:
            return None
        judge, weights = self.reference
        if judge.bundle.train.images.shape[1:] != run.bundle.train.images.shape[1:] or judge.k != run.k:
            raise SettingError("--reference", judge.folder, "a run on images and classes of the same kind")
        if run.bundle.fingerprint not in self.judges:
            subject = open_subject(judge, weights)
            asked = Subject(run, weights, subject.net, subject.epoch)
            self.judges[run.bundle.fingerprint] = all_predictions(
                asked, self.wishes.settings.batch_size
            ).argmax(dim=1)
        return self.judges[run.bundle.fingerprint]


def _judge(folder: str, runs: Sequence[Opened], device: torch.device) -> tuple[Opened, Weights]:
    known = {run.folder.resolve(): run for run in runs}
    judge = known.get(Path(folder).resolve()) or open_runs([folder], device)[0]
    weights = weights_of(judge.folder, ["best"])
    if not weights:
        raise SettingError("--reference", folder, "a run with a best checkpoint")
    return judge, weights[0]


def _newest(folder: Path) -> str | None:
    paths = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    return str(paths[-1]) if paths else None


def _digest(path: str | None) -> str | None:
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def audit_run(
    folder: str,
    *,
    score: str = DEFAULT_SCORE,
    source: str = "memory",
    baseline: bool | None = None,
    at: Sequence[int] = (100, 1000),
    batch_size: int = 500,
    device: torch.device | None = None,
) -> Audit:
    """Audit the labels of a run with the newest weights and memory it has saved.

    Args:
        source: what ranks, ``memory`` or ``prediction``.
        baseline: compare with cleanlab; None: where it is installed.

    Raises:
        SettingError: no such run; asked for its memory, one without, or whose memory still is the labels.
    """
    (run,) = open_runs([folder], device or torch.device("cpu"))
    weights = weights_of(run.folder, ["last"])
    if not weights:
        raise SettingError("run", f"{folder} without saved weights", "a run with a finished epoch")
    subject = open_subject(run, weights[0])
    wanted = installed() if baseline is None else baseline
    positions = source_positions(run)
    return audit(
        subject, positions, score=score, source=source, baseline=wanted, at=at, batch_size=batch_size
    )


def installed() -> bool:
    """Whether cleanlab is."""
    from importlib.util import find_spec

    return find_spec("cleanlab") is not None


def write_audit(found: Audit, output: Path, top: int) -> None:
    """Write ``labels.csv``, ``audit.json`` and ``audit.html``."""
    content = {
        "run": str(found.subject.run.folder),
        "weights": found.subject.weights.name,
        "epoch": found.subject.epoch,
        "score": found.score,
        "source": found.source,
        "samples": len(found.rows),
        "wrong": found.wrong,
        "other_class_believed": found.flagged,
        "comparison": found.comparison,
        "curves": found.curves,
    }
    write_atomic(output / "labels.csv", as_csv(found.rows).encode())
    write_atomic(output / "audit.json", json.dumps(finite(content), indent=1, allow_nan=False).encode())
    write_atomic(output / "audit.html", audit_page(found, top))
