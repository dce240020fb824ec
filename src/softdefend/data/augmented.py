"""The training split with its augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data.augment import AugmentSettings, windows
from softdefend.data.base import Batch, Extra, Split
from softdefend.data.encoded import RandomCrop
from softdefend.data.jitter import draw_jitter, jitter
from softdefend.data.policies import (
    COLOR_SHAPE,
    augment,
    draw_autoaugment,
    draw_color_shape,
    draw_randaugment,
)
from softdefend.data.regions import (
    cutmix,
    cutout,
    draw_boxes,
    draw_centers,
    draw_erasures,
    draw_shifts,
    erase,
    keep,
    own_share,
)
from softdefend.data.resident import SEEDS, Resident

_BOX = 4


class Augmented(Resident):
    """A resident split whose batches are augmented as settings say, see :class:`AugmentSettings`.

    Everything random is drawn on the CPU for a whole epoch and stands in the rows of its plan, so that a
    batch is a function of its rows: it can be captured, and a resumed run makes the same ones.

    Args:
        split: the images and labels.
        device: where to keep them.
        settings: what to do.
        channels_last: give images in ``torch.channels_last`` memory format.
        extra: further images, of which every batch has a share.

    Raises:
        SettingError: padding, a cutout or a shift that the image is too small for.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device | str,
        settings: AugmentSettings,
        *,
        channels_last: bool = False,
        extra: Extra | None = None,
    ) -> None:
        h, w = split.images.shape[2:]
        self._shift = settings.pixels("crop_shift", h, w)
        self._cutout = settings.pixels("cutout", h, w)
        for name, value, most in (
            ("crop_shift", self._shift, min(h, w) - 1),
            ("cutout", self._cutout, max(h, w)),
        ):
            if value > most:
                accepted = f"0 to {most} pixels for images of {h}x{w}"
                raise SettingError(f"augment.{name}", getattr(settings, name), accepted)
        self._margin = self._shift or settings.margin
        super().__init__(
            split,
            device,
            pad=self._margin,
            pad_mode=settings.pad_mode,
            channels_last=channels_last,
            crop=RandomCrop(settings.scale, settings.ratio) if settings.resizes else None,
            extra=None if extra is None else extra.split,
        )
        self.extra = extra
        self.settings = settings
        layers = {"none": 0, "randaugment": settings.randaugment_n, "autoaugment": 2}
        self._layers = layers.get(settings.policy, 1)
        self.mixes = settings.cutmix > 0
        self._sizes = [
            _BOX * (self._shift > 0),
            2 * self._layers,
            2 * (self._cutout > 0),
            _BOX * (settings.erasing > 0),
            3 * (settings.jitter > 0),
            int(settings.resizes),
        ]
        """Columns of the plan for what is drawn for a view, kind by kind."""

    def plan(
        self,
        *,
        seed: int,
        epoch: int,
        views: int = 1,
        strong: bool = True,
        batches: tuple[int, int] | None = None,
    ) -> Tensor:
        """Draw the order and every augmentation of one epoch.

        The plan is [n, columns] int64: the columns of :func:`epoch_plan`; then for each view the box that a
        shift leaves, the policy's operations and levels, the cutout's center (y, x), the box that is erased,
        the jitter's three draws and the seed of the resized crop; then the CutMix box of the first view.
        Boxes are (top, bottom, left, right). What is switched off has no columns.

        Each kind of draw has a stream of its own, so that switching one on changes no other.

        Args:
            seed, epoch: position in the run (see :mod:`softdefend.core.rng`).
            views: independent augmentations of each image, >= 1.
            strong: whether policy, cutout and erasing are applied; if not, their columns hold values without
                effect.
            batches: how many there are, and images of each. With extra images the plan has as many rows: in
            each batch the same ones, evenly spread, are extra.
        """
        settings, (_, h, w) = self.settings, self.image_shape
        index = self._order(seed, epoch, batches)
        n = len(index)
        window = windows(n, seed=seed, epoch=epoch, augment=settings.kind, pad=self._margin, views=views)
        parts = [index[:, None], window]
        for view in range(views):

            def draws(name: str, suffix: str = f"/{view}" if view else "") -> torch.Generator:
                return stream(seed, name + suffix, epoch)

            if self._shift:
                offsets, box = draw_shifts(n, h, w, self._shift, draws("shift"))
                window[:, 3 * view : 2 + 3 * view] += offsets
                flipped = window[:, 2 + 3 * view, None] == 1
                parts.append(torch.where(flipped, _mirrored(box, w), box))
            applied = strong and not (settings.plain_first and views > 1 and view == 0)
            parts += self._strong_columns(n, draws, applied)
            if settings.jitter:
                parts.append(draw_jitter(n, draws("jitter")))
            if self.crop is not None:
                parts.append(torch.randint(0, SEEDS, (n, 1), generator=draws("resized-crop")))
        if self.mixes:
            boxes = stream(seed, "cutmix", epoch)
            parts.append(draw_boxes(n, h, w, settings.cutmix, settings.cutmix_alpha, boxes))
        return torch.cat(parts, dim=1).to(self._device)

    def _order(self, seed: int, epoch: int, batches: tuple[int, int] | None) -> Tensor:
        """Positions of the images of one epoch, [rows]."""
        order = torch.randperm(self.n, generator=stream(seed, "order", epoch))
        if self.extra is None or batches is None:
            return order
        steps, size = batches
        count = self.extra.count(size)
        place = torch.arange(size)
        is_extra = (place + 1) * count // size > place * count // size
        index = torch.empty(steps, size, dtype=torch.int64)
        index[:, ~is_extra] = order[: steps * (size - count)].view(steps, size - count)
        drawn = stream(seed, "extra", epoch)
        index[:, is_extra] = self.n + torch.randint(0, len(self.extra.split), (steps, count), generator=drawn)
        return index.flatten()

    def _strong_columns(
        self, n: int, draws: Callable[[str], torch.Generator], applied: bool
    ) -> Iterator[Tensor]:
        """The columns of policy, cutout and erasing for one view; without effect where they are not
        applied."""
        settings, (_, h, w) = self.settings, self.image_shape
        if self._layers:
            yield self._operations(n, draws("policy")).flatten(1) * applied  # 0 is no operation
        if self._cutout:
            centers = draw_centers(n, h, w, draws("cutout"))
            yield centers if applied else centers - 2 * max(h, w)  # out of the image
        if settings.erasing:
            erased = draw_erasures(n, h, w, settings.erasing, settings.erasing_area, draws("erasing"))
            yield erased * applied

    def _operations(self, n: int, draws: torch.Generator) -> Tensor:
        """The policy's operations and levels, [n, layers, 2]."""
        settings = self.settings
        if settings.policy == "randaugment":
            return draw_randaugment(n, settings.randaugment_n, settings.randaugment_m, draws)
        if settings.policy in COLOR_SHAPE:
            return draw_color_shape(n, settings.policy, draws)
        return draw_autoaugment(n, draws)

    def batch(self, plan_rows: Tensor, view: int = 0) -> Batch:
        """Make one view of the augmented batch for rows [b, columns] of :meth:`plan`, on the device.

        ``label`` is the image's own, also where CutMix gave it pixels of another.
        """
        batch = super().batch(plan_rows, view)
        image, columns = batch.image, self._drawn_for(plan_rows, view)
        kept, operations, center, erased, jittered, _ = torch.split(columns, self._sizes, dim=1)
        if self._shift:
            image = keep(image, kept)
        if self.settings.jitter:
            image = jitter(image, jittered, self.settings.jitter)
        if self._layers:
            image = augment(image, operations.reshape(-1, self._layers, 2))
        if self._cutout:
            image = cutout(image, center, self._cutout)
        if self.settings.erasing:
            image = erase(image, erased)
        if self.mixes:
            image = cutmix(image, plan_rows[:, -_BOX:])
        return replace(batch, image=self.to_layout(image))

    def share(self, plan_rows: Tensor) -> Tensor | None:
        return own_share(plan_rows[:, -_BOX:], *self.image_shape[1:]) if self.mixes else None

    def _views(self, plan_rows: Tensor) -> int:
        return (plan_rows.shape[1] - 1 - _BOX * self.mixes) // (3 + sum(self._sizes))

    def _drawn_for(self, plan_rows: Tensor, view: int) -> Tensor:
        """The columns of a view that are not those of :func:`epoch_plan`."""
        drawn = sum(self._sizes)
        first = 1 + 3 * self._views(plan_rows) + drawn * view
        return plan_rows[:, first : first + drawn]

    def _draws(self, plan_rows: Tensor) -> Tensor:
        if self.crop is None:
            return super()._draws(plan_rows)
        views = range(self._views(plan_rows))
        return torch.stack([self._drawn_for(plan_rows, view)[:, -1] for view in views])


def _mirrored(box: Tensor, w: int) -> Tensor:
    """Boxes [n, 4] of images of width w, as they are after a flip."""
    top, bottom, left, right = box.unbind(dim=1)
    return torch.stack([top, bottom, w - right, w - left], dim=1)
