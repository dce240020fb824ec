"""Certificates by randomized smoothing (Cohen et al., arXiv 1902.02918).

The smoothed classifier answers with the class that a network gives most often to an image with Gaussian
noise. If that class has a probability of at least p > 1/2, no change shorter than sigma * Phi^-1(p) in l2
changes the answer (theorem 1). p is not known: counted forwards give a lower bound, which is wrong with
probability alpha at most. The noise of an image is a function of the seed, the image's position in the data
and the number of the draw, whatever else is computed beside it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.attacks import PGD, adapt
from softdefend.core import rng
from softdefend.core.errors import SettingError, check_values
from softdefend.core.hints import check_fields
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Resident
from softdefend.evaluation.resume import StateFile
from softdefend.execution.network_mode import frozen, on_device, tf32
from softdefend.execution.randomness import hashed_normal

ABSTAINED = -1
"""The prediction where no class has a probability above one half for sure."""
_MOST = 2**20
"""Draws of an image: positions of draws and images share 63 bits."""


@dataclass(frozen=True)
class Smoothing:
    """How a certificate is made.

    Raises:
        SettingError: a number outside its range.
    """

    sigma: float = 0.25
    """Standard deviation of the noise in pixel units, > 0; that of the training if not given."""
    samples: int = 10_000
    """Noisy copies of an image from which its radius is bounded, 1 to 1,000,000 (the paper: 100,000)."""
    selection: int = 100
    """Noisy copies from which its class is chosen, 1 to 1,000,000."""
    alpha: float = 0.001
    """Probability that the certificate of an image is wrong, in (0, 1)."""
    attack_draws: int = 8
    """Draws of noise that an attack on the smoothed classifier averages, for the empirical curve; 0 for no
    attack."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        check_fields(self, "certify")
        checks = (
            ("sigma", 0 < self.sigma < math.inf, "a positive number in pixel units, such as 0.25"),
            ("samples", 1 <= self.samples <= 1_000_000, "a whole number from 1 to 1,000,000"),
            ("selection", 1 <= self.selection <= 1_000_000, "a whole number from 1 to 1,000,000"),
            ("alpha", 0 < self.alpha < 1, "a probability in (0, 1), such as 0.001"),
            ("attack_draws", 0 <= self.attack_draws <= 1000, "a whole number from 0 to 1000"),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        )
        check_values("certify", self, checks)

    @property
    def largest_radius(self) -> float:
        """The radius of an image whose noisy copies are all of one class."""
        every = np.asarray([self.samples])
        return float(self.radius(every)[0])

    def radius(self, count: NDArray[np.int64]) -> NDArray[np.float64]:
        """The certified l2 radius where ``count`` [n] of the samples are of the class; 0 for none.

        The bound of the probability is Clopper and Pearson's, one-sided.
        """
        from scipy.stats import beta, norm  # takes a second to import: only where it is used

        bound = np.zeros(len(count))
        some = count > 0
        bound[some] = beta.ppf(self.alpha, count[some], self.samples - count[some] + 1)
        radius = np.zeros(len(count))
        above = bound > 0.5
        radius[above] = self.sigma * norm.ppf(bound[above])
        return radius


@dataclass(frozen=True)
class Certificates:
    """What was certified of n images; all on the CPU."""

    index: Tensor
    """Positions in the data, [n] int64."""
    label: Tensor
    """[n] int64."""
    prediction: Tensor
    """Class of the smoothed classifier, [n] int64; -1 where it abstains."""
    radius: Tensor
    """l2 radius in pixel units in which it cannot change, [n] float64; 0 where it abstains."""
    count: Tensor
    """Samples of that class (of the likeliest one where it abstains), [n] int64."""

    def certified(self, radius: float) -> Tensor:
        """Images that are right at every point closer than ``radius``, [n] bool."""
        return (self.prediction == self.label) & (self.radius >= radius)


