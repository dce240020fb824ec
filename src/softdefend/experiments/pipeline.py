"""From a resolved configuration to a trained, evaluated and reported run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.threat import ThreatModel
from softdefend.core.weight_files import load_weights_file, save_weights
from softdefend.core.yaml_files import read_yaml
from softdefend.data import DataBundle, DataSettings, channel_stats, load, split
from softdefend.evaluation import EvaluateSettings, load_weights
from softdefend.evaluation.examine import Extras, Subject, check_wishes, examine, surrogate_names
from softdefend.evaluation.third_party import load_network
from softdefend.execution.engine import resolve_device
from softdefend.experiments.config import Experiment, first_given, resolve
from softdefend.experiments.parallel import Job, command_line, run_all
from softdefend.models import build, check_logits
from softdefend.report import comparison_rows, read_run, text_table, write_report
from softdefend.report.runs import OUTSIDE
from softdefend.training import Trainer

log = logging.getLogger(__name__)

WHICH = ("best", "last")


def make_net(experiment: Experiment, bundle: DataBundle) -> nn.Module:
    """The experiment's network with fresh weights, a function of its seed."""
    mean, std = channel_stats(bundle.train)
    shape = tuple(bundle.train.images.shape[1:])
    with torch.random.fork_rng(devices=[]):  # the network is drawn on the CPU
        torch.manual_seed(rng.key(experiment.seed, "init"))
        net = build(experiment.net, num_classes=len(bundle.classes), in_channels=shape[0], mean=mean, std=std)
    check_logits(net, shape, len(bundle.classes), "cpu")
    return net


def make_trainer(experiment: Experiment, bundle: DataBundle) -> Trainer:
    """What trains the experiment, in its folder: new, or to be continued."""
    net = make_net(experiment, bundle)
    return Trainer(net, bundle, experiment, experiment.folder, progress=experiment.progress)


