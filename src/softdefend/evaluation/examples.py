"""A few test images with what an attack made of them, kept for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.attacks import PGD, Attack
from softdefend.evaluation.autoattack import Ensemble, parse
from softdefend.evaluation.evaluate import Evaluator, answers


def make_examples(evaluator: Evaluator, attack: Attack, count: int, among: Tensor) -> dict[str, Tensor]:
    """The first images of each class in turn, with what an attack makes of them.

    Args:
        evaluator: of the network.
        attack: what is shown.
        count: images, at most.
        among: positions [n] int64 of the test images that may be taken.

    Returns:
        For m images ``image`` and ``adversarial`` [m, c, h, w] float32 in [0, 1], ``label``, and for both
        images the predicted class and its probability: ``clean_prediction``, ``clean_confidence``,
        ``adversarial_prediction``, ``adversarial_confidence``.
    """
    labels = evaluator.data.labels
    among = among.cpu()
    index = among[one_of_each_class(labels.cpu()[among])[:count]].to(labels.device)
    image, adversarial, clean, attacked = evaluator.show(attack, index)
    return {
        "image": image,
        "adversarial": adversarial,
        "label": labels[index],
        "clean_prediction": answers(clean, labels[index]),
        "adversarial_prediction": answers(attacked, labels[index]),
        "clean_confidence": clean.amax(1),
        "adversarial_confidence": attacked.amax(1),
    }


def one_of_each_class(label: Tensor) -> Tensor:
    """Positions [n]: the first sample of each class, then the second of each, and so on.

    Args:
        label: [n] int64, on the CPU.
    """
    number_in_class = torch.zeros_like(label)
    for number in sorted(set(label.tolist())):
        members = label == number
        number_in_class[members] = torch.arange(int(members.sum()))
    return torch.argsort(number_in_class, stable=True)


def shown_attack(names: tuple[str, ...], k: int) -> Attack:
    """The attack whose images are shown: the first of an evaluation, of an ensemble its first member.

    Args:
        names: of the evaluation's attacks.
        k: classes.
    """
    first = parse(names[0], k) if names else PGD(steps=20)
    return first.members[0] if isinstance(first, Ensemble) else first
