"""Analyze runs: measure the requested parts, store what was measured, write numbers and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from softdefend.analysis.part import AnalysisPart, NetworkPart, RunPart, make_parts
from softdefend.analysis.request import AnalysisRequest
from softdefend.analysis.results import Measurement, PartResults, finite
from softdefend.analysis.runs import (
    AnalyzedNetwork,
    AnalyzedRun,
    SavedWeights,
    checkpoint_paths,
    find_weights,
    open_network,
    open_runs,
)
from softdefend.core.digest import file_digest, value_digest
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.store import ResultStore, plain
from softdefend.evaluation.settings import check_writable
from softdefend.report.render import render_page
from softdefend.report.runs import RunRecord
from softdefend.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class Analysis:
    """All results of an analysis.

    Attributes:
        records: the runs by name.
        parts: the results of each requested part by its name, in the order of the page.
    """

    records: Mapping[str, RunRecord]
    parts: Mapping[str, PartResults]


def analyze_runs(
    folders: Sequence[str],
    output: Path,
    request: AnalysisRequest,
    device: torch.device,
    *,
    progress: bool = False,
) -> Analysis:
    """Analyze runs and write ``analysis.json``, ``analysis.html`` and ``results/`` into a folder.

    What was measured before with the same weights, data and settings is read from ``output/results``.

    Args:
        folders: run folders, which are read only.
        output: where the results go.
        request: what the analysis is to contain.
        device: where networks and images go.
        progress: show a progress bar.

    Raises:
        SettingError: an output folder inside a run, or runs or files that cannot be used.
    """
    check_output(output, folders)
    parts = make_parts(request)
    runs = open_runs(folders, device)
    network_parts = [part for part in parts if isinstance(part, NetworkPart)]
    work = [(run, weights) for run in runs for weights in find_weights(run.folder, request.which)]
    if network_parts and not work:
        raise SettingError(
            "run",
            f"{', '.join(folders)} without saved weights",
            "runs with a finished epoch, or --parts overfitting",
        )
    for part in parts:
        part.prepare(runs)
    measurements: dict[str, list[Measurement]] = {part.name: [] for part in parts}
    for part in parts:
        if isinstance(part, RunPart):
            measurements[part.name] = [
                Measurement(run.name, "", None, finite(part.measure(run))) for run in runs
            ]
    store = ResultStore(output / "results")
    for name, measurement in _measure_networks(network_parts, work, store, progress=progress):
        measurements[name].append(measurement)
    records = {run.name: run.record for run in runs}
    results = {name: PartResults(records, members) for name, members in measurements.items()}
    _write(output, _content(runs, request, device, parts, results), parts, results)
    return Analysis(records, results)


def check_output(output: Path, folders: Sequence[str]) -> None:
    """Refuse an output folder inside a run, for run folders stay as they are, and one that cannot be.

    Raises:
        SettingError: it is inside one, below a file, or has a name that the system cannot have.
    """
    check_writable("--output", output / "analysis.json")
    for folder in folders:
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(folder)):
            raise SettingError("--output", f"{output}, inside the run {folder}", "a folder outside the runs")


def _measure_networks(
    parts: Sequence[NetworkPart],
    work: Sequence[tuple[AnalyzedRun, SavedWeights]],
    store: ResultStore,
    *,
    progress: bool,
) -> Iterator[tuple[str, Measurement]]:
    """Measure every part on every network, from stored results where there are some."""
    newest_checkpoint = cache(_newest_checkpoint_digest)
    hidden = None if progress and parts else True  # None: hidden where the output is no terminal
    with tqdm(total=len(work) * len(parts), disable=hidden, leave=False) as bar:
        for run, weights in work:
            # Opened when the first result is missing, and shared by all parts.
            opened = cache(partial(open_network, run, weights))
            memory = None
            if weights.name != "best":
                from_checkpoint = weights.path.suffix == ".ckpt"
                memory = weights.sha256 if from_checkpoint else newest_checkpoint(run.folder)
            for part in parts:
                bar.set_description(f"{run.name}, {weights.name}: {part.name}")
                try:
                    measurement = _measure(part, run, weights, memory, opened, store)
                except CheckpointError:
                    if weights.path.is_file():
                        raise
                    break  # the run is still going and has deleted this checkpoint meanwhile
                yield part.name, measurement
                bar.update()


def _measure(
    part: NetworkPart,
    run: AnalyzedRun,
    weights: SavedWeights,
    memory: str | None,
    opened: Callable[[], AnalyzedNetwork],
    store: ResultStore,
) -> Measurement:
    """One result, measured or found again.

    Args:
        memory: digest of the file that the label memory is read from.
    """
    inputs = {
        "part": part.name,
        "revision": part.revision,
        "run": run.identity.settings,
        "weights": weights.sha256,
        "memory": memory,
        "data": run.data_digests,
        "threat": [run.threat.norm, str(run.threat.eps)],
        "attack": repr(run.training_attack),
        "device": run.device.type,
        **part.inputs(run),
    }

    def make() -> dict[str, Any]:
        network = opened()
        return {"epoch": network.epoch, "result": finite(part.measure(network))}

    content = store.compute(f"{part.name}-{value_digest(plain(inputs))[:20]}", inputs, make)
    return Measurement(run.name, weights.name, content["epoch"], content["result"])


def _newest_checkpoint_digest(folder: Path) -> str | None:
    paths = checkpoint_paths(folder)
    return file_digest(paths[-1]) if paths else None


def _content(
    runs: Sequence[AnalyzedRun],
    request: AnalysisRequest,
    device: torch.device,
    parts: Sequence[AnalysisPart],
    results: Mapping[str, PartResults],
) -> dict[str, Any]:
    """What ``analysis.json`` holds: by run for parts that read runs, a list of measurements for others."""
    files = ("reference", "train_votes", "train_keys", "test_votes")
    settings = asdict(request.settings) | {name: getattr(request, name) for name in files}
    content: dict[str, Any] = {
        "runs": {run.name: {"folder": str(run.folder), "data": run.bundle.name} for run in runs},
        "settings": settings | {"device": str(device)},
    }
    for part in parts:
        members = results[part.name].measurements
        if isinstance(part, RunPart):
            content[part.name] = {one.run: one.result for one in members}
        else:
            content[part.name] = [vars(one) for one in members]
    return content


def _write(
    output: Path,
    content: Mapping[str, Any],
    parts: Sequence[AnalysisPart],
    results: Mapping[str, PartResults],
) -> None:
    made = [part.section(results[part.name]) for part in parts if results[part.name].measurements]
    page = render_page("Analysis", " · ".join(content["runs"]), [section for section in made if section])
    write_atomic(output / "analysis.json", json.dumps(content, indent=1, allow_nan=False).encode())
    write_atomic(output / "analysis.html", page)
