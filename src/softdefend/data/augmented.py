"""The training split with its augmentation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data.augment import AugmentSettings, epoch_plan
from softdefend.data.base import Batch, Split
from softdefend.data.policies import augment, draw_autoaugment, draw_randaugment
from softdefend.data.regions import cutmix, cutout, draw_boxes, draw_centers, own_share
from softdefend.data.resident import Resident

_BOX = 4


class Augmented(Resident):
    """A resident split whose batches are augmented as settings say: crop, flip, policy, cutout, CutMix.

    Everything random is drawn on the CPU for a whole epoch and stands in the rows of its plan, so that a
    batch is a function of its rows: it can be captured, and a resumed run makes the same ones.

    Args:
        split: the images and labels.
        device: where to keep them.
        settings: what to do.
        channels_last: give images in ``torch.channels_last`` memory format.

    Raises:
        SettingError: padding or a cutout that the image is too small for.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device | str,
        settings: AugmentSettings,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            split, device, pad=settings.margin, pad_mode=settings.pad_mode, channels_last=channels_last
        )
        _, h, w = self.image_shape
        self._cutout = int(settings.cutout * min(h, w) if settings.cutout < 1 else settings.cutout)
        if self._cutout > max(h, w):
            accepted = f"0 to {max(h, w)} pixels for images of {h}x{w}"
            raise SettingError("augment.cutout", settings.cutout, accepted)
        self.settings, self._device = settings, device
        self._layers = {"none": 0, "randaugment": settings.randaugment_n, "autoaugment": 2}[settings.policy]
        self.mixes = settings.cutmix > 0

    def plan(self, *, seed: int, epoch: int, views: int = 1, strong: bool = True) -> Tensor:
        """Draw the order and every augmentation of one epoch.

        The plan is [n, columns] int64: the columns of :func:`epoch_plan`, then for each view the policy's
        operations and levels and the cutout's center (y, x), then the CutMix box (top, bottom, left, right)
        of the first view. What is switched off has no columns.

        Each kind of draw has a stream of its own, so that switching one on changes no other.

        Args:
            seed, epoch: position in the run (see :mod:`softdefend.core.rng`).
            views: independent augmentations of each image, >= 1.
            strong: whether policy and cutout are applied; if not, their columns hold values without effect.
        """
        settings, (_, h, w) = self.settings, self.image_shape
        parts = [
            epoch_plan(
                self.n, seed=seed, epoch=epoch, augment=settings.kind, pad=settings.margin, views=views
            )
        ]
        for view in range(views):
            suffix = f"/{view}" if view else ""
            if settings.policy != "none":
                draws = stream(seed, f"policy{suffix}", epoch)
                chosen = (
                    draw_autoaugment(self.n, draws)
                    if settings.policy == "autoaugment"
                    else draw_randaugment(self.n, settings.randaugment_n, settings.randaugment_m, draws)
                )
                parts.append(chosen.flatten(1) * strong)  # 0 is no operation
            if self._cutout:
                centers = draw_centers(self.n, h, w, stream(seed, f"cutout{suffix}", epoch))
                parts.append(centers if strong else centers - 2 * max(h, w))  # out of the image
        if self.mixes:
            boxes = stream(seed, "cutmix", epoch)
            parts.append(draw_boxes(self.n, h, w, settings.cutmix, settings.cutmix_alpha, boxes))
        return torch.cat(parts, dim=1).to(self._device)

    def batch(self, plan_rows: Tensor, view: int = 0) -> Batch:
        """Make one view of the augmented batch for rows [b, columns] of :meth:`plan`, on the device.

        ``label`` is the image's own, also where CutMix gave it pixels of another.
        """
        batch = super().batch(plan_rows, view)
        image = batch.image
        drawn = 2 * self._layers + 2 * (self._cutout > 0)
        box = _BOX * self.mixes
        views = (plan_rows.shape[1] - 1 - box) // (3 + drawn)
        columns = plan_rows[:, 1 + 3 * views + drawn * view :][:, :drawn]
        if self._layers:
            image = augment(image, columns[:, : 2 * self._layers].reshape(-1, self._layers, 2))
        if self._cutout:
            image = cutout(image, columns[:, -2:], self._cutout)
        if self.mixes:
            image = cutmix(image, plan_rows[:, -_BOX:])
        return replace(batch, image=self.to_layout(image))

    def share(self, plan_rows: Tensor) -> Tensor | None:
        return own_share(plan_rows[:, -_BOX:], *self.image_shape[1:]) if self.mixes else None
