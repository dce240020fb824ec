"""Data sources, one file each, and :func:`read`, which finds the one that an address needs."""

from softdefend.data.raw import RawData
from softdefend.data.sources import cifar, digits, folder, hub, npz, parquet  # each registers its source
from softdefend.data.sources.base import SOURCES, Source
from softdefend.data.sources.select import read

__all__ = ["SOURCES", "RawData", "Source", "cifar", "digits", "folder", "hub", "npz", "parquet", "read"]
