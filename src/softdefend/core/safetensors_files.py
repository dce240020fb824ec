"""Safetensors files of any name: the library itself takes names in UTF-8 only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from softdefend.core.files import check_regular


@contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a file as ``safetensors.safe_open`` does.

    Raises:
        OSError: there is none, or it is no regular file.
        SafetensorError: damage.
    """
    check_regular(path)
    with open(path, "rb") as file:
        name = str(path)
        try:
            name.encode()
        except UnicodeEncodeError:
            name = f"/dev/fd/{file.fileno()}"
        with safe_open(name, framework) as opened:
            yield opened
