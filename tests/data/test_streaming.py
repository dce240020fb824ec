"""Images that stay on disk: the same pixels, the same batches, and no more memory than is stated."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_tools import encode
from PIL import Image

from softdefend.core.errors import SettingError
from softdefend.core.files import cache_folder
from softdefend.core.memory import TooLargeError
from softdefend.core.rng import stream
from softdefend.data import Augmented, AugmentSettings, DataSettings, load
from softdefend.data.describe import channel_stats, describe
from softdefend.data.encoded import RandomCrop
from softdefend.data.jitter import STEPS, draw_jitter, jitter
from softdefend.data.sources import encoded, read


@pytest.fixture(params=["folder", "parquet"])
def source(request, tmp_path, pictures, hub_folder) -> Path:
    """Nine training and three test images of 7x5 pixels in three classes."""
    if request.param == "parquet":
        return hub_folder
    for i, picture in enumerate(pictures):
        path = tmp_path / "photos" / ("train" if i < 9 else "test") / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture))
    return tmp_path / "photos"


def settings(source: Path, residence: str = "stream", **more) -> DataSettings:
    return DataSettings(str(source), residence=residence, **{"validation": 3, "workers": 0, **more})


def test_the_splits_are_those_of_decoded_images(source):
    """Images, labels, classes and clean labels; twice, the second time from the list."""
    noisy = {"noise": "symmetric", "noise_rate": 0.5}
    decoded = load(settings(source, "device", **noisy))
    for _ in range(2):
        streamed = load(settings(source, **noisy))
        assert (streamed.classes, streamed.name) == (decoded.classes, decoded.name)
        assert streamed.notes["residence"] == "stream"
        for part in ("train", "validation", "test"):
            ours, theirs = getattr(streamed, part), getattr(decoded, part)
            assert ours.images.shape == theirs.images.shape
            assert torch.equal(ours.images[:], theirs.images)
            assert torch.equal(ours.images[torch.tensor([1, 0])], theirs.images[[1, 0]])
            assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(streamed.train.clean_labels, decoded.train.clean_labels)
    assert channel_stats(streamed.train) == channel_stats(decoded.train)
    assert "5x7" in describe(streamed)


def test_a_fingerprint_tells_other_images_and_another_way_to_see_them(source, tmp_path):
    first = load(settings(source)).fingerprint
    assert load(settings(source)).fingerprint == first
    assert load(settings(source, image_size=4)).fingerprint != first
    assert (
        load(settings(source, image_size=4)).fingerprint
        != load(settings(source, image_size=4, center_share=1.0)).fingerprint
    )


EVERYTHING = AugmentSettings(
    "crop-flip", pad=1, jitter=0.4, policy="randaugment", cutout=2, cutmix=0.5, pad_mode="reflect"
)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("residence", ["stream", "host"])
def test_batches_are_those_of_images_on_the_device(source, residence, channels_last):
    """To the bit, in the order of the plan, also of its last, smaller batch."""
    ours = Augmented(load(settings(source, residence)).train, "cpu", EVERYTHING, channels_last=channels_last)
    theirs = Augmented(load(settings(source, "device")).train, "cpu", EVERYTHING, channels_last=channels_last)
    plans = [data.plan(seed=0, epoch=1, views=2) for data in (ours, theirs)]
    assert torch.equal(*plans)
    batches = plans[0].split(4)
    ours.expect(batches)
    for rows in batches:
        ours.load(rows)
        for view in (0, 1):
            one, other = ours.batch(rows, view), theirs.batch(rows, view)
            assert torch.equal(one.image, other.image)
            assert one.image.stride() == other.image.stride()
            assert torch.equal(one.label, other.label)
    index = torch.tensor([3, 1])
    assert torch.equal(ours.take(index).image, theirs.take(index).image)


@pytest.mark.parametrize("residence", ["stream", "host"])
def test_batches_by_way_of_a_device_are_the_same(source, residence):
    """A GPU arranges what it is given; here a CPU does."""

    def upload(shape, dtype, fill):
        room = torch.empty(shape, dtype=dtype)
        fill(room)
        return room

    made = []
    for way in (None, upload):
        data = Augmented(load(settings(source, residence)).train, "cpu", AugmentSettings("none"))
        data._upload = way
        rows = data.plan(seed=0, epoch=0)
        data.expect([rows])
        data.load(rows)
        made.append(data.batch(rows).image)
    assert torch.equal(*made)


@pytest.mark.parametrize("source", ["parquet"], indirect=True)
def test_processes_decode_what_one_would(source):
    """Two of them, with a new plan in the middle of an epoch, and random parts of the images."""
    augment = AugmentSettings("resized-crop-flip", scale=(0.3, 1.0))
    made = []
    for workers in (0, 2):
        data = Augmented(load(settings(source, image_size=6, workers=workers)).train, "cpu", augment)
        images = []
        for epoch, (first, last) in ((0, (0, 2)), (0, (1, 3)), (1, (0, 3))):
            batches = data.plan(seed=0, epoch=epoch, views=2).split(2)
            data.expect(batches[first:])
            for rows in batches[first:last]:
                data.load(rows)
                images += [data.batch(rows, view).image for view in (0, 1)]
        made.append(torch.stack(images))
        assert data.waited > 0
    assert torch.equal(*made)
    assert torch.equal(made[0][2], made[0][4])  # the batch that both plans of the first epoch have
    assert not torch.equal(made[0][0], made[0][1])  # two views


@pytest.fixture
def photos(tmp_path) -> Path:
    """100 images of noise, of several sizes, in two classes."""
    draw = np.random.default_rng(0)
    for i in range(100):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw.integers(0, 256, (*draw.integers(9, 30, 2), 3), np.uint8)))
    return tmp_path / "photos"


def naive_parts(data: Augmented, files: list[Path], rows: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Random parts, file by file, [b, c, 6, 6] in [0, 1]."""
    parts = []
    for row, seed in zip(rows.tolist(), seeds.tolist(), strict=True):
        with Image.open(files[row]) as image:
            box = data.crop.box(*image.size, seed)
            part = np.asarray(image.resize((6, 6), Image.Resampling.BILINEAR, box))
        parts.append(torch.from_numpy(part / np.float32(255)).permute(2, 0, 1))
    return torch.stack(parts)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("views", [1, 2])