class Smoothed:
    """The smoothed classifier of a network.

    Args:
        net: images [b, c, h, w] to logits [b, k]; asked in eval mode and float32, with pixels outside [0, 1].
        data: the images.
        settings: of the certificate.
        batch_size: noisy images at once; changes no result but by rounding.
        progress: show a bar.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Resident,
        settings: Smoothing,
        *,
        batch_size: int = 1000,
        progress: bool = False,
    ) -> None:
        if batch_size < 1:
            raise SettingError("certify.batch_size", batch_size, "a whole number >= 1")
        self.net, self.data, self.settings = net, data, settings
        self.batch_size, self.progress = batch_size, progress

    def certify(self, index: Tensor, state: StateFile | None = None) -> Certificates:
        """Certificates of the images at ``index`` [n].

        Args:
            index: positions in the data.
            state: where to continue from and to save how far the counting is.
        """
        index = index.cpu()
        saved = None if state is None else state.load()
        tensors, done = saved or ({}, {})
        counts: dict[str, Tensor] = {}
        for stage, draws in (("selection", self.settings.selection), ("estimation", self.settings.samples)):
            image = self.data.take(index.to(self._device)).image

            def save(count: Tensor, rows: int, stage: str = stage) -> None:
                if state is not None:
                    state.save(lambda: ({**counts, stage: count}, {**done, stage: rows}))

            counts[stage] = self._count(
                stage, image, index, draws, tensors.get(stage), int(done.get(stage, 0)), save
            )
            done[stage] = len(index) * draws
        chosen = counts["selection"].argmax(1)
        count = counts["estimation"].gather(1, chosen[:, None]).squeeze(1)
        radius = torch.from_numpy(self.settings.radius(count.numpy()))
        prediction = torch.where(radius > 0, chosen, ABSTAINED)
        return Certificates(index, self.data.labels.cpu()[index], prediction, radius, count)

    def predict(self, image: Tensor, index: Tensor, stage: str) -> Tensor:
        """The likeliest class of images [n, c, h, w] by ``selection`` draws, [n] int64.

        Args:
            image: on the device of the data.
            index: positions [n] in the data, which own the noise.
            stage: other names draw other noise.
        """
        return self._count(stage, image, index.cpu(), self.settings.selection).argmax(1)

    def attacked(self, index: Tensor, radius: float) -> Tensor:
        """Images at ``index`` [n] that the smoothed classifier still gets right under an l2 attack within
        ``radius``, [n] bool: PGD-20 on logits averaged over ``attack_draws`` of noise (after Salman et al.,
        arXiv 1906.04584), verdict by :meth:`predict`. An upper bound of what can be certified.
        """
        index = index.cpu()
        label = self.data.labels.cpu()[index]
        parts = []
        for part in torch.split(index, self.batch_size):
            batch = self.data.take(part.to(self._device))
            noise = _Noise(self.settings, part.to(self._device))
            averaged = adapt(self.net, eot=self.settings.attack_draws, transform=noise)
            with _exact(averaged, self._device):
                attack, threat = PGD(steps=20, start="none"), ThreatModel("l2", Budget(radius))
                parts.append(attack(averaged, batch.image, batch.label, threat))
        image = torch.cat(parts) if parts else self.data.take(index.to(self._device)).image
        return self.predict(image, index, f"attacked/{radius:g}") == label

    @property
    def _device(self) -> torch.device:
        return self.data.labels.device

    def _bar(self, stage: str, total: int) -> tqdm[Any]:
        return tqdm(total=total, desc=stage, leave=False, disable=None if self.progress else True)

    @torch.no_grad()
    def _count(
        self,
        stage: str,
        image: Tensor,
        index: Tensor,
        draws: int,
        count: Tensor | None = None,
        done: int = 0,
        save: Callable[[Tensor, int], None] = lambda count, rows: None,
    ) -> Tensor:
        """How often each class is given to each image, [n, k] int64 on the CPU; logits that are not finite
        count for no class.

        Args:
            stage: other names draw other noise.
            image: [n, c, h, w].
            index: positions [n] in the data.
            draws: of each image.
            count, done: what was counted before, and for how many noisy images.
            save: called with both after each batch.
        """
        key, total = rng.key(self.settings.seed, f"certify/{stage}"), len(index) * draws
        flat = None if count is None else count.to(self._device).flatten()
        with _exact(self.net, self._device), self._bar(stage, total) as bar:
            bar.update(done)
            while done < total:
                rows = torch.arange(done, min(done + self.batch_size, total))
                of, draw = rows // draws, rows % draws
                noise = hashed_normal(key, (index[of] * _MOST + draw).to(self._device), image[0].numel())
                at = of.to(self._device)
                logits = self.net(image[at] + self.settings.sigma * noise.view(-1, *image.shape[1:]))
                if flat is None:
                    flat = torch.zeros(len(index) * logits.shape[1], dtype=torch.int64, device=self._device)
                finite = logits.isfinite().all(1)
                cell = at * logits.shape[1] + logits.argmax(1)
                flat.index_add_(0, cell, finite.long())
                done += len(rows)
                bar.update(len(rows))
                save(flat.view(len(index), -1), done)
        assert flat is not None
        return flat.view(len(index), -1).cpu()


@contextlib.contextmanager
def _exact(net: nn.Module, device: torch.device) -> Iterator[None]:
    """The network in eval mode, frozen, in float32 without TF32."""
    with on_device(device), frozen(net, "eval"), tf32(False):
        yield


class _Noise:
    """Adds noise that belongs to the images and to the number of the call."""

    def __init__(self, settings: Smoothing, index: Tensor) -> None:
        self.settings, self.index, self.calls = settings, index, 0

    def __call__(self, image: Tensor) -> Tensor:
        key = rng.key(self.settings.seed, "certify/attack", step=self.calls)
        self.calls += 1
        noise = hashed_normal(key, self.index, image[0].numel()).view(image.shape)
        return image + self.settings.sigma * noise
