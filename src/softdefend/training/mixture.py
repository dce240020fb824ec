"""Targets of images that CutMix may have mixed of two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    @property
    def partner(self) -> Batch:
        """The same images with the labels and indices of their other parts."""
        return Batch(partners(self.batch.index), self.batch.image, partners(self.batch.label))

    @property
    def label(self) -> Tensor:
        """Labels [b] of the larger parts."""
        if self.share is None:
            return self.batch.label
        return torch.where(self.share >= 0.5, self.batch.label, self.partner.label)

    def attack_target(self, rule: LabelRule, phase: str) -> Tensor:
        """As :meth:`LabelRule.attack_target`; always probabilities [b, k] where images are mixed."""
        own = rule.attack_target(self.batch, phase)
        if self.share is None:
            return own
        both = (own, rule.attack_target(self.partner, phase))
        return self._blend(*(rule.one_hot(target) if target.ndim == 1 else target for target in both))

    def supervise(
        self, rule: LabelRule, adversarial: Tensor, predictions: Predictions, phase: str
    ) -> Supervision:
        """As :meth:`LabelRule.supervise`."""
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
