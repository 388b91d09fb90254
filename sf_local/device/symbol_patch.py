"""Patches libshortfin's PLT slots, so that its calls of its own exported functions reach ours.

Needed where IREE 3.9 has no option, or a mistake.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_SHT_RELA, _SHF_INFO_LINK = 4, 0x40  # type and flag of the section .rela.plt


class _Section(NamedTuple):
    """A section header of a 64-bit ELF file; `at` and `length` are in bytes of the file."""

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
    """The slot that holds the address to which a library's calls of a function jump.

    library: loaded from `path`. name: of a function that it exports and calls itself; raises
    LookupError for others.
    """
    here = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        symbol_at, slot_at = find_slot(elf, name.encode())
    return ctypes.c_void_p.from_address(here - symbol_at + slot_at)


def keep_joined_statuses(library: ctypes.CDLL, path: Path) -> None:
    """Replace `iree_status_join(a, b)` by one that returns `a or b` and frees neither.

    When a GPU fails, IREE's cleanup thread joins a status with itself, which frees it, and then
    uses it again. Without freeing, a failure leaks a few bytes. Does nothing on systems that forbid
    memory which is both written and run.
    """
    global _code
    if _code is not None:
        return
    # mov rax, rdi; test rdi, rdi; cmove rax, rsi; ret
    code = bytes.fromhex("4889f8 4885ff 480f44c6 c3")
    try:
        _code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return
    _code.write(code)
    start = ctypes.addressof(ctypes.c_char.from_buffer(_code))
    call_slot(library, path, "iree_status_join").value = start


_code: mmap.mmap | None = None


def find_slot(elf: bytes | mmap.mmap, name: bytes) -> tuple[int, int]:
    """The addresses of an exported function and of its PLT slot, from where the library is loaded.

    Raises LookupError if the library does not call the function.
    """
    [table_at] = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", elf, table_at + i * size))
                for i in range(count)]  # fmt: skip
    [jumps] = [s for s in sections if s.kind == _SHT_RELA and s.flags & _SHF_INFO_LINK]
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
