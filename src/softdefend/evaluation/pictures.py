"""The pictures of an evaluation: its gallery and its examples, made where they are not there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdefend.evaluation.accuracy import make_evaluator
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.examples import make_examples, shown_attack
from softdefend.evaluation.gallery import choose_gallery
from softdefend.evaluation.settings import EvaluateSettings
from softdefend.evaluation.table import Table


def renew_pictures(
    checkpoint: Checkpoint, settings: EvaluateSettings, result: dict[str, Any], table: Table | None
) -> None:
    """Write the gallery and the examples, ``settings.examples`` images of each.

    Another number of them needs no new evaluation, and an evaluation that was killed before its pictures
    gets them with the next call. Only under the threat of the training: the report shows no other.

    Args:
        checkpoint: the network.
        settings: how many pictures, and how to compute them.
        result: ``evaluation/NAME.json``, whose pictures these are.
        table: ``evaluation/NAME.parquet``; without it there are no pictures.
    """
    source, count = checkpoint.source, settings.examples
    if table is None or not source.under_trained_threat:
        return
    inputs = {"evaluation": result["key"], "images": count}
    classes = {"classes": json.dumps(source.bundle.classes)}
    facts = {name: result[name] for name in ("weights", "test_data", "norm", "eps")}
    named = {**facts, **classes, "attacks": str(len(table.attacks)), "asked": str(count)}
    _renew(checkpoint, f"{source.name}-gallery", inputs, named, lambda: _gallery(checkpoint, settings, table))
    evaluated = replace(
        settings,
        attacks=result["settings"]["attacks"],
        microbatch=settings.microbatch or settings.batch_size,
    )
    examples = f"{source.name}-examples"
    _renew(checkpoint, examples, inputs, classes, lambda: _examples(checkpoint, evaluated, table))


def _renew(
    checkpoint: Checkpoint,
    name: str,
    inputs: dict[str, Any],
    metadata: dict[str, str],
    make: Callable[[], dict[str, Tensor]],
) -> None:
    store = checkpoint.store
    if inputs["images"] and store.find_tensors(name, inputs) is not None:
        return
    store.path(name, ".safetensors").unlink(missing_ok=True)
    if inputs["images"]:
        store.write_tensors(name, inputs, make(), metadata)


def _gallery(checkpoint: Checkpoint, settings: EvaluateSettings, table: Table) -> dict[str, Tensor]:
    return choose_gallery(
        checkpoint.net,
        checkpoint.data,
        table,
        eps=float(checkpoint.source.threat.eps),
        count=settings.examples,
        batch_size=settings.microbatch or settings.batch_size,
    )


def _examples(checkpoint: Checkpoint, settings: EvaluateSettings, table: Table) -> dict[str, Tensor]:
    attack = shown_attack(settings.attacks, len(checkpoint.source.bundle.classes))
    evaluator = make_evaluator(checkpoint, settings)
    return make_examples(evaluator, attack, settings.examples, torch.from_numpy(table.index.copy()))
