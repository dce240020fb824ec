from __future__ import annotations

import numpy as np
import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import Resident, Split, epoch_plan

PAD = 3


@pytest.fixture(params=["uint8", "float"])
def images(request: pytest.FixtureRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if request.param == "uint8":
        return torch.randint(0, 256, (40, 3, 6, 9), dtype=torch.uint8, generator=generator)
    return torch.rand(40, 3, 6, 9, generator=generator)


def naive(image: torch.Tensor, top: int, left: int, flip: int, mode: str) -> np.ndarray:
    """Pad, cut out, mirror: one image at a time, by NumPy."""
    pixels = image.numpy().astype(np.float64) / (255 if image.dtype == torch.uint8 else 1)
    padded = np.pad(
        pixels, ((0, 0), (PAD, PAD), (PAD, PAD)), mode="constant" if mode == "zero" else "reflect"
    )
    window = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return window[:, :, ::-1] if flip else window


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_one_gather_equals_padding_cutting_and_mirroring(
    images: torch.Tensor, mode: str, channels_last: bool
) -> None:
    labels = torch.arange(40) % 7
    data = Resident(Split(images, labels), "cpu", pad=PAD, pad_mode=mode, channels_last=channels_last)
    rows = epoch_plan(40, seed=0, epoch=0, augment="crop-flip", pad=PAD)
    corners = torch.tensor([[5, 0, 0, 0], [6, 0, 6, 1], [7, 6, 0, 1], [8, 6, 6, 0]])
    rows = torch.cat([rows, corners])
    batch = data.batch(rows)
    expected = np.stack([naive(images[i], *row, mode) for i, *row in rows.tolist()])
    np.testing.assert_allclose(batch.image.numpy(), expected, rtol=0, atol=1e-7)
    assert batch.image.dtype == torch.float32
    assert torch.equal(batch.index, rows[:, 0])
    assert torch.equal(batch.label, rows[:, 0] % 7)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.image.is_contiguous(memory_format=wanted)


def test_without_augmentation_the_plan_gives_the_stored_images(images: torch.Tensor) -> None:
    data = Resident(Split(images, torch.zeros(40, dtype=torch.int64)), "cpu", pad=PAD)
    rows = epoch_plan(40, seed=0, epoch=0, augment="none", pad=PAD)
    scale = 255 if images.dtype == torch.uint8 else 1
    assert torch.equal(data.batch(rows).image, images[rows[:, 0]].float() / scale)


@pytest.mark.parametrize("channels_last", [False, True])
def test_take_gives_the_images_as_they_are(images: torch.Tensor, channels_last: bool) -> None:
    labels, clean = torch.arange(40), torch.arange(40).flip(0)
    data = Resident(Split(images, labels, clean), "cpu", pad=PAD, channels_last=channels_last)
    index = torch.tensor([3, 39, 0, 3])
    batch = data.take(index)
    scale = 255 if images.dtype == torch.uint8 else 1
    assert torch.equal(batch.image, images[index].float() / scale)
    assert torch.equal(batch.label, index)
    assert (data.n, data.image_shape) == (40, (3, 6, 9))
    assert torch.equal(data.labels, labels)
    assert data.clean_labels is not None
    assert torch.equal(data.clean_labels, clean)


def test_no_padded_copy_is_kept() -> None:
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    data = Resident(Split(images, torch.zeros(10, dtype=torch.int64)), "cpu", pad=4, channels_last=True)
    held = sum(x.numel() * x.element_size() for x in vars(data).values() if isinstance(x, torch.Tensor))
    assert held < images.numel() + 10 * 8 + 1000


@pytest.mark.parametrize("pad", [-1, 6])
def test_padding_that_does_not_fit_the_image_is_refused(images: torch.Tensor, pad: int) -> None:
    with pytest.raises(
        SettingError, match=f"augment.pad: got {pad}; accepted: 0 to 5 pixels for images of 6x9"
    ):
        Resident(Split(images, torch.zeros(40, dtype=torch.int64)), "cpu", pad=pad)


def test_an_unknown_padding_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(SettingError, match=r"augment\.pad_mode: got wrap"):
        Resident(Split(images, torch.zeros(40, dtype=torch.int64)), "cpu", pad_mode="wrap")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_a_captured_graph_gives_the_batches_of_the_cpu(
    images: torch.Tensor, mode: str, channels_last: bool
) -> None:
    split = Split(images, torch.arange(40))
    rows = epoch_plan(40, seed=0, epoch=0, augment="crop-flip", pad=PAD)
    on_cpu = Resident(split, "cpu", pad=PAD, pad_mode=mode)
    on_gpu = Resident(split, "cuda", pad=PAD, pad_mode=mode, channels_last=channels_last)
    static = rows[:8].cuda()
    on_gpu.batch(static)  # outside the graph first, so that nothing is set up lazily inside
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = on_gpu.batch(static)
        clean = on_gpu.take(static[:, 0])
    for start in (8, 16, 32):
        static.copy_(rows[start : start + 8])
        graph.replay()
        expected = on_cpu.batch(rows[start : start + 8])
        torch.testing.assert_close(batch.image.cpu(), expected.image, rtol=0, atol=1e-7)
        assert torch.equal(batch.label.cpu(), expected.label)
        torch.testing.assert_close(
            clean.image.cpu(), on_cpu.take(rows[start : start + 8, 0]).image, rtol=0, atol=1e-7
        )
