"""CutMix in a step: what is attacked, believed and charged for where images are parts of two."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from captured import HostReads, as_on_a_device
from killed_runs import train_whole_and_killed
from softdefend import PGD, PGDAT, SGLR, TRADES, Consistency, Hard, OptimSettings, Smooth
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import AugmentSettings, Batch
from softdefend.labels import LabelRule, Predictions, SoftTerm, Supervision
from softdefend.training import RuntimeSettings
from softdefend.training.mixture import Mixture
from softdefend.training.step import Phase
from softdefend.weights import AWP, EMA
from tiny import K, about

LABEL = torch.tensor([2, 0, 3, 1, 1])
BATCH = Batch(torch.tensor([8, 3, 5, 0, 11]), torch.rand(5, 1, 4, 4, generator=stream(0, "x")), LABEL)
OTHER = torch.tensor([1, 2, 0, 3, 1])  # of the image before, the last for the first
SHARE = torch.tensor([1.0, 0.25, 0.5, 0.0, 0.75])
NOTHING = Predictions(torch.zeros(5, K))


class Teaching(LabelRule):
    """Sample weights, the label, and a term that depends on the image alone, as distillation has."""

    def attack_target(self, batch, phase):
        return 0.9 * self.one_hot(batch.label) + 0.1 / K

    def target(self, batch, predictions, phase):
        return self.one_hot(batch.label)

    def supervise(self, batch, adversarial, predictions, phase):
        hard, taught = self.one_hot(batch.label), adversarial.flatten(1)[:, :K].softmax(1)
        terms = (SoftTerm(hard, 0.5), SoftTerm(taught, 0.5, 2.0))
        return Supervision(batch.label, hard, 1 + batch.label / 10, terms)


def mixed_by_hand(rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.stack([s * a + (1 - s) * b for s, a, b in zip(SHARE, rows, other, strict=True)])


def one_hot(label: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(label, K).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_are_weighed_by_the_shares_of_pixels(smoothing):
    rule = Smooth(smoothing) if smoothing else Hard()
    rule.setup(about(nn.Linear(1, 1)))
    given = mixed_by_hand(one_hot(LABEL), one_hot(OTHER))
    target = (1 - smoothing - smoothing / (K - 1)) * given + smoothing / (K - 1)
    mixture = Mixture(BATCH, SHARE)
    said = mixture.supervise(rule, BATCH.image, NOTHING, "fixed")
    torch.testing.assert_close(said.target, target)
    torch.testing.assert_close(mixture.attack_target(rule, "fixed"), given)
    assert said.label.tolist() == mixture.label.tolist() == [2, 2, 3, 3, 1]
    assert (said.weight, said.terms) == (None, ())


def test_what_depends_on_the_image_alone_stays_and_the_rest_is_weighed():
    rule = Teaching()
    rule.setup(about(nn.Linear(1, 1)))
    image = torch.randn(5, 1, 4, 4, generator=stream(1, "x"))
    said = Mixture(BATCH, SHARE).supervise(rule, image, NOTHING, "fixed")
    given = mixed_by_hand(one_hot(LABEL), one_hot(OTHER))
    torch.testing.assert_close(said.terms[0].target, given)
    torch.testing.assert_close(said.terms[1].target, image.flatten(1)[:, :K].softmax(1))
    assert [(term.coefficient, term.temperature) for term in said.terms] == [(0.5, 1.0), (0.5, 2.0)]
    torch.testing.assert_close(said.weight, mixed_by_hand(1 + LABEL / 10, 1 + OTHER / 10))
    torch.testing.assert_close(Mixture(BATCH, SHARE).attack_target(rule, "fixed"), 0.9 * given + 0.1 / K)


def test_where_nothing_is_mixed_a_rule_is_asked_once_and_its_answer_kept():
    rule = Teaching()
    rule.setup(about(nn.Linear(1, 1)))
    mixture, asked = Mixture(BATCH, None), []
    supervise = rule.supervise
    rule.supervise = lambda batch, *rest: asked.append(batch) or supervise(batch, *rest)
    mixture.supervise(rule, BATCH.image, NOTHING, "fixed")
    assert asked == [BATCH]
    assert mixture.label is LABEL


def test_a_whole_epoch_trains_on_the_published_loss(make_trainer):
    """lambda CE(f(x), y_a) + (1 - lambda) CE(f(x), y_b), by torch used directly; no attack, no dropout."""
    trainer = make_trainer(
        Hard(), PGDAT(), augment=AugmentSettings("none", cutmix=0.8), optim=OptimSettings(2, 16, lr=0.1)
    )
    trainer.step.attack = PGD(steps=0, start="none")
    for module in trainer.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net = copy.deepcopy(trainer.net).train()
    row: list[dict] = []
    trainer.fit(on_epoch=row.append)

    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, labels, losses, right = (
        trainer.train_data.take(torch.arange(48)).image,
        trainer.train_data.labels,
        [],
        0,
    )
    for rows in trainer.train_data.plan(seed=0, epoch=0).split(16):
        index, box = rows[:, 0], rows[:, 4:].tolist()
        x, lam = images[index].clone(), []
        for i, (top, bottom, left, right_side) in enumerate(box):
            x[i, :, top:bottom, left:right_side] = images[index[i - 1], :, top:bottom, left:right_side]
            lam.append(1 - (bottom - top) * (right_side - left) / 36)
        first, second, share = labels[index], labels[index.roll(1)], torch.tensor(lam)
        logits = net(x)
        both = [nn.functional.cross_entropy(logits, y, reduction="none") for y in (first, second)]
        loss = (share * both[0] + (1 - share) * both[1]).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
        right += int((logits.argmax(1) == torch.where(share >= 0.5, first, second)).sum())
    assert row[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert row[0]["train_robust"] == right / 48
    assert row[0]["target_entropy"] > 0


def test_the_attack_starts_from_the_mixed_image_and_climbs_from_the_mixed_label(make_trainer):
    trainer = make_trainer(Hard(), TRADES(), augment=AugmentSettings("none", cutmix=1.0))
    seen, attack = [], trainer.step.attack
    trainer.step.attack = lambda forward, image, target, *rest, **named: (
        seen.append((image, target)) or attack(forward, image, target, *rest, **named)
    )
    trainer.fit()
    rows = trainer.train_data.plan(seed=0, epoch=0)[:16]
    image, target = seen[0]
    assert torch.equal(image, trainer.train_data.batch(rows).image)
    share = trainer.train_data.share(rows)[:, None]
    label = one_hot(trainer.train_data.labels[rows[:, 0]])
    torch.testing.assert_close(target, share * label + (1 - share) * label.roll(1, 0))


@pytest.mark.parametrize(
    ("label", "objective", "named"),
    [(SGLR, PGDAT, "SGLR"), (Hard, Consistency, "Consistency")],
)
def test_rules_about_single_images_are_refused_before_a_folder_is_made(
    make_trainer, tmp_path, label, objective, named
):
    with pytest.raises(SettingError, match=rf"augment\.cutmix: got CutMix with {named}; accepted: 0: "):
        make_trainer(label(), objective(), augment=AugmentSettings(cutmix=0.5, pad=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("label", "objective", "augment"),
    [
        (Hard, PGDAT, {"policy": "randaugment", "cutout": 3, "cutmix": 0.5}),
        (SGLR, Consistency, {"policy": "autoaugment", "cutout": 2, "start": 0.5}),
    ],
)
def test_an_augmented_run_cut_and_continued_ends_in_the_same_bits(make_trainer, label, objective, augment):
    def trainer(folder):
        settings = AugmentSettings("crop-flip", pad=1, **augment)
        return make_trainer(label(), objective(), AWP(average=EMA()), folder=folder, augment=settings)

    train_whole_and_killed(trainer, (2, 3, 2))


def test_augmentation_changes_what_is_trained_and_nothing_else_of_a_run(make_trainer):
    """Same order, same validation images, other weights."""
    rows = {}
    for name, settings in (("plain", {}), ("cutout", {"cutout": 2}), ("policy", {"policy": "randaugment"})):
        trainer = make_trainer(
            Hard(),
            PGDAT(),
            folder=name,
            augment=AugmentSettings("crop-flip", pad=1, **settings),
            runtime=RuntimeSettings(device="cpu", threads=1),
        )
        rows[name] = [trainer.train_data.plan(seed=0, epoch=0)[:, :4], trainer]
        trainer.fit()
    for name in ("cutout", "policy"):
        assert torch.equal(rows[name][0], rows["plain"][0])
        pairs = zip(rows[name][1].net.parameters(), rows["plain"][1].net.parameters(), strict=True)
        assert not all(torch.equal(*pair) for pair in pairs)


def test_augmentation_that_starts_later_changes_no_epoch_before(make_trainer):
    """Of three epochs the first passes as without it."""
    losses = {}
    for name, settings in (("plain", {}), ("later", {"policy": "autoaugment", "cutout": 2, "start": 0.5})):
        trainer = make_trainer(
            Hard(), PGDAT(), folder=name, augment=AugmentSettings("crop-flip", pad=1, **settings)
        )
        trainer.fit()
        lines = (trainer.folder.path / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["later"][0] == losses["plain"][0]
    assert losses["later"][1] != losses["plain"][1]


@pytest.mark.parametrize(
    ("label", "augment"),
    [
        (Hard, {"policy": "randaugment", "cutout": 3, "cutmix": 0.5}),
        (SGLR, {"policy": "autoaugment"}),
    ],
)
def test_an_augmented_and_perturbed_step_can_be_captured_as_far_as_a_cpu_can_tell(
    make_trainer, label, augment
):
    """Nothing in it reads back to the host, makes a tensor of Python numbers or a shape that depends on data.
    The optimizer is left out: a GPU has another one."""
    trainer = make_trainer(label(), TRADES(), AWP(), augment=AugmentSettings("crop-flip", pad=1, **augment))
    rows = trainer.train_data.plan(seed=0, epoch=0)[:16]
    with as_on_a_device(trainer):
        for refined in ("hard", "refined") if label is SGLR else ("fixed",):
            phase = Phase(refined, "fixed", "perturbed")
            trainer.step._body(rows, phase)  # the first of a phase is a rehearsal, which may look
            with HostReads() as reads:
                trainer.step._body(rows, phase)
            assert reads.found == []
    with HostReads() as reads:
        torch.ones(2).sum().item()
        torch.arange(3)[torch.tensor([True, False, True])]
    assert reads.found == ["_local_scalar_dense", "lift_fresh", "index"]
