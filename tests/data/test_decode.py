from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from picture_tools import encode, planes
from PIL import ExifTags, Image, ImageOps

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.decode import decode


def decoded(encoded: list[bytes], *more: Any) -> np.ndarray:
    return decode(len(encoded), encoded.__getitem__, lambda i: f"picture {i}", "test", *more).numpy()


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


def sixteen(pixels: np.ndarray, kind: str) -> bytes:
    """An image of 16 bits per channel, written by hand where Pillow cannot."""
    height, width, channels = pixels.shape
    if kind == "PPM":
        magic = {1: b"P5", 3: b"P6"}[channels]
        return b"%s %d %d 65535\n" % (magic, width, height) + pixels.astype(">u2").tobytes()

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_refused_or_scaled(kind: str, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (4, 5, channels), dtype=np.uint16)
    data = sixteen(pixels, kind)
    with pytest.raises(
        SettingError,
        match=r"picture 0 of (mode I.*|16 bits per channel); accepted: .*data\.sixteen_bit scale",
    ):
        decoded([data])
    scaled = decoded([data], DataSettings(sixteen_bit="scale"))
    assert scaled.dtype == np.uint8
    # The upper byte; Pillow rounds those of PPM.
    assert np.abs(scaled - planes(pixels[None]) / 257).max() <= 1
    if kind == "PNG":
        np.testing.assert_array_equal(scaled, planes(pixels[None]) >> 8)


def test_sixteen_bits_of_other_formats_are_seen() -> None:
    gray = np.random.default_rng(0).integers(0, 2**16, (8, 9), dtype=np.uint16)
    for kind in ("TIFF", "JPEG2000"):
        data = encode(gray, kind)
        with pytest.raises(SettingError, match="of mode I;16"):
            decoded([data])
        np.testing.assert_array_equal(decoded([data], DataSettings(sixteen_bit="scale"))[0, 0], gray >> 8)
    color = encode(np.zeros((8, 9, 3), np.uint8), "JPEG2000")
    assert decoded([color]).shape == (1, 3, 8, 9)
    at = color.index(b"\xff\x4f\xff\x51") + 42
    with pytest.raises(SettingError, match="of 16 bits per channel"):
        decoded([color[:at] + b"\x0f" + color[at + 1 :]])


def test_floats_are_refused_however() -> None:
    data = encode(np.ones((4, 4), np.float32), "TIFF")
    with pytest.raises(SettingError, match="picture 0 of mode F; accepted: images of 8 bits per channel"):
        decoded([data], DataSettings(sixteen_bit="scale"))


def test_of_gray_and_color_the_setting_decides_and_what_changes_is_said(pictures: np.ndarray) -> None:
    mixed = [encode(picture if i % 3 else picture[:, :, 0]) for i, picture in enumerate(pictures)]
    remarks: list[str] = []
    assert decoded(mixed, None, None, remarks).shape == (12, 1, 5, 7)
    assert remarks == ["8 of 12 images are in color and were made gray, as picture 0 is"]
    assert decoded(mixed[1:], None, None, remarks).shape == (11, 3, 5, 7)
    assert remarks[1:] == ["3 of 11 images are gray and were made in color, as picture 0 is"]
    as_gray = [np.asarray(Image.open(io.BytesIO(data)).convert("L"))[None] for data in mixed]
    np.testing.assert_array_equal(decoded(mixed, DataSettings(channels="gray")), np.stack(as_gray))
    as_rgb = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in mixed]
    found = decoded(mixed, DataSettings(channels="rgb"), None, remarks)
    np.testing.assert_array_equal(found, planes(np.stack(as_rgb)))
    assert len(remarks) == 2


def test_all_damaged_images_are_named_at_once() -> None:
    encoded = [encode(np.full((64, 64, 3), i % 256, np.uint8)) for i in range(600)]
    for bad in (0, 300, 599):
        encoded[bad] = b"x"
    with pytest.raises(SettingError) as caught:
        decoded(encoded)
    reason = "(not a known format)"
    assert caught.value.given == (
        f"3 damaged images: picture 0 {reason}, picture 300 {reason}, picture 599 {reason}"
    )
    assert "data.skip_damaged" in caught.value.accepted
    skipped, remarks = list[int](), list[str]()
    found = decoded(encoded, DataSettings(skip_damaged=True), skipped, remarks)
    assert skipped == [0, 300, 599]
    assert found[:, 0, 0, 0].tolist() == [i % 256 for i in range(600) if i not in skipped]
    assert remarks == ["3 of 600 images are damaged and left out: picture 0, picture 300, picture 599"]


def test_where_all_are_damaged_nothing_is_left_to_skip_to() -> None:
    with pytest.raises(SettingError, match="got 3 damaged images: picture 0"):
        decoded([b"x"] * 3, DataSettings(skip_damaged=True), [], [])
    with pytest.raises(SettingError, match=r"got 150 damaged images: .*, picture 99 \(.*\) and 50 more;"):
        decoded([b"x"] * 150)


def test_images_beyond_memory_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encode(np.zeros((9000, 9000), np.uint8))
    monkeypatch.setattr("softdefend.data.decode.available_memory", lambda: 16 * 10**9)
    read: list[int] = []

    def content(i: int) -> bytes:
        read.append(i)
        return large

    message = (
        "data.source: got 420 images of 9000x9000 pixels and 1 channel, which take 34.02 GB of memory, and "
        "as much again when they are split; accepted: images that fit into the 16 GB that are free"
    )
    with pytest.raises(SettingError, match=f"^{re.escape(message)}"):
        decode(420, content, str, "test")
    assert read == [0]
