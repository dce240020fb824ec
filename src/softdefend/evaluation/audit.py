"""The audit of a checkpoint: are its gradients masked?"""

from __future__ import annotations

from typing import Any

from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.masking import CHECKS, audit
from softdefend.evaluation.measurement import Measurement
from softdefend.evaluation.settings import EvaluateSettings, Requests
from softdefend.evaluation.surrogates import weights_of


def audit_measurement(checkpoint: Checkpoint, settings: EvaluateSettings, requests: Requests) -> Measurement:
    """Signs of gradient masking on the first ``requests.audit`` test images.

    The first surrogate takes part in it. An audit by other checks, or with other thresholds, is another one.
    """
    surrogate = next(iter(requests.surrogates.items()), None)

    def measure() -> dict[str, Any]:
        shown = checkpoint.test_images(requests.audit)
        found = audit(
            checkpoint.net,
            shown.image,
            shown.label,
            checkpoint.source.threat,
            seed=settings.seed,
            surrogate=None if surrogate is None else surrogate[1].to(checkpoint.device),
            progress=checkpoint.source.progress,
        )
        return {"n": len(shown.label), **found.to_dict(), "text": str(found)}

    depends_on = {
        "seed": settings.seed,
        "images": requests.audit,
        "surrogate": None if surrogate is None else (surrogate[0], weights_of(surrogate[1])),
        "checks": {check.name: check.threshold for check in CHECKS},
    }
    return Measurement("-audit", depends_on, measure, audit_text)


def audit_text(result: dict[str, Any]) -> str:
    """An audit's table, reasons and summary."""
    return f"audit on {result['n']} images:\n{result['text']}"
