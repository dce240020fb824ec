"""The audit of a checkpoint: are its gradients masked?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdefend.data import DataBundle, Resident, Split, fingerprint, subset
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.masking import CHECKS, audit
from softdefend.evaluation.measurement import Measurement
from softdefend.evaluation.settings import EvaluateSettings, Requests, Size, count_of
from softdefend.evaluation.surrogates import weights_of

_ENOUGH = 32
"""Validation images that say as much as training images."""


def audit_measurement(checkpoint: Checkpoint, settings: EvaluateSettings, requests: Requests) -> Measurement:
    """Signs of gradient masking on ``requests.audit`` test images.

    The first surrogate takes part in it, and as fresh images as many validation images, or training images
    where there are few of these. An audit by other checks, or with other thresholds, is another one.
    """
    fresh = _fresh_split(checkpoint.source.bundle)
    surrogate = next(iter(requests.surrogates.items()), None)

    def measure() -> dict[str, Any]:
        shown = checkpoint.test_images(requests.audit, settings.subset)
        found = audit(
            checkpoint.net,
            shown.image,
            shown.label,
            checkpoint.source.threat,
            seed=settings.seed,
            surrogate=None if surrogate is None else surrogate[1].to(checkpoint.device),
            fresh=None if fresh is None else _images_and_labels(fresh, requests.audit, checkpoint.device),
            progress=checkpoint.source.progress,
        )
        return {"n": len(shown.label), **found.to_dict(), "text": str(found)}

    depends_on = {
        "seed": settings.seed,
        "images": replace(settings, size=requests.audit).images(len(checkpoint.source.bundle.test)),
        "fresh": None if fresh is None else fingerprint(fresh),
        "surrogate": None if surrogate is None else (surrogate[0], weights_of(surrogate[1])),
        "checks": {check.name: check.threshold for check in CHECKS},
    }
    return Measurement("-audit", depends_on, measure, audit_text)


def _fresh_split(bundle: DataBundle) -> Split | None:
    """The images that are no test images; None where all are."""
    if bundle.train is bundle.test:
        return None
    return bundle.validation if len(bundle.validation) >= _ENOUGH else bundle.train


def _images_and_labels(split: Split, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    part = split.subset(subset(split.labels, count_of(size, len(split))))
    batch = Resident(part, device).take(torch.arange(len(part), device=device))
    return batch.image, batch.label


def audit_text(result: dict[str, Any]) -> str:
    """An audit's table, reasons and summary."""
    return f"audit on {result['n']} images:\n{result['text']}"
