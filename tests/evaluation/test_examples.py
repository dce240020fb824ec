"""The example images of a report against the evaluator's own records."""

from __future__ import annotations

import torch
from checkpoint_tools import THREAT, make_checkpoint

from softdefend.attacks import APGD, PGD
from softdefend.core.rng import stream
from softdefend.evaluation import Evaluator
from softdefend.evaluation.examples import make_examples, one_of_each_class, shown_attack


def test_classes_take_turns():
    label = torch.tensor([2, 2, 0, 2, 0, 1])
    assert one_of_each_class(label).tolist() == [0, 2, 5, 1, 4, 3]


def test_examples_are_images_of_the_evaluation(bundle, tmp_path):
    checkpoint = make_checkpoint(tmp_path, bundle)
    evaluator = Evaluator(checkpoint.net, checkpoint.data, THREAT, batch_size=10)
    evaluation = evaluator([PGD(steps=3)])
    among = torch.randperm(32, generator=stream(0, "among"))[:20]
    tensors = make_examples(evaluator, PGD(steps=3), 6, among)
    index = among[one_of_each_class(bundle.test.labels[among])[:6]]
    assert torch.equal(tensors["label"], bundle.test.labels[index])
    assert torch.equal(tensors["image"], checkpoint.data.take(index).image)
    assert torch.equal(tensors["clean_prediction"], evaluation.clean_prediction[index])
    assert torch.equal(tensors["adversarial_prediction"], evaluation.attacks["pgd-3"].prediction[index])
    with torch.no_grad():
        for image, kind in ((tensors["image"], "clean"), (tensors["adversarial"], "adversarial")):
            share = checkpoint.net(image).softmax(1).amax(1)
            torch.testing.assert_close(tensors[f"{kind}_confidence"], share)
    assert float(THREAT.distance(tensors["image"], tensors["adversarial"]).max()) <= 0.1 + 1e-6


def test_the_first_attack_is_shown_and_of_an_ensemble_its_first_member():
    assert shown_attack(("pgd-7", "fgsm"), 4) == PGD(steps=7)
    assert shown_attack(("autoattack",), 4) == APGD()
    assert shown_attack((), 4) == PGD(steps=20)
