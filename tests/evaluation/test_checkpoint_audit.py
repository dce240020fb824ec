"""The audit of a checkpoint is that of its network, and another one where something of it is other."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from checkpoint_tools import QUICK, THREAT, make_checkpoint

from softdefend.evaluation import Requests
from softdefend.evaluation import audit as audit_module
from softdefend.evaluation.audit import audit_measurement, audit_text
from softdefend.evaluation.masking import CHECKS, audit
from softdefend.evaluation.measurement import measured
from tiny import tiny_net


@pytest.fixture
def checkpoint(bundle, tmp_path):
    return make_checkpoint(tmp_path, bundle)


def test_the_findings_are_those_of_the_networks_audit(checkpoint, bundle):
    surrogates = {"first": tiny_net(seed=1), "second": tiny_net(seed=2)}
    requests = Requests(audit=12, surrogates=surrogates)
    result = measured(checkpoint, audit_measurement(checkpoint, replace(QUICK, seed=3), requests))
    shown = checkpoint.test_images(12)
    more = {"seed": 3, "surrogate": surrogates["first"].eval()}
    # 16 validation images are few
    more["fresh"] = bundle.train.images[:12].float() / 255, bundle.train.labels[:12]
    wanted = audit(checkpoint.net, shown.image, shown.label, THREAT, **more)
    assert result["n"] == 12
    assert result["findings"] == [asdict(finding) for finding in wanted.findings]
    assert (result["verdict"], result["summary"]) == (wanted.verdict, wanted.summary)
    assert audit_text(result) == f"audit on 12 images:\n{wanted}"


def test_fresh_images_are_no_test_images(checkpoint, bundle):
    assert audit_module._fresh_split(bundle) is bundle.train
    many = replace(bundle, validation=bundle.train, train=bundle.validation)
    assert audit_module._fresh_split(many) is many.validation
    assert audit_module._fresh_split(replace(bundle, train=bundle.test)) is None


def test_it_depends_on_what_it_looks_at_and_on_nothing_else(checkpoint, monkeypatch):
    other, moved = tiny_net(seed=1), tiny_net(seed=2)

    def inputs(settings=QUICK, **requests):
        return audit_measurement(checkpoint, settings, Requests(**{"audit": 12, **requests})).settings

    first = inputs(surrogates={"other": other})
    for changed in (
        inputs(),
        inputs(audit=13, surrogates={"other": other}),
        inputs(surrogates={"other": moved}),
        inputs(surrogates={"another": other}),
        inputs(replace(QUICK, seed=1), surrogates={"other": other}),
    ):
        assert changed != first
    same = replace(QUICK, attacks=("pgd-7",), size=5, batch_size=3, examples=0, curve_size=9)
    assert inputs(same, surrogates={"other": other, "more": moved}, corruptions=True) == first
    monkeypatch.setattr(audit_module, "CHECKS", CHECKS[1:])
    assert inputs(surrogates={"other": other}) != first
