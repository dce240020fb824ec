"""``softdefend evaluate``: checkpoints of runs, or a network from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from softdefend.cli.flags import Flags, Given, positional, switch
from softdefend.core.errors import SettingError
from softdefend.core.threat import EXAMPLES, Budget, Norm, ThreatModel
from softdefend.data import DataSettings
from softdefend.evaluation import EvaluateSettings, Requests
from softdefend.evaluation.mask import read_mask
from softdefend.evaluation.robustbench_networks import RobustBenchNetwork
from softdefend.evaluation.settings import Size, check_size
from softdefend.execution.engine import count_processes
from softdefend.execution.launched import place_of_this_process
from softdefend.experiments.evaluate import evaluate, evaluate_external, open_run
from softdefend.experiments.launch import run_on_processes
from softdefend.experiments.pipeline import WHICH
from softdefend.models import NetSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateFlags:
    """Evaluate a run's best and last checkpoint on its test images; what is not given is as the run was
    configured. Under another norm or eps than the trained one the result is a file of its own, such as
    evaluation/best-linf-4_255.json, and the report keeps its figures. With --model a network that was not
    trained here is evaluated on --data."""

    run: tuple[str, ...] = positional(())
    """Run folders."""
    which: tuple[str, ...] = WHICH
    """best, last or both."""
    norm: tuple[str, ...] = ()
    """linf, l2, l1 or l0, or several of them; as trained if not given."""
    eps: tuple[Budget, ...] = ()
    """Radius in pixel units, such as 8/255, one for each norm; as trained if not given, which another norm
    does not allow."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    devices: int | Literal["auto"] = 1
    """Processes that share the batches, one on each GPU, or on the CPU; auto: as many as there are GPUs."""
    audit: bool = switch()
    """Look for signs of gradient masking."""
    audit_size: Size = 250
    """Test images that the audit looks at; subset says which."""
    save_adversarial: bool = switch()
    """Write what each attack made of each image, evaluation/NAME-adversarial-ATTACK.safetensors."""
    corruptions: bool = switch()
    """Measure accuracy under common corruptions."""
    transfer: tuple[str, ...] = ()
    """Run folders, or weights of the same network: surrogates for transfer attacks."""
    optimality: tuple[str, ...] = ()
    """Attacks whose closest wrong images are compared, such as fmn fab-t deepfool."""
    optimality_size: Size = 200
    """Test images that they are compared on; subset says which."""
    union: bool = switch()
    """Print accuracy under all threats together that the checkpoint was evaluated under, now or earlier."""
    mask: Path | None = None
    """Values that may change: a .npy or .safetensors file of zeros and ones, [h, w], [c, h, w] or one for
    each test image, or a PNG picture, black where nothing may change."""
    robustbench: Path | None = None
    """RobustBench's model_info JSON, to write."""
    log: Path | None = None
    """Log lines as AutoAttack writes them, to write."""
    model: str | None = None
    """The network: a built-in one, timm:NAME, or package.module:function that makes it."""
    net: NetSettings = field(default_factory=NetSettings)
    """With --model: what else a training's net settings say, such as net.width."""
    weights: Path | None = None
    """With --model: safetensors, or a state dict from torch.save."""
    weights_key: str = ""
    """Where in that file the weights stand, such as state_dict_ema, if several fit."""
    robustbench_model: Path | None = None
    """A checkpoint in one of RobustBench's formats, in place of --model and --weights."""
    architecture: str | None = None
    """With --robustbench_model: as RobustBench's tables call it, such as WideResNet-28-10 or ResNet-18; in
    DeepMind's layout WideResNet-70-16-SiLU."""
    mean: tuple[float, ...] = ()
    """With --robustbench_model: what its code subtracts from each channel, where the file does not say it."""
    std: tuple[float, ...] = ()
    """With --mean: what it divides by."""
    output: Path | None = None
    """With --model or --robustbench_model: the result folder, which keeps one result a threat."""
    data: DataSettings = field(default_factory=DataSettings)
    """With --model or --robustbench_model: the data."""


_THEIRS = ("architecture", "mean", "std")
"""Flags that only a checkpoint of RobustBench's needs."""

