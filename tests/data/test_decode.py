from __future__ import annotations

import io
import re

import numpy as np
import pytest
from picture_tools import encode, planes
from PIL import ExifTags, Image, ImageOps

from softdefend.core.errors import SettingError
from softdefend.data.decode import decode


def decoded(encoded: list[bytes]) -> np.ndarray:
    return decode(len(encoded), encoded.__getitem__, lambda i: f"picture {i}", "test").numpy()


def test_lossless_images_come_back_as_they_were(pictures: np.ndarray) -> None:
    np.testing.assert_array_equal(decoded([encode(picture) for picture in pictures]), planes(pictures))


def test_many_large_images_keep_their_order_on_several_threads() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (600, 1, 1, 3), dtype=np.uint8)
    large = np.broadcast_to(pictures, (600, 64, 65, 3))
    np.testing.assert_array_equal(decoded([encode(picture) for picture in large]), planes(large))


def test_jpegs_equal_pillows(pictures: np.ndarray) -> None:
    encoded = [encode(picture, "JPEG") for picture in pictures]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
    np.testing.assert_array_equal(decoded(encoded), planes(expected))


def test_grey_images_have_one_channel_and_set_the_mode_of_the_rest(pictures: np.ndarray) -> None:
    gray = pictures[:, :, :, 0]
    mixed = [*(encode(picture) for picture in gray), encode(np.repeat(gray[:1, :, :, None], 3, axis=3)[0])]
    out = decoded(mixed)
    assert out.shape == (13, 1, 5, 7)
    np.testing.assert_array_equal(out[:12, 0], gray)
    np.testing.assert_array_equal(out[12, 0], gray[0])


def test_palette_and_transparent_images_become_rgb(pictures: np.ndarray) -> None:
    opaque = np.concatenate([pictures, np.full((12, 5, 7, 1), 255, np.uint8)], axis=3)
    out = decoded([encode(picture) for picture in opaque])
    np.testing.assert_array_equal(out, planes(pictures))


@pytest.mark.parametrize("bad", [0, 1, 11])
@pytest.mark.parametrize("kind", ["noise", "cut", "empty"])
def test_an_image_that_cannot_be_decoded_is_named(pictures: np.ndarray, bad: int, kind: str) -> None:
    encoded = [encode(picture, "PNG") for picture in pictures]
    encoded[bad] = {"noise": b"no image at all", "cut": encoded[bad][:-40], "empty": b""}[kind]
    with pytest.raises(
        SettingError, match=rf"^data.source: got picture {bad} \(.*images that can be decoded$"
    ):
        decoded(encoded)


def test_the_first_bad_image_of_many_is_the_one_named() -> None:
    encoded = [encode(np.zeros((64, 64, 3), np.uint8))] * 2000
    for bad in (1999, 1500, 700):
        encoded[bad] = b"x"
    with pytest.raises(SettingError, match="picture 700 "):
        decoded(encoded)


def test_sizes_that_differ_are_refused_by_name(pictures: np.ndarray) -> None:
    encoded = [encode(picture) for picture in pictures]
    encoded[4] = encode(np.zeros((7, 5, 3), np.uint8))
    message = "picture 4 of 5x7 pixels; accepted: images of one size (7x5, as picture 0)"
    with pytest.raises(SettingError, match=re.escape(message)):
        decoded(encoded)


def test_sixteen_bits_are_refused_rather_than_clipped() -> None:
    with pytest.raises(SettingError, match="picture 0 of mode I;16; accepted: images of 8 bits per channel"):
        decoded([encode(np.full((4, 4), 40_000, np.uint16))])


def oriented(pixels: np.ndarray, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(pixels, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_orientation_says(
    pictures: np.ndarray, orientation: int, kind: str
) -> None:
    data = oriented(pictures[0], orientation, kind)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (upright.shape[:2] == (7, 5)) == (orientation >= 5)
    np.testing.assert_array_equal(decoded([data]), planes(upright[None]))
    if kind != "JPEG":
        turned = {1: pictures[0], 3: pictures[0][::-1, ::-1], 6: np.rot90(pictures[0], -1)}
        np.testing.assert_array_equal(upright, turned.get(orientation, upright))


def test_sizes_are_those_of_the_upright_images(pictures: np.ndarray) -> None:
    sideways = [encode(pictures[0]), oriented(np.rot90(pictures[1]), 6, "PNG")]
    np.testing.assert_array_equal(decoded(sideways), planes(pictures[:2]))
    message = "picture 1 of 5x7 pixels; accepted: images of one size (7x5, as picture 0)"
    with pytest.raises(SettingError, match=re.escape(message)):
        decoded([encode(pictures[0]), oriented(pictures[1], 6, "PNG")])


def test_damaged_tags_leave_an_image_as_it_is(pictures: np.ndarray) -> None:
    data = encode(pictures[0], "PNG", exif=b"Exif\x00\x00no tags at all")
    np.testing.assert_array_equal(decoded([data]), planes(pictures[:1]))
