"""Images, labels and splits: from a source on disk to batches on the device."""

from softdefend.data.augment import AugmentSettings, epoch_plan
from softdefend.data.augmented import Augmented
from softdefend.data.base import Batch, DataBundle, Extra, Split, fingerprint, split
from softdefend.data.describe import channel_stats, describe
from softdefend.data.load import from_tensors, load
from softdefend.data.resident import Resident
from softdefend.data.settings import DataSettings
from softdefend.data.subsets import SubsetOrder, describe_subset, subset, subset_order

__all__ = [
    "AugmentSettings",
    "Augmented",
    "Batch",
    "DataBundle",
    "DataSettings",
    "Extra",
    "Resident",
    "Split",
    "SubsetOrder",
    "channel_stats",
    "describe",
    "describe_subset",
    "epoch_plan",
    "fingerprint",
    "from_tensors",
    "load",
    "split",
    "subset",
    "subset_order",
]
