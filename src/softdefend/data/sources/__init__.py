"""Readers of image data, one file each; :func:`read` picks the one that a source needs."""

from softdefend.data.raw import Raw
from softdefend.data.sources.pick import read

__all__ = ["Raw", "read"]
