"""Targets of images that CutMix may have mixed of two, and of batches with extra images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softdefend.core.processes import Processes
from softdefend.core.rule import Rule
from softdefend.data import Batch
from softdefend.data.regions import partners
from softdefend.labels import LabelRule, Predictions, Supervision


@dataclass(frozen=True)
class Mixture:
    """A batch, and the share of each image that is its own.

    CutMix weighs two labels by their shares of the image's pixels. Here the rule makes two targets, for the
    image with its own label and with its partner's, and these are weighed. For the given label that is
    CutMix; it is right for any rule whose target depends on image and label alone.
    """

    batch: Batch
    """Labels and indices of the images' own parts."""
    share: Tensor | None
    """[b]; None where no image is mixed. The targets are then the rule's own."""
    known: Tensor | None = None
    """Positions [m] of the images that a rule remembers; the others, which are extra, have the given label as
    their target. None where the rule is asked about all."""
    others: tuple[Tensor, Tensor] | None = None
    """Indices and labels [b] of the other parts, where those do not all lie in this batch."""

    @property
    def partner(self) -> Batch:
        """The same images with the labels and indices of their other parts."""
        index, label = self.others or (partners(self.batch.index), partners(self.batch.label))
        return Batch(index, self.batch.image, label)

    def own(self, processes: Processes) -> Mixture:
        """One process's share of the images, some of whose other parts are in another's."""
        if processes.size == 1 or self.share is None:
            return self
        own, whole, partner = processes.own, self.batch, self.partner
        batch = Batch(own(whole.index), own(whole.image), own(whole.label))
        return Mixture(batch, own(self.share), others=(own(partner.index), own(partner.label)))

    @property
    def label(self) -> Tensor:
        """Labels [b] of the larger parts."""
        if self.share is None:
            return self.batch.label
        return torch.where(self.share >= 0.5, self.batch.label, self.partner.label)

    def attack_target(self, rule: LabelRule, phase: str) -> Tensor:
        """As :meth:`LabelRule.attack_target`; always probabilities [b, k] where images are mixed."""
        if self.known is not None:
            asked = rule.attack_target(_rows(self.batch, self.known), phase)
            given = self.batch.label if asked.ndim == 1 else rule.one_hot(self.batch.label)
            return given.index_copy(0, self.known, asked)
        own = rule.attack_target(self.batch, phase)
        if self.share is None:
            return own
        both = (own, rule.attack_target(self.partner, phase))
        return self._blend(*(rule.one_hot(target) if target.ndim == 1 else target for target in both))

    def supervise(
        self, rule: LabelRule, adversarial: Tensor, predictions: Predictions, phase: str
    ) -> Supervision:
        """As :meth:`LabelRule.supervise`."""
        if self.known is not None:
            rows = self.known
            asked = rule.supervise(_rows(self.batch, rows), adversarial[rows], predictions.at(rows), phase)
            return self._with_given(asked, rows, rule.one_hot(self.batch.label))
        own = rule.supervise(self.batch, adversarial, predictions, phase)
        if self.share is None:
            return own
        other = rule.supervise(self.partner, adversarial, predictions, phase)
        weight = None
        if own.weight is not None and other.weight is not None:
            weight = self.share * own.weight + (1 - self.share) * other.weight
        terms = tuple(
            replace(mine, target=self._blend(mine.target, theirs.target))
            for mine, theirs in zip(own.terms, other.terms, strict=True)
        )
        return Supervision(self.label, self._blend(own.target, other.target), weight, terms)

    def _with_given(self, asked: Supervision, rows: Tensor, given: Tensor) -> Supervision:
        """What a rule said of some rows, and the given label [b, k] with weight one for the others."""
        weight = None
        if asked.weight is not None:
            weight = torch.ones_like(given[:, 0]).index_copy(0, rows, asked.weight)
        terms = tuple(replace(term, target=given.index_copy(0, rows, term.target)) for term in asked.terms)
        return Supervision(self.batch.label, given.index_copy(0, rows, asked.target), weight, terms)

    def _blend(self, own: Tensor, other: Tensor) -> Tensor:
        assert self.share is not None
        share = self.share[:, None]
        return share * own + (1 - share) * other


def mixing_refusal(rule: Rule) -> str | None:
    """The reason why a rule cannot be trained on images that CutMix has mixed; None where it can."""
    if not rule.mixes:
        return "what it does for an image and its one label has no meaning for a mixture of two"
    if getattr(rule, "views", 1) > 1:
        return "views of one image would be mixtures of different labels"
    return None


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.index[rows], batch.image[rows], batch.label[rows])
