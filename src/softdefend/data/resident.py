"""A split as one tensor on the device; a single gather crops and mirrors a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.data.base import Batch, Split


class Resident:
    """A split that lives on the device as it is stored (uint8: CIFAR-10's training set takes 150 MB).

    No padded copy is kept: the padding exists only in the index arithmetic. Neither method reads the device
    from the host, branches on data or changes shapes, so both can be captured in a CUDA graph.

    Args:
        split: the images and labels.
        device: where to keep them.
        pad: padding in pixels that the crop offsets of :meth:`batch` refer to.
        pad_mode: ``zero`` (black) or ``reflect`` (mirrored at the border, which is not repeated).
        channels_last: give images in ``torch.channels_last`` memory format.

    Raises:
        SettingError: an unknown ``pad_mode``, or padding that the image is too small for.
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
    ) -> None:
        n, c, h, w = split.images.shape
        if pad_mode not in ("zero", "reflect"):
            raise SettingError("augment.pad_mode", pad_mode, "zero or reflect")
        if not 0 <= pad < min(h, w):
            raise SettingError("augment.pad", pad, f"0 to {min(h, w) - 1} pixels for images of {h}x{w}")
        self.n = n
        self.image_shape = (c, h, w)
        self.labels = split.labels.to(device)
        self.clean_labels = None if split.clean_labels is None else split.clean_labels.to(device)
        self._pad, self._masked = pad, pad > 0 and pad_mode == "zero"
        self._channels_last = channels_last
        # Stored in the order in which batches are written, so that the gather reads runs of neighbors.
        images = split.images.permute(0, 2, 3, 1) if channels_last else split.images
        self._pixels = images.to(device).contiguous().view(-1)
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
        image = self._gather(index, y, x)
        if self._masked:
            image = image * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
        return Batch(index, image, self.labels[index])

    def share(self, plan_rows: Tensor) -> Tensor | None:
        """The share of its own pixels that each image keeps, [b] float32; None where no images are mixed.

        The rest is its partner's (see :func:`~softdefend.data.regions.partners`).
        """
        return None

    def take(self, index: Tensor) -> Batch:
        """Make the batch of images at ``index`` [b] int64, without augmentation."""
        y, x = self._rows.expand(len(index), -1), self._columns.expand(len(index), -1)
        return Batch(index, self._gather(index, y, x), self.labels[index])

    def to_layout(self, image: Tensor) -> Tensor:
        """``image`` in the memory format of batches."""
        order = torch.channels_last if self._channels_last else torch.contiguous_format
        return image.contiguous(memory_format=order)

    def _gather(self, index: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Pixel (y, x) of image ``index``: [b], [b, h], [b, w] to [b, c, h, w] float32 in [0, 1]."""
        c, h, w = self.image_shape
        if self._channels_last:
            at = (index[:, None] * h + y)[:, :, None] * w + x[:, None, :]  # [b, h, w]
            image = self._pixels.take(at[..., None] * c + self._channels).permute(0, 3, 1, 2)
        else:
            at = (index[:, None] * c + self._channels)[:, :, None] * h + y[:, None, :]  # [b, c, h]
            image = self._pixels.take(at[..., None] * w + x[:, None, None, :])
        return image.to(torch.float32).div(255) if image.dtype == torch.uint8 else image
