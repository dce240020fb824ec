"""A split on the device, or its batches brought there; a single gather crops and mirrors a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.data.base import Batch, Split
from softdefend.data.encoded import EncodedImages, RandomCrop
from softdefend.data.loader import Loader
from softdefend.data.settings import Residence
from softdefend.data.upload import Uploader

_SHARE = 0.5
"""Of a GPU's free memory that images take at most where ``data.residence`` is auto."""
SEEDS = 2**62
"""Of the random parts of images: below this."""


class Resident:
    """A split that lives on the device as it is stored (uint8: CIFAR-10's training set takes 150 MB), or
    whose batches are brought there from main memory or from encoded files: :meth:`load` does that for a step,
    which then finds the same pixels as if all were there.

    No padded copy is kept: the padding exists only in the index arithmetic. :meth:`batch` does not read the
    device from the host, branch on data or change shapes, so it can be captured in a CUDA graph.

    Args:
        split: the images and labels.
        device: where to keep them.
        pad: padding in pixels that the crop offsets of :meth:`batch` refer to.
        pad_mode: ``zero`` (black) or ``reflect`` (mirrored at the border, which is not repeated).
        channels_last: give images in ``torch.channels_last`` memory format.
        crop: train on random parts of the images.
        extra: further images, whose positions follow those of the split. ``n`` and ``labels`` are the split's
            alone.

    Raises:
        SettingError: an unknown ``pad_mode``, random parts of images that are not streamed, or padding that
            the image is too small for.
    """

    mixes: bool = False
    """Whether :meth:`batch` mixes images, and :meth:`share` says how much."""

    def __init__(
        self,
        split: Split,
        device: torch.device | str,
        *,
        pad: int = 0,
        pad_mode: str = "zero",
        channels_last: bool = False,
        crop: RandomCrop | None = None,
        extra: Split | None = None,
    ) -> None:
        n, c, h, w = split.images.shape
        if pad_mode not in ("zero", "reflect"):
            raise SettingError("augment.pad_mode", pad_mode, "zero or reflect")
        if not 0 <= pad < min(h, w):
            raise SettingError("augment.pad", pad, f"0 to {min(h, w) - 1} pixels for images of {h}x{w}")
        self.n = n
        self.image_shape = (c, h, w)
        self.labels = split.labels.to(device)
        self.has_extra = extra is not None
        self._labels = self.labels if extra is None else torch.cat([self.labels, extra.labels.to(device)])
        self.clean_labels = None if split.clean_labels is None else split.clean_labels.to(device)
        self._pad, self._masked = pad, pad > 0 and pad_mode == "zero"
        self._channels_last = channels_last
        self._device, self.crop = torch.device(device), crop
        images = split.images if extra is None else _joined(split.images, extra.images)
        self._images: Tensor | EncodedImages | None = images
        self._pixels: Tensor | None = None
        if isinstance(images, Tensor) and self._has_room(images, split.residence):
            self._images, self._pixels = None, self._arranged(images)
        if crop is not None and not isinstance(split.images, EncodedImages):
            given = "a resized crop of images that are not streamed"
            raise SettingError("augment.kind", given, "crop or crop-flip, or data.residence stream")
        self._loader: Loader | None = None
        self._buffers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._loaded: tuple[Tensor, Tensor] | None = None
        self._upload = Uploader(self._device) if self._device.type == "cuda" else None
        self._rows = torch.arange(h, device=device)
        self._columns = torch.arange(w, device=device)
        self._channels = torch.arange(c, device=device)

    def batch(self, plan_rows: Tensor, view: int = 0) -> Batch:
        """Make one view of the augmented batch for [b, 1 + 3 v] int64 rows of :func:`epoch_plan`."""
        _, h, w = self.image_shape
        index = plan_rows[:, 0]
        top, left, flip = plan_rows[:, 1 + 3 * view : 4 + 3 * view].unbind(dim=1)
        x = torch.where(flip[:, None] == 1, w - 1 - self._columns, self._columns)  # [b, w]
        x = x + left[:, None] - self._pad
        y = self._rows + top[:, None] - self._pad  # [b, h]
        inside_y, inside_x = (y >= 0) & (y < h), (x >= 0) & (x < w)
        # Reflecting gives a valid address for outside pixels in either mode; zero mode masks them later.
        y = (h - 1) - ((h - 1) - y.abs()).abs()
        x = (w - 1) - ((w - 1) - x.abs()).abs()
        pixels, place = self._pixels_of(index, view)
        image = self._gather(pixels, place, y, x)
        if self._masked:
            image = image * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
        return Batch(index, image, self._labels[index])

    def share(self, plan_rows: Tensor) -> Tensor | None:
        """The share of its own pixels that each image keeps, [b] float32; None where no images are mixed.

        The rest is its partner's (see :func:`~softdefend.data.regions.partners`).
        """
        return None

    def take(self, index: Tensor) -> Batch:
        """Make the batch of images at ``index`` [b] int64, without augmentation."""
        y, x = self._rows.expand(len(index), -1), self._columns.expand(len(index), -1)
        pixels, place = self._pixels, index
        if pixels is None:
            assert self._images is not None
            pixels, place = (
                self._arranged(self._images[index.cpu()]),
                torch.arange(len(index), device=index.device),
            )
        return Batch(index, self._gather(pixels, place, y, x), self._labels[index])

    def expect(self, batches: Sequence[Tensor]) -> None:
        """Say which rows of the plan come next, batch by batch, so that streamed images are decoded ahead."""
        if not isinstance(self._images, EncodedImages):
            return
        if self._loader is None:
            self._loader = Loader(self._images, self.crop)
        rows = torch.split(torch.cat([*batches]).cpu(), [len(batch) for batch in batches]) if batches else ()
        self._loader.expect([(own[:, 0], self._draws(own)) for own in rows])

    def load(self, plan_rows: Tensor) -> None:
        """Bring the pixels of a step's batch to the device, if they are not there; :meth:`batch` takes rows
        of it. Streamed batches come in the order in which they are expected. The host is two steps ahead of
        the device at most."""
        if self._images is None:
            return
        index, pixels = self._loaded = self._buffers_for(plan_rows)
        index.copy_(plan_rows[:, 0])
        if self._loader is not None:
            self._fill(pixels.permute(0, 1, 3, 4, 2), self._loader.fill)
            return
        images, rows = self._images, plan_rows[:, 0].cpu()
        assert isinstance(images, Tensor)
        self._fill(pixels[0], lambda room: torch.index_select(images, 0, rows, out=room))

    def _buffers_for(self, plan_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the positions [b] and the pixels [views, b, c, h, w] of a batch, the same for all of its
        size."""
        assert self._images is not None
        size = (1 if self._loader is None else self._loader.views, len(plan_rows))
        if size not in self._buffers:
            shape, dtype = (*size, *self.image_shape), self._images.dtype
            pixels = torch.empty(shape, dtype=dtype, device=self._device)
            self._buffers[size] = plan_rows[:, 0].clone(), pixels
        return self._buffers[size]

    def _fill(self, place: Tensor, fill: Callable[[Tensor], object]) -> None:
        """Let ``fill`` write into a tensor on the device: on a GPU by way of pinned memory, in the order of
        ``place``'s dimensions."""
        if self._upload is None:
            fill(place)
        else:
            place.copy_(self._upload(place.shape, place.dtype, fill))

    @property
    def waited(self) -> float | None:
        """Seconds for which streamed batches were not ready in time since :meth:`expect`; None where none are
        streamed."""
        return None if self._loader is None else self._loader.waited

    def _draws(self, plan_rows: Tensor) -> Tensor:
        """Seeds of the random parts [views, b] in rows of a plan; [0, b] where there are none."""
        return plan_rows.new_empty(0, len(plan_rows))

    def _has_room(self, images: Tensor, residence: Residence) -> bool:
        """Whether all images are to lie on the device."""
        if residence != "auto" or self._device.type != "cuda":
            return residence != "host"
        free, _ = torch.cuda.mem_get_info(self._device)
        return images.numel() * images.element_size() <= _SHARE * free

    def _pixels_of(self, index: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """Pixels on the device in one row, and the place of each image of a batch among them."""
        if self._pixels is not None:
            return self._pixels, index
        assert self._loaded is not None
        loaded, pixels = self._loaded
        place = (index[:, None] == loaded).int().argmax(dim=1)
        return self._arranged(pixels[view if self.crop is not None else 0]), place

    def _arranged(self, images: Tensor) -> Tensor:
        """Images in one row on the device, in the order in which batches are written, so that a gather reads
        runs of neighbors."""
        images = images.permute(0, 2, 3, 1) if self._channels_last else images
        return images.to(self._device).contiguous().view(-1)

    def to_layout(self, image: Tensor) -> Tensor:
        """``image`` in the memory format of batches."""
        order = torch.channels_last if self._channels_last else torch.contiguous_format
        return image.contiguous(memory_format=order)

    def _gather(self, pixels: Tensor, index: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Pixel (y, x) of image ``index`` among ``pixels``: [b], [b, h], [b, w] to [b, c, h, w] float32 in
        [0, 1]."""
        c, h, w = self.image_shape
        if self._channels_last:
            at = (index[:, None] * h + y)[:, :, None] * w + x[:, None, :]  # [b, h, w]
            image = pixels.take(at[..., None] * c + self._channels).permute(0, 3, 1, 2)
        else:
            at = (index[:, None] * c + self._channels)[:, :, None] * h + y[:, None, :]  # [b, c, h]
            image = pixels.take(at[..., None] * w + x[:, None, None, :])
        return image.to(torch.float32).div(255) if image.dtype == torch.uint8 else image


def _joined(images: Tensor | EncodedImages, extra: Tensor | EncodedImages) -> Tensor:
    """One after the other: both in 8 bits, or both as float32 in [0, 1]."""
    assert isinstance(images, Tensor)
    assert isinstance(extra, Tensor)
    parts = [images, extra]
    if images.dtype != extra.dtype:
        parts = [part.float() / 255 if part.dtype == torch.uint8 else part for part in parts]
    return torch.cat(parts)
