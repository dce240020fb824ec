"""A checkpoint is loaded once, checked before anybody gets it, and known by its digests."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from checkpoint_tools import CPU, QUICK, THREAT, make_checkpoint, make_source
from safetensors.torch import load_file

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.core.weight_files import save_weights
from softdefend.data import fingerprint
from softdefend.evaluation import Requests, checkpoint, evaluate_checkpoint
from softdefend.evaluation.checkpoint import Checkpoint
from tiny import tiny_net


def test_whatever_is_asked_weights_are_read_and_hashed_and_images_uploaded_once(
    bundle, tmp_path, monkeypatch
):
    calls = []

    def counted(name):
        call = getattr(checkpoint, name)
        monkeypatch.setattr(checkpoint, name, lambda *a, **k: calls.append(name) or call(*a, **k))

    names = ("load_weights", "weights_digest", "fingerprint", "Resident")
    for name in names:
        counted(name)
    source = make_source(tmp_path, bundle)
    requests = Requests(audit=8, corruptions=True, surrogates={"other": tiny_net(seed=1)})
    settings = replace(QUICK, curve_size=8, size=12)
    evaluate_checkpoint(source, settings, requests, device=CPU)
    assert sorted(calls) == sorted(names)
    calls.clear()
    evaluate_checkpoint(source, settings, requests, device=CPU)
    assert sorted(calls) == ["fingerprint", "weights_digest"]  # all is there: nothing has to be loaded


def test_the_network_holds_the_weights_of_the_file_in_eval_mode(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    weights = load_file(tmp_path / "last.safetensors")
    assert not made.net.training
    assert all(torch.equal(value, weights[name]) for name, value in made.net.state_dict().items())
    assert made.metadata["epoch"] == 3
    assert made.facts == {
        "weights": file_digest(tmp_path / "last.safetensors"),
        "test_data": fingerprint(bundle.test),
    }


def test_nobody_gets_a_network_that_preflight_refuses(bundle, tmp_path, monkeypatch):
    shown = []

    def refuse(net, images, labels, threat, *, classes, assumes_determinism):
        shown.append((len(images), classes, assumes_determinism))
        raise SettingError("net", "a network that moves", "one that stands still")

    monkeypatch.setattr(checkpoint, "preflight", refuse)
    made = make_checkpoint(tmp_path, bundle)
    for _ in range(2):
        with pytest.raises(SettingError, match="a network that moves"):
            _ = made.net
    assert shown == 2 * [(32, 4, True)]


@pytest.mark.parametrize("before", [True, False])
def test_determinism_is_looked_at_once(bundle, tmp_path, monkeypatch, before):
    asked = []
    monkeypatch.setattr(
        checkpoint, "preflight", lambda *_, assumes_determinism, **__: asked.append(assumes_determinism)
    )
    made = Checkpoint(make_source(tmp_path, bundle), CPU, assumes_determinism=before)
    _ = made.net
    made.require_determinism()
    made.require_determinism()
    assert asked == ([True] if before else [False, True])


def test_weights_trained_beside_other_test_images_are_refused(bundle, tmp_path):
    source = make_source(tmp_path, bundle)
    for test_data, fits in (("0" * 64, False), (fingerprint(bundle.test), True)):
        save_weights(source.net, tmp_path / "last.safetensors", {"epoch": 1, "test_data": test_data})
        if fits:
            assert Checkpoint(source, CPU).metadata["test_data"] == test_data
            continue
        with pytest.raises(
            SettingError, match=f"^data: got test images .*, trained beside test images {12 * '0'};"
        ):
            _ = Checkpoint(source, CPU).metadata


def test_weights_that_are_not_there_are_refused(bundle, tmp_path):
    source = make_source(tmp_path, bundle)
    (tmp_path / "last.safetensors").unlink()
    for ask in (lambda made: made.net, lambda made: made.facts):
        with pytest.raises(SettingError, match=r"last\.safetensors: got no such file"):
            ask(Checkpoint(source, CPU))


def test_a_network_from_outside_is_known_by_what_it_does_too(bundle, tmp_path):
    facts = make_checkpoint(tmp_path, bundle, origin="nets:make").facts
    assert facts["network"]["origin"] == "nets:make"
    assert re.fullmatch(r"logits .* gradient .* classes \w{16}", facts["network"]["behavior"])
    assert "network" not in make_checkpoint(tmp_path, bundle).facts


def test_results_under_another_threat_lie_beside_the_runs_own(bundle, tmp_path):
    def name(threat):
        return make_source(tmp_path, bundle, threat=threat).name

    assert name(THREAT) == name(ThreatModel("linf", Budget("25.5/255"))) == "last"
    assert name(ThreatModel("linf", Budget("4/255"))) == "last-linf-4_255"
    assert name(ThreatModel("l2", Budget("0.1"))) == "last-l2-0.1"


def test_inputs_know_network_data_threat_and_settings(bundle, tmp_path):
    one = make_checkpoint(tmp_path / "a", bundle).inputs({"seed": 0})
    assert one == make_checkpoint(tmp_path / "b", bundle).inputs({"seed": 0})
    other_data = replace(bundle, test=bundle.test.subset(torch.arange(31)))
    for other in (
        make_checkpoint(tmp_path / "c", bundle).inputs({"seed": 1}),
        make_checkpoint(tmp_path / "d", bundle, seed=1).inputs({"seed": 0}),
        make_checkpoint(tmp_path / "e", bundle, threat=ThreatModel("l2", Budget("0.1"))).inputs({"seed": 0}),
        make_checkpoint(tmp_path / "f", other_data).inputs({"seed": 0}),
        make_checkpoint(tmp_path / "g", bundle, origin="nets:make").inputs({"seed": 0}),
    ):
        assert other != one
