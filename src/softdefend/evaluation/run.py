"""Evaluate the checkpoints of a run and write what was found beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from softdefend.attacks import PGD, Attack
from softdefend.core.digest import file_digest
from softdefend.core.environment import versions
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.threat import LARGEST, Budget, ThreatModel
from softdefend.core.weight_files import load_weights
from softdefend.data import DataBundle, Resident, fingerprint
from softdefend.evaluation.autoattack import Ensemble, parse
from softdefend.evaluation.evaluate import Evaluator, answers, cost_line
from softdefend.evaluation.records import Evaluation, Rate
from softdefend.evaluation.resume import StateFile
from softdefend.execution.microbatch import fitting_microbatch
from softdefend.execution.search_network import Precision, check_precision

CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Multiples of the trained eps at which the robust-accuracy curve is measured."""
SAVE_EVERY = 30.0
"""Least seconds between two saves. AutoAttack's members save within a group of logical batches, all other
attacks at its end: a killed evaluation begins such a group again."""
HARMLESS = ("physical_batch", "compile", "examples")
"""Settings that change no figure but by rounding: another value of theirs is the same evaluation."""


@dataclass(frozen=True)
class EvaluateSettings:
    """The evaluation of a finished run on its test images."""

    attacks: tuple[str, ...] = ("pgd-20",)
    """Names of attacks: fgsm, pgd-20, pgd-50x10, pgd-20-margin, autoattack."""
    size: int | None = None
    """Test images used, at most; all when null."""
    curve_size: int = 1000
    """Test images for the curve of robust accuracy against eps; 0 leaves it out."""
    examples: int = 8
    """Example images kept for the report; 0 for none."""
    batch_size: int = 500
    """Images of a logical batch, which draws its own random numbers (AutoAttack's reference code: 250)."""
    physical_batch: int | None = None
    """Images computed at once; found from the free memory when null. Changes no result."""
    precision: Precision = "exact"
    """exact (searches in torch's default precision: fp32, with TF32 in convolutions on a GPU), strict (fp32
    without TF32) or fast (bf16). A success counts once strict fp32 confirms it."""
    compile: bool | None = None
    """Compile the network and capture the attacks' steps; null: on a GPU from 256 images on."""
    seed: int = 0
    """Of the attacks' random numbers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(self.attacks))
        for name in self.attacks:
            parse(name)
        check_precision(self.precision)
        for name, value, least in (
            ("size", 1 if self.size is None else self.size, 1),
            ("curve_size", self.curve_size, 0),
            ("examples", self.examples, 0),
            ("batch_size", self.batch_size, 1),
            ("physical_batch", 1 if self.physical_batch is None else self.physical_batch, 1),
        ):
            if value < least:
                raise SettingError(f"evaluate.{name}", value, f"a whole number >= {least}")
        if not 0 <= self.seed < 2**63:
            raise SettingError("evaluate.seed", self.seed, "a whole number from 0 to 2^63 - 1")


def evaluate_checkpoint(
    net: nn.Module,
    bundle: DataBundle,
    threat: ThreatModel,
    folder: Path,
    which: str,
    settings: EvaluateSettings,
    identity: dict[str, Any],
    *,
    name: str,
    device: torch.device,
    data_name: str,
    network: dict[str, str] | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluate ``which`` (``best`` or ``last``) of a run folder on the test images.

    ``identity`` is written with the result under ``settings``, beside the sha256 of the weights and of the
    test data; all but :data:`HARMLESS` of it tells evaluations apart. ``network`` is written likewise: what
    else tells the network from others of the same weights. ``say`` is told what each attack found and cost;
    ``before_writing`` is called when everything is measured and nothing written.

    Writes ``evaluation/{name}.json``, one row a sample in ``evaluation/{name}.parquet`` and, for the name
    ``last``, the report's example images. Killed at any moment, the same call continues from
    ``evaluation/{name}.state``, which is removed at the end, and writes the same records; with other
    settings, weights, data, versions or another device it starts anew.

    Returns:
        What went into the JSON file.

    Raises:
        SettingError: weights that do not fit, or that were trained with other test images.
    """
    weights = folder / f"{which}.safetensors"
    metadata = load_weights(net, weights)
    tested_on = fingerprint(bundle.test)
    if metadata.get("test_data", tested_on) != tested_on:
        given = f"test images {tested_on[:12]}, trained beside test images {metadata['test_data'][:12]}"
        raise SettingError("data", given, "the data that the run was trained with")
    net = net.to(device)
    data = Resident(bundle.test, device)
    about: dict[str, Any] = {"weights": file_digest(weights), "test_data": tested_on}
    about |= {"network": network} if network else {}
    state = StateFile(
        folder / "evaluation" / f"{name}.state",
        {"settings": telling(identity), **about, "versions": versions(device)},
        every=SAVE_EVERY,
    )
    physical = settings.physical_batch
    if physical is None:
        physical = fitting_microbatch(net, data.take(torch.zeros(1, dtype=torch.int64, device=device)).image)
    evaluator = _evaluator(net, data, threat, settings, physical)
    attacks = [parse(attack, len(bundle.classes)) for attack in settings.attacks]
    result = evaluator(
        attacks, limit=settings.size, progress=progress, state=state, log_costs=say is not None
    )
    evaluator.microbatch = physical = result.how["physical_batch"]
    report = {
        "which": which,
        "epoch": metadata.get("epoch"),
        "split": "test",
        "name_of_data": data_name,
        **about,
        "settings": identity,
        **result.to_dict(),
        "per_class": _per_class(result, bundle.classes),
        "eps_curve": _curve(evaluator, settings.curve_size, result) if settings.curve_size else [],
    }
    before_writing()
    # Killed between these, no file is left that speaks of another evaluation than the others.
    pictures = [f"{name}-gallery.safetensors", *(["examples.safetensors"] if name == "last" else [])]
    for stale in (f"{name}.json", *pictures):
        (folder / "evaluation" / stale).unlink(missing_ok=True)
    write_atomic(folder / "evaluation" / f"{name}.parquet", result.to_parquet())
    if name == "last" and settings.examples:
        write_examples(net, data, threat, settings, folder, bundle.classes, physical=physical)
    write_atomic(folder / "evaluation" / f"{name}.json", json.dumps(report, indent=1).encode())
    state.remove()
    return report


