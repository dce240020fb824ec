"""From a resolved configuration to a trained, evaluated and reported run."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.data import DataBundle, load
from softdefend.evaluation.settings import check_writable
from softdefend.execution.engine import count_processes
from softdefend.execution.launched import place_of_this_process
from softdefend.experiments.config import Experiment, first_given, resolve
from softdefend.experiments.evaluate import evaluate, evaluate_run, open_run
from softdefend.experiments.launch import run_on_processes
from softdefend.experiments.network import check_trainable, make_net
from softdefend.experiments.parallel import Job, command_line, run_all
from softdefend.experiments.tracking import attach
from softdefend.report import comparison_rows, read_run, text_table, write_report
from softdefend.training import Trainer
from softdefend.training.plain import plain_config
from softdefend.training.start import check_resume, has_checkpoints, record_start

log = logging.getLogger(__name__)

WHICH = ("best", "last")


def make_trainer(experiment: Experiment, bundle: DataBundle) -> Trainer:
    """What trains the experiment, in its folder: new, or to be continued."""
    if experiment.init_from is not None and experiment.net.pretrained is not None:
        given = f"{experiment.net.pretrained} beside init_from {experiment.init_from}"
        raise SettingError("net.pretrained", given, "one of the two")
    # The weights of a checkpoint or a file take the place of others.
    others = has_checkpoints(experiment.folder) or experiment.init_from is not None
    net = make_net(experiment, bundle, pretrained=not others)
    check_trainable(net, bundle, experiment)
    if os.path.isdir(experiment.folder):
        check_writable("evaluation", experiment.folder / "evaluation" / "best.json")
    return Trainer(net, bundle, experiment, experiment.folder, progress=experiment.progress)


def train(experiment: Experiment) -> Path:
    """Train, evaluate best and last checkpoint on the test images, write the report; continue where the
    folder holds an unfinished run.

    Returns:
        The run folder.
    """
    if experiment.resume is not None:
        check_resume(experiment.resume, experiment.folder)
    size = count_processes(experiment.runtime.device, experiment.runtime.devices)
    if size > 1 and place_of_this_process() is None:
        _train_on_processes(experiment, size)
        return experiment.folder
    experiment = record_start(experiment, experiment.folder)
    bundle = load(experiment.data)
    trainer = make_trainer(experiment, bundle)
    try:
        device = trainer.engine.device
        where = str(device) if trainer.processes.size == 1 else f"{trainer.processes.size} x {device.type}"
        log.info("%s, seed %d, on %s: %s", experiment.name, experiment.seed, where, experiment.folder)
        epochs = experiment.optim.epochs
        trainer.fit(experiment.resume, on_epoch=lambda row: log.info(epoch_line(row, epochs)))
        trainer.folder.close()
        net, processes = make_net(experiment, bundle), trainer.processes
        for which in WHICH:
            settings = experiment.evaluate
            evaluate_run(experiment, bundle, net, which, settings, device=device, processes=processes)
        if processes.first:
            run = read_run(experiment.folder)
            report = write_report([run], experiment.folder / "report.html")
            attach(trainer.trackers, run, report)
            log.info("report: %s", report)
    finally:
        trainer.close()
    return experiment.folder


def _train_on_processes(experiment: Experiment, size: int) -> None:
    """Train on processes of their own, which read the configuration from a file."""
    where = {"folder": str(experiment.folder), "progress": experiment.progress}
    if experiment.resume is not None:
        where["resume"] = str(experiment.resume)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.yaml"
        path.write_text(yaml.safe_dump({**plain_config(experiment), **where}, sort_keys=False))
        run_on_processes(["train", "--config", str(path)], size)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One line of progress from a metrics row."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"lr {row['lr']:.4g}", f"loss {row['loss']:.3f}"]
    for name, key in (
        ("train robust", "train_robust"),
        ("val clean", "val_clean"),
        ("val robust", "val_robust"),
    ):
        if row[key] is not None:
            parts.append(f"{name} {100 * row[key]:.1f}%")
    return "  ".join(parts)


def train_all(
    runs: Mapping[str, Sequence[str]],
    *,
    parallel: int = 1,
    after: Mapping[str, str] | None = None,
    threats: Sequence[ThreatModel] = (),
) -> list[Experiment]:
    """Train several runs; finished ones are kept, unfinished ones continued.

    Args:
        runs: words of ``softdefend train`` by what messages call the run; a folder of its own in each.
        parallel: runs at a time. Above one each is a process of its own that writes to ``FOLDER.log``.
        after: runs that start from another one, and which; it stands before them or is finished.
        threats: under which each finished run is evaluated too, beside that of its training.

    Raises:
        SettingError: words that do not resolve, before anything runs; or what a run refuses.
    """
    experiments = [resolve(words) for words in runs.values()]
    runtimes = [experiment.runtime for experiment in experiments]
    if parallel > 1 and any(count_processes(each.device, each.devices) > 1 for each in runtimes):
        raise SettingError("--parallel", parallel, "1 with runtime.devices above 1")
    if parallel == 1:
        for experiment in experiments:
            train(experiment)
            if others := _others(experiment, threats):
                made = open_run(experiment.folder)  # knows the digest of what the run started from
                evaluate(made, WHICH, experiment.evaluate, others, device=experiment.runtime.device)
        return experiments
    logs = [experiment.folder.with_name(f"{experiment.folder.name}.log") for experiment in experiments]
    after = {name: base for name, base in (after or {}).items() if base in runs}
    jobs = [
        Job(name, partial(_train_command, words), log, (after[name],) if name in after else ())
        for (name, words), log in zip(runs.items(), logs, strict=True)
    ]
    jobs += [
        Job(f"{name}, other threats", partial(_evaluate_command, experiment, others), log, (name,))
        for name, experiment, log in zip(runs, experiments, logs, strict=True)
        if (others := _others(experiment, threats))
    ]
    run_all(jobs, parallel, spread=all(made.runtime.device == "auto" for made in experiments))
    return experiments


def _train_command(words: Sequence[str], _: str) -> list[str]:
    return command_line("train", *words)


def _evaluate_command(experiment: Experiment, threats: Sequence[ThreatModel], _: str) -> list[str]:
    norms, radii = [threat.norm for threat in threats], [str(threat.eps) for threat in threats]
    words = ["--norm", *norms, "--eps", *radii, "--device", experiment.runtime.device]
    return command_line("evaluate", str(experiment.folder), *words)


def _others(experiment: Experiment, threats: Sequence[ThreatModel]) -> list[ThreatModel]:
    """Of these threats those that the run was not trained against."""
    return [threat for threat in threats if threat != experiment.recipe.threat]


def compare(
    arguments: Sequence[str],
    presets: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    parallel: int = 1,
) -> tuple[str, Path]:
    """Train every preset with every seed under one protocol; one table, one report.

    Finished runs are kept, unfinished ones continued.

    Args:
        arguments: further words of ``softdefend train``: the protocol and overrides.
        presets: names or paths.
        seeds: of the runs.
        folder: holds one run folder for each preset and seed, and the report.
        parallel: runs at a time, see :func:`train_all`.

    Returns:
        The table as text, and the path of the report.

    Raises:
        SettingError: two presets of one file name; a seed or a preset among ``arguments``.
    """
    words = {}
    if flag := first_given(arguments, ("--seed", "--preset")):
        raise SettingError(flag, f"one beside {flag}s", f"{flag}s alone")
    stems = [Path(preset).stem for preset in dict.fromkeys(presets)]
    if len(set(stems)) < len(stems):
        accepted = "presets of different file names, which name the run folders"
        raise SettingError("--presets", " ".join(presets), accepted)
    for preset in presets:
        for seed in seeds:
            place = f"--folder={folder}/{Path(preset).stem}-seed{seed}"
            words[f"{preset}, seed {seed}"] = [*arguments, "--preset", preset, "--seed", str(seed), place]
    experiments = train_all(words, parallel=parallel)
    runs = [read_run(experiment.folder) for experiment in experiments]
    return text_table(comparison_rows(runs)), write_report(runs, folder / "report.html")
