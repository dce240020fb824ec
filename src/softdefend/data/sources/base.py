"""What a data source is, and the registry that holds one of each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from softdefend.core.registry import Registry
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings


class Source(ABC):
    """A kind of place that images come from, such as a folder of Parquet files.

    Its class is registered in :data:`SOURCES`. The setting ``data.source`` is given to all sources, and the
    first that recognizes it reads the data.
    """

    address: ClassVar[str]
    """How ``data.source`` names such a place, for messages."""
    columns: ClassVar[tuple[str, ...]] = ()
    """The settings of :data:`COLUMNS` that it uses. The others are refused with it."""
    decodes: ClassVar[bool] = False
    """Whether it reads encoded images, for which there are the settings of :data:`DECODING`."""
    streams: ClassVar[bool] = False
    """Whether it has :meth:`read_encoded`."""
    priority: ClassVar[int] = 0
    """Sources of higher priority are asked first, equal ones in the order of their names. 1 is for addresses
    that are no path, -1 for a source that takes every folder."""

    @abstractmethod
    def recognizes(self, address: str, path: Path) -> bool:
        """Whether this source reads what the address names.

        Args:
            address: as the user gave it.
            path: the address as a path, ``~`` expanded. There may be nothing.

        Raises:
            OSError: the path cannot be looked at. The user gets one line that names it.
        """

    @abstractmethod
    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        """Read the data in the source's own order, before splits and label noise.

        Args:
            settings: of the data; ``settings.source`` is the address.
            path: as for :meth:`recognizes`.
            cache: folder for decoded images, see :func:`softdefend.data.cache.read_or_build`.

        Raises:
            SettingError: data that cannot be used.
            OSError: as for :meth:`recognizes`.
        """

    def read_encoded(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        """As :meth:`read`, with images that stay encoded on disk. Their table is in ``cache``."""
        raise NotImplementedError


COLUMNS = ("image_column", "label_column")
"""Settings of the data that name a column."""

DECODING = ("channels", "sixteen_bit", "skip_damaged", "image_size", "center_share")
"""Settings of the data that say how images are decoded."""

LOOKING = ("sixteen_bit", "skip_damaged")
"""Those that say which images there are."""

SOURCES: Registry[type[Source]] = Registry("data")
"""Data sources by name; other packages add theirs by entry points of the group ``softdefend.data``."""
