"""Data sets of the Hugging Face hub: only their Parquet files are downloaded, once."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

from softdefend.core.errors import SettingError

_ID = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w./-]+))?")


def download(source: str) -> Path:
    """The local folder of ``hf:owner/name``, or of one configuration of it, ``hf:owner/name/config``.

    Raises:
        SettingError: a malformed id, or any reason for which the client could not get the files.
    """
    match = _ID.fullmatch(source)
    if match is None or ".." in source:
        raise SettingError("data.source", source, "hf:owner/name or hf:owner/name/config")
    repo, config = match["repo"], match["config"]
    pattern = f"{config}/*.parquet" if config else "*.parquet"
    try:
        root = Path(huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=[pattern]))
    except Exception as error:  # the client's own errors and those of its HTTP library share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SettingError(
            "data.source",
            f"{source} ({reason})",
            "a data set of the hub that can be reached, or a local path",
        ) from None
    return root / config if config else root