def test_random_parts_are_those_of_a_naive_decoder(photos, monkeypatch, workers, views):
    """To the bit, in batches of several chunks; also where the processes are faster than who takes what they
    decoded: they must not write into it."""

    def copy_late(place, content):
        time.sleep(0.02)
        place[...] = content

    if workers:
        monkeypatch.setattr("softdefend.data.loader.np.copyto", copy_late)
    how = settings(photos, image_size=6, workers=workers, test_fraction=0.1)
    train = load(how).train
    data = Augmented(train, "cpu", AugmentSettings("resized-crop", scale=(0.3, 1.0)))
    table = train.images.decoder.table
    files = [photos / table.name(row) for row in train.images.rows.tolist()]
    plan = data.plan(seed=0, epoch=0, views=views)
    seeds = plan[:, -1:] if views == 1 else plan[:, [-2, -1]]
    data.expect(plan.split(45))
    for rows, seed in zip(plan.split(45), seeds.split(45), strict=True):
        data.load(rows)
        for view in range(views):
            expected = naive_parts(data, files, rows[:, 0], seed[:, view])
            assert torch.equal(data.batch(rows, view).image, expected)


def ramp(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green downwards, by one level a pixel."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(width), np.arange(height)[:, None]
    return picture


def ramp_folder(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    for i, size in enumerate(sizes):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(ramp(*size)))
    return folder


def sampled(start: float, stop: float, size: int) -> np.ndarray:
    """A ramp's levels at the centers of ``size`` pixels between two borders."""
    return start + (np.arange(size) + 0.5) * (stop - start) / size - 0.5


@pytest.mark.parametrize("residence", ["stream", "device"])
def test_the_middle_of_images_of_any_size_is_cut_out(tmp_path, residence):
    """Also of those that are turned: a ramp's levels say which pixels were seen."""
    sizes = [(200, 100), (100, 200), (64, 64), (240, 180)] * 4
    folder = ramp_folder(tmp_path / "photos", sizes)
    images = read(settings(folder, residence, image_size=20)).train.images
    by_folder = [*sizes[0::2], *sizes[1::2]]  # the order of the files
    for (width, height), image in zip(by_folder, images[:].numpy().astype(float), strict=True):
        side = 0.875 * min(width, height)
        for length, levels in ((width, image[0].mean(0)), (height, image[1].mean(1))):
            expected = sampled((length - side) / 2, (length + side) / 2, 20)
            np.testing.assert_allclose(levels[1:-1], expected[1:-1], atol=1.0)


def test_images_of_several_sizes_need_a_size(tmp_path):
    folder = ramp_folder(tmp_path / "photos", [(9, 9), (9, 9), (9, 9), (9, 8)] * 2)
    with pytest.raises(
        SettingError, match=r"b/03\.png of 9x8 pixels; accepted: images of one size .*image_size"
    ):
        load(settings(folder))


def test_random_parts_are_where_their_draw_puts_them(tmp_path):
    folder = ramp_folder(tmp_path / "photos", [(200, 120)] * 8)
    images, crop = load(settings(folder, image_size=16)).train.images, RandomCrop((0.2, 0.5), (0.5, 2.0))
    for draw in range(20):
        left, top, right, bottom = crop.box(200, 120, draw)
        image = next(images.decoder.parts(0, crop, [draw])).astype(float)
        np.testing.assert_allclose(image[0].mean(0)[1:-1], sampled(left, right, 16)[1:-1], atol=1.0)
        np.testing.assert_allclose(image[1].mean(1)[1:-1], sampled(top, bottom, 16)[1:-1], atol=1.0)


def test_random_parts_have_the_shares_and_ratios_that_are_asked_for():
    crop, (width, height) = RandomCrop((0.1, 0.4), (0.5, 2.0)), (300, 400)
    boxes = np.array([crop.box(width, height, draw) for draw in range(2000)], float)
    left, top, right, bottom = boxes.T
    assert (left.min(), top.min()) >= (0, 0)
    assert (right.max(), bottom.max()) <= (width, height)
    share, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert share.min() > 0.099
    assert share.max() < 0.401
    assert ratio.min() > 0.49
    assert ratio.max() < 2.05
    assert share.mean() == pytest.approx(0.25, abs=0.006)  # uniform
    assert np.log(ratio).mean() == pytest.approx(0.0, abs=0.03)
    place = left / np.maximum(width - (right - left), 1)
    assert place.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("size", "box"), [((100, 10), (43, 0, 57, 10)), ((10, 100), (0, 43, 10, 57))])
