"""Evaluate the checkpoints of runs, and networks that were not trained here."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.hints import check_type
from softdefend.core.identity import RunIdentity, check_place, settings_digest
from softdefend.core.processes import ALONE, Processes
from softdefend.core.threat import ThreatModel
from softdefend.core.weight_files import load_weights, load_weights_file, save_weights
from softdefend.core.yaml_files import read_yaml
from softdefend.data import DataBundle, DataSettings, channel_stats, load, split
from softdefend.evaluation import CheckpointSource, EvaluateSettings, Requests, evaluate_checkpoint
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.external import load_network
from softdefend.evaluation.pipeline import check_evaluation, check_union
from softdefend.evaluation.robustbench_networks import RobustBenchNetwork, load_robustbench
from softdefend.evaluation.settings import check_requests, check_writable
from softdefend.evaluation.surrogates import surrogate_names
from softdefend.execution.engine import join, resolve_device
from softdefend.experiments.config import Experiment, resolve
from softdefend.experiments.network import check_data, check_folder, check_surrogate, make_net
from softdefend.models import NetSettings, check_logits
from softdefend.models.network import check_parameters, check_state
from softdefend.report import read_run, write_report
from softdefend.report.runs import OUTSIDE
from softdefend.training.plain import plain_config

_log = logging.getLogger(__name__)


def open_run(folder: Path) -> Experiment:
    """The experiment of a run that the command line trained; reads its configuration only.

    Raises:
        SettingError: no such run, or one trained from Python with a network of its own.
    """
    path = folder / "config.yaml"
    if not os.path.isfile(path):
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


def run_identity(experiment: Experiment, bundle: DataBundle) -> RunIdentity:
    """What the weights and checkpoints of a run carry."""
    return RunIdentity(settings_digest(plain_config(experiment)), bundle.fingerprint)


def evaluate(
    experiment: Experiment,
    which: Sequence[str],
    settings: EvaluateSettings,
    threats: Sequence[ThreatModel],
    *,
    requests: Requests | None = None,
    transfer: Sequence[str] = (),
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run on its test images and renew its report.

    Args:
        experiment: see :func:`open_run`.
        which: checkpoints.
        settings: of the attacks.
        threats: that the network is attacked under, one after the other.
        requests: what else is asked, of each threat; the union when all are known.
        transfer: surrogates, see :func:`load_surrogates`.
        device: auto, cpu, cuda or cuda:N.
    """
    chosen = resolve_device(device)
    processes = join(chosen.type == "cuda")
    for name in which[1:]:  # before hours go into the first
        if not (path := experiment.folder / f"{name}.safetensors").is_file():
            accepted = "a finished run (the same train command goes on), or --which best"
            raise SettingError(str(path), "no such file", accepted)
    bundle = load(experiment.data)
    net = make_net(experiment, bundle)
    requests = replace(requests or Requests(), surrogates=load_surrogates(transfer, net, bundle))
    settings = settings.with_classes(bundle.classes)
    sources = [
        _source(experiment, bundle, net, name, settings, threat, requests, processes)
        for threat in threats
        for name in which
    ]
    for source in sources:  # before hours go into the first
        check_evaluation(source, settings, requests, chosen)
    for name in which if requests.union else ():
        check_union([source for source in sources if source.which == name], settings, chosen)
    early, apart = len(sources) - len(which), replace(requests, union=False)
    results = [
        evaluate_checkpoint(source, settings, apart if number < early else requests, device=chosen)
        for number, source in enumerate(sources)
    ]
    if processes.first:
        write_report([read_run(experiment.folder)], experiment.folder / "report.html")
    processes.wait()
    return results


