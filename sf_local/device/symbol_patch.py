"""Calls inside libshortfin that go elsewhere: where IREE 3.9 has no option, or a mistake."""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_RELOCATIONS, _FOR_A_SECTION = 4, 0x40  # SHT_RELA, SHF_INFO_LINK: those of .rela.plt


class _Section(NamedTuple):
    """A section header of a 64-bit ELF file."""

    name: int
    kind: int
    flags: int
    address: int
    at: int
    length: int
    link: int
    info: int
    alignment: int
    entry: int


def call_slot(library: ctypes.CDLL, path: Path, name: str) -> ctypes.c_void_p:
    """The address that calls of an exported function jump to; of a library loaded from `path`."""
    here = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        symbol_at, slot_at = _addresses(elf, name.encode())
    return ctypes.c_void_p.from_address(here - symbol_at + slot_at)


def keep_joined_statuses(library: ctypes.CDLL, path: Path) -> None:
    """Let `iree_status_join(a, b)` return `a or b` and free neither.

    When a GPU fails, IREE's cleanup thread joins a status with itself: that frees it, and it is
    used again. What is not freed is a few bytes of a failure.
    """
    global _code
    if _code is not None:
        return
    # mov rax, rdi; test rdi, rdi; cmove rax, rsi; ret
    code = bytes.fromhex("4889f8 4885ff 480f44c6 c3")
    try:
        _code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # a system that forbids memory that is written and run
        return
    _code.write(code)
    start = ctypes.addressof(ctypes.c_char.from_buffer(_code))
    call_slot(library, path, "iree_status_join").value = start


_code: mmap.mmap | None = None


def _addresses(elf: bytes | mmap.mmap, name: bytes) -> tuple[int, int]:
    """Where a library has an exported function, and the slot that its own calls go through."""
    [table_at] = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", elf, table_at + i * size))
                for i in range(count)]  # fmt: skip
    [jumps] = [s for s in sections if s.kind == _RELOCATIONS and s.flags & _FOR_A_SECTION]
    symbols = sections[jumps.link]
    names_at = sections[symbols.link].at
    for at in range(jumps.at, jumps.at + jumps.length, jumps.entry):
        slot, info = struct.unpack_from("<QQ", elf, at)
        name_at, _, _, _, value = struct.unpack_from(
            "<IBBHQ", elf, symbols.at + (info >> 32) * symbols.entry
        )
        start = names_at + name_at
        if elf[start : start + len(name) + 1] == name + b"\0":
            return value, slot
    raise LookupError(f"libshortfin does not call {name.decode()}")
