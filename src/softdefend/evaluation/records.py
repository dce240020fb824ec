"""What an evaluation found: per sample, as rates, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.table import parquet_bytes


@dataclass(frozen=True)
class Rate:
    """A share of samples with its 95% Wilson interval."""

    count: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, flags: Tensor) -> Rate:
        """From booleans [n], n >= 1."""
        from scipy.stats import binomtest  # takes a second to import: only where it is used

        count, n = int(flags.sum()), len(flags)
        interval = binomtest(count, n).proportion_ci(method="wilson")
        return cls(count, n, count / n, float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{100 * self.rate:5.1f}%  [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass
class Trial:
    """What one attack did to the samples that it was given; everything [n], on the CPU, n the whole split.

    Rows of samples that it was not given hold -1, and a distance of 0.
    """

    attacked: Tensor
    """Given to the attack, bool."""
    prediction: Tensor
    """Class of the adversarial image, int64."""
    distance: Tensor
    """Distance from the clean image in the threat's norm, float32."""
    forwards: Tensor
    """Times the sample was passed forward, int64; -1 also where the attack does not say which samples."""
    backwards: Tensor
    """Image gradients of the sample, int64, likewise."""
    total_forwards: int = 0
    """Images passed forward, all samples together."""
    total_backwards: int = 0
    """Image gradients, all samples together."""
    seconds: float = 0.0
    adversarial: Tensor | None = None
    """The adversarial images [n, c, h, w] float32, where they are kept; zero where none was made."""

    @classmethod
    def of(cls, attacked: Tensor) -> Trial:
        """Before the attack, from flags [n] bool."""
        unknown = torch.full((len(attacked),), -1)
        nowhere = torch.zeros(len(attacked), dtype=torch.float32)
        return cls(attacked, unknown, nowhere, unknown.clone(), unknown.clone())

    def tensors(self) -> dict[str, Tensor]:
        """The per-sample tensors, by name."""
        names = ("attacked", "prediction", "distance", "forwards", "backwards")
        kept = {} if self.adversarial is None else {"adversarial": self.adversarial}
        return {name: getattr(self, name) for name in names} | kept


@dataclass(frozen=True)
class AttackRecord:
    """What one attack, or one ensemble of attacks, did to each sample; everything [n], on the CPU."""

    prediction: Tensor
    """Class of the adversarial image, int64."""
    distance: Tensor
    """Distance from the clean image in the threat's norm, float32."""
    robust: Tensor
    """Right on the clean image, and on the adversarial one right, or not taken for the target, bool."""
    forwards: int
    """Images passed forward, all samples together."""
    backwards: int
    """Image gradients taken, all samples together."""
    seconds: float
    trials: dict[str, Trial] = field(default_factory=dict)
    """By attack, in order: one, or an ensemble's members."""
    ensemble: bool = False
    adversarial: Tensor | None = None
    """The adversarial images [n, c, h, w] float32, where they are kept; zero where none was made."""

    @classmethod
    def of(
        cls,
        trials: Mapping[str, Trial],
        label: Tensor,
        clean: Tensor,
        ensemble: bool,
        target: Tensor | None = None,
    ) -> AttackRecord:
        """From trials in order. A sample's image is that of the last trial that attacked it, which is the one
        that fooled the network where one did. A sample that was never attacked keeps its clean prediction."""
        prediction, distance = clean.clone(), torch.zeros(len(label), dtype=torch.float32)
        adversarial = None
        for trial in trials.values():
            prediction = torch.where(trial.attacked, trial.prediction, prediction)
            distance = torch.where(trial.attacked, trial.distance, distance)
            if adversarial is None:
                adversarial = trial.adversarial
            elif trial.adversarial is not None:  # None where nothing was left to attack
                mask = trial.attacked.view(-1, 1, 1, 1)
                adversarial = torch.where(mask, trial.adversarial, adversarial)
        return cls(
            prediction,
            distance,
            (clean == label) & ~hits(prediction, label, target),
            sum(trial.total_forwards for trial in trials.values()),
            sum(trial.total_backwards for trial in trials.values()),
            sum(trial.seconds for trial in trials.values()),
            dict(trials),
            ensemble,
            adversarial,
        )

    @property
    def attacked(self) -> Tensor:
        """Given to some attack, [n] bool."""
        return torch.stack([trial.attacked for trial in self.trials.values()]).any(dim=0)


