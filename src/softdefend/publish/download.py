"""The folder of a published model: a local one, or one of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from softdefend.core import hub_files
from softdefend.core.errors import SettingError

ACCEPTED = "owner/name on the hub, or a folder that softdefend push --dry_run wrote"
PATTERNS = ["*.json", "*.safetensors", "*.yaml", "README.md"]
"""Files that are downloaded."""

_ADDRESS = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_address(address: str, setting: str = "address") -> str:
    """The address itself, if the hub could have it.

    Raises:
        SettingError: something else.
    """
    if not _ADDRESS.fullmatch(address) or ".." in address or "--" in address:
        raise SettingError(setting, repr(address), "owner/name, of letters, digits, -, _ and .")
    return address


def locate(
    source: str | Path, *, revision: str | None = None, setting: str = "model", **options: Any
) -> Path:
    """A model's folder; one of the hub is downloaded, and its files compared with the hub's hashes.

    Args:
        source: a folder, or ``owner/name``.
        revision: branch, tag or commit on the hub; its main branch if None.
        setting: by which the user named the source.
        options: for the hub's client: ``cache_dir``, ``force_download``, ``local_files_only``, ``token``.

    Raises:
        SettingError: no such folder, no such model, or files that were altered.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise SettingError("revision", f"{revision} of the folder {source}", "it with a model of the hub")
        return Path(source)
    address = os.fspath(source)
    if not _ADDRESS.fullmatch(address):
        raise SettingError(setting, repr(address), ACCEPTED)

    def get() -> Path:
        def ask() -> str:
            return str(
                huggingface_hub.snapshot_download(
                    check_address(address, setting), revision=revision, allow_patterns=PATTERNS, **options
                )
            )

        return hub_files.download(ask, address, setting, ACCEPTED)

    root = get()
    if damaged := hub_files.damaged_files(root):
        hub_files.discard(damaged)
        hub_files.check_hashes(root := get(), address, setting)
    return root
