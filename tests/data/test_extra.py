"""Extra training images: what a batch holds, what rules with a memory do, exact resume; on digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from killed_runs import train_whole_and_killed
from softdefend.core.errors import SettingError
from softdefend.data import Augmented, AugmentSettings, DataSettings, Extra, Split, from_tensors, load
from softdefend.data.sources.digits import read_digits
from softdefend.labels import SAT, SGLR, Hard, Smooth
from softdefend.objectives import PGDAT, TE, TRADES
from softdefend.training import OptimSettings
from tiny import tiny_net

N, M = 40, 25
ORIGINAL = Split(torch.randint(0, 256, (N, 1, 6, 6), dtype=torch.uint8), torch.arange(N) % 4)
MORE = Split(torch.randint(0, 256, (M, 1, 6, 6), dtype=torch.uint8), (torch.arange(M) + 1) % 4)


@pytest.fixture(scope="module")
def halves():
    """Digits: 48 images to train on, and 300 others as extra ones."""
    digits = read_digits().train
    return from_tensors(
        digits.images[:120],
        digits.labels[:120],
        validation=20,
        test_fraction=0.4,
        extra_images=digits.images[900:1200],
        extra_labels=digits.labels[900:1200],
        extra_fraction=0.6,
    )


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(8, 0.7, 5), (10, 0.7, 7), (16, 0.1, 1), (6, 0.9, 5)]
)
def test_every_batch_has_its_share_and_no_original_image_comes_twice(size, fraction, count) -> None:
    data = Augmented(ORIGINAL, "cpu", AugmentSettings(pad=1), extra=Extra(MORE, fraction))
    assert data.extra is not None
    assert data.extra.count(size) == count
    steps = N // size
    rows = data.plan(seed=0, epoch=3, batches=(steps, size))
    assert len(rows) == steps * size
    original = [index for index in rows[:, 0].tolist() if index < N]
    assert len(original) == len(set(original)) == steps * (size - count)
    patterns = {tuple((part[:, 0] >= N).tolist()) for part in rows.split(size)}
    assert len(patterns) == 1
    (pattern,) = patterns
    assert sum(pattern) == count
    sums = np.cumsum(pattern)  # any part of a batch has its share, to one image
    assert all(abs(total - count * (place + 1) / size) < 1 for place, total in enumerate(sums))


def test_extra_images_are_those_of_the_other_source_drawn_evenly_with_replacement() -> None:
    data = Augmented(ORIGINAL, "cpu", AugmentSettings("none"), extra=Extra(MORE, 0.5))
    drawn = []
    for epoch in range(100):
        rows = data.plan(seed=0, epoch=epoch, batches=(5, 8))
        batch = data.batch(rows)
        for index, image, label in zip(rows[:, 0].tolist(), batch.image, batch.label.tolist(), strict=True):
            split, place = (ORIGINAL, index) if index < N else (MORE, index - N)
            assert torch.equal(image, split.images[place].float() / 255)
            assert label == int(split.labels[place])
        drawn += [index - N for index in rows[:, 0].tolist() if index >= N]
    assert len(drawn) == 100 * 5 * 4
    assert chisquare(np.bincount(drawn, minlength=M)).pvalue > 1e-3
    assert data.n == N
    assert torch.equal(data.labels, ORIGINAL.labels)


def test_a_run_without_extra_images_has_the_plan_it_always_had() -> None:
    plain = Augmented(ORIGINAL, "cpu", AugmentSettings(pad=1))
    rows = plain.plan(seed=0, epoch=3)
    assert torch.equal(rows, plain.plan(seed=0, epoch=3, batches=(5, 8)))


def test_eight_bits_and_floats_meet_as_floats() -> None:
    floats = Split(torch.rand(M, 1, 6, 6), MORE.labels)
    data = Augmented(ORIGINAL, "cpu", AugmentSettings("none"), extra=Extra(floats, 0.5))
    rows = data.plan(seed=0, epoch=0, batches=(2, 8))
    for index, image in zip(rows[:, 0].tolist(), data.batch(rows).image, strict=True):
        expected = ORIGINAL.images[index].float() / 255 if index < N else floats.images[index - N]
        assert torch.equal(image, expected)


@pytest.mark.parametrize(
    "rule", [SGLR(start=0.0, attack_label="refined"), SAT(start=0.0)], ids=["SGLR", "SAT"]
)
def test_a_memory_keeps_rows_of_original_images_and_extra_ones_have_their_label(
    make_trainer, halves, rule
) -> None:
    trainer = make_trainer(rule, PGDAT(), net=tiny_net(10), data=halves)
    seen = []
    supervise = rule.supervise

    def watched(batch, *more):
        seen.append(batch.index.clone())
        return supervise(batch, *more)

    rule.supervise = watched
    outer = trainer.recipe.objective.outer_loss
    beliefs = []
    trainer.recipe.objective.outer_loss = lambda predictions, batch, belief: (
        beliefs.append((batch, belief)) or outer(predictions, batch, belief)
    )
    trainer.fit()
    assert len(rule.memory.table) == len(halves.train)
    assert all(int(index.max()) < len(halves.train) for index in seen)
    assert {len(index) for index in seen} == {16 - 9}
    for (batch, belief), index in zip(beliefs, seen, strict=True):
        extra = batch.index >= len(halves.train)
        assert torch.equal(batch.index[~extra], index)
        assert torch.equal(belief.target[extra], torch.eye(10)[batch.label[extra]])
        refined = torch.eye(10)[batch.label[~extra]]
        assert not torch.allclose(belief.target[~extra], refined)
        if belief.weight is not None:
            assert torch.equal(belief.weight[extra], torch.ones(9))
            assert belief.weight.mean().item() == pytest.approx(1.0)


def test_a_batch_in_parts_has_the_same_rows_in_the_memory(make_trainer, halves) -> None:
    """Every part has its share of extra images, and rows of its own."""
    rule = SGLR(start=0.0)
    optim = OptimSettings(epochs=1, batch_size=16, lr=0.1, accumulate=3)
    trainer = make_trainer(rule, PGDAT(), net=tiny_net(10), data=halves, optim=optim)
    seen = []
    supervise = rule.supervise
    rule.supervise = lambda batch, *more: seen.append(batch.index.tolist()) or supervise(batch, *more)
    trainer.fit()
    plan = trainer.train_data.plan(seed=0, epoch=0, batches=(trainer.steps_per_epoch, 16))
    parts = [part for batch in plan.split(16) for part in batch.tensor_split(3)]
    expected = [[i for i in part[:, 0].tolist() if i < len(halves.train)] for part in parts]
    assert seen == expected
    assert {len(rows) for rows in seen} <= {2, 3}


@pytest.mark.parametrize("label", [SGLR(start=0.3), Smooth()], ids=["SGLR", "Smooth"])
def test_a_run_cut_anywhere_and_continued_ends_in_the_same_bits(make_trainer, halves, label) -> None:
    def start(folder):
        rule = SGLR(start=0.3) if isinstance(label, SGLR) else Smooth()
        return make_trainer(rule, TRADES(), None, folder, net=tiny_net(10), data=halves)

    whole, last = train_whole_and_killed(start, (2, 4))
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, last.net.state_dict()[name]), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"fraction": 0.05},
            r"data\.extra_fraction: got 0\.05, no image of a batch of 16; accepted: ",
        ),
        (
            {"objective": TE()},
            r"data\.extra: got extra images with TE; accepted: an objective",
        ),
    ],
    ids=["none", "TE"],
)
def test_what_extra_images_cannot_do_is_refused(make_trainer, halves, given, said) -> None:
    data = from_tensors(
        torch.zeros(80, 1, 8, 8),
        torch.arange(80) % 10,
        extra_images=torch.zeros(9, 1, 8, 8),
        extra_labels=torch.arange(9),
        extra_fraction=given.get("fraction", 0.5),
    )
    with pytest.raises(SettingError, match=said):
        make_trainer(Hard(), given.get("objective", PGDAT()), net=tiny_net(10), data=data)


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "nhw"])
def test_they_come_from_any_source(tmp_path, layout) -> None:
    digits = read_digits().train
    images = digits.images[:50].numpy()
    stored = {"nhwc": images.transpose(0, 2, 3, 1), "nchw": images, "nhw": images[:, 0]}[layout]
    path = tmp_path / "generated.npz"
    np.savez(path, image=stored, label=digits.labels[:50].numpy())
    bundle = load(DataSettings("digits", extra=str(path), extra_fraction=0.25))
    assert bundle.extra is not None
    assert bundle.extra.fraction == 0.25
    assert torch.equal(bundle.extra.split.images, digits.images[:50])
    assert torch.equal(bundle.extra.split.labels, digits.labels[:50])
    plain = load(DataSettings("digits"))
    assert bundle.fingerprint != plain.fingerprint
    assert torch.equal(bundle.train.images, plain.train.images)
    assert "50 images of generated, 0.25 of every batch" in str(bundle.notes["extra"])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"images": np.zeros((4, 8, 9), np.uint8), "labels": np.arange(4)},
            r"data\.extra: .*\[1, 8, 9\].*\[1, 8, 8",
        ),
        ({"images": np.zeros((12, 8, 8), np.uint8), "labels": np.arange(12)}, r"data\.extra: .*label 11 in"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, r"data\.extra: .*no array labels or label"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(4)}, r"data\.extra: .*labels: float64"),
        ({"images": np.array([{}]), "labels": np.arange(1)}, r"data\.extra: .*allow_pickle"),
    ],
    ids=["shape", "classes", "absent", "floats", "pickle"],
)
def test_a_source_that_does_not_fit_is_refused_in_one_line(tmp_path, arrays, said) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SettingError, match=said) as refusal:
        load(DataSettings("digits", extra=str(tmp_path / "x.npz")))
    assert "\n" not in str(refusal.value)


def test_damage_and_absence_are_one_line(tmp_path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and no more")
    for address in (tmp_path / "x.npz", tmp_path / "nowhere"):
        with pytest.raises(SettingError, match=r"^data\.extra: "):
            load(DataSettings("digits", extra=str(address)))


def test_classes_are_matched_by_name(tmp_path) -> None:
    from PIL import Image

    for folder, names in (("one", ("cat", "dog", "eel")), ("two", ("eel", "cat")), ("three", ("cat", "yak"))):
        for number, name in enumerate(names):
            (tmp_path / folder / name).mkdir(parents=True)
            for copy in range(6):
                color = (50 * number, 10 * copy, 0)
                Image.new("RGB", (8, 8), color).save(tmp_path / folder / name / f"{copy}.png")
    settings = {"validation": 3, "cache": str(tmp_path / "cache")}
    bundle = load(DataSettings(str(tmp_path / "one"), extra=str(tmp_path / "two"), **settings))
    assert bundle.extra is not None
    assert bundle.extra.split.labels.tolist() == [0] * 6 + [2] * 6  # cat, eel
    with pytest.raises(SettingError, match=r"^data\.extra: got the class yak in three; accepted: .*cat, dog"):
        load(DataSettings(str(tmp_path / "one"), extra=str(tmp_path / "three"), **settings))
