"""Runs single AMD instructions in the stand-in driver's interpreter, for tests.

The driver's library exports `sf_isa_run` and `sf_isa_decode` (isa/probe.cpp). They need no launch
and no kernel: bytes and the state of one wave go in, the state after the bytes comes out.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

NUM_VGPRS, NUM_SGPRS, MAX_LANES = 512, 128, 64
AGPR = 256  # the number of the first accumulation register
VCC, M0, EXEC = 106, 124, 126  # numbers of special scalar registers, the same for all chips
KEEP_DENORMALS = 0xF0  # MODE: round to nearest even, denormals of every type are kept


class IsaFault(Exception):
    """The interpreter refused an instruction. The text says which, and why."""


@dataclass(frozen=True)
class Line:
    """One decoded instruction."""

    pc: int  # bytes
    size: int  # bytes
    format: str
    name: str
    text: str


def _zeros(*shape: int) -> npt.NDArray[np.uint32]:
    return np.zeros(shape, np.uint32)


def _no_bytes() -> npt.NDArray[np.uint8]:
    return np.zeros(0, np.uint8)


@dataclass
class State:
    """What one wave sees. `Probe.run` changes it in place."""

    lanes: int = 64  # 32 or 64
    vgprs: npt.NDArray[np.uint32] = field(default_factory=lambda: _zeros(NUM_VGPRS, MAX_LANES))
    sgprs: npt.NDArray[np.uint32] = field(default_factory=lambda: _zeros(NUM_SGPRS))
    scc: int = 0
    mode: int = KEEP_DENORMALS
    memory_base: int = 0x10000  # address of `memory` as the code sees it
    memory: npt.NDArray[np.uint8] = field(default_factory=_no_bytes)
    lds: npt.NDArray[np.uint8] = field(default_factory=_no_bytes)
    scratch: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros((64, 0), np.uint8))
    check_waits: bool = False

    @property
    def exec(self) -> int:
        """The mask of active lanes."""
        return self.mask(EXEC)

    @exec.setter
    def exec(self, value: int) -> None:
        self.set_mask(EXEC, value)

    @property
    def vcc(self) -> int:
        """The mask in VCC."""
        return self.mask(VCC)

    @vcc.setter
    def vcc(self, value: int) -> None:
        self.set_mask(VCC, value)

    def mask(self, index: int) -> int:
        """The lane mask in scalar register `index`: one register in wave32, two in wave64."""
        low = int(self.sgprs[index])
        return low if self.lanes == 32 else low | int(self.sgprs[index + 1]) << 32

    def set_mask(self, index: int, value: int) -> None:
        """Writes a lane mask to scalar register `index`."""
        self.sgprs[index] = value & 0xFFFFFFFF
        if self.lanes == 64:
            self.sgprs[index + 1] = value >> 32 & 0xFFFFFFFF

    def copy(self) -> State:
        """A state of its own, equal to this one."""
        return State(
            self.lanes, self.vgprs.copy(), self.sgprs.copy(), self.scc, self.mode,
            self.memory_base, self.memory.copy(), self.lds.copy(), self.scratch.copy(),
            self.check_waits,
        )  # fmt: skip


class _CState(ctypes.Structure):
    """`sf_isa_state` of isa/probe.cpp."""

    _fields_ = [
        ("vgprs", ctypes.c_void_p),
        ("sgprs", ctypes.c_void_p),
        ("scc", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("lanes", ctypes.c_uint32),
        ("memory_base", ctypes.c_uint64),
        ("memory", ctypes.c_void_p),
        ("memory_size", ctypes.c_uint64),
        ("lds", ctypes.c_void_p),
        ("lds_size", ctypes.c_uint32),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_uint32),
        ("check_waits", ctypes.c_uint32),
    ]


def _check(array: npt.NDArray[np.generic], dtype: type, shape: tuple[int, ...]) -> None:
    """Refuses an array that C code cannot take as it is."""
    if array.dtype != dtype or array.shape != shape or not array.flags["C_CONTIGUOUS"]:
        raise ValueError(f"want a contiguous {dtype.__name__} array of shape {shape}")


def _c_state(state: State) -> _CState:
    """The C form of `state`; its pointers are those of the arrays."""
    _check(state.vgprs, np.uint32, (NUM_VGPRS, MAX_LANES))
    _check(state.sgprs, np.uint32, (NUM_SGPRS,))
    _check(state.memory, np.uint8, (state.memory.size,))
    _check(state.lds, np.uint8, (state.lds.size,))
    scratch_bytes = state.scratch.shape[1]
    if scratch_bytes:
        _check(state.scratch, np.uint8, (state.lanes, scratch_bytes))
    return _CState(
        state.vgprs.ctypes.data, state.sgprs.ctypes.data, state.scc, state.mode, state.lanes,
        state.memory_base, state.memory.ctypes.data, state.memory.size,
        state.lds.ctypes.data, state.lds.size, state.scratch.ctypes.data, scratch_bytes,
        int(state.check_waits),
    )  # fmt: skip


class Probe:
    """The interpreter in a built libamdhip64.so."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._run = loaded.sf_isa_run
        self._run.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(_CState),
            ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip
        self._decode = loaded.sf_isa_decode
        self._decode.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64,
            ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip
        self._error = ctypes.create_string_buffer(4096)

    def run(self, chip: str, code: bytes, state: State) -> None:
        """Runs `code` on `chip` ("gfx942") from its start to its end, or to s_endpgm.

        `state` is changed in place. Raises IsaFault where the interpreter does.
        """
        c_state = _c_state(state)
        error = self._error
        failed = self._run(chip.encode(), code, len(code), c_state, error, len(error))
        state.scc, state.mode = c_state.scc, c_state.mode
        if failed:
            raise IsaFault(error.value.decode())

    def decode(self, chip: str, code: bytes, pc: int = 0) -> list[Line]:
        """The instructions of `code`, whose first is at address `pc`. Raises IsaFault."""
        text = ctypes.create_string_buffer(256 * (len(code) // 4 + 1) + 4096)
        if self._decode(chip.encode(), code, len(code), pc, text, len(text)):
            raise IsaFault(text.value.decode())
        lines = []
        for line in text.value.decode().splitlines():
            address, size, form, name, *rest = line.split(" ", 4)
            lines.append(Line(int(address), int(size), form, name, rest[0] if rest else ""))
        return lines