def cost_lines(report: Mapping[str, Any]) -> list[str]:
    """What an evaluation said after each attack, from its JSON."""
    rows: list[Mapping[str, Any]] = []
    for name, row in report["attacks"].items():
        rows += row.get("members") or [{"name": name, "attacked": row["n"], **row}]
    return [cost_line(row) for row in rows]


def telling(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation's settings tells it from others, as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(identity)))
    return {name: value for name, value in plain.items() if name not in HARMLESS}


def _evaluator(
    net: nn.Module, data: Resident, threat: ThreatModel, settings: EvaluateSettings, physical: int
) -> Evaluator:
    return Evaluator(
        net,
        data,
        threat,
        batch_size=settings.batch_size,
        seed=settings.seed,
        microbatch=physical,
        precision=settings.precision,
        compile=settings.compile,
    )


def _per_class(result: Evaluation, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    right = result.clean_prediction == result.label
    for number, name in enumerate(classes):
        members = result.label == number
        n = int(members.sum())
        if n:
            shares = {"clean": int(right[members].sum()) / n, "robust": int(result.worst[members].sum()) / n}
            rows.append({"class": name, **shares, "n": n})
    return rows


def _curve(evaluator: Evaluator, size: int, result: Evaluation) -> list[dict[str, Any]]:
    """Robust accuracy under PGD-20 at multiples of eps, starting from clean accuracy at zero."""
    n, threat = min(size, len(result.label)), result.threat
    clean = Rate.of((result.clean_prediction == result.label)[:n])
    points = [{"eps": "0", "value": 0.0, **asdict(clean)}]
    for factor in CURVE:
        eps = scaled(threat.eps, factor)
        if eps > LARGEST[threat.norm]:
            break
        rate = evaluator.under(ThreatModel(threat.norm, eps))([PGD(steps=20)], limit=n).robust("pgd-20")
        points.append({"eps": str(eps), "value": float(eps), **asdict(rate)})
    return points


def scaled(eps: Budget, factor: float) -> Budget:
    """``eps`` times ``factor``, written as eps is: 8/255 times 0.5 is 4/255."""
    above, slash, below = str(eps).partition("/")
    return Budget(f"{float(above) * factor:g}{slash}{below}")


def write_examples(
    net: nn.Module,
    data: Resident,
    threat: ThreatModel,
    settings: EvaluateSettings,
    folder: Path,
    classes: tuple[str, ...],
    *,
    physical: int,
) -> None:
    """Write ``evaluation/examples.safetensors`` for the report: ``settings.examples`` images, the first of
    each class in turn, with what the first attack made of them."""
    evaluator = _evaluator(net, data, threat, settings, physical)
    first = parse(settings.attacks[0], len(classes)) if settings.attacks else PGD(steps=20)
    attack: Attack = first.members[0] if isinstance(first, Ensemble) else first
    label = data.labels[: settings.size].cpu()
    number_in_class = torch.zeros_like(label)
    for number in range(len(classes)):
        members = label == number
        number_in_class[members] = torch.arange(int(members.sum()))
    order = torch.argsort(number_in_class, stable=True)
    index = order[: settings.examples].to(data.labels.device)
    image, adversarial, clean, attacked_ = evaluator.show(attack, index)
    shown = data.labels[index]
    tensors: dict[str, Tensor] = {
        "image": image,
        "adversarial": adversarial,
        "label": shown,
        "clean_prediction": answers(clean, shown),
        "adversarial_prediction": answers(attacked_, shown),
        "clean_confidence": clean.amax(1),
        "adversarial_confidence": attacked_.amax(1),
    }
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"classes": json.dumps(classes)}
    write_atomic(folder / "evaluation" / "examples.safetensors", to_safetensors(on_cpu, metadata=metadata))
