"""Networks with batch normalization, one image at a time: running statistics know no batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softdefend.attacks.names import parse_attack
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import Resident, split
from softdefend.evaluation import Evaluator
from softdefend.evaluation.corruptions import evaluate_corruptions
from softdefend.evaluation.masking import audit

N = 5
IMAGES = torch.rand(N, 1, 6, 6, generator=stream(0, "single"))
NAMES = (
    "fgsm",
    "pgd-5x2",
    "apgd-ce-5",
    "apgd-t-5",
    "fab-t-3",
    "square-20",
    "fmn-5",
    "deepfool-5",
    "cw-l2-2x5",
    "hop-skip-jump-60",
    "surfree-60",
)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Normalized over batches on maps, on maps of one pixel, and on vectors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(1, 8, 3, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.BatchNorm2d(8),
        ]
        made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        for _ in range(20):
            made(torch.rand(32, 1, 6, 6))
    return made.eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_microbatch_of_one_and_a_last_batch_of_one_change_no_verdict(net, name):
    labels = net(IMAGES).argmax(1)
    threat = ThreatModel("l2", "0.3")

    def found(microbatch: int) -> list[list[int]]:
        evaluator = Evaluator(
            net, Resident(split(IMAGES, labels), "cpu"), threat, batch_size=N - 1, microbatch=microbatch
        )
        record = evaluator([parse_attack(name)]).attacks[parse_attack(name).name]
        return [record.prediction.tolist(), record.robust.tolist()]

    assert found(1) == found(2) == found(N)


def test_corruptions_and_the_audit_take_one_image(net):
    data = split(IMAGES[:1], net(IMAGES[:1]).argmax(1))
    assert evaluate_corruptions(net, data, names=("fog",), batch_size=1)["clean"]["count"] == 1
    result = audit(net, IMAGES[:1], data.labels, ThreatModel("linf", "0.1"), batch_size=1)
    assert result.verdict == "no sign of masking"
