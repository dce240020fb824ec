"""Images that an evaluation keeps are those that it judged."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ensemble_tools import rugged, sample
from softdefend.attacks import APGD, FAB, FMN, PGD, Square
from softdefend.core.threat import ThreatModel
from softdefend.evaluation import Ensemble, EvaluateSettings, Evaluator, Requests
from softdefend.evaluation.adversarial import file_name
from softdefend.experiments.evaluate import evaluate_network

SHAPE = (2, 5, 5)
ENSEMBLE = Ensemble("three", (APGD(steps=5), FAB(steps=5, targets=2), Square(queries=40)))


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("targeted", [None, "next"])
def test_what_is_kept_is_what_was_counted(norm, targeted):
    net, threat = rugged(SHAPE).float(), ThreatModel(norm, {"linf": 0.04, "l1": 1}[norm])
    data = sample(net, 40, SHAPE)
    evaluator = Evaluator(net, data, threat, batch_size=9, microbatch=20, targeted=targeted, keep_images=True)
    found = evaluator([PGD(steps=4), FMN(steps=10), ENSEMBLE])
    for record in found.attacks.values():
        rows = record.attacked
        clean, made = data.image[found.index][rows], record.adversarial[rows]
        assert torch.equal(net(made).argmax(1), record.prediction[rows])
        torch.testing.assert_close(
            threat.distance(clean, made).float(), record.distance[rows], atol=1e-5, rtol=1e-4
        )
        assert not record.adversarial[~rows].any()
    assert not found.attacks["three"].attacked.all()
    assert found.attacks["pgd-4"].attacked.all()


@pytest.mark.parametrize("right", [True, False])
def test_the_files_of_an_ensemble_that_soon_had_nothing_left(right, tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 3)).eval()
    images = torch.rand(12, *SHAPE)
    with torch.no_grad():
        labels = (net(images).argmax(1) + (0 if right else 1)) % 3
    result = evaluate_network(
        net,
        (images, labels),
        tmp_path,
        threat=ThreatModel("linf", "120/255"),
        settings=EvaluateSettings(attacks=("autoattack",), curve_size=0, examples=0),
        requests=Requests(adversarial=True),
        device="cpu",
    )
    assert result["attacks"]["autoattack"]["members"][-1]["attacked"] == 0
    kept = load_file(tmp_path / "evaluation" / "last-adversarial-autoattack.safetensors")
    assert kept["adversarial"].shape == (12 if right else 0, *SHAPE)
    with torch.no_grad():
        assert torch.equal(net(kept["adversarial"]).argmax(1), kept["prediction"])


def test_nothing_is_kept_unless_asked_for():
    net = rugged(SHAPE)
    found = Evaluator(net, sample(net, 10, SHAPE), ThreatModel())([PGD(steps=1)])
    assert found.attacks["pgd-1"].adversarial is None


def test_names_of_files_hold_no_path():
    assert file_name("best", "pgd-20-mine/../x:loss") == "best-adversarial-pgd-20-mine_.._x_loss"
