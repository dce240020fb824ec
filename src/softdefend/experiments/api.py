"""The short way from Python: any module, any tensors in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.attacks import Attack, Transfer
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.hints import check_type
from softdefend.core.threat import ThreatModel
from softdefend.data import DataBundle, Resident, from_tensors, split, subset
from softdefend.evaluation import Ensemble, Evaluation, Evaluator
from softdefend.evaluation.autoattack import averages_draws, parse
from softdefend.evaluation.preflight import LOOK, preflight
from softdefend.execution.batch_norm import separate
from softdefend.execution.engine import resolve_device
from softdefend.execution.microbatch import fitting_microbatch
from softdefend.execution.network_mode import frozen
from softdefend.execution.search_network import Precision
from softdefend.experiments.network import check_data, check_folder, check_surrogate, check_trainable
from softdefend.models import check_logits
from softdefend.models.network import as_network, check_parameters
from softdefend.models.recompute import keep_blocks
from softdefend.report import RunRecord, read_run
from softdefend.training import TrainConfig, Trainer
from softdefend.training.config import BROUGHT, flat_hints, nest


def train(
    net: nn.Module,
    data: DataBundle | tuple[Tensor, Tensor],
    *,
    folder: Path | str,
    progress: bool = True,
    **settings: Any,
) -> RunRecord:
    """Train ``net`` in place, robustly; continue where ``folder`` holds an unfinished run.

    Afterwards ``net`` is in train mode and holds the weights that were trained. The best and the last ones
    that predict (with EMA or SWA: the average) are in ``folder`` as safetensors; see
    :func:`softdefend.evaluation.load_weights`.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k]; normalization belongs inside
            (see :func:`softdefend.normalize`).
        data: a bundle, or images [n, c, h, w] (uint8, or float in [0, 1]) and integer labels [n], of which a
            fifth is set aside as test set and a tenth of the rest (at most 1000) held out for validation.
        folder: the run folder.
        progress: show progress bars.
        settings: fields of :class:`~softdefend.training.Recipe` (``label``, ``objective``, ``weight``,
            ``threat``, ``attack``, ``attack_bn``) and of :class:`~softdefend.training.TrainConfig` (``name``,
            ``seed``, ``init_from``, ``optim``, ``augment``, ``validate``, ``runtime``, ``save``). Those left
            out or None are the defaults: plain PGD adversarial training, l-inf at 8/255.

    Raises:
        SettingError: something that does not fit; the line says what.
        DivergenceError: the loss or a weight is no longer finite, the loss is far above that of guessing and
            of the first step, or ``validate.alarm`` is ``stop`` and rings.
    """
    _refuse_inference_mode("train")
    check_type("net", net, nn.Module)
    place = check_folder(folder)
    config = _config(settings)
    check_data(data)
    bundle = data if isinstance(data, DataBundle) else from_tensors(*data)
    with torch.enable_grad():
        check_trainable(net, bundle, config)
        try:
            trainer = Trainer(net, bundle, config, place, progress=progress)
            try:
                trainer.fit()
            finally:
                trainer.close()
        finally:
            separate(net)
            keep_blocks(net)
    return read_run(place)


def _refuse_inference_mode(function: str) -> None:
    """Tensors that are made there have no gradients."""
    if torch.is_inference_mode_enabled():
        given = "a call in torch.inference_mode()"
        raise SettingError(f"softdefend.{function}", given, "a call outside of it")


def _config(settings: Mapping[str, Any]) -> TrainConfig:
    """Keywords as the settings of a run whose images, network and evaluation are the caller's.

    Raises:
        SettingError: an unknown name, or a value that its setting does not take.
    """
    known = [name for name in flat_hints() if name not in BROUGHT]
    for name in settings:
        if name not in known:
            raise SettingError(name, "an unknown setting", ", ".join(known) + did_you_mean(name, known))
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(given.get("init_from"), Path):
        given["init_from"] = str(given["init_from"])
    return TrainConfig(**nest({**given, **dict.fromkeys(BROUGHT)}))


def evaluate(
    net: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel | None = None,
    attacks: Sequence[str | Attack | Ensemble] = ("pgd-20",),
    batch_size: int = 500,
    microbatch: int | None = None,
    precision: Precision = "exact",
    compile: bool | None = None,
    seed: int = 0,
    targeted: str | None = None,
    mask: Tensor | None = None,
    keep_images: bool = False,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Evaluation:
    """Clean and robust accuracy of any module on any images, in eval mode and fp32.

    Before anything is attacked, :func:`softdefend.evaluation.preflight.preflight` looks at some images.
    ``net`` is moved to the device; its mode and gradients are put back as they were.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k]: a module, or a function. Modules that a
            function keeps in its variables or attributes are treated as its own; others are the caller's to
            put into eval mode and on the device.
        images: [n, c, h, w], uint8 or float in [0, 1].
        labels: [n] integers in [0, k).
        threat: l-inf at 8/255 when None.
        attacks: attacks, or names of them (docs/attacks.md) such as ``autoattack``; all different. A network
            that draws random numbers is refused unless one of them averages over its draws (``-eot``,
            ``autoattack-rand``).
        batch_size, precision, compile, seed, targeted, mask, keep_images: as
            :class:`softdefend.evaluation.Evaluator` has them.
        microbatch: images computed at once; on a GPU found from its free memory when None.

    Raises:
        SettingError: images, labels, a threat or a network that do not fit.
    """
    _refuse_inference_mode("evaluate")
    net = as_network(net)
    threat = check_type("threat", threat, ThreatModel | None) or ThreatModel()
    attacks = _attacks(attacks)
    batch_size = check_type("batch_size", batch_size, int)
    microbatch = check_type("microbatch", microbatch, int | None)
    compile = check_type("compile", compile, bool | None)
    seed = check_type("seed", seed, int, None)
    if not -(2**63) <= seed < 2**64:
        raise SettingError("seed", seed, "a whole number from -2^63 to 2^64 - 1")
    checked = split(images, labels)
    chosen = resolve_device(str(device) if isinstance(device, torch.device) else device)
    check_parameters(net)
    net.to(chosen)
    shape, least = tuple(checked.images.shape[1:]), int(checked.labels.max()) + 1
    k = check_logits(net, shape, None, chosen, least=least)
    data = Resident(checked, chosen)
    made = [parse(attack, k) if isinstance(attack, str) else attack for attack in attacks]
    for attack in made:
        for member in attack.members if isinstance(attack, Ensemble) else (attack,):
            for surrogate in member.surrogates if isinstance(member, Transfer) else ():
                check_surrogate("attack.surrogate", surrogate, shape, k, chosen)
    steady = not averages_draws([attack.name for attack in made])
    with frozen(net, "eval"):
        shown = data.take(subset(checked.labels, LOOK).to(chosen))
        preflight(net, shown.image, shown.label, threat, classes=k, assumes_determinism=steady)
    if microbatch is None and chosen.type == "cuda":
        microbatch = fitting_microbatch(net, data.take(data.labels.new_zeros(1)).image)
    evaluator = Evaluator(
        net,
        data,
        threat,
        batch_size=batch_size,
        seed=seed,
        microbatch=microbatch,
        precision=precision,
        compile=compile,
        targeted=check_type("targeted", targeted, str | None),
        mask=check_type("mask", mask, Tensor | None),
        keep_images=check_type("keep_images", keep_images, bool),
    )
    return evaluator(made, progress=progress)


def _attacks(given: object) -> list[str | Attack | Ensemble]:
    """The attacks of a list of them.

    Raises:
        SettingError: something else.
    """
    accepted = "a list of attacks or of their names, such as ['pgd-20', softdefend.FGSM()]"
    if isinstance(given, (str, Attack, Ensemble)) or not isinstance(given, Iterable):
        plain = isinstance(given, (str, int, float, type(None)))
        raise SettingError("attacks", repr(given) if plain else f"a {type(given).__name__}", accepted)
    attacks = list(given)
    for one in attacks:
        if isinstance(one, type) and issubclass(one, Attack):
            name = one.__name__
            raise SettingError("attacks", f"the class {name}", f"an object of it, as {name}()")
        if not isinstance(one, (str, Attack, Ensemble)):
            raise SettingError("attacks", f"a list with a {type(one).__name__}", accepted)
    return attacks