FLAGS = Flags("evaluate", EvaluateFlags, EvaluateSettings, partial=(EvaluateSettings,))
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Evaluate run folders one after another, or one network from elsewhere."""
    given = FLAGS.read(words)
    flags = given.make(EvaluateFlags)
    _check(flags, given)
    size = count_processes(flags.device, flags.devices, "--devices")
    if size > 1 and place_of_this_process() is None:
        run_on_processes(["evaluate", *words], size)
        return
    requests = Requests(
        audit=flags.audit_size if flags.audit else 0,
        corruptions=flags.corruptions,
        adversarial=flags.save_adversarial,
        robustbench=flags.robustbench,
        log=flags.log,
        optimality=flags.optimality,
        optimality_size=flags.optimality_size,
        union=flags.union,
        mask=None if flags.mask is None else read_mask(flags.mask),
    )
    also: dict[str, Any] = {"requests": requests, "transfer": flags.transfer, "device": flags.device}
    changes = given.changes(EvaluateSettings)
    external = _external(flags)
    if external is not None and flags.output is not None:
        (threat,), settings = _threats(flags, ThreatModel()), EvaluateSettings(**changes)
        paths = *external, flags.data, flags.output
        evaluate_external(*paths, key=flags.weights_key, threat=threat, settings=settings, **also)
    for folder in map(Path, flags.run):
        experiment = open_run(folder)
        threats = _threats(flags, experiment.recipe.threat)
        _log.info(str(folder))
        evaluate(experiment, flags.which, replace(experiment.evaluate, **changes), threats, **also)


def _external(flags: EvaluateFlags) -> tuple[NetSettings | RobustBenchNetwork, Path] | None:
    """The network that was not trained here and the file of its weights; None where runs are evaluated."""
    if flags.robustbench_model is not None and flags.architecture is not None:
        return RobustBenchNetwork(flags.architecture, flags.mean, flags.std), flags.robustbench_model
    if flags.model is not None and flags.weights is not None:
        return replace(flags.net, name=flags.model), flags.weights
    return None


def _threats(flags: EvaluateFlags, trained: ThreatModel) -> list[ThreatModel]:
    norms = flags.norm or (trained.norm,)
    for norm in () if flags.eps else norms:
        if norm != trained.norm and norm in EXAMPLES:
            accepted = f"a radius in {norm}, such as {EXAMPLES[norm]}"
            raise SettingError("--eps", f"nothing beside --norm {norm}", accepted)
    radii = flags.eps or (trained.eps,) * len(norms)
    if len(radii) != len(norms):
        raise SettingError("--eps", f"{len(radii)} radii for {len(norms)} norms", "one for each --norm")
    # A norm that there is not is refused with the rest.
    return [ThreatModel(cast(Norm, norm), eps) for norm, eps in zip(norms, radii, strict=True)]


def _check(flags: EvaluateFlags, given: Given) -> None:
    """Refuse flags that contradict each other, or lack each other."""
    for which in flags.which:
        if which not in WHICH:
            raise SettingError("--which", repr(which), " or ".join(WHICH))
    check_size("--audit_size", flags.audit_size, 1)
    check_size("--optimality_size", flags.optimality_size, 1)
    if flags.robustbench_model is not None:
        _check_robustbench(flags, given)
    elif flags.model is None:
        _check_runs(flags, given)
    else:
        _check_model(flags, given)
    if flags.union and not flags.run:
        accepted = "run folders; the report in an --output folder shows the union of its threats"
        raise SettingError("--union", "given without a run", accepted)
    outside = flags.model or flags.robustbench_model
    if outside and len(flags.norm) > 1:
        accepted = "one of them: a call with --output evaluates under one threat, and keeps those of others"
        raise SettingError("--norm", " ".join(flags.norm), accepted)
    checkpoints = 1 if outside else len(flags.which) * len(flags.run) * max(1, len(flags.norm))
    for name in ("robustbench", "log"):
        if getattr(flags, name) and checkpoints > 1:
            accepted = "one run, one checkpoint and one norm, such as --which best"
            raise SettingError(f"--{name}", f"{checkpoints} checkpoints for one file", accepted)


def _check_runs(flags: EvaluateFlags, given: Given) -> None:
    for name in ("net", "weights", "weights_key", "output", "data", *_THEIRS):
        if name in given.values:
            beside = "--robustbench_model" if name in _THEIRS else "--model"
            accepted = f"--{name} only beside {beside}; a run brings its own"
            raise SettingError(f"--{name}", f"given without {beside}", accepted)
    if not flags.run:
        raise SettingError("run", "nothing", "run folders, or --model; see 'softdefend evaluate --help'")


def _check_robustbench(flags: EvaluateFlags, given: Given) -> None:
    for name in ("run", "model", "net", "weights"):
        if name in given.values:
            shown = f"{name} beside --robustbench_model"
            raise SettingError(name if name == "run" else f"--{name}", shown, "one of them")
    for name in ("architecture", "output"):
        if getattr(flags, name) is None:
            raise SettingError(f"--{name}", "nothing", f"--{name} beside --robustbench_model")


def _check_model(flags: EvaluateFlags, given: Given) -> None:
    if "name" in given.values.get("net", {}):
        raise SettingError("--net.name", flags.net.name, "--model for the network's name")
    for name in _THEIRS:
        if name in given.values:
            raise SettingError(f"--{name}", "given with --model", f"--{name} beside --robustbench_model")
    if flags.run:
        raise SettingError("run", f"{flags.run[0]} with --model", "either run folders or --model")
    for name in ("weights", "output"):
        if getattr(flags, name) is None:
            raise SettingError(f"--{name}", "nothing", f"--{name} PATH beside --model")
