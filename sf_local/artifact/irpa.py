"""IREE parameter archives (.irpa, version 0.0): write one as a stream, read and check its table.

The format is that of IREE's `runtime/src/iree/schemas/parameter_archive.h`. The metadata of an
entry hold its type, such as "4x8xbf16": IREE ignores it, `open_artifact` compares it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sf_local.errors import CorruptFileError, MissingFileError

_HEADER = struct.Struct("<IHHQQQ Q QQ QQ QQ")  # prefix, entry count, entries, metadata, storage
_ENTRY = struct.Struct("<QIQ QQ QQ Q QQ")  # size, type, flags, name, metadata, alignment, data
_MAGIC = 0x41505249
_DATA = 2  # the type of an entry whose bytes are in the file
_ENTRY_STRIDE = 80
_ALIGNMENT = 64  # of parameters
_PAGE = 4096  # alignment of the storage segment


@dataclass(frozen=True)
class Entry:
    """One parameter: its type, such as "4x8xbf16", and where its bytes are in the file."""

    type: str
    offset: int
    num_bytes: int


def write_archive(
    file: BinaryIO,
    entries: Sequence[tuple[str, str, int]],
    data: Iterable[bytes | memoryview],
    whole: str | None = None,
) -> None:
    """Write an archive of parameters.

    entries: (name, type, num_bytes) of each. data: their bytes in the same order, in chunks that
    may be of any size but do not span two parameters. whole: the name of one more entry, which
    covers the bytes of all parameters, each padded to a multiple of 64 bytes.
    """
    places, end = [], 0
    for name, kind, num_bytes in entries:
        places.append((name.encode(), kind.encode(), end, num_bytes))
        end = _aligned(end + num_bytes, _ALIGNMENT)
    if whole is not None:
        places.append((whole.encode(), whole_type(end).encode(), 0, end))
    names = b"".join(place[0] + place[1] for place in places)
    metadata_start = _aligned(_HEADER.size, 16) + _ENTRY_STRIDE * len(places)
    storage_start = _aligned(metadata_start + len(names), _PAGE)
    table, metadata = bytearray(), 0
    for text, type_text, offset, num_bytes in places:
        entry = _ENTRY.pack(_ENTRY.size, _DATA, 0, metadata, len(text), metadata + len(text),
                            len(type_text), _ALIGNMENT, offset, num_bytes)  # fmt: skip
        table += entry.ljust(_ENTRY_STRIDE, b"\0")
        metadata += len(text) + len(type_text)
    header = _HEADER.pack(_MAGIC, 0, 0, _HEADER.size, 0, 0, len(places),
                          _aligned(_HEADER.size, 16), len(table), metadata_start, len(names),
                          storage_start, end)  # fmt: skip
    file.write(header.ljust(_aligned(_HEADER.size, 16), b"\0"))
    file.write(bytes(table))
    file.write(names.ljust(storage_start - metadata_start, b"\0"))
    _write_storage(file, [num_bytes for _, _, num_bytes in entries], data)


def whole_type(num_bytes: int) -> str:
    """The type of the entry that covers all parameters."""
    return f"{num_bytes}xi8"


def num_bytes_together(sizes: Iterable[int]) -> int:
    """The size of the entry that covers parameters of these sizes."""
    return sum(_aligned(size, _ALIGNMENT) for size in sizes)


def _write_storage(
    file: BinaryIO, sizes: Sequence[int], data: Iterable[bytes | memoryview]
) -> None:
    chunks = iter(data)
    for num_bytes in sizes:
        written = 0
        while written < num_bytes:
            chunk = memoryview(next(chunks)).cast("B")
            file.write(chunk)
            written += len(chunk)
        assert written == num_bytes, "a parameter's chunks do not add up to its size"
        file.write(b"\0" * (_aligned(num_bytes, _ALIGNMENT) - num_bytes))


def read_table(path: Path) -> Mapping[str, Entry]:
    """The entries of an archive, by name; all of them lie inside the file.

    Raises MissingFileError, and CorruptFileError for anything but a whole archive.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: the weights are missing; compile the model again")
    size = os.path.getsize(path)
    try:
        with path.open("rb") as file:
            return _parse(file, size)
    except (OSError, struct.error, ValueError) as error:
        raise CorruptFileError(
            f"{path}: not a whole parameter archive of {size} bytes ({error}); "
            "copy it again, or compile the model again"
        ) from error


def _parse(file: BinaryIO, size: int) -> dict[str, Entry]:
    head = _HEADER.unpack(file.read(_HEADER.size))
    magic, major, count = head[0], head[1], head[6]
    (entries_at, entries_size), (text_at, text_size), (storage_at, storage_size) = (
        head[7:9], head[9:11], head[11:13],
    )  # fmt: skip
    if magic != _MAGIC or major != 0:
        raise ValueError("wrong magic number or version")
    if max(entries_at + entries_size, text_at + text_size, storage_at + storage_size) > size:
        raise ValueError(f"{storage_at + storage_size} bytes expected")
    file.seek(entries_at)
    table = file.read(entries_size)
    file.seek(text_at)
    text = file.read(text_size)
    result, position = {}, 0
    for _ in range(count):
        entry = _ENTRY.unpack_from(table, position)
        name_at, name_size, kind_at, kind_size, _, offset, num_bytes = entry[3:]
        if not 0 < entry[0] <= entries_size:  # 0 would read this entry `count` times
            raise ValueError(f"entry at {position} has a size of {entry[0]}")
        if entry[1] == _DATA and offset + num_bytes > storage_size:
            raise ValueError(f"entry at {position} reaches beyond the storage")
        name = text[name_at : name_at + name_size].decode()
        kind = text[kind_at : kind_at + kind_size].decode(errors="replace")
        result[name] = Entry(kind, storage_at + offset, num_bytes)
        position += _aligned(entry[0], 16)
    return result


def _aligned(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
