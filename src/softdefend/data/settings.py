"""Every data setting of a run, with its meaning; the command line is generated from this class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields

Noise = Literal["none", "symmetric", "asymmetric", "file"]
Channels = Literal["first", "gray", "rgb"]
SixteenBit = Literal["refuse", "scale"]
Residence = Literal["auto", "device", "host", "stream"]


@dataclass(frozen=True)
class DataSettings:
    """Which images, how they are split, and what label noise is added."""

    source: str = "digits"
    """Where images come from: "digits" (scikit-learn's, built in), a Parquet file or a folder of them in hub
    layout, "hf:owner/name" (or "hf:owner/name/config"), a folder of images (class/name.png, or
    train/class/name.png and test/class/name.png), torchvision's cifar-10-batches-py or cifar-100-python
    folder, or an .npz file with arrays of images and labels."""

    name: str | None = None
    """What tables and reports call the data; taken from the source if not given."""

    image_column: str | None = None
    """Parquet only: the column of encoded images; found from the schema if not given."""

    label_column: str | None = None
    """Parquet: the column of labels, integers or names of classes; found from the schema if not given.
    CIFAR-100: fine_label (default) or coarse_label."""

    channels: Channels = "first"
    """Encoded images where some are gray and some in color: first (all become what the first one is), gray or
    rgb."""

    sixteen_bit: SixteenBit = "refuse"
    """Encoded images of 16 bits per channel: refuse, or scale to 8 bits (the upper byte)."""

    skip_damaged: bool = False
    """Whether to leave out encoded images that cannot be decoded, and say how many, rather than to refuse the
    source."""

    image_size: int | None = None
    """Encoded images: side in pixels of the square that is cut out of the middle of each, at least 1. Images
    may then have different sizes. As they are, and of one size, if not given."""

    center_share: float = 0.875
    """Side of that square as a share of the image's shorter side, in (0, 1]."""

    residence: Residence = "auto"
    """Where images are kept: device, decoded; host, decoded in main memory, from which each batch is copied;
    stream, encoded on disk, decoded when they are needed (Parquet files and folders of images); auto, the
    first of these that has room for them."""

    workers: int | None = None
    """Processes that decode streamed images for training, >= 0; one for each core but one, at most 16, if not
    given."""

    train_size: int | None = None
    """Train on only this many images, drawn by class with split_seed after the validation split is held out;
    all of them if not given."""

    validation: int = 1000
    """How many images to hold out of the training data, by class with split_seed, to select the best
    checkpoint. The test set is never used for that."""

    test_fraction: float = 0.2
    """Share of the images to hold out as the test set, for sources that have none of their own."""

    extra: str | None = None
    """More training images from another source, such as generated ones: an address as of data.source, read
    with its defaults. Every batch is mixed of both; validation and test are of data.source alone."""

    extra_fraction: float = 0.7
    """Share of every batch, in (0, 1), that is drawn from extra, with replacement; rounded down to images."""

    split_seed: int = 0
    """Seed of the splits, apart from the seed of the run so that several seeds share their splits."""

    noise: Noise = "none"
    """Label noise: none, symmetric (a random other class), asymmetric (CIFAR-10's usual confusions) or file
    (labels from noise_file)."""

    noise_rate: float = 0.0
    """Share of wrong labels, in [0, 1): of all samples (symmetric) or of those of the confused classes
    (asymmetric)."""

    noise_file: str | None = None
    """An .npz file with one label for each training image of the source, in the source's order."""

    noise_key: str | None = None
    """Which array of noise_file, such as worse_label; may be left out if there is only one."""

    noise_seed: int = 0
    """Seed of the drawn label noise."""

    noise_validation: bool = False
    """Whether the validation labels are noisy too, as they would be without clean data."""

    cache: str | None = None
    """Folder for decoded images; softdefend inside $XDG_CACHE_HOME or ~/.cache if not given."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        for name, kind in (
            ("noise", Noise),
            ("channels", Channels),
            ("sixteen_bit", SixteenBit),
            ("residence", Residence),
        ):
            if getattr(self, name) not in get_args(kind):
                raise SettingError(f"data.{name}", getattr(self, name), " or ".join(get_args(kind)))
        if not self.source:
            raise SettingError(
                "data.source", "nothing", "digits, hf:owner/name, or the path of a file or folder"
            )
        if self.validation < 1:
            raise SettingError("data.validation", self.validation, "at least 1 image")
        if self.image_size is not None and self.image_size < 1:
            raise SettingError("data.image_size", self.image_size, "at least 1 pixel")
        if not 0 < self.center_share <= 1:
            raise SettingError("data.center_share", self.center_share, "a share in (0, 1]")
        if self.workers is not None and not 0 <= self.workers <= 1024:
            raise SettingError("data.workers", self.workers, "0 to 1024 processes")
        if self.train_size is not None and self.train_size < 1:
            raise SettingError("data.train_size", self.train_size, "at least 1 image")
        if not 0 < self.test_fraction < 1:
            raise SettingError("data.test_fraction", self.test_fraction, "a value in (0, 1)")
        if self.extra == "":
            raise SettingError("data.extra", "nothing", "an address as of data.source, or null")
        if not 0 < self.extra_fraction < 1:
            raise SettingError("data.extra_fraction", self.extra_fraction, "a share of a batch, in (0, 1)")
        self._check_noise()

    def _check_noise(self) -> None:
        if not (math.isfinite(self.noise_rate) and 0 <= self.noise_rate < 1):
            raise SettingError("data.noise_rate", self.noise_rate, "a value in [0, 1)")
        drawn = self.noise in ("symmetric", "asymmetric")
        if self.noise_rate and not drawn:
            raise SettingError(
                "data.noise_rate",
                f"{self.noise_rate} with noise {self.noise}",
                "noise_rate only with data.noise symmetric or asymmetric",
            )
        if self.noise == "file" and self.noise_file is None:
            raise SettingError("data.noise_file", None, "the path of an .npz file, for data.noise file")
        if self.noise != "file" and (self.noise_file or self.noise_key):
            raise SettingError(
                "data.noise_file" if self.noise_file else "data.noise_key",
                f"{self.noise_file or self.noise_key} with noise {self.noise}",
                "a file and key only with data.noise file",
            )
