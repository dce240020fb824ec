"""Streamed batches on a GPU, eager and captured; run with ``pytest -m gpu``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from picture_tools import encode

from softdefend import EMA, PGDAT, SGLR, OptimSettings
from softdefend.data import Augmented, AugmentSettings, DataSettings, load
from softdefend.data.upload import Uploader
from softdefend.training import RuntimeSettings
from tiny import tiny_net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def bundle(tmp_path):
    """A function that opens 90 gray images of 8x8 pixels of four classes."""
    draw = np.random.default_rng(0)
    for i in range(90):
        path = tmp_path / "photos" / f"class{i % 4}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw.integers(0, 256, (8, 8), dtype=np.uint8)))

    def make(residence, workers=2):
        place = {"cache": str(tmp_path / "cache"), "validation": 10, "workers": workers}
        return load(DataSettings(str(tmp_path / "photos"), residence=residence, image_size=8, **place))

    return make


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(("residence", "parts"), [("host", 1), ("stream", 1), ("stream", 2)])
def test_a_run_has_the_numbers_of_images_on_the_device(make_trainer, bundle, residence, parts, capture):
    runs = []
    for where in ("device", residence):
        trainer = make_trainer(
            SGLR(start=0),
            PGDAT(),
            EMA(),
            where,
            net=tiny_net(),
            data=bundle(where),
            optim=OptimSettings(epochs=2, batch_size=16, lr=0.1, drop_last=False, accumulate=parts),
            augment=AugmentSettings("crop-flip", pad=1, jitter=0.2),
            runtime=RuntimeSettings(device="cuda", deterministic=True, capture=capture, channels_last=True),
        )
        trainer.fit()
        runs.append(trainer)
    one, other = (run.net.state_dict() for run in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_batches_come_in_time_and_whole(bundle):
    """The host runs ahead of the device, and a batch must not overwrite one that is still in use."""
    data = Augmented(bundle("stream").train, "cuda", AugmentSettings("resized-crop-flip", scale=(0.3, 1.0)))
    own = Augmented(bundle("stream", 0).train, "cpu", AugmentSettings("resized-crop-flip", scale=(0.3, 1.0)))
    rows = data.plan(seed=0, epoch=0).split(8)
    data.expect(rows)
    busy, images = torch.rand(4096, 4096, device="cuda"), []
    for part in rows:
        data.load(part)
        busy = busy @ busy / 4096
        images.append(data.batch(part).image)
    own.expect([part.cpu() for part in rows])
    for part, image in zip(rows, images, strict=True):
        own.load(part.cpu())
        torch.testing.assert_close(image.cpu(), own.batch(part.cpu()).image)


def test_memory_is_written_again_only_after_its_copy():
    """The device begins each copy long after the host could have written the next ones."""
    upload = Uploader(torch.device("cuda"))
    copies = []
    for number in range(12):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        copies.append(upload((64, 1024), torch.uint8, lambda room, number=number: room.fill_(number)).clone())
    for number, copy in enumerate(copies):
        assert (copy == number).all()


@pytest.mark.parametrize("residence", ["host", "stream"])
def test_pixels_come_in_the_order_of_the_images(tmp_path, residence):
    """In color and not square; in one buffer for each size of batches, since a captured step reads it."""
    pictures = np.random.default_rng(0).integers(0, 256, (90, 7, 5, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        path = tmp_path / "photos" / "ab"[i // 45] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture))
    place = {"cache": str(tmp_path / "cache"), "validation": 10, "residence": residence, "workers": 2}
    train = load(DataSettings(str(tmp_path / "photos"), **place)).train
    expected, addresses = train.images[:].cuda(), {}
    data = Augmented(train, "cuda", AugmentSettings("none"))
    rows = data.plan(seed=0, epoch=0).split(40)
    for _ in range(2):
        data.expect(rows)
        for part in rows:
            data.load(part)
            _, pixels = data._loaded
            assert pixels.is_contiguous()
            assert torch.equal(pixels[0], expected[part[:, 0]])
            assert addresses.setdefault(len(part), pixels.data_ptr()) == pixels.data_ptr()
    assert len(addresses) == 2