def evaluate_run(
    experiment: Experiment,
    bundle: DataBundle,
    net: nn.Module,
    which: str,
    settings: EvaluateSettings,
    *,
    device: torch.device,
    threat: ThreatModel | None = None,
    requests: Requests | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Evaluate one checkpoint of a run, unless the same evaluation already lies in its folder.

    Under the trained threat the result is the run's own, ``evaluation/{which}.json``; under another one it
    is a file beside it, so that reports never mix threats.
    """
    settings, requests = settings.with_classes(bundle.classes), requests or Requests()
    threat = threat or experiment.recipe.threat
    source = _source(experiment, bundle, net, which, settings, threat, requests, processes)
    return evaluate_checkpoint(source, settings, requests, device=device)


def _source(
    experiment: Experiment,
    bundle: DataBundle,
    net: nn.Module,
    which: str,
    settings: EvaluateSettings,
    threat: ThreatModel,
    requests: Requests,
    processes: Processes,
) -> CheckpointSource:
    """A checkpoint of a run under a threat."""
    return CheckpointSource(
        net,
        bundle,
        experiment.folder,
        which,
        trained=experiment.recipe.threat,
        threat=threat,
        architecture=experiment.net.name,
        run=run_identity(experiment, bundle),
        additional_data=None if experiment.init_from else False,
        progress=experiment.progress and processes.first,
        targeted=settings.targeted,
        mask=requests.mask,
        processes=processes,
    )


def load_surrogates(paths: Sequence[str], net: nn.Module, bundle: DataBundle) -> dict[str, nn.Module]:
    """Networks by name whose adversarial images are to be tried on another.

    Args:
        paths: run folders (their best checkpoint), or files with weights of the network's own architecture.
        net: that network.
        bundle: the data both are for.

    Raises:
        SettingError: nothing to read there, weights that do not fit, or two of one name.
    """
    names = surrogate_names(paths)
    return {name: _load_surrogate(Path(path), net, bundle) for name, path in zip(names, paths, strict=True)}


def _load_surrogate(path: Path, net: nn.Module, bundle: DataBundle) -> nn.Module:
    try:
        if os.path.isdir(path):
            made = make_net(open_run(path), bundle)
            load_weights(made, path / "best.safetensors")
            check_place(path / "best.safetensors")
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
    requests: Requests | None = None,
    device: str = "auto",
    origin: dict[str, Any] | None = None,
    architecture: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate any network; write the result files and the report page of a run without a training.

    A network from outside has one checkpoint, which tables show as ``last``. Under another threat than that
    of its first evaluation in the folder the result is a file beside it, as in a run. Results of another
    network or other images are kept in ``evaluation/earlier`` where new ones replace them.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k]; put into eval mode.
        data: a bundle, of which the test images are used, or test images [n, c, h, w] (uint8, or float in
            [0, 1]) and labels [n].
        folder: gets ``last.safetensors``, ``evaluation/``, ``report.html`` and a ``config.yaml`` that says
            what this is.
        threat: l-inf at 8/255 when None.
        settings, requests: the attacks, and what else is asked.
        device: auto, cpu, cuda or cuda:N.
        origin: plain values for the configuration: where the network came from.
        architecture: what tables call the network; the name of its class if None.
        progress: show bars.

    Returns:
        What stands in ``evaluation/NAME.json``.

    Raises:
        SettingError: a folder that holds a training run, a network, images or labels that do not fit, or a
            union that will not be known.
    """
    folder = check_folder(folder)
    threat = check_type("threat", threat, ThreatModel | None) or ThreatModel()
    settings = check_type("settings", settings, EvaluateSettings | None) or EvaluateSettings()
    requests = check_type("requests", requests, Requests | None) or Requests()
    _check_plain("origin", check_type("origin", origin, dict | None))
    check_data(data)
    _refuse_run(folder)
    chosen = resolve_device(device)
    processes = join(chosen.type == "cuda")
    check_type("net", net, nn.Module)
    check_parameters(net)
    check_state(net)
    net.to(chosen).eval()
    bundle = data if isinstance(data, DataBundle) else _test_only(net, *data, chosen)
    settings = settings.with_classes(bundle.classes)
    check_requests(settings, requests, len(bundle.test))
    shape, k = tuple(bundle.test.images.shape[1:]), len(bundle.classes)
    check_logits(net, shape, k, chosen)
    for name, surrogate in requests.surrogates.items():
        check_surrogate(f"surrogates.{name}", surrogate.to(chosen), shape, k, chosen)
    source = CheckpointSource(
        net,
        bundle,
        folder,
        "last",
        trained=threat,
        threat=threat,
        architecture=architecture or type(net).__name__,
        origin=str((origin or {}).get("model", type(net).__qualname__)),
        progress=progress and processes.first,
        targeted=settings.targeted,
        mask=requests.mask,
        processes=processes,
    )
    check_writable("--output", folder / "last.safetensors")
    check_evaluation(source, settings, requests, chosen)
    own = processes.from_first(lambda: _write_folder(source, origin or {}, chosen))
    source = replace(source, trained=own)
    if requests.union:
        check_union([source], settings, chosen)
    result = evaluate_checkpoint(source, settings, requests, device=chosen)
    if processes.first:
        page = write_report([read_run(folder)], folder / "report.html", "Robustness report")
        _log.info(f"report: {page}")
    processes.wait()
    return result


def _check_plain(setting: str, value: Any) -> None:
    """Refuse what a configuration cannot hold."""
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError as error:
        raise SettingError(setting, error.args[0], "plain values by name") from error


def _write_folder(source: CheckpointSource, origin: dict[str, Any], device: torch.device) -> ThreatModel:
    """Write what makes a folder one of a network from outside, its weights and where they are from, and
    return the threat whose results carry the bare name."""
    save_weights(source.net, source.folder / "last.safetensors", {"epoch": None})
    threat = _first_threat(source, device)
    config = {
        "name": source.folder.name,
        "seed": 0,
        "data": {"source": source.bundle.name},
        "net": {"name": source.architecture},
        "threat": {"norm": threat.norm, "eps": str(threat.eps)},
        OUTSIDE: origin,
    }
    write_atomic(source.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    return threat


def _first_threat(source: CheckpointSource, device: torch.device) -> ThreatModel:
    """The threat of a network's first evaluation in its folder; the one asked for where there is none."""
    checkpoint = Checkpoint(source, device, assumes_determinism=False)
    store, facts, path = checkpoint.store, checkpoint.facts, source.folder / "config.yaml"
    kept = [store.read(file.stem) or {} for file in sorted(store.folder.glob(f"{source.which}*.json"))]
    known = any(all(one.get(name) == fact for name, fact in facts.items()) for one in kept)
    return outside_threat(source.folder) if known and path.is_file() else source.threat


def outside_threat(folder: Path) -> ThreatModel:
    """The threat whose results carry the bare name in the folder of a network from outside.

    Raises:
        SettingError: no such folder, or a configuration that names none.
    """
    path = folder / "config.yaml"
    threat = read_yaml(path).get("threat")
    if not isinstance(threat, dict) or threat.keys() < {"norm", "eps"}:
        raise SettingError(f"{path}: threat", threat, "norm and eps")
    return ThreatModel(threat["norm"], threat["eps"])


def evaluate_external(
    network: NetSettings | RobustBenchNetwork,
    weights: Path,
    data: DataSettings,
    folder: Path,
    *,
    key: str = "",
    threat: ThreatModel,
    settings: EvaluateSettings,
    requests: Requests | None = None,
    transfer: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """:func:`evaluate_network` of a network with the weights of a file.

    ``network``, ``weights`` and ``key`` are those of :func:`~softdefend.evaluation.external.load_network`, or
    of :func:`~softdefend.evaluation.robustbench_networks.load_robustbench`.
    """
    _refuse_run(folder)
    bundle = load(replace(data, validation=1, train_size=None))  # the test split is drawn before either
    net, notes = _load_external(network, weights, bundle, key)
    _log.info(f"{weights}: {'; '.join(notes) if notes else 'loaded as it is'}")
    return evaluate_network(
        net,
        bundle,
        folder,
        threat=threat,
        settings=settings,
        requests=replace(requests or Requests(), surrogates=load_surrogates(transfer, net, bundle)),
        device=device,
        origin={"model": network.name, "weights": str(weights), "done_to_names": notes},
        architecture=network.shown if isinstance(network, RobustBenchNetwork) else None,
        progress=progress,
    )


def _load_external(
    network: NetSettings | RobustBenchNetwork, weights: Path, bundle: DataBundle, key: str
) -> tuple[nn.Module, list[str]]:
    """The network for a bundle's images and classes, and what had to be done to find its weights."""
    k, shape = len(bundle.classes), bundle.test.images.shape[1:]
    if isinstance(network, RobustBenchNetwork):
        return load_robustbench(
            network.architecture,
            weights,
            num_classes=k,
            in_channels=shape[0],
            mean=network.mean,
            std=network.std,
            key=key,
        )
    mean, std = channel_stats(bundle.train)
    return load_network(network, weights, num_classes=k, mean=mean, std=std, image_size=shape[1:], key=key)


def _refuse_run(folder: Path) -> None:
    """An evaluation never takes the place of a training run."""
    path = folder / "config.yaml"
    if os.path.isfile(path) and OUTSIDE not in read_yaml(path):
        raise SettingError(
            "--output", f"{folder}, a training run", "a new folder, or one written by --output"
        )


def _test_only(net: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> DataBundle:
    """A bundle in which all images are test images.

    The network, on ``device``, decides how many classes there are: the labels of a few images may miss some.
    """
    test = split(images, labels)
    least = max(2, int(test.labels.max()) + 1)
    k = check_logits(net, tuple(test.images.shape[1:]), None, device, least=least)
    classes = tuple(str(number) for number in range(k))
    return DataBundle("tensors", test, test, test, classes, fingerprint="")
