"""Evaluation that trusts nobody: it projects, re-runs and counts for itself, sample by sample, in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from softdefend import rng
from softdefend.attacks import Attack
from softdefend.data import Resident
from softdefend.errors import SettingError
from softdefend.modes import attacked, tf32
from softdefend.threat import ThreatModel


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
        count, n = int(flags.sum()), len(flags)
        interval = binomtest(count, n).proportion_ci(method="wilson")
        return cls(count, n, count / n, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class AttackRecord:
    """What one attack did to each sample; everything [n], on the CPU."""

    prediction: Tensor
    """Class of the adversarial image, int64."""
    distance: Tensor
    """Distance from the clean image in the threat's norm, float32."""
    robust: Tensor
    """Right on the clean image and on the adversarial one, bool."""
    forwards: int
    """Images passed forward, all samples together."""
    backwards: int
    """Image gradients taken, all samples together."""
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Clean and robust accuracy of one network on one split."""

    threat: ThreatModel
    label: Tensor
    clean_prediction: Tensor
    attacks: dict[str, AttackRecord] = field(default_factory=dict)

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

    def to_dict(self) -> dict[str, Any]:
        """Numbers as numbers, for JSON."""
        attacks = {
            name: {
                **asdict(Rate.of(r.robust)),
                "forwards": r.forwards,
                "backwards": r.backwards,
                "seconds": r.seconds,
            }
            for name, r in self.attacks.items()
        }
        return {
            "n": len(self.label),
            "norm": self.threat.norm,
            "eps": str(self.threat.eps),
            "clean": asdict(self.clean),
            "attacks": attacks,
            "worst": asdict(Rate.of(self.worst)),
            "interval": "wilson 95%",
        }

    def __str__(self) -> str:
        lines = [f"clean   {_percent(self.clean)}"]
        lines += [f"{name:<7} {_percent(self.robust(name))}" for name in self.attacks]
        where = f"{self.threat.norm}, eps {self.threat.eps}, {len(self.label)} images, 95% Wilson intervals"
        return "\n".join([*lines, f"({where})"])


def _percent(rate: Rate) -> str:
    return f"{100 * rate.rate:5.1f}%  [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


class _Counted:
    """A forward that counts the images it is given, and those whose gradient is asked for."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.forwards, self.backwards = net, 0, 0

    def __call__(self, image: Tensor) -> Tensor:
        self.forwards += len(image)
        self.backwards += len(image) if image.requires_grad else 0
        logits: Tensor = self.net(image)
        return logits.float()


class Evaluator:
    """Measures one network on one split, in eval mode, fp32, with frozen parameters.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], on the device of ``data``.
        data: the split.
        threat: the set the adversary may use; every result is projected into it again.
        batch_size: images at once. Random draws are made per batch, so it is part of the result.
        seed: of every random draw.
    """

    def __init__(
        self, net: nn.Module, data: Resident, threat: ThreatModel, *, batch_size: int = 500, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise SettingError("evaluate.batch_size", batch_size, "a whole number >= 1")
        self.net, self.data, self.threat, self.batch_size, self.seed = net, data, threat, batch_size, seed

    def __call__(
        self, attacks: Sequence[Attack], *, limit: int | None = None, progress: bool = False
    ) -> Evaluation:
        """Clean accuracy, then each attack on every sample.

        Args:
            attacks: in order; two of the same name are refused.
            limit: only the first so many samples.
            progress: show a bar.

        Raises:
            SettingError: two attacks share a name.
        """
        names = [attack.name for attack in attacks]
        if len(set(names)) < len(names):
            raise SettingError("evaluate.attacks", ", ".join(names), "attacks with different names")
        with attacked(self.net, "eval"), tf32(False):
            n = min(self.data.n, limit or self.data.n)
            result = Evaluation(self.threat, self.data.labels[:n].cpu(), self._predict(n))
            for attack in attacks:
                result.attacks[attack.name] = self._attack(attack, result, progress)
        return result

    def _batches(self, n: int) -> Iterable[Tensor]:
        return torch.split(torch.arange(n, device=self.data.labels.device), self.batch_size)

    @torch.no_grad()
    def _predict(self, n: int) -> Tensor:
        """Clean predictions of the first ``n`` samples, [n] on the CPU."""
        return torch.cat(
            [self.net(self.data.take(index).image).argmax(1) for index in self._batches(n)]
        ).cpu()

    def _attack(self, attack: Attack, result: Evaluation, progress: bool) -> AttackRecord:
        n, forward, started = len(result.label), _Counted(self.net), time.perf_counter()
        predictions, distances = [], []
        batches = tqdm(
            list(self._batches(n)), desc=attack.name, leave=False, disable=None if progress else True
        )
        for number, index in enumerate(batches):
            adversarial, image = self._perturb(attack, index, number, forward)
            with torch.no_grad():
                predictions.append(forward(adversarial).argmax(1))
            distances.append(self.threat.distance(image, adversarial))
        prediction, distance = torch.cat(predictions).cpu(), torch.cat(distances).cpu()
        robust = (result.clean_prediction == result.label) & (prediction == result.label)
        seconds = time.perf_counter() - started
        return AttackRecord(prediction, distance, robust, forward.forwards, forward.backwards, seconds)

    def show(self, attack: Attack, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [m, c, h, w], their adversarial images, and both predictions as probabilities [m, k]."""
        with attacked(self.net, "eval"), tf32(False):
            forward = _Counted(self.net)
            adversarial, image = self._perturb(attack, index, 0, forward)
            with torch.no_grad():
                return image, adversarial, forward(image).softmax(1), forward(adversarial).softmax(1)

    def _perturb(
        self, attack: Attack, index: Tensor, number: int, forward: _Counted
    ) -> tuple[Tensor, Tensor]:
        """Adversarial and clean images of one batch; an attack's NaN counts as no change."""
        batch = self.data.take(index)
        image = batch.image.clone()  # the attack's own: it may write into what it is given
        generator = rng.stream(self.seed, f"evaluate/{attack.name}", step=number, device=batch.image.device)
        adversarial = attack(forward, image, batch.label, self.threat, generator=generator).detach()
        adversarial = torch.where(adversarial.isfinite(), adversarial.float(), batch.image)
        return self.threat.project(batch.image, adversarial), batch.image
