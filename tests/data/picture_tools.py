"""Encoding pictures for tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def planes(pictures: np.ndarray) -> np.ndarray:
    """[n, h, w, c] to [n, c, h, w]."""
    return np.moveaxis(pictures, 3, 1)