def test_an_image_without_such_a_part_gives_its_middle(size, box):
    """A strip of ten to one holds no part of nine tenths of its area that is nearly square."""
    assert RandomCrop((0.9, 1.0), (0.7, 1.4)).box(*size, 5) == box


def test_jitter_against_one_image_at_a_time():
    draw = stream(0, "test-jitter")
    images, draws = torch.rand(6, 3, 4, 5, generator=draw), draw_jitter(6, draw)
    assert draws.min() >= 0
    assert draws.max() <= STEPS
    for image, out, (b, c, s) in zip(images, jitter(images, draws, 0.5), draws / STEPS, strict=True):
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        x = (image * (0.5 + b)).clip(0, 1)
        level = (weights * x).sum(0).mean()
        x = ((0.5 + c) * x + (0.5 - c) * level).clip(0, 1)
        x = ((0.5 + s) * x + (0.5 - s) * (weights * x).sum(0)).clip(0, 1)
        torch.testing.assert_close(out, x)
    torch.testing.assert_close(jitter(images, draws, 0.0), images)


def test_a_damaged_image_is_named_when_the_list_is_made(source, tmp_path, pictures):
    folder = ramp_folder(tmp_path / "some", [(9, 9)] * 8)
    (folder / "a" / "02.png").write_bytes(b"no image")
    with pytest.raises(SettingError, match=r"a/02\.png \(not a known format\)"):
        load(settings(folder))
    left = load(settings(folder, skip_damaged=True))
    assert len(left.train) + len(left.validation) + len(left.test) == 7
    assert "1 of 8 images are damaged and left out: a/02.png" in left.notes["images"]


def test_processes_of_one_machine_share_its_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    images = load(settings(ramp_folder(tmp_path / "some", [(9, 9)] * 16), workers=None)).train.images
    assert images.workers == 11
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert images.workers == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_chunks_are_full_also_where_an_epoch_began_at_its_last_image(photos, workers):
    """A resumed run may; epochs of larger batches follow."""
    train = load(settings(photos, image_size=6, workers=workers, test_fraction=0.1)).train
    data = Augmented(train, "cpu", AugmentSettings("none"))
    plan = data.plan(seed=0, epoch=0)
    for batches in (plan[-1:].split(1), plan.split(45)):
        data.expect(batches)
        for rows in batches:
            data.load(rows)
            assert torch.equal(data.batch(rows).image, train.images[rows[:, 0]] / 255)
    assert max(len(chunk.rows) for chunk in data._loader._coming) == 32


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_lost_later_is_one_line(tmp_path, workers):
    folder = ramp_folder(tmp_path / "some", [(9, 9)] * 16)
    data = Augmented(load(settings(folder, workers=workers)).train, "cpu", AugmentSettings("flip"))
    rows = data.plan(seed=0, epoch=0)
    for path in folder.glob("*/*.png"):
        path.unlink()
    data.expect([rows])
    with pytest.raises(SettingError, match=r"data\.source: got .*\.png \(No such file or directory\)"):
        data.load(rows)


