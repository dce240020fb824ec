"""On fewer images than there are: every class has its share, whatever the order of the data, and records say
which images they are of."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_tools import CPU, QUICK, THREAT, make_checkpoint, make_source
from safetensors.torch import load_file

from softdefend import SettingError
from softdefend.attacks import FGSM, PGD
from softdefend.core.rng import stream
from softdefend.data import Resident, from_tensors, subset
from softdefend.evaluation import EvaluateSettings, Evaluator, Requests, evaluate_checkpoint
from softdefend.evaluation.accuracy import find_accuracies, measure_accuracies
from softdefend.evaluation.settings import count_of
from softdefend.evaluation.table import read_table

K, PART = 4, 12


@pytest.fixture
def bundle():
    """32 test images of 4 classes, sorted by class as image folders are."""
    labels = torch.arange(96) * K // 96
    images = 0.3 * torch.rand(96, 1, 6, 6, generator=stream(0, "sorted"))
    for number, label in enumerate(labels.tolist()):
        images[number, 0, label] += 0.5
    made = from_tensors(images, labels, validation=16, test_fraction=1 / 3, name="sorted")
    assert made.test.labels.tolist() == sorted(made.test.labels.tolist())
    return made


def test_an_image_gets_the_same_verdict_wherever_it_stands(bundle, tmp_path):
    """PGD's start belongs to the position in the data."""
    checkpoint = make_checkpoint(tmp_path, bundle)
    evaluator = Evaluator(checkpoint.net, checkpoint.data, THREAT, batch_size=5)
    attacks = [FGSM(), PGD(steps=3)]
    index = torch.randperm(32, generator=stream(0, "order"))[:20]
    whole, part = evaluator(attacks), evaluator(attacks, index=index)
    assert torch.equal(part.clean_prediction, whole.clean_prediction[index])
    for name in ("fgsm", "pgd-3"):
        for kept in ("prediction", "robust"):
            one, other = (getattr(found.attacks[name], kept) for found in (part, whole))
            assert torch.equal(one, other[index])
        torch.testing.assert_close(part.attacks[name].distance, whole.attacks[name].distance[index])
    rows = pq.read_table(io.BytesIO(part.to_parquet()))
    assert rows.column("index").to_pylist() == index.tolist()
    assert rows.column("label").to_pylist() == bundle.test.labels[index].tolist()


def test_all_that_is_measured_on_a_part_is_of_all_classes(bundle, tmp_path):
    settings = replace(QUICK, size=PART, curve_size=8)
    source = make_source(tmp_path, bundle)
    result = evaluate_checkpoint(source, settings, Requests(corruptions=True), device=CPU)
    assert [row["n"] for row in result["per_class"]] == [PART // K] * K
    table = read_table(tmp_path / "evaluation" / "last.parquet")
    assert table.index.tolist() == subset(bundle.test.labels, PART).tolist()
    index = torch.from_numpy(table.index.copy())
    np.testing.assert_array_equal(bundle.test.labels[index].numpy(), table.label)
    for name in ("last-gallery", "last-examples"):
        shown = load_file(tmp_path / "evaluation" / f"{name}.safetensors")
        images = Resident(bundle.test, "cpu").take(index).image
        for image, label in zip(shown["image"], shown["label"], strict=True):
            (row,) = (images == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert table.label[row] == label
            if name == "last-gallery":
                assert table.index[row] in shown["index"].tolist()
    few = Evaluator(source.net, Resident(bundle.test, "cpu"), THREAT, batch_size=10)(
        [PGD(steps=20)], index=subset(bundle.test.labels, 8)
    )
    at_eps = next(point for point in result["eps_curve"] if point["eps"] == "0.1")
    assert (at_eps["count"], at_eps["n"]) == (few.robust("pgd-20").count, 8)
    assert (result["eps_curve"][0]["count"], result["eps_curve"][0]["n"]) == (few.clean.count, 8)


def test_the_curve_of_a_whole_evaluation_is_of_all_classes_too(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    result = measure_accuracies(made, replace(QUICK, curve_size=8))
    index = subset(bundle.test.labels, 8)
    assert sorted(bundle.test.labels[index].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    with torch.no_grad():
        right = made.net(made.data.take(index).image).argmax(1) == bundle.test.labels[index]
    assert result["eps_curve"][0]["count"] == int(right.sum())


def test_a_smaller_part_lies_in_a_larger_one(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    indices = []
    for size in (8, 20):
        measure_accuracies(made, replace(QUICK, size=size))
        indices.append(read_table(tmp_path / "evaluation" / "last.parquet").index.tolist())
    assert indices[1][:8] == indices[0]


def test_the_first_images_are_an_option_that_says_what_they_are(bundle, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="softdefend")
    source, settings = make_source(tmp_path, bundle), replace(QUICK, size=PART, subset="first")
    result = evaluate_checkpoint(source, settings, Requests(audit=3), device=CPU)
    assert "size: the first 12 of 32 images, which are of 2 of the 4 classes" in caplog.messages
    assert "audit_size: the first 3 of 32 images, which are of 1 of the 4 classes" in caplog.messages
    assert [row["n"] for row in result["per_class"]] == [8, 4]
    table = read_table(tmp_path / "evaluation" / "last.parquet")
    assert table.index.tolist() == list(range(PART))
    caplog.clear()
    evaluate_checkpoint(source, replace(settings, subset="stratified"), device=CPU)
    assert not any("classes" in line for line in caplog.messages)
    assert read_table(tmp_path / "evaluation" / "last.parquet").index.tolist() != list(range(PART))


def test_what_was_measured_on_all_images_answers_for_either_order(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    measure_accuracies(made, QUICK)
    for changes in ({"size": 32}, {"size": "all"}, {"size": 7}, {"size": 7, "subset": "first"}):
        assert find_accuracies(made, replace(QUICK, **changes)) is not None, changes
    assert find_accuracies(made, replace(QUICK, curve_size=4)) is None
    measure_accuracies(made, replace(QUICK, size=7))
    assert find_accuracies(made, replace(QUICK, size=5)) is not None
    for changes in ({"size": 5, "subset": "first"}, {"size": 8}, {}):
        assert find_accuracies(made, replace(QUICK, **changes)) is None, changes


def test_preflight_and_audit_look_at_all_classes(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    assert sorted(made.test_images(8).label.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert made.test_images(8, "first").label.tolist() == [0] * 8
    assert made.test_images("all").label.tolist() == bundle.test.labels.tolist()


def test_all_means_all():
    assert EvaluateSettings(size="all") == EvaluateSettings()
    assert [count_of(size, 30) for size in (None, "all", 20, 40)] == [30, 30, 20, 30]
    for wrong in ({"size": 0}, {"curve_size": -1}):
        with pytest.raises(SettingError, match="or all"):
            EvaluateSettings(**wrong)
    with pytest.raises(SettingError, match=r"evaluate\.subset: got 'last'; accepted: stratified or first"):
        EvaluateSettings(subset="last")
