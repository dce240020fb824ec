"""Counter-based randomness: a generator is a function of where we are, so there is no state to lose.

Every draw in the package comes from a generator keyed by (seed, name, epoch, step). A resumed run
asks for the same key and gets the same numbers; nothing has to be saved.
"""

from __future__ import annotations

import hashlib

import torch


def key(seed: int, name: str, epoch: int = 0, step: int = 0) -> int:
    """A 63-bit generator seed from a position in the run, equal on every machine and Python version.

    Args:
        seed: the run's seed.
        name: what the numbers are for (``"order"``, ``"augment"``, ``"attack"``, ...); different names
            give unrelated streams.
        epoch, step: zero-based position.
    """
    # The last field is the number of a process, of which there is one: finished runs drew so.
    text = f"{seed}/{name}/{epoch}/{step}/0".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream(
    seed: int,
    name: str,
    epoch: int = 0,
    step: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A fresh generator on ``device`` for one purpose at one position (see :func:`key`).

    The numbers depend on the kind of device: torch's CPU and CUDA generators are different functions.
    """
    return torch.Generator(device=device).manual_seed(key(seed, name, epoch, step))
