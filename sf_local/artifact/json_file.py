"""Reads JSON files that others wrote, and refuses those that only make trouble later."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
MAX_DEPTH = 100  # of objects and arrays in each other


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, and ValueError that says what is wrong."""
    check_regular(path, MAX_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_values(value)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raise ValueError for what is no regular file, such as a pipe, which may never end, or has
    more bytes; and OSError for a file that is not there."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"it has more than {max_bytes >> 20} MiB")


def is_file_name(name: object) -> bool:
    """Whether a value of a JSON file is the name of a file, and of none in another folder."""
    return isinstance(name, str) and Path(name).name == name and "\0" not in name


def _check_values(value: Any) -> None:
    """Raise ValueError for too deep a nesting, and for strings that are no Unicode text."""
    level = [value]
    for _ in range(MAX_DEPTH):
        for text in (text for part in level for text in _strings(part)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"it has half of a surrogate pair in {text[:40]!r}") from None
        level = [part for parent in level for part in _parts(parent)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _strings(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else [value] if isinstance(value, str) else []