def test_too_little_shared_memory_is_one_line(source, monkeypatch):
    def refuse(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    data = Augmented(load(settings(source, workers=2)).train, "cpu", AugmentSettings("flip"))
    with pytest.raises(SettingError, match=r"data\.workers: got 2 \(unable to .*; accepted: fewer processes"):
        data.expect([data.plan(seed=0, epoch=0)])


def test_too_many_images_for_the_memory_stay_on_disk_unless_told_otherwise(source, monkeypatch):
    monkeypatch.setattr("softdefend.data.decode.available_memory", lambda: 1000)
    assert torch.equal(load(settings(source, "auto")).train.labels, load(settings(source)).train.labels)
    assert load(settings(source, "auto")).notes["residence"] == "stream"
    for residence in ("device", "host"):
        with pytest.raises(TooLargeError, match="which take"):
            load(settings(source, residence))


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(SettingError, match=r"data\.residence: got stream; accepted: auto, device or host"):
        load(DataSettings("digits", residence="stream"))
    train = load(DataSettings("digits", residence="host")).train
    with pytest.raises(SettingError, match=r"augment\.kind: got a resized crop of images that are not str"):
        Augmented(train, "cpu", AugmentSettings("resized-crop"))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"image_size": 0}, "data.image_size"),
        ({"center_share": 0.0}, "data.center_share"),
        ({"workers": -1}, "data.workers"),
        ({"residence": "disk"}, "data.residence"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_settings_are_refused(wrong, name):
    with pytest.raises(SettingError, match=name.replace(".", r"\.")):
        DataSettings("photos", **wrong)


def test_processes_that_start_together_list_the_images_once(source, monkeypatch):
    """And once more where a list was deleted."""
    made = []
    write = encoded.write_table

    def counted(path, *arguments):
        made.append(path.name)
        time.sleep(0.05)
        return write(path, *arguments)

    monkeypatch.setattr(encoded, "write_table", counted)
    with ThreadPoolExecutor(3) as pool:
        bundles = list(pool.map(lambda _: load(settings(source)), range(3)))
    assert len({bundle.fingerprint for bundle in bundles}) == 1
    assert len(made) == 2  # training and test images
    (made_test,) = (name for name in made if ".test." in name)
    next(cache_folder().glob(made_test)).unlink()
    assert load(settings(source)).fingerprint == bundles[0].fingerprint
    assert len(made) == 4


def test_a_disk_without_space_is_one_line(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"data\.cache"):
        load(settings(source, cache=str(tmp_path / "file" / "below")))


MEASURE = """
import sys, threading, time
import torch
from softdefend.data import Augmented, AugmentSettings, DataSettings, Resident, load
from softdefend.data.loader import Loader

def own():  # bytes that are no copies of files
    lines = open("/proc/self/status").read().splitlines()
    kinds = ("RssAnon", "RssShmem")
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))

torch.set_num_threads(1)
how = {"validation": 10, "workers": int(sys.argv[2]), "image_size": 160, "test_fraction": 0.01}
bundle = load(DataSettings(sys.argv[1], residence="stream", **how))
data = Augmented(bundle.train, "cpu", AugmentSettings("resized-crop-flip", scale=(0.5, 1.0)))
batches = data.plan(seed=0, epoch=0).split(8)
def first(bundle):  # of one image: what Python imports then is no image
    data = Augmented(bundle.train, "cpu", AugmentSettings("resized-crop-flip", scale=(0.5, 1.0)))
    data.expect([batches[0][:1]])
    data.load(batches[0][:1])
first(bundle)
peak, before, ended = 0, own(), False
def watch():
    global peak
    while not ended:
        peak = max(peak, own())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
data.expect(batches)
for rows in batches:
    data.load(rows)
ended = True
watcher.join()
print(peak - before, data._loader.bound(8), len(bundle.train) * 3 * 160 * 160)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_within_the_bound_on_a_set_far_larger(tmp_path, workers):
    """1,000 names of one photograph, 77 MB decoded, in a process of its own (hence slow): beside the bound
    some megabytes are the allocator's and torch's own."""
    photo = tmp_path / "photos" / "a" / "0.jpg"
    photo.parent.mkdir(parents=True)
    Image.fromarray(ramp(240, 200)).save(photo, quality=80)
    for i in range(1, 1000):
        path = photo.parent.parent / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        os.link(photo, path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "photos"), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, bound, whole = map(int, done.stdout.split())
    assert bound == (64 * workers + 3 * 8) * 3 * 160 * 160
    assert grown < bound + 8 * 2**20 < whole / 3
