"""The model of the cost of many GPUs, against closed forms and a ring that is played through."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    yield importlib.import_module("scaling_model")
    for name in ("scaling_model", "scaling_messages", "common"):
        sys.modules.pop(name, None)


def ring(n: int, size: int, link) -> tuple[float, float]:
    """Seconds of the two halves of an all-reduce of ``size`` bytes, in which each of n sends one part a round
    to the next. The numbers are checked at the end."""
    parts = torch.randint(100, (n, n))  # by process, by part
    total, held, spent = parts.sum(0), parts.clone(), [0.0, 0.0]
    for half in (0, 1):
        for number in range(n - 1):
            sent = [(rank, (rank - number + half) % n) for rank in range(n)]
            values = [int(held[rank, part]) for rank, part in sent]
            for (rank, part), value in zip(sent, values, strict=True):
                held[(rank + 1) % n, part] = value + (0 if half else held[(rank + 1) % n, part])
            spent[half] += link.hop + size / n / link.bandwidth
    assert torch.equal(held, total.expand(n, n))
    return spent[0], spent[1]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_message_inside_a_host_takes_what_a_ring_takes(model, n):
    link = model.Link(start=0.25, hop=0.5, bandwidth=100.0)
    cluster, (first, second) = model.Cluster(n, link), ring(n, 24_000, link)
    assert cluster.all_reduce(24_000) == pytest.approx(0.25 + first + second)
    assert cluster.all_gather(24_000) == pytest.approx(0.25 + second)
    assert model.Cluster(1, link).all_reduce(24_000) == 0


def test_between_hosts_each_link_carries_the_whole_once_more(model):
    """Three hosts are three that send on one link each."""
    inside = model.Link(start=0.25, hop=0.5, bandwidth=1000.0)
    between = model.Link(start=0.125, hop=2.0, bandwidth=100.0)
    for name in ("all_reduce", "all_gather"):
        wanted = sum(
            getattr(one, name)(24_000) for one in (model.Cluster(8, inside), model.Cluster(3, between))
        )
        assert getattr(model.Cluster(24, inside, between), name)(24_000) == pytest.approx(wanted)


def test_steps_are_on_a_line_between_and_beyond_batches(model):
    points = {size: 3.0 + 0.25 * size for size in (64, 128, 512)}
    for size in (16, 64, 100, 128, 300, 512, 1024):
        assert model.interpolate(points, size) == pytest.approx(3.0 + 0.25 * size)
    bent = {100: 10.0, 200: 30.0, 300: 40.0}
    assert [model.interpolate(bent, size) for size in (150, 250, 400)] == [20.0, 35.0, 50.0]
    assert model.interpolate({128: 10.0}, 512) == 40.0


def test_links_are_those_that_the_messages_were_made_with(model):
    link = model.Link(start=2e-5, hop=model.NVLINK.hop, bandwidth=3e11)

    def rows(count, link):
        cluster = model.Cluster(count, link)
        for what, size in (("meters", 20), ("gradients", 4 * 10**7), ("gradients", 2 * 10**8)):
            yield {"what": what, "bytes": size, "processes": count, "ms": 1e3 * cluster.all_reduce(size)}

    messages = [{**row, "captured": True} for row in rows(4, link)]
    messages += [{**row, "captured": False} for row in rows(4, model.Link(1.0, 1.0, 1.0))]
    messages += [{**row, "captured": True} for row in rows(2, model.Link(1e-3, 1.0, 1.0))]
    found = model.fitted(messages)
    assert (found.start, found.bandwidth, found.measured) == pytest.approx((2e-5, 3e11, 4), rel=1e-3)
    assert model.fitted([]) == model.NVLINK


def test_without_messages_a_step_is_as_many_times_as_fast(model):
    free = model.Link(0.0, 0.0, float("inf"))
    work, points = model.Work("resnet18", 1024), {128: 12.8, 512: 51.2}
    for count in (1, 2, 8, 64):
        row = model.predict(work, "sglr-reference", points, model.Cluster(count, free, free))
        assert row["times_one"] == row["hidden_times_one"] == pytest.approx(count, rel=1e-3)


def test_a_step_is_its_compute_and_its_messages(model):
    """By hand: ResNet-18 has 11,173,962 parameters, and 20 layers with 4,800 channels together."""
    link = model.Link(start=1e-5, hop=1e-6, bandwidth=1e11)
    row = model.predict(model.Work("resnet18", 512), "sglr-reference", {256: 20.0}, model.Cluster(2, link))
    assert row["compute_ms"] == 20.0
    assert row["gradients_ms"] == pytest.approx(0.012 + 44_695_848 / 1e8, abs=1e-4)
    gathers = 20 * 0.011 + 4800 * 12 / 1e8  # in each of two forwards
    assert row["statistics_ms"] == pytest.approx(2 * gathers + 20 * 0.012 + 4800 * 8 / 1e8, abs=1e-4)
    assert row["memory_ms"] == pytest.approx(0.011 + 512 * 48 / 2 / 1e8, abs=1e-4)
    parts = [row[f"{name}_ms"] for name in ("compute", "gradients", "statistics", "memory", "meters")]
    assert row["ms"] == pytest.approx(sum(parts), abs=1e-3)
    assert row["times_one"] == pytest.approx(40 / row["ms"], abs=1e-3)
    assert row["hidden_times_one"] == pytest.approx(40 / (row["ms"] - row["gradients_ms"]), abs=1e-3)


def test_measured_steps_stand_beside_and_odd_hosts_are_refused(model, tmp_path, monkeypatch, capsys):
    def step(batch, count, ms):
        named = {"net": "small_cnn", "recipe": "pgd-at", "settings": ""}
        return {**named, "batch_size": batch, "processes": count, "ms": ms}

    scaling, output = tmp_path / "scaling.json", tmp_path / "model.json"
    scaling.write_text(json.dumps({"steps": [step(32, 1, 10.0), step(64, 1, 20.0), step(64, 2, 40.0)]}))
    words = ["model", "--work", "small_cnn:64", "--scaling", str(scaling), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--counts", "2", "4", "128"])
    model.main()
    content = json.loads(output.read_text())
    two, four = content["rows"]
    assert content["inputs"] == ["scaling.json", "train_step.json"]
    assert two["compute_ms"] == 10.0
    assert two["measured_ratio"] == pytest.approx(two["ms"] / 40, abs=1e-3)
    assert "measured_ms" not in four
    assert "measured 0.25 times that" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--counts", "12"])
    with pytest.raises(SystemExit):
        model.main()
    assert "--counts: [12]; accepted: 1 to 8, or a multiple of 8" in capsys.readouterr().err


def test_networks_without_a_measured_step_are_named_with_the_command_that_measures_them(
    model, tmp_path, monkeypatch, capsys
):
    def step(net, **changes):
        named = {"net": net, "recipe": "pgd-at", "settings": "", "batch_size": 32, "processes": 1, "ms": 9.0}
        return {**named, **changes}

    scaling, output = tmp_path / "scaling.json", tmp_path / "model.json"
    words = ["model", "--scaling", str(scaling), "--single", str(tmp_path / "none"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--work", "small_cnn:32", "resnet18:64"])
    one_gpu, others = step("small_cnn"), [step("resnet18", processes=2), step("resnet18", settings="x")]
    for steps, missing in (
        (others, "small_cnn:32 resnet18:64"),
        ([one_gpu, *others], "resnet18:64"),
        ([one_gpu, step("resnet18")], ""),
    ):
        scaling.write_text(json.dumps({"steps": steps}))
        code = 0
        try:
            model.main()
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        known = {"small_cnn", "resnet18"} - {one.split(":")[0] for one in missing.split()}
        assert {line.split()[0] for line in said.out.splitlines()} == known
        assert output.exists() == bool(known)
        assert code == (2 if missing else 0)
        command = f"benchmarks/scaling.py --gpus 1 --parts steps --work {missing} --output {scaling}\n"
        assert said.err.endswith(command) if missing else not said.err
        assert said.err.count("\n") == bool(missing)
