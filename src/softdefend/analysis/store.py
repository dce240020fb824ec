"""Results kept by what they are a function of, so that an analysis that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softdefend.core.files import write_atomic


def kept(folder: Path, identity: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result that ``folder`` holds for ``identity``, else what ``compute`` returns, which is then kept.

    Args:
        folder: of result files; made where absent.
        identity: plain values that the result is a function of; ``part`` names it. It is written into the
            file, and a file whose identity differs or that cannot be read counts as absent.
        compute: makes the result, of plain values; numbers that are not finite become None.
    """
    wanted = json.loads(json.dumps(identity, sort_keys=True))
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    path = folder / f"{identity['part']}-{digest[:20]}.json"
    if (found := _read(path)) is not None and found.get("identity") == wanted:
        result: dict[str, Any] = found["result"]
        return result
    result = finite(compute())
    content = json.dumps({"identity": wanted, "result": result}, indent=1, allow_nan=False)
    write_atomic(path, content.encode())
    return result


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("result"), dict) else None


def finite(value: Any) -> Any:
    """The same plain values with None for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