def train(experiment: Experiment) -> Path:
    """Train, evaluate best and last checkpoint on the test images, write the report; continue where the
    folder holds an unfinished run.

    Returns:
        The run folder.
    """
    bundle = load(experiment.data)
    trainer = make_trainer(experiment, bundle)
    try:
        device = trainer.engine.device
        log.info("%s, seed %d, on %s: %s", experiment.name, experiment.seed, device, experiment.folder)
        epochs = experiment.optim.epochs
        trainer.fit(experiment.resume, on_epoch=lambda row: log.info(epoch_line(row, epochs)))
    finally:
        trainer.folder.close()
    net = make_net(experiment, bundle)
    for which in WHICH:
        evaluate_run(experiment, bundle, net, which, experiment.evaluate, device=device)
    report = write_report([read_run(experiment.folder)], experiment.folder / "report.html")
    log.info("report: %s", report)
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
    extras: Extras | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate one checkpoint of a run, unless the same evaluation already lies in its folder.

    Under the trained threat the result is the run's own, ``evaluation/{which}.json``; under another one it
    is a file beside it, so that reports never mix threats.
    """
    trained = experiment.recipe.threat
    subject = Subject(
        net,
        bundle,
        experiment.folder,
        which,
        trained=trained,
        threat=threat or trained,
        architecture=experiment.net.name,
        progress=experiment.progress,
    )
    return examine(subject, settings, extras or Extras(), device=device, say=say)


def open_run(folder: Path) -> Experiment:
    """The experiment of a run that the command line trained; reads its configuration only.

    Raises:
        SettingError: no such run, or one trained from Python with a network of its own.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise SettingError("run", folder, "a run folder (it holds a config.yaml)")
    config = read_yaml(path)
    if OUTSIDE in config:
        raise SettingError(
            "run",
            f"{folder}, a network from outside",
            "evaluate it with --model, --weights and --output again",
        )
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
    extras: Extras | None = None,
    transfer: Sequence[str] = (),
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run on its test images and renew its report.

    Args:
        experiment: see :func:`open_run`.
        which: checkpoints.
        settings, threat: of the attacks.
        extras: what else is asked.
        transfer: surrogates, see :func:`surrogates`.
        device: auto, cpu, cuda or cuda:N.
        say: is given every line of progress.
    """
    chosen = resolve_device(device)
    for name in which[1:]:  # before hours go into the first
        if not (path := experiment.folder / f"{name}.safetensors").is_file():
            accepted = "a finished run (the same train command goes on), or --which best"
            raise SettingError(str(path), "no such file", accepted)
    bundle = load(experiment.data)
    net = make_net(experiment, bundle)
    extras = replace(extras or Extras(), surrogates=surrogates(transfer, net, bundle))
    results = [
        evaluate_run(
            experiment,
            bundle,
            net,
            name,
            settings,
            device=chosen,
            threat=threat,
            extras=extras,
            say=say,
        )
        for name in which
    ]
    write_report([read_run(experiment.folder)], experiment.folder / "report.html")
    return results


def surrogates(paths: Sequence[str], net: nn.Module, bundle: DataBundle) -> dict[str, nn.Module]:
    """Networks by name whose adversarial images are to be tried on another.

    Args:
        paths: run folders (their best checkpoint), or files with weights of the network's own architecture.
        net: that network.
        bundle: the data both are for.

    Raises:
        SettingError: nothing to read there, weights that do not fit, or two of one name.
    """
    return dict(
        zip(surrogate_names(paths), (_surrogate(Path(path), net, bundle) for path in paths), strict=True)
    )


def _surrogate(path: Path, net: nn.Module, bundle: DataBundle) -> nn.Module:
    try:
        if path.is_dir():
            made = make_net(open_run(path), bundle)
            load_weights(made, path / "best.safetensors")
        else:
            made = copy.deepcopy(net)
            load_weights_file(made, path)
    except SettingError as error:
        raise SettingError(
            "--transfer", f"{path} ({error.setting}: {error.given})", error.accepted
        ) from error
    return made.eval()


def evaluate_network(
    net: nn.Module,
    data: DataBundle | tuple[Tensor, Tensor],
    folder: Path | str,
    *,
    threat: ThreatModel | None = None,
    settings: EvaluateSettings | None = None,
    extras: Extras | None = None,
    device: str = "auto",
    origin: dict[str, Any] | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate any network; write the result files and the report page of a run without a training.

    A network from outside has one checkpoint, which tables show as ``last``.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k]; put into eval mode.
        data: a bundle, of which the test images are used, or test images [n, c, h, w] (uint8, or float in
            [0, 1]) and labels [n].
        folder: gets ``last.safetensors``, ``evaluation/``, ``report.html`` and a ``config.yaml`` that says
            what this is.
        threat: l-inf at 8/255 when None.
        settings, extras: the attacks, and what else is asked.
        device: auto, cpu, cuda or cuda:N.
        origin: plain values for the configuration: where the network came from.
        progress: show bars.
        say: is given every line of progress.

    Returns:
        What stands in ``evaluation/last.json``.

    Raises:
        SettingError: a folder that holds a training run, or a network, images or labels that do not fit.
    """
    folder, threat = Path(folder), threat or ThreatModel()
    settings, extras = settings or EvaluateSettings(), extras or Extras()
    _refuse_run(folder)
    chosen = resolve_device(device)
    net.to(chosen).eval()
    bundle = data if isinstance(data, DataBundle) else _test_only(net, *data, chosen)
    check_wishes(settings, extras, len(bundle.test))
    check_logits(net, tuple(bundle.test.images.shape[1:]), len(bundle.classes), chosen)
    architecture = type(net).__name__
    config = {
        "name": folder.name,
        "seed": 0,
        "data": {"source": bundle.name},
        "net": {"name": architecture},
        "threat": {"norm": threat.norm, "eps": str(threat.eps)},
        OUTSIDE: origin or {},
    }
    save_weights(net, folder / "last.safetensors", {"epoch": None})
    write_atomic(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    subject = Subject(
        net,
        bundle,
        folder,
        "last",
        trained=threat,
        threat=threat,
        architecture=architecture,
        progress=progress,
    )
    result = examine(subject, settings or EvaluateSettings(), extras or Extras(), device=chosen, say=say)
    say(f"report: {write_report([read_run(folder)], folder / 'report.html', 'Robustness report')}")
    return result


def evaluate_outside(
    factory: str,
    weights: Path,
    data: DataSettings,
    folder: Path,
    *,
    threat: ThreatModel,
    settings: EvaluateSettings,
    extras: Extras | None = None,
    transfer: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """:func:`evaluate_network` of a factory ``package.module:function`` and a file of weights."""
    _refuse_run(folder)
    bundle = load(replace(data, validation=1, train_size=None))  # the test split is drawn before either
    net, notes = load_network(
        factory, weights, num_classes=len(bundle.classes), in_channels=bundle.test.images.shape[1]
    )
    say(f"{weights}: {'; '.join(notes) if notes else 'loaded as it is'}")
    return evaluate_network(
        net,
        bundle,
        folder,
        threat=threat,
        settings=settings,
        extras=replace(extras or Extras(), surrogates=surrogates(transfer, net, bundle)),
        device=device,
        origin={"model": factory, "weights": str(weights), "done_to_names": notes},
        progress=progress,
        say=say,
    )


def _refuse_run(folder: Path) -> None:
    """An evaluation never takes the place of a training run."""
    path = folder / "config.yaml"
    if path.is_file() and OUTSIDE not in read_yaml(path):
        raise SettingError(
            "--output", f"{folder}, a training run", "a new folder, or one written by --output"
        )


def _test_only(net: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> DataBundle:
    """A bundle in which all images are test images; the network, on ``device``, says how many classes there
    are, because the labels of a few images may miss some."""
    test = split(images, labels)
    least = max(2, int(test.labels.max()) + 1)
    k = check_logits(net, tuple(test.images.shape[1:]), None, device, least=least)
    classes = tuple(str(number) for number in range(k))
    return DataBundle("tensors", test, test, test, classes, fingerprint="")


def train_all(runs: Mapping[str, Sequence[str]], *, parallel: int = 1) -> list[Experiment]:
    """Train several runs; finished ones are kept, unfinished ones continued.

    Args:
        runs: words of ``softdefend train`` by what messages call the run; a folder of its own in each.
        parallel: runs at a time. Above one each is a process of its own that writes to ``FOLDER.log``.

    Raises:
        SettingError: words that do not resolve, before anything runs; or what a run refuses.
    """
    experiments = [resolve(words) for words in runs.values()]
    if parallel == 1:
        for experiment in experiments:
            train(experiment)
        return experiments
    logs = [experiment.folder.with_name(f"{experiment.folder.name}.log") for experiment in experiments]
    jobs = [
        Job(name, partial(_train_command, words), log)
        for (name, words), log in zip(runs.items(), logs, strict=True)
    ]
    run_all(jobs, parallel, spread=all(made.runtime.device == "auto" for made in experiments))
    return experiments


def _train_command(words: Sequence[str], _: str) -> list[str]:
    return command_line("train", *words)


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
