"""Evaluates a small network, as one process or as one of several, and dies where it is told to.

Run as ``python evaluate_of_processes.py FOLDER SAVES``: the last process ends at its SAVES-th save, if that
is not 0.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch

from ensemble_tools import rugged
from softdefend.attacks import APGD, FAB, PGD, Square
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.core.weight_files import save_weights
from softdefend.data import from_tensors
from softdefend.evaluation import (
    CheckpointSource,
    Ensemble,
    EvaluateSettings,
    Requests,
    accuracy,
    checkpoint,
    corruptions,
    evaluate_checkpoint,
    examples,
    settings,
)
from softdefend.evaluation.resume import StateFile
from softdefend.execution.engine import join

SHAPE, N = (1, 5, 5), 44
MEMBERS = (APGD(steps=4, restarts=2), FAB(steps=4, restarts=2, targets=2), Square(queries=20))


def evaluate(folder: Path, saves: int = 0) -> None:
    """An ensemble, PGD and a few corruptions on batches of 6 images, two of them at once."""
    ours = join(False)
    net = rugged(SHAPE).float()
    image = torch.rand(2 * N, *SHAPE, generator=stream(0, "x"))
    bundle = from_tensors(image, net(image).argmax(1), validation=8, test_fraction=0.5, name="noise")
    known = {"small": Ensemble("small", MEMBERS), "pgd": PGD(steps=3)}
    for module in (accuracy, examples, settings):
        module.parse = lambda name, k=10: known[name]
    checkpoint.preflight = lambda *_, **__: None
    accuracy.SAVE_EVERY = 0.0
    few = ("gaussian_noise", "contrast")
    corruptions.evaluate_corruptions = functools.partial(corruptions.evaluate_corruptions, names=few)
    save, made = StateFile.save, []

    def deadly(self, state):
        save(self, state)
        made.append(1)
        if len(made) == saves and ours.rank == ours.size - 1:
            os._exit(9)

    StateFile.save = deadly
    ours.from_first(lambda: save_weights(net, folder / "last.safetensors", {"epoch": 1}))
    threat = ThreatModel("linf", Budget("0.02"))
    named = {"architecture": "x", "origin": "x", "processes": ours}
    source = CheckpointSource(net, bundle, folder, "last", trained=threat, threat=threat, **named)
    asked = EvaluateSettings(attacks=("small", "pgd"), batch_size=6, microbatch=12, curve_size=10)
    evaluate_checkpoint(source, asked, Requests(corruptions=True), device=torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(Path(sys.argv[1]), int(sys.argv[2]))
