"""Transfer attacks on a checkpoint against the same images made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoint_tools import QUICK, THREAT, make_checkpoint

from softdefend.attacks import PGD, Transfer
from softdefend.core.errors import SettingError
from softdefend.data import subset
from softdefend.evaluation import Evaluator
from softdefend.evaluation.measurement import measured
from softdefend.evaluation.surrogates import (
    surrogate_names,
    transfer_measurement,
    transfer_text,
    transfer_warning,
    weights_of,
)
from tiny import tiny_net


def test_each_surrogate_is_an_attack_and_all_together_the_worst(bundle, tmp_path):
    checkpoint = make_checkpoint(tmp_path, bundle)
    nets = {"one": tiny_net(seed=1).eval(), "two": tiny_net(seed=2).eval()}
    settings = replace(QUICK, size=20, seed=4)
    result = measured(checkpoint, transfer_measurement(checkpoint, settings, nets))
    evaluator = Evaluator(checkpoint.net, checkpoint.data, THREAT, batch_size=10, seed=4)
    left = torch.ones(20, dtype=torch.bool)
    for name, net in nets.items():
        alone = evaluator(
            [Transfer(net, PGD(steps=20, loss="margin"), name)], index=subset(bundle.test.labels, 20)
        )
        attack = f"transfer-pgd-20-margin-{name}"
        assert result["attacks"][attack]["count"] == alone.robust(attack).count
        left &= alone.worst
    assert result["worst"]["count"] == int(left.sum())
    assert transfer_text(result) == "  ".join(
        f"{name} {100 * rate['rate']:.1f}%" for name, rate in result["attacks"].items()
    )


def test_other_weights_of_a_surrogate_are_another_question(bundle, tmp_path):
    checkpoint, net = make_checkpoint(tmp_path, bundle), tiny_net(seed=1)
    first = transfer_measurement(checkpoint, QUICK, {"one": net}).settings
    assert transfer_measurement(checkpoint, replace(QUICK, attacks=()), {"one": net}).settings == first
    before = weights_of(net)
    with torch.no_grad():
        net[0].bias[0] += 1e-6
    assert weights_of(net) != before
    assert transfer_measurement(checkpoint, QUICK, {"one": net}).settings != first


@pytest.mark.parametrize(("n", "left", "said"), [(20, 9, True), (20, 10, False), (12, 9, False)])
def test_a_line_says_where_transfer_does_more_on_the_same_images(n: int, left: int, said: bool) -> None:
    own = {"n": 20, "worst": {"count": 10, "rate": 0.5}}
    other = {"n": n, "worst": {"count": left, "rate": left / n}}
    line = transfer_warning(own, other)
    assert bool(line) is said
    assert line is None or "other networks leave 45.0% robust, all attacks on this one 50.0%" in line


def test_surrogates_are_called_like_their_folders_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert surrogate_names(["runs/one", "b/two.safetensors", "three.pt", "x/../four/"]) == [
        "one",
        "two",
        "three.pt",
        "four",
    ]
    with pytest.raises(SettingError, match=r"^--transfer: got a/one, b/one; accepted: surrogates with diff"):
        surrogate_names(["a/one", "b/one"])
