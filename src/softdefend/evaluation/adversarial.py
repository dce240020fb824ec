"""The adversarial images that an evaluation's attacks made, in files of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.records import Evaluation


def file_name(result: str, attack: str) -> str:
    """Of the file of one attack, without its ending."""
    return f"{result}-adversarial-{re.sub(r'[^A-Za-z0-9._-]+', '_', attack)}"


def save_adversarial(checkpoint: Checkpoint, inputs: Mapping[str, Any], evaluation: Evaluation) -> None:
    """Write ``evaluation/NAME-adversarial-ATTACK.safetensors`` for each attack.

    A file holds m images, those that were attacked (of an ensemble those that are right as they are):
    ``adversarial`` [m, c, h, w] float32 in [0, 1], and ``index`` (in the test data), ``label``,
    ``clean_prediction``, ``prediction`` and perhaps ``target``, [m] int64; ``distance`` [m] float32.
    """
    for name, record in evaluation.attacks.items():
        rows, adversarial = record.attacked, record.adversarial
        if adversarial is None:  # an ensemble found no image right as it is
            adversarial = torch.zeros(len(rows), *checkpoint.source.bundle.test.images.shape[1:])
        tensors = {
            "adversarial": adversarial,
            "index": evaluation.index,
            "label": evaluation.label,
            "clean_prediction": evaluation.clean_prediction,
            "prediction": record.prediction,
            "distance": record.distance,
        }
        if evaluation.target is not None:
            tensors["target"] = evaluation.target
        path = file_name(checkpoint.source.name, name)
        checkpoint.store.write_tensors(path, _of(inputs, name), {n: t[rows] for n, t in tensors.items()})


def saved_images(checkpoint: Checkpoint, result: Mapping[str, Any]) -> bool:
    """Whether the files of all attacks of a kept result are there."""
    find, name = checkpoint.store.find_tensors, checkpoint.source.name
    inputs = result["inputs"]
    return all(find(file_name(name, attack), _of(inputs, attack)) is not None for attack in result["attacks"])


def _of(inputs: Mapping[str, Any], attack: str) -> dict[str, Any]:
    return {**inputs, "adversarial": attack}