@dataclass(frozen=True)
class Evaluation:
    """Clean and robust accuracy of one network on one split."""

    threat: ThreatModel
    label: Tensor
    clean_prediction: Tensor
    index: Tensor
    """Positions of the samples in the data, [n] int64."""
    attacks: dict[str, AttackRecord] = field(default_factory=dict)
    target: Tensor | None = None
    """Classes to be reached, [n] int64; None where any wrong class is a success."""
    how: dict[str, Any] = field(default_factory=dict)
    """Precision, batch sizes, seed and versions, as they go into the JSON; ``may_change``, the share of the
    images' values, where a mask said which."""

    @property
    def clean(self) -> Rate:
        """Clean accuracy."""
        return Rate.of(self.clean_prediction == self.label)

    @property
    def worst(self) -> Tensor:
        """Samples that every attack left right, [n] bool."""
        robust = self.clean_prediction == self.label
        for record in self.attacks.values():
            robust = robust & record.robust
        return robust

    def robust(self, attack: str) -> Rate:
        """Robust accuracy under one attack."""
        return Rate.of(self.attacks[attack].robust)

    def members(self, attack: str) -> list[dict[str, Any]]:
        """How robust accuracy fell from member to member of an ensemble: for each, robust accuracy after it
        (``count`` of ``n``, with its interval), the samples it attacked and fooled, and what it cost."""
        rows, robust = [], self.clean_prediction == self.label
        for name, trial in self.attacks[attack].trials.items():
            fooled = trial.attacked & hits(trial.prediction, self.label, self.target)
            robust = robust & ~fooled
            rows.append(
                {
                    "name": name,
                    **asdict(Rate.of(robust)),
                    "attacked": int(trial.attacked.sum()),
                    "fooled": int(fooled.sum()),
                    "forwards": trial.total_forwards,
                    "backwards": trial.total_backwards,
                    "seconds": trial.seconds,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Numbers as numbers, for JSON."""
        attacks = {}
        for name, record in self.attacks.items():
            attacks[name] = {
                **asdict(Rate.of(record.robust)),
                "forwards": record.forwards,
                "backwards": record.backwards,
                "seconds": record.seconds,
            }
            if self.target is not None:
                attacks[name]["reached"] = asdict(Rate.of(record.prediction == self.target))
            if record.ensemble:
                attacks[name]["members"] = self.members(name)
        return {
            "n": len(self.label),
            "norm": self.threat.norm,
            "eps": str(self.threat.eps),
            "clean": asdict(self.clean),
            "attacks": attacks,
            "worst": asdict(Rate.of(self.worst)),
            "interval": "wilson 95%",
            **self.how,
        }

    def to_parquet(self) -> bytes:
        """One row a sample: ``index`` (its position in the data), ``label``, ``clean_prediction``, ``target``
        where there is one, and for
        each attack A ``A/prediction``, ``A/distance``, ``A/robust``, ``A/forwards`` and ``A/backwards`` (null
        where the attack does not say for which samples). For each member M of an ensemble also
        ``A/M/fooled``, ``A/M/forwards`` and ``A/M/backwards``, null where it was not given the sample."""
        columns: dict[str, Any] = {
            "index": self.index.numpy(),
            "label": self.label.numpy(),
            "clean_prediction": self.clean_prediction.numpy(),
        }
        if self.target is not None:
            columns["target"] = self.target.numpy()
        for name, record in self.attacks.items():
            columns[f"{name}/prediction"] = record.prediction.numpy()
            columns[f"{name}/distance"] = record.distance.numpy()
            columns[f"{name}/robust"] = record.robust.numpy()
            for what in ("forwards", "backwards"):
                each = torch.stack([getattr(trial, what) for trial in record.trials.values()])
                columns[f"{name}/{what}"] = _nullable(each.clamp_min(0).sum(0), _known(record, what))
                if record.ensemble:
                    for member, trial in record.trials.items():
                        counts = getattr(trial, what)
                        columns[f"{name}/{member}/{what}"] = _nullable(counts, counts >= 0)
            if record.ensemble:
                for member, trial in record.trials.items():
                    fooled = hits(trial.prediction, self.label, self.target)
                    columns[f"{name}/{member}/fooled"] = _nullable(fooled, trial.attacked)
        return parquet_bytes(columns)

    def __str__(self) -> str:
        rows = [("clean", self.clean)]
        for name, record in self.attacks.items():
            rows.append((name, self.robust(name)))
            if record.ensemble:
                kept = ("count", "n", "rate", "low", "high")
                after = ((m["name"], Rate(**{key: m[key] for key in kept})) for m in self.members(name))
                rows += [(f"  {member}", rate) for member, rate in after]
        width = max(7, *(len(name) for name, _ in rows))
        lines = [f"{name:<{width}} {rate}" for name, rate in rows]
        where = f"{self.threat.norm}, eps {self.threat.eps}, {len(self.label)} images, 95% Wilson intervals"
        if "may_change" in self.how:
            where += f", {100 * self.how['may_change']:.1f}% of the values may change"
        return "\n".join([*lines, f"({where})"])


def robust_in_all(evaluations: Sequence[Evaluation]) -> Tensor:
    """Samples that every attack of every evaluation left right, [n] bool: robust in the union of the threats.

    Args:
        evaluations: at least one, all of the same samples of the same data.

    Raises:
        SettingError: none, other samples in one of them, or classes to be reached in one.
    """
    if not evaluations:
        raise SettingError("evaluations", "none", "one for each threat model")
    first = evaluations[0]
    for other in evaluations[1:]:
        same = torch.equal(first.index, other.index) and torch.equal(first.label, other.label)
        if not same:
            raise SettingError("evaluations", "of different images", "evaluations of the same images")
    if any(evaluation.target is not None for evaluation in evaluations):
        raise SettingError("evaluations", "targeted", "evaluations in which any wrong class is a success")
    return torch.stack([evaluation.worst for evaluation in evaluations]).all(dim=0)


def hits(prediction: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    """Where a prediction [n] is an attack's success: wrong, or the target [n] where there is one."""
    return prediction != label if target is None else prediction == target


def _known(record: AttackRecord, what: str) -> Tensor:
    """Samples whose counts every trial that attacked them knows."""
    each = [~trial.attacked | (getattr(trial, what) >= 0) for trial in record.trials.values()]
    return torch.stack(each).all(0)


def _nullable(values: Tensor, known: Tensor) -> pa.Array:
    return pa.array(values.numpy(), mask=~known.numpy())
