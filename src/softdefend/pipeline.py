"""From a resolved configuration to a trained, evaluated and reported run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softdefend import rng
from softdefend.config import Experiment, resolve
from softdefend.data import DataBundle, channel_stats, load
from softdefend.errors import SettingError
from softdefend.evaluation import EvaluateSettings, evaluate_checkpoint
from softdefend.models import build, check_logits
from softdefend.report import comparison_rows, read_run, text_table, write_report
from softdefend.threat import ThreatModel
from softdefend.training import Trainer
from softdefend.training.engine import resolve_device
from softdefend.training.folder import read_yaml

WHICH = ("best", "last")


def make_net(experiment: Experiment, bundle: DataBundle) -> nn.Module:
    """The experiment's network with fresh weights, a function of its seed."""
    mean, std = channel_stats(bundle.train)
    shape = tuple(bundle.train.images.shape[1:])
    with torch.random.fork_rng():
        torch.manual_seed(rng.key(experiment.seed, "init"))
        net = build(experiment.net, num_classes=len(bundle.classes), in_channels=shape[0], mean=mean, std=std)
    check_logits(net, shape, len(bundle.classes), "cpu")
    return net


def train(experiment: Experiment, *, say: Callable[[str], None] = print) -> Path:
    """Train, evaluate best and last checkpoint on the test images, write the report; continue where the
    folder holds an unfinished run.

    Returns:
        The run folder.
    """
    bundle = load(experiment.data)
    trainer = Trainer(
        make_net(experiment, bundle),
        bundle,
        experiment.recipe,
        experiment.folder,
        optim=experiment.optim,
        augment=experiment.augment,
        validate=experiment.validate,
        runtime=experiment.runtime,
        save=experiment.save,
        weight=experiment.weight,
        seed=experiment.seed,
        config=experiment.config,
        progress=experiment.progress,
    )
    try:
        say(f"{experiment.name}, seed {experiment.seed}, on {trainer.engine.device}: {experiment.folder}")
        trainer.fit(experiment.resume, on_epoch=lambda row: say(epoch_line(row, experiment.optim.epochs)))
        device = trainer.engine.device
    finally:
        trainer.folder.close()
    net = make_net(experiment, bundle)
    for which in WHICH:
        evaluate_run(experiment, bundle, net, which, experiment.evaluate, device=device, say=say)
    report = write_report([read_run(experiment.folder)], experiment.folder / "report.html")
    say(f"report: {report}")
    return experiment.folder


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


def evaluate_run(
    experiment: Experiment,
    bundle: DataBundle,
    net: nn.Module,
    which: str,
    settings: EvaluateSettings,
    *,
    device: torch.device,
    threat: ThreatModel | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate one checkpoint of a run, unless the same evaluation already lies in its folder.

    Under the trained threat the result is the run's own, ``evaluation/{which}.json``; under another one it
    is a file beside it, so that reports never mix threats.
    """
    threat = threat or experiment.recipe.threat
    name = which + _suffix(threat, experiment.recipe.threat)
    wanted = {**json.loads(json.dumps(asdict(settings))), "norm": threat.norm, "eps": str(threat.eps)}
    result = _existing(experiment.folder, which, name)
    if result is None or result.get("settings") != wanted:
        result = evaluate_checkpoint(
            net,
            bundle,
            threat,
            experiment.folder,
            which,
            settings,
            wanted,
            name=name,
            device=device,
            data_name=bundle.name,
            progress=experiment.progress,
        )
    figures = [f"{name} {100 * figure['rate']:.1f}%" for name, figure in result["attacks"].items()]
    say(
        f"{name} (epoch {result['epoch']}): clean {100 * result['clean']['rate']:.1f}%  " + "  ".join(figures)
    )
    return result


def _suffix(threat: ThreatModel, trained: ThreatModel) -> str:
    """Nothing for the trained threat, else the threat in letters that file names may have."""
    if (threat.norm, float(threat.eps)) == (trained.norm, float(trained.eps)):
        return ""
    return f"-{threat.norm}-{re.sub(r'[^0-9.e]+', '_', str(threat.eps))}"


def _existing(folder: Path, which: str, name: str) -> dict[str, Any] | None:
    """An evaluation of the weights as they now are, or None."""
    path, weights = folder / "evaluation" / f"{name}.json", folder / f"{which}.safetensors"
    try:
        if path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            return None
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def open_run(folder: Path) -> Experiment:
    """The experiment of a run that the command line trained; reads its configuration only.

    Raises:
        SettingError: no such run, or one trained from Python with a network of its own.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise SettingError("run", folder, "a run folder (it holds a config.yaml)")
    config = read_yaml(path)
    if "net" not in config:
        raise SettingError(
            "run", f"{folder}, trained from Python", "evaluate it there: softdefend.evaluate(net, ...)"
        )
    return replace(resolve(config), folder=folder)


def evaluate(
    experiment: Experiment,
    which: Sequence[str],
    settings: EvaluateSettings,
    threat: ThreatModel,
    *,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run on its test images and renew its report."""
    bundle = load(experiment.data)
    net = make_net(experiment, bundle)
    results = [
        evaluate_run(
            experiment,
            bundle,
            net,
            name,
            settings,
            device=resolve_device(device),
            threat=threat,
            say=say,
        )
        for name in which
    ]
    write_report([read_run(experiment.folder)], experiment.folder / "report.html")
    return results


def compare(
    arguments: Sequence[str],
    presets: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    say: Callable[[str], None] = print,
) -> tuple[str, Path]:
    """Train every preset with every seed under one protocol; one table, one report.

    Finished runs are kept, unfinished ones continued.

    Args:
        arguments: further words of ``softdefend train``: the protocol and overrides.
        presets: names or paths.
        seeds: of the runs.
        folder: holds one run folder for each preset and seed, and the report.

    Returns:
        The table as text, and the path of the report.
    """
    experiments = [
        resolve(
            [
                *arguments,
                "--preset",
                preset,
                "--seed",
                str(seed),
                f"--folder={folder}/{Path(preset).stem}-seed{seed}",
            ]
        )
        for preset in presets
        for seed in seeds
    ]
    for experiment in experiments:
        train(experiment, say=say)
    runs = [read_run(experiment.folder) for experiment in experiments]
    return text_table(comparison_rows(runs)), write_report(runs, folder / "report.html")
