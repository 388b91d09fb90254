"""Reading files that others wrote: checked numbers, and errors that name what is wrong."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_local.artifact.json_file import check_regular, read_object
from sf_local.errors import SourceError, UnsupportedError

Where = Path | str  # a file, or a part of one
LFS = b"version https://git-lfs.github.com/spec/"
# The most that keys may say: larger numbers keep a conversion busy for ever
MOST = {
    "num_hidden_layers": 4096, "block_count": 4096,
    "max_position_embeddings": 1 << 24, "context_length": 1 << 24,
}  # fmt: skip
Supported = dict[str, tuple[list[Any], str]]  # by key: allowed values (None: absent), and in words


@dataclass(frozen=True)
class Numbers:
    """The numbers of a config, all positive; a key that is absent or null means the default.

    Methods raise SourceError for what is not such a number.
    """

    path: Where
    values: Mapping[str, Any]

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value: Any = default if self.values.get(key) is None else self.values[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < 1e18:  # so neither inf nor nan
            raise corrupt(self.path, f"a positive number for {key}", value)
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value, most = self.number(key, default), MOST.get(key)
        if value != int(value):
            raise corrupt(self.path, f"a whole number for {key}", value)
        if most is not None and value > most:
            raise corrupt(self.path, f"at most {most} for {key}", f"{value:.0f}")
        return int(value)

    def heads(self, hidden: int, heads: str, kv_heads: str, size: str) -> dict[str, int]:
        """num_heads, num_kv_heads and head_dim of a model of `hidden` features, by their keys.

        Raises UnsupportedError for heads that do not share KV heads evenly.
        """
        num = self.integer(heads)
        num_kv = self.integer(kv_heads, num)
        dim = self.number(size, hidden / num)
        if num % num_kv or dim % 2:
            found = f"attention of {num} heads of size {dim:g} over {num_kv} key/value heads"
            supported = "a multiple of the key/value heads, of an even size"
            raise unsupported(self.path, found, supported)
        return {"num_heads": num, "num_kv_heads": num_kv, "head_dim": int(dim)}


def corrupt(path: Where, expected: str, found: object) -> SourceError:
    """The error for a file that does not hold what it must."""
    remedy = "the file is damaged or incomplete: download it again"
    if isinstance(path, Path) and _is_lfs_pointer(path):
        remedy = f"it only points to the file in Git LFS: run git lfs pull in {path.parent}"
    return SourceError(f"{path}: expected {expected}, found {found}; {remedy}")


def _is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in place of a large one."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(LFS)) == LFS
    return False


def unsupported(path: Where, found: str, supported: str) -> UnsupportedError:
    """The error for a file that holds something we cannot compile."""
    return UnsupportedError(f"{path}: {found} is not supported; supported: {supported}")


def check_supported(path: Where, values: Mapping[str, Any], supported: Supported) -> None:
    """Raise UnsupportedError for the first key whose value is not allowed."""
    for key, (allowed, text) in supported.items():
        if values.get(key) not in allowed:
            raise unsupported(path, f"{key} {values.get(key)!r}", text)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises SourceError, and OSError."""
    try:
        return read_object(path)
    except ValueError as error:
        raise corrupt(path, "a JSON object", error) from error


def check_file(path: Path, what: str, max_bytes: int | None = None) -> None:
    """Raise SourceError unless the path is a regular file; OSError if it is not there."""
    try:
        check_regular(path, max_bytes)
    except ValueError as error:
        raise corrupt(path, what, error) from None


def map_file(path: Path) -> mmap.mmap:
    """The file mapped into memory, where it is read as it is touched; raises SourceError."""
    check_file(path, "a model file")
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise corrupt(path, "a model file", "an empty file") from None
