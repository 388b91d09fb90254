"""The interpreter's loads, stores and LDS move the right bytes, and refuse all others.

What an instruction must do is worked out here in numpy, from its name: how many bytes a lane
moves, whether they are extended by their sign, and which half of a register they are in.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.hip.driver import LIBRARY, Driver
from tests.hip.oracle import M0
from tests.hip.probe import AGPR, IsaFault, Probe, State

CHIPS = ("gfx942", "gfx1100", "gfx1201")
ARCHS = {"gfx9": "cdna", "gfx11": "rdna3", "gfx12": "rdna4"}
BASE = 0x5000_0001_0000  # address of memory as the code sees it
MEMORY_BYTES = 4096
LDS_BYTES = 2048
SCRATCH_BYTES = 256  # a lane

Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

# ------------------------------------------------------------------------------------ what is there

CDNA_LOADS = (
    "ubyte", "sbyte", "ushort", "sshort", "dword", "dwordx2", "dwordx3", "dwordx4",
    "ubyte_d16", "ubyte_d16_hi", "sbyte_d16", "sbyte_d16_hi", "short_d16", "short_d16_hi",
)  # fmt: skip
RDNA_LOADS = (
    "u8", "i8", "u16", "i16", "b32", "b64", "b96", "b128",
    "d16_u8", "d16_hi_u8", "d16_i8", "d16_hi_i8", "d16_b16", "d16_hi_b16",
)  # fmt: skip
CDNA_STORES = (
    "byte", "byte_d16_hi", "short", "short_d16_hi", "dword", "dwordx2", "dwordx3", "dwordx4",
)  # fmt: skip
RDNA_STORES = ("b8", "d16_hi_b8", "b16", "d16_hi_b16", "b32", "b64", "b96", "b128")
LDS_LOADS = (
    "b32", "b64", "b96", "b128", "u8", "i8", "u16", "i16",
    "u8_d16", "u8_d16_hi", "i8_d16", "i8_d16_hi", "u16_d16", "u16_d16_hi",
)  # fmt: skip
LDS_STORES = ("b8", "b16", "b8_d16_hi", "b16_d16_hi", "b32", "b64", "b96", "b128")
SPACES = ("global", "flat", "scratch", "buffer")
SCALAR_LOADS = {
    "cdna": ("dword", "dwordx2", "dwordx4", "dwordx8", "dwordx16"),
    "rdna3": ("b32", "b64", "b128", "b256", "b512"),
    "rdna4": ("b32", "b64", "b96", "b128", "b256", "b512", "u8", "i8", "u16", "i16"),
}
LDS_PAIRS = {
    "cdna": ("read2_{}", "read2st64_{}", "write2_{}", "write2st64_{}"),
    "rdna": (
        "load_2addr_{}", "load_2addr_stride64_{}", "store_2addr_{}", "store_2addr_stride64_{}",
    ),
}  # fmt: skip
EXCHANGES = ("ds_swizzle_b32", "ds_permute_b32", "ds_bpermute_b32")


def loads(arch: str) -> tuple[str, ...]:
    """Data of vector loads, as their names end."""
    return CDNA_LOADS if arch == "cdna" else RDNA_LOADS


def stores(arch: str) -> tuple[str, ...]:
    """Data of vector stores, as their names end."""
    return CDNA_STORES if arch == "cdna" else RDNA_STORES


def lds_pairs(arch: str) -> tuple[str, ...]:
    """The names, without a datum, of LDS instructions with two addresses: two load, two store."""
    return LDS_PAIRS["cdna" if arch == "cdna" else "rdna"]


def _names(arch: str) -> Iterator[str]:
    """All memory instructions of a family that are tested here."""
    for space in SPACES:
        yield from (f"{space}_load_{datum}" for datum in loads(arch))
        yield from (f"{space}_store_{datum}" for datum in stores(arch))
    load, store = ("read", "write") if arch == "cdna" else ("load", "store")
    yield from (f"ds_{load}_{datum}" for datum in LDS_LOADS)
    yield from (f"ds_{store}_{datum}" for datum in LDS_STORES)
    for pair in lds_pairs(arch):
        yield from ("ds_" + pair.format(datum) for datum in ("b32", "b64"))
    yield from EXCHANGES
    for datum in SCALAR_LOADS[arch]:
        yield from (f"s_load_{datum}", f"s_buffer_load_{datum}")


OPCODES = {name for arch in ARCHS.values() for name in _names(arch)}


@dataclass(frozen=True)
class Datum:
    """What a lane moves."""

    size: int  # bytes
    is_signed: bool
    half: str  # "", "low" or "high"

    @property
    def registers(self) -> int:
        return max(1, self.size // 4)


def datum_of(name: str) -> Datum:
    """The datum that the end of an instruction's name says."""
    half = "high" if "d16_hi" in name else "low" if "d16" in name else ""
    rest = re.sub("_?d16(_hi)?_?", "", name)
    if number := re.fullmatch(r"dword(x(\d+))?", rest):
        return Datum(4 * int(number[2] or 1), False, half)
    if number := re.fullmatch(r"([bui])(\d+)", rest):
        return Datum(int(number[2]) // 8, number[1] == "i", half)
    words = {"byte": 1, "short": 2}
    size = next(size for word, size in words.items() if rest.endswith(word))
    return Datum(size, rest in ("sbyte", "sshort"), half)


# ----------------------------------------------------------------------------------------- encoding


def arch_of(chip: str) -> str:
    return next(arch for start, arch in ARCHS.items() if chip.startswith(start))


@cache
def _ins(arch: str) -> ModuleType:
    return import_module(f"tinygrad.runtime.autogen.amd.{arch}.ins")


class Assembler:
    """Memory instructions of a family, through tinygrad's tables."""

    def __init__(self, chip: str) -> None:
        self.chip, self.arch = chip, arch_of(chip)
        self.is_cdna, self.is_rdna4 = self.arch == "cdna", self.arch == "rdna4"
        # What "off" is encoded as.
        self.off = 127 if self.is_cdna else 124

    def make(self, name: str, **fields: int) -> bytes:
        """Vector registers are numbered from 256; a field that the format lacks is an error."""
        from tinygrad.renderer.amd.dsl import BitField, src

        instruction = getattr(_ins(self.arch), name)()
        for field, value in fields.items():
            is_number = type(type(instruction).__dict__[field]) is BitField
            setattr(instruction, field, value if is_number else src[value])
        return bytes(instruction.to_bytes())

    def flat(
        self, name: str, data: int, address: int | None, base: int | None = None, offset: int = 0
    ) -> bytes:
        """global_, flat_ and scratch_; registers are None where there is none."""
        is_store = "_store_" in name
        fields = {"saddr": self.off if base is None else base}
        fields["vaddr" if self.is_rdna4 else "addr"] = 256 + (address or 0)
        if is_store:
            fields["vsrc" if self.is_rdna4 else "data"] = 256 + data
        else:
            fields["vdst"] = 256 + data
        if name.startswith("scratch_"):
            fields["sve"] = int(address is not None)
        fields["ioffset" if self.is_rdna4 else "offset"] = offset
        return self.make(name, **fields)

    def buffer(
        self,
        name: str,
        data: int,
        address: int | None,
        resource: int,
        soffset: int | None = None,
        offset: int = 0,
        **more: int,
    ) -> bytes:
        """buffer_; soffset: a scalar register."""
        zero = 128 if not self.is_rdna4 else 124
        fields = {"vdata": 256 + data, "vaddr": 256 + (address or 0), **more}
        fields["offen"] = int(address is not None)
        fields["rsrc" if self.is_rdna4 else "srsrc"] = resource
        fields["soffset"] = zero if soffset is None else soffset
        fields["ioffset" if self.is_rdna4 else "offset"] = offset
        return self.make(name, **fields)

    def scalar(
        self, name: str, data: int, base: int, soffset: int | None = None, offset: int = 0
    ) -> bytes:
        """s_load_ and s_buffer_load_."""
        fields = {"sdata": data, "sbase": base}
        fields["ioffset" if self.is_rdna4 else "offset"] = offset
        if self.is_cdna:
            fields |= {"imm": 1, "soffset_en": int(soffset is not None), "soffset": soffset or 0}
        else:
            fields["soffset"] = 124 if soffset is None else soffset
        return self.make(name, **fields)

    def ds(self, name: str, offset: int = 0, **registers: int) -> bytes:
        """ds_, with an offset of 16 bits; registers: vdst, addr, data0, data1."""
        fields = {field: 256 + number for field, number in registers.items()}
        return self.make(name, offset0=offset & 255, offset1=offset >> 8, **fields)

    def wait(self, vector: int | None = None, lds: int | None = None) -> bytes:
        """At most so many vector loads, LDS operations, and scalar loads."""
        if self.is_rdna4:
            parts = [("s_wait_loadcnt", vector), ("s_wait_dscnt", lds), ("s_wait_kmcnt", lds)]
            return b"".join(
                self.make(name, simm16=count) for name, count in parts if count is not None
            )
        vector = 63 if vector is None else vector
        if self.is_cdna:
            lds = 15 if lds is None else lds
            bits = vector & 15 | vector >> 4 << 14 | 7 << 4 | lds << 8
        else:
            bits = vector << 10 | 7 | (63 if lds is None else lds) << 4
        return self.make("s_waitcnt", simm16=bits)

    def copy(self, target: int, source: int) -> bytes:
        return self.make("v_mov_b32_e32", vdst=256 + target, src0=256 + source)

    def scalar_copy(self, target: int, source: int) -> bytes:
        return self.make("s_mov_b32", sdst=target, ssrc0=source)

    @property
    def dword(self) -> str:
        return "dword" if self.is_cdna else "b32"


@pytest.fixture(params=CHIPS)
def assembler(request: pytest.FixtureRequest) -> Assembler:
    """The assembler of a chip, in turn."""
    return Assembler(request.param)


# -------------------------------------------------------------------------------------- the oracle


def narrow(data: Bytes, datum: Datum, old: Words) -> Words:
    """Registers [n] after a load of at most 16 bits; data: [n, bytes]."""
    kind = f"<{'i' if datum.is_signed else 'u'}{datum.size}"
    value = np.ascontiguousarray(data).view(kind)[:, 0].astype(np.int64).astype(np.uint32)
    if datum.half == "low":
        return old & np.uint32(0xFFFF0000) | value & np.uint32(0xFFFF)
    if datum.half == "high":
        return old & np.uint32(0xFFFF) | value << np.uint32(16)
    return value


def loaded(data: Bytes, datum: Datum, old: Words) -> Words:
    """Registers [registers, n] after a load of data [n, bytes]."""
    if datum.size < 4:
        return narrow(data, datum, old[0])[None]
    return np.ascontiguousarray(data).view("<u4").T.astype(np.uint32)


def stored(registers: Words, datum: Datum) -> Bytes:
    """Bytes [n, bytes] that a store takes out of registers [registers, n]."""
    if datum.size >= 4:
        return np.ascontiguousarray(registers.T).view(np.uint8)
    value = registers[0] >> np.uint32(16 if datum.half == "high" else 0)
    return np.ascontiguousarray(value[:, None]).view(np.uint8)[:, : datum.size]


def active_lanes(state: State) -> Integers:
    return np.array([lane for lane in range(state.lanes) if state.exec >> lane & 1], np.int64)


def spans(addresses: Integers, size: int) -> Integers:
    """Indices [n, size] of the bytes at addresses [n]."""
    return addresses[:, None] + np.arange(size)


def expect_load(
    before: State, after: State, first: int, datum: Datum, source: Bytes, addresses: Integers
) -> None:
    """Active lanes hold what is at their addresses in source; nothing else has changed."""
    lanes = active_lanes(before)
    want = before.vgprs.copy()
    registers = slice(first, first + datum.registers)
    if len(lanes):
        data = source[spans(addresses[lanes], datum.size)]
        want[registers, lanes] = loaded(data, datum, before.vgprs[registers, lanes])
    assert np.array_equal(after.vgprs, want)
    for name in ("memory", "lds", "scratch", "sgprs"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name


def expect_store(
    before: State, after: State, name: str, first: int, datum: Datum, addresses: Integers
) -> None:
    """The bytes of active lanes are at their addresses; nothing else has changed.

    name: of the memory in the state. Where lanes overlap, the last one stays.
    """
    want = getattr(before, name).copy()
    flat = want.reshape(-1)
    data = stored(before.vgprs[first : first + datum.registers], datum)
    for lane in active_lanes(before):
        flat[spans(addresses[lane : lane + 1], datum.size)[0]] = data[lane]
    assert np.array_equal(getattr(after, name), want)
    for other in {"memory", "lds", "scratch"} - {name}:
        assert np.array_equal(getattr(after, other), getattr(before, other)), other
    assert np.array_equal(after.vgprs, before.vgprs)
    assert np.array_equal(after.sgprs, before.sgprs)


def random_state(chip: str, rng: np.random.Generator, mask: int | None = None) -> State:
    """A wave full of random numbers; mask: its active lanes, else all of them."""
    lanes = 64 if chip.startswith("gfx9") else 32
    state = State(lanes, memory_base=BASE)
    state.vgprs[:] = rng.integers(0, 2**32, state.vgprs.shape, np.uint32)
    state.sgprs[:] = rng.integers(0, 2**32, state.sgprs.shape, np.uint32)
    state.memory = rng.integers(0, 256, MEMORY_BYTES, np.uint8)
    state.lds = rng.integers(0, 256, LDS_BYTES, np.uint8)
    state.scratch = rng.integers(0, 256, (lanes, SCRATCH_BYTES), np.uint8)
    state.exec = 2**lanes - 1 if mask is None else mask & (2**lanes - 1)
    return state


def masks(rng: np.random.Generator) -> Iterator[int | None]:
    """All lanes, some, one, none."""
    yield from (None, int(rng.integers(1, 2**63)), int(rng.integers(1, 2**63)) | 1, 1 << 7, 0)


def run(probe: Probe, assembler: Assembler, code: bytes, before: State) -> State:
    after = before.copy()
    probe.run(assembler.chip, code, after)
    return after


def refuse(probe: Probe, assembler: Assembler, code: bytes, state: State, *parts: str) -> None:
    """The interpreter refuses the code, and says why."""
    with pytest.raises(IsaFault) as fault:
        run(probe, assembler, code, state)
    for part in parts:
        assert part in str(fault.value)


def put64(state: State, register: int, values: Integers) -> None:
    """An address for each lane, in two vector registers."""
    state.vgprs[register, : len(values)] = (values & 0xFFFFFFFF).astype(np.uint32)
    state.vgprs[register + 1, : len(values)] = (values >> 32).astype(np.uint32)


def put_offsets(state: State, register: int, values: Integers) -> None:
    state.vgprs[register, : len(values)] = (values & 0xFFFFFFFF).astype(np.uint32)


def put_scalar64(state: State, register: int, value: int) -> None:
    state.sgprs[register] = value & 0xFFFFFFFF
    state.sgprs[register + 1] = value >> 32


def patterns(rng: np.random.Generator, lanes: int, size: int, end: int) -> Iterator[Integers]:
    """Where lanes reach to: without gaps, anywhere, all to one place."""
    last = end - size
    yield int(rng.integers(0, (end - lanes * size) // size + 1)) * size + np.arange(lanes) * size
    yield rng.integers(0, last + 1, lanes)
    yield rng.integers(0, last // 4 + 1, lanes) * 4
    yield np.full(lanes, last)


# --------------------------------------------------------------------------- global, flat, scratch


def _cases(assembler: Assembler, space: str) -> Iterator[tuple[str, Datum, bool]]:
    """(instruction, its datum, whether it is a store)."""
    for datum in loads(assembler.arch):
        yield f"{space}_load_{datum}", datum_of(datum), False
    for datum in stores(assembler.arch):
        yield f"{space}_store_{datum}", datum_of(datum), True


def check_access(
    probe: Probe,
    assembler: Assembler,
    code: bytes,
    before: State,
    memory: str,
    datum: Datum,
    is_store: bool,
    addresses: Integers,
) -> None:
    """v8 and the following registers hold the data; addresses: indices in the memory's bytes."""
    after = run(probe, assembler, code, before)
    if is_store:
        expect_store(before, after, memory, 8, datum, addresses)
    else:
        expect_load(before, after, 8, datum, getattr(before, memory).reshape(-1), addresses)


@pytest.mark.parametrize("space", ["global", "flat"])
def test_addresses_in_vector_registers(space: str, assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(1)
    offsets = (0, 36, 2047) if space == "flat" and not assembler.is_rdna4 else (0, -28, 2047, -2048)
    for name, datum, is_store in _cases(assembler, space):
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            for places in patterns(rng, before.lanes, datum.size, MEMORY_BYTES):
                offset = int(rng.choice(offsets))
                put64(before, 2, BASE + places - offset)
                code = assembler.flat(name, 8, 2, offset=offset)
                check_access(isa_probe, assembler, code, before, "memory", datum, is_store, places)


def test_addresses_with_a_scalar_base(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(2)
    for name, datum, is_store in _cases(assembler, "global"):
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            for places in patterns(rng, before.lanes, datum.size, MEMORY_BYTES):
                offset = int(rng.integers(-64, 64))
                base = int(rng.integers(0, max(1, places.min() - offset + 1)))
                put_scalar64(before, 4, BASE + base)
                put_offsets(before, 2, places - base - offset)
                if (places - base - offset).min() < 0:
                    continue
                code = assembler.flat(name, 8, 2, 4, offset)
                check_access(isa_probe, assembler, code, before, "memory", datum, is_store, places)


def test_scratch(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(3)
    for name, datum, is_store in _cases(assembler, "scratch"):
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            own = np.arange(before.lanes) * SCRATCH_BYTES
            last = SCRATCH_BYTES - datum.size
            for places in (rng.integers(0, last + 1, before.lanes), np.full(before.lanes, last)):
                offset, base = int(rng.integers(-50, 50)), int(rng.integers(-50, 50))
                put_offsets(before, 2, places - offset)
                code = assembler.flat(name, 8, 2, None, offset)
                check_access(
                    isa_probe, assembler, code, before, "scratch", datum, is_store, own + places
                )
                before.sgprs[4] = base & 0xFFFFFFFF
                put_offsets(before, 2, places - offset - base)
                code = assembler.flat(name, 8, 2, 4, offset)
                check_access(
                    isa_probe, assembler, code, before, "scratch", datum, is_store, own + places
                )
            code = assembler.flat(name, 8, None, None, last)
            places = own + last
            check_access(isa_probe, assembler, code, before, "scratch", datum, is_store, places)


def test_one_byte_outside_is_refused(assembler: Assembler, isa_probe: Probe) -> None:
    """The text names the lane, the address and by how much it misses."""
    rng = np.random.default_rng(4)
    for space in ("global", "flat"):
        for name, datum, _ in _cases(assembler, space):
            state = random_state(assembler.chip, rng)
            places = np.arange(state.lanes, dtype=np.int64) * 16
            for place, how in (
                (MEMORY_BYTES - datum.size + 1, "1 bytes over the end"),
                (MEMORY_BYTES + 5, "5 bytes behind the end"),
                (-3, "3 bytes before the start"),
            ):
                if how.startswith("1 ") and datum.size == 1:
                    continue
                places[5] = place
                put64(state, 2, BASE + places)
                code = assembler.flat(name, 8, 2)
                refuse(isa_probe, assembler, code, state, "lane 5 ", hex(BASE + place), how)
                state.exec = state.exec & ~(1 << 5)  # inactive, it may point anywhere
                run(isa_probe, assembler, code, state)
                state.exec = state.exec | 1 << 5


def test_a_scalar_base_names_the_region(assembler: Assembler, isa_probe: Probe) -> None:
    state = random_state(assembler.chip, np.random.default_rng(5))
    put_scalar64(state, 4, BASE)
    put_offsets(state, 2, np.full(state.lanes, MEMORY_BYTES))
    code = assembler.flat(f"global_load_{assembler.dword}", 8, 2, 4)
    refuse(isa_probe, assembler, code, state, "lane 0 ", "0 bytes behind the end")


def test_scratch_has_bounds(assembler: Assembler, isa_probe: Probe) -> None:
    state = random_state(assembler.chip, np.random.default_rng(6))
    for place in (-1, SCRATCH_BYTES - 3):
        offsets = np.zeros(state.lanes, np.int64)
        offsets[9] = place
        put_offsets(state, 2, offsets)
        for kind in ("load", "store"):
            code = assembler.flat(f"scratch_{kind}_{assembler.dword}", 8, 2)
            refuse(isa_probe, assembler, code, state, "lane 9 ", f"at {place}")


def test_accumulation_registers(isa_probe: Probe) -> None:
    """CDNA loads into them, and stores out of them, where a bit says so."""
    assembler = Assembler("gfx942")
    before = random_state("gfx942", np.random.default_rng(7))
    put64(before, 2, BASE + np.arange(64) * 16)
    fields = {"addr": 256 + 2, "saddr": 127, "acc": 1}
    load = assembler.make("global_load_dwordx4", vdst=256 + 8, **fields)
    after = run(isa_probe, assembler, load, before)
    datum = datum_of("dwordx4")
    expect_load(before, after, AGPR + 8, datum, before.memory, np.arange(64) * 16)
    store = assembler.make("global_store_dwordx4", data=256 + 8, **fields)
    after = run(isa_probe, assembler, store, before)
    expect_store(before, after, "memory", AGPR + 8, datum, np.arange(64) * 16)


# ------------------------------------------------------------------------------------------ buffers


def put_resource(
    assembler: Assembler, state: State, num_records: int, base: int = BASE, word3: int | None = None
) -> None:
    """s[4:7] describes a buffer as our kernels do."""
    put_scalar64(state, 4, base)
    state.sgprs[6] = num_records
    default = 0x27000 if assembler.is_cdna else 0x31027000
    state.sgprs[7] = default if word3 is None else word3


def test_buffers(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(8)
    for name, datum, is_store in _cases(assembler, "buffer"):
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            for places in patterns(rng, before.lanes, datum.size, MEMORY_BYTES):
                offset = int(rng.integers(0, min(places.min(), 4095) + 1))
                soffset = int(rng.integers(0, places.min() - offset + 1))
                put_resource(assembler, before, MEMORY_BYTES)
                before.sgprs[12] = soffset
                put_offsets(before, 2, places - offset - soffset)
                code = assembler.buffer(name, 8, 2, 4, 12, offset)
                check_access(isa_probe, assembler, code, before, "memory", datum, is_store, places)
            put_resource(assembler, before, MEMORY_BYTES - 128, BASE + 128)
            places = np.full(before.lanes, 128 + 96)
            code = assembler.buffer(name, 8, None, 4, None, 96)
            check_access(isa_probe, assembler, code, before, "memory", datum, is_store, places)


def expect_partly(
    before: State, after: State, datum: Datum, is_store: bool, places: Integers, end: int
) -> None:
    """Registers beyond the end get 0, or are not stored."""
    part = Datum(min(datum.size, 4), datum.is_signed, datum.half)
    want, memory = before.vgprs.copy(), before.memory.copy()
    for lane in active_lanes(before):
        for k in range(datum.registers):
            place = int(places[lane]) + 4 * k
            register = slice(8 + k, 9 + k), slice(lane, lane + 1)
            span = slice(place, place + part.size)
            if is_store and place < end:
                memory[span] = stored(before.vgprs[register], part)
            elif not is_store:
                data = before.memory[span] if place < end else np.zeros(part.size, np.uint8)
                want[register] = loaded(data[None], part, before.vgprs[register])
    assert np.array_equal(after.vgprs, want)
    assert np.array_equal(after.memory, memory)


def test_the_end_of_a_buffer(assembler: Assembler, isa_probe: Probe) -> None:
    """Loads beyond it give 0, stores do nothing; an access across it is refused on RDNA."""
    rng = np.random.default_rng(9)
    end = 1024
    for name, datum, is_store in _cases(assembler, "buffer"):
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            put_resource(assembler, before, end)
            step = min(datum.size, 4)
            across = [end - step * k for k in range(1, datum.registers)]
            choices = [end - datum.size, end, end + step, 2**32 - 1, 2**31]
            if assembler.is_cdna:
                choices += across
            places = rng.choice(choices, before.lanes)
            if is_store:  # one lane at most writes, as nobody knows the order of two
                places[:] = end
                places[rng.integers(before.lanes)] = rng.choice(choices)
            put_offsets(before, 2, places)
            after = run(isa_probe, assembler, assembler.buffer(name, 8, 2, 4), before)
            expect_partly(before, after, datum, is_store, places, end)
            # An offset that would wrap around in 32 bits lies beyond the end as well.
            put_offsets(before, 2, np.full(before.lanes, 2**32 - 4))
            after = run(isa_probe, assembler, assembler.buffer(name, 8, 2, 4, None, 16), before)
            expect_partly(before, after, datum, is_store, np.full(before.lanes, 2**32), end)
            if across and before.exec and not assembler.is_cdna:
                put_offsets(before, 2, np.full(before.lanes, across[0]))
                code = assembler.buffer(name, 8, 2, 4)
                refuse(isa_probe, assembler, code, before, "across the end")


def test_what_documents_leave_open_about_buffers(assembler: Assembler, isa_probe: Probe) -> None:
    state = random_state(assembler.chip, np.random.default_rng(10))
    name = f"buffer_load_{assembler.dword}"
    put_resource(assembler, state, 1022)
    put_offsets(state, 2, np.full(state.lanes, 1020))
    refuse(isa_probe, assembler, assembler.buffer(name, 8, 2, 4), state, "across the end")
    put_resource(assembler, state, 1024)
    state.sgprs[12] = 8
    put_offsets(state, 2, np.full(state.lanes, 1020))
    code = assembler.buffer(name, 8, 2, 4, 12)
    refuse(isa_probe, assembler, code, state, "soffset decides")


def test_buffers_that_are_not_interpreted(assembler: Assembler, isa_probe: Probe) -> None:
    name = f"buffer_load_{assembler.dword}"
    state = random_state(assembler.chip, np.random.default_rng(11))
    put_offsets(state, 2, np.zeros(state.lanes, np.int64))
    code = assembler.buffer(name, 8, 2, 4)
    for word1, text in ((4 << 16, "stride"), (1 << 30, "swizzles"), (1 << 31, "swizzles")):
        put_resource(assembler, state, 1024)
        state.sgprs[5] |= word1
        refuse(isa_probe, assembler, code, state, text)
    put_resource(assembler, state, 1024, word3=int(state.sgprs[7]) | 1 << 23)
    refuse(isa_probe, assembler, code, state, "add_tid")
    put_resource(assembler, state, 1024)
    refuse(isa_probe, assembler, assembler.buffer(name, 8, 2, 4, idxen=1), state, "idxen")
    if not assembler.is_cdna:
        for select in (0, 1):
            put_resource(assembler, state, 1024, word3=0x01027000 | select << 28)
            refuse(isa_probe, assembler, code, state, f"oob_select {select}")


@pytest.mark.parametrize("chip", ["gfx1100", "gfx1201"])
def test_buffers_without_bounds(chip: str, isa_probe: Probe) -> None:
    """oob_select 2 asks only whether the buffer is empty. Memory still ends where it ends."""
    assembler, rng = Assembler(chip), np.random.default_rng(12)
    before = random_state(chip, rng)
    datum = datum_of("b64")
    places = rng.integers(0, MEMORY_BYTES - 8, before.lanes)
    put_offsets(before, 2, places)
    code = assembler.buffer("buffer_load_b64", 8, 2, 4)
    put_resource(assembler, before, 1, word3=0x21027000)
    after = run(isa_probe, assembler, code, before)
    expect_load(before, after, 8, datum, before.memory, places)
    put_resource(assembler, before, 0, word3=0x21027000)
    expect_partly(before, run(isa_probe, assembler, code, before), datum, False, places, 0)
    put_resource(assembler, before, 1, word3=0x21027000)
    put_offsets(before, 2, np.full(before.lanes, MEMORY_BYTES))
    refuse(isa_probe, assembler, code, before, "lane 0 ", "behind the end")


def test_a_buffer_that_is_larger_than_its_memory(assembler: Assembler, isa_probe: Probe) -> None:
    state = random_state(assembler.chip, np.random.default_rng(13))
    put_resource(assembler, state, MEMORY_BYTES + 16)
    put_offsets(state, 2, np.full(state.lanes, MEMORY_BYTES))
    for kind in ("load", "store"):
        code = assembler.buffer(f"buffer_{kind}_{assembler.dword}", 8, 2, 4)
        refuse(isa_probe, assembler, code, state, "lane 0 ", "0 bytes behind the end")


@pytest.mark.parametrize("chip", ["gfx908", "gfx90a"])
def test_scratch_through_a_buffer(chip: str, isa_probe: Probe) -> None:
    """Chips without scratch instructions reach scratch through a resource of its own, where the
    bytes of 64 lanes are interleaved: soffset counts those of all."""
    scratch_base = 0x5C00 << 32
    assembler, rng = Assembler(chip), np.random.default_rng(14)
    for name, datum, is_store in _cases(assembler, "buffer"):
        before = random_state(chip, rng, int(rng.integers(1, 2**63)))
        put_scalar64(before, 4, scratch_base | 1 << 63)
        before.sgprs[6], before.sgprs[7], before.sgprs[12] = 0xFFFFFFFF, 0xE00000, 16 * 64
        places = rng.integers(16 + 40, SCRATCH_BYTES - datum.size + 1, 64)
        put_offsets(before, 2, places - 16 - 40)
        own = np.arange(64) * SCRATCH_BYTES
        code = assembler.buffer(name, 8, 2, 4, 12, 40)
        check_access(isa_probe, assembler, code, before, "scratch", datum, is_store, own + places)
        put_offsets(before, 2, np.full(64, SCRATCH_BYTES))
        refuse(isa_probe, assembler, code, before, "of scratch")
        before.sgprs[12] = 16
        refuse(isa_probe, assembler, code, before, "soffset")


# ----------------------------------------------------------------------------------- scalar loads


def test_scalar_loads(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(15)
    for kind in SCALAR_LOADS[assembler.arch]:
        datum = datum_of(kind)
        for _ in range(8):
            before = random_state(assembler.chip, rng)
            align = min(datum.size, 4)
            place = int(rng.integers(0, (MEMORY_BYTES - datum.size) // align + 1)) * align
            for name, start in ((f"s_load_{kind}", 4), (f"s_buffer_load_{kind}", 4)):
                put_resource(assembler, before, MEMORY_BYTES)
                before.sgprs[8] = place // 8 * 4
                codes = [(place, assembler.scalar(name, 16, start, None, place))]
                base = place // 8 * 4 + 64
                if base + datum.size <= MEMORY_BYTES:
                    codes.append((base, assembler.scalar(name, 16, start, 8, 64)))
                for at, code in codes:
                    after = run(isa_probe, assembler, code, before)
                    want = before.sgprs.copy()
                    old = want[16 : 16 + datum.registers, None]
                    data = before.memory[None, at : at + datum.size]
                    want[16 : 16 + datum.registers] = loaded(data, datum, old)[:, 0]
                    assert np.array_equal(after.sgprs, want), (name, at)
                    assert np.array_equal(after.vgprs, before.vgprs)


def test_scalar_loads_that_are_refused(assembler: Assembler, isa_probe: Probe) -> None:
    state = random_state(assembler.chip, np.random.default_rng(16))
    put_resource(assembler, state, 1024)
    for kind in SCALAR_LOADS[assembler.arch]:
        datum = datum_of(kind)
        name, size = f"s_load_{kind}", datum.size
        outside = assembler.scalar(name, 16, 4, None, MEMORY_BYTES - size + min(size, 4))
        refuse(isa_probe, assembler, outside, state, "the end of")
        beyond = assembler.scalar(f"s_buffer_load_{kind}", 16, 4, None, 1024)
        refuse(isa_probe, assembler, beyond, state, "beyond the end")
        if size > 1:
            crooked = assembler.scalar(name, 16, 4, None, 129)
            refuse(isa_probe, assembler, crooked, state, "not aligned")


# --------------------------------------------------------------------------------------------- LDS


def lds_name(assembler: Assembler, datum: str, is_store: bool) -> str:
    cdna, rdna = ("write", "store") if is_store else ("read", "load")
    return f"ds_{cdna if assembler.is_cdna else rdna}_{datum}"


def test_lds(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(17)
    for kind, is_store in [(k, False) for k in LDS_LOADS] + [(k, True) for k in LDS_STORES]:
        datum = datum_of(kind)
        name = lds_name(assembler, kind, is_store)
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            for places in patterns(rng, before.lanes, datum.size, LDS_BYTES):
                offset = int(rng.integers(0, 1000))  # the sum has 32 bits: it may wrap around
                put_offsets(before, 2, places - offset)
                registers = {"addr": 2, "data0" if is_store else "vdst": 8}
                code = assembler.ds(name, offset, **registers)
                check_access(isa_probe, assembler, code, before, "lds", datum, is_store, places)


def test_lds_has_bounds(assembler: Assembler, isa_probe: Probe) -> None:
    state = random_state(assembler.chip, np.random.default_rng(18))
    for kind, is_store in [(k, False) for k in LDS_LOADS] + [(k, True) for k in LDS_STORES]:
        datum = datum_of(kind)
        places = np.zeros(state.lanes, np.int64)
        places[11] = LDS_BYTES - datum.size + 1
        put_offsets(state, 2, places)
        registers = {"addr": 2, "data0" if is_store else "vdst": 8}
        code = assembler.ds(lds_name(assembler, kind, is_store), **registers)
        refuse(isa_probe, assembler, code, state, "lane 11 ", f"at {places[11]}, of {LDS_BYTES}")


def test_lds_pairs(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(19)
    for which, pair in enumerate(lds_pairs(assembler.arch)):
        for kind in ("b32", "b64"):
            datum, is_store = datum_of(kind), which >= 2
            unit = datum.size * (64 if which % 2 else 1)
            for mask in masks(rng):
                before = random_state(assembler.chip, rng, mask)
                room = (LDS_BYTES - datum.size) // unit
                first, second = (int(k) for k in rng.integers(0, min(room, 256), 2))
                last = LDS_BYTES - datum.size - max(first, second) * unit
                places = rng.integers(0, last + 1, before.lanes)
                put_offsets(before, 2, places)
                registers = {"data0": 8, "data1": 12} if is_store else {"vdst": 8}
                name = "ds_" + pair.format(kind)
                code = assembler.ds(name, first | second << 8, addr=2, **registers)
                after = run(isa_probe, assembler, code, before)
                middle = before.copy()
                offsets = (places + first * unit, places + second * unit)
                if is_store:
                    for row, at in zip((8, 12), offsets, strict=True):
                        values = stored(before.vgprs[row : row + datum.registers], datum)
                        for lane in active_lanes(before):
                            middle.lds[at[lane] : at[lane] + datum.size] = values[lane]
                else:
                    for row, at in zip((8, 8 + datum.registers), offsets, strict=True):
                        rows, lanes = slice(row, row + datum.registers), active_lanes(before)
                        if len(lanes):
                            data = before.lds[spans(at[lanes], datum.size)]
                            old = before.vgprs[rows, lanes]
                            middle.vgprs[rows, lanes] = loaded(data, datum, old)
                assert np.array_equal(after.lds, middle.lds), name
                assert np.array_equal(after.vgprs, middle.vgprs), name


def exchange(assembler: Assembler, probe: Probe, code: bytes, before: State, want: Words) -> None:
    """Active lanes of v8 hold what is wanted; nothing else has changed."""
    after = run(probe, assembler, code, before)
    lanes = active_lanes(before)
    expected = before.vgprs.copy()
    expected[8, lanes] = want[lanes]
    assert np.array_equal(after.vgprs, expected)


def test_permutes(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(20)
    for mask in masks(rng):
        before = random_state(assembler.chip, rng, mask)
        n, offset = before.lanes, int(rng.integers(0, 64)) * 4
        which = (before.vgprs[2, :n].astype(np.int64) + offset) % 2**32 // 4 % n
        data = before.vgprs[3]
        is_active = np.isin(np.arange(n), active_lanes(before))
        read = np.where(is_active[which], data[which], 0).astype(np.uint32)
        code = assembler.ds("ds_bpermute_b32", offset, vdst=8, addr=2, data0=3)
        exchange(assembler, isa_probe, code, before, read)
        written = np.zeros(n, np.uint32)
        for lane in active_lanes(before):
            written[which[lane]] = data[lane]
        code = assembler.ds("ds_permute_b32", offset, vdst=8, addr=2, data0=3)
        exchange(assembler, isa_probe, code, before, written)
        if assembler.is_rdna4:
            code = assembler.ds("ds_bpermute_fi_b32", offset, vdst=8, addr=2, data0=3)
            exchange(assembler, isa_probe, code, before, data[which])


def swizzle_source(offset: int, lane: int) -> int:
    """The lane that ds_swizzle reads from, by AMD's documents."""
    within, half = lane & 31, lane & 32
    low, middle = offset & 31, offset >> 5 & 31
    if offset >= 0xE000:  # FFT
        reversed_bits = int(f"{within:05b}"[::-1], 2)
        return half | reversed_bits >> low.bit_count() | within & low
    if offset >= 0xC000:  # rotation of the bits outside the mask
        amount = -middle if offset & 0x400 else middle
        return half | within & low | (within + amount) & ~low & 31
    if offset >= 0x8000:  # within fours
        return lane & ~3 | offset >> 2 * (lane & 3) & 3
    return half | (within & low | middle) ^ offset >> 10 & 31


def test_swizzle(assembler: Assembler, isa_probe: Probe) -> None:
    rng = np.random.default_rng(21)
    # Swapped neighbours, reversed, broadcast, rotated in 32 and in 8, and whatever comes.
    offsets = [0x041F, 0x401F, 0x7C1F, 0x001E, 0x801B, 0x80B1, 0xC020, 0xC478, 0xE000, 0xE010]
    offsets += rng.integers(0, 2**16, 40).tolist()
    for offset in offsets:
        for mask in masks(rng):
            before = random_state(assembler.chip, rng, mask)
            which = np.array([swizzle_source(offset, lane) for lane in range(before.lanes)])
            is_active = np.isin(np.arange(before.lanes), active_lanes(before))
            want = np.where(is_active[which], before.vgprs[2][which], 0).astype(np.uint32)
            code = assembler.ds("ds_swizzle_b32", offset, vdst=8, addr=2)
            exchange(assembler, isa_probe, code, before, want)


# ------------------------------------------------------------------------------------------- waits


class Waiting:
    """Short programs on one wave that has to wait for its loads."""

    def __init__(self, probe: Probe, assembler: Assembler) -> None:
        self.probe, self.assembler = probe, assembler
        self.state = random_state(assembler.chip, np.random.default_rng(22))
        self.state.check_waits = True
        put64(self.state, 2, BASE + np.arange(self.state.lanes) * 4)
        put_offsets(self.state, 4, np.arange(self.state.lanes) * 4)
        put_scalar64(self.state, 4, BASE)

    def load(self, target: int, address: int = 2) -> bytes:
        name = f"global_load_{self.assembler.dword}"
        return self.assembler.flat(name, target, address)

    def flat(self, target: int) -> bytes:
        return self.assembler.flat(f"flat_load_{self.assembler.dword}", target, 2)

    def store(self, source: int) -> bytes:
        return self.assembler.flat(f"global_store_{self.assembler.dword}", source, 2)

    def lds(self, target: int) -> bytes:
        return self.assembler.ds(lds_name(self.assembler, "b32", False), vdst=target, addr=4)

    def lds_store(self, source: int) -> bytes:
        return self.assembler.ds(lds_name(self.assembler, "b32", True), data0=source, addr=4)

    def scalar(self, target: int) -> bytes:
        return self.assembler.scalar(f"s_load_{self.assembler.dword}", target, 4)

    def runs(self, *code: bytes) -> State:
        return run(self.probe, self.assembler, b"".join(code), self.state)

    def refuses(self, *code: bytes, text: str = "pending") -> None:
        refuse(self.probe, self.assembler, b"".join(code), self.state, text)
        ready = self.state.copy()
        ready.check_waits = False
        run(self.probe, self.assembler, b"".join(code), ready)


@pytest.fixture
def waiting(isa_probe: Probe, assembler: Assembler) -> Waiting:
    return Waiting(isa_probe, assembler)


def test_what_is_pending_may_not_be_read_or_overwritten(waiting: Waiting) -> None:
    w, a = waiting, waiting.assembler
    for load, wait in (
        (w.load(8), a.wait(vector=0)),
        (w.lds(8), a.wait(lds=0)),
        (w.flat(8), a.wait(vector=0, lds=0)),
    ):
        w.refuses(load, a.copy(9, 8), text="v8 is read while v8 is pending")
        w.refuses(load, a.copy(8, 9), text="v8 is overwritten")
        w.runs(load, a.copy(9, 7))
        after = w.runs(load, wait, a.copy(9, 8))
        lanes = slice(after.lanes)
        assert np.array_equal(after.vgprs[9, lanes], after.vgprs[8, lanes])
    w.refuses(w.scalar(16), a.scalar_copy(17, 16), text="s16 is read while s16 is pending")
    w.refuses(w.scalar(16), a.scalar_copy(16, 17), text="s16 is overwritten")
    w.runs(w.scalar(16), a.wait(lds=0), a.scalar_copy(17, 16))
    w.runs(w.load(8))  # a wave may end before its loads


def test_addresses_and_data_that_are_pending(waiting: Waiting) -> None:
    w, a = waiting, waiting.assembler
    address = a.flat(f"global_load_{a.dword}", 8, 3)
    refuse(w.probe, a, w.lds(3) + address, w.state, "v[3:4] is read while v3 is pending")
    w.refuses(w.load(8), w.store(8), text="v8 is read")
    w.runs(w.store(8), a.copy(8, 9))  # hardware has read it by then
    w.runs(w.load(8), a.wait(vector=0), w.store(8), w.load(8))


@pytest.mark.parametrize("chip", ["gfx1100", "gfx1201"])
def test_registers_that_m0_chooses_may_be_pending(chip: str, isa_probe: Probe) -> None:
    a = Assembler(chip)
    w = Waiting(isa_probe, a)
    w.state.sgprs[M0] = 2
    read, write = (
        a.make(name, vdst=256 + to, src0=256 + source)
        for name, to, source in (
            ("v_movrels_b32_e32", 9, 6), ("v_movreld_b32_e32", 6, 9)
        )
    )  # fmt: skip
    w.refuses(w.load(8), read, text="v8 is read while v8 is pending")
    w.refuses(w.load(8), write, text="v8 is overwritten")
    after = w.runs(w.load(8), a.wait(vector=0), read, write)
    assert np.array_equal(after.vgprs[8, :32], after.vgprs[9, :32])


def test_loads_come_in_order(waiting: Waiting) -> None:
    w, a = waiting, waiting.assembler

    def wait_vector(count: int) -> bytes:
        return a.wait(vector=count)

    def wait_lds(count: int) -> bytes:
        return a.wait(lds=count)

    for load, wait in ((w.load, wait_vector), (w.lds, wait_lds)):
        begin = load(8) + load(9) + load(10)
        w.runs(begin, wait(2), a.copy(12, 8))
        w.runs(begin, wait(1), a.copy(12, 8), a.copy(13, 9))
        w.refuses(begin, wait(2), a.copy(12, 9))
        w.refuses(begin, wait(1), a.copy(12, 10))
        w.refuses(begin, wait(3), a.copy(12, 8))
        w.runs(begin, wait(1), wait(0), a.copy(12, 10))
        # The later of two loads to one register stays.
        w.runs(load(8), load(8), wait(0), a.copy(12, 8))
        w.refuses(load(8), load(8), wait(1), a.copy(12, 8))
    w.refuses(w.load(8), w.lds(8), text="v8 is overwritten")
    w.refuses(w.lds(8), w.load(8), text="v8 is overwritten")
    w.refuses(w.flat(8), w.load(8), text="v8 is overwritten")


def test_scalar_loads_come_in_any_order(waiting: Waiting) -> None:
    w, a = waiting, waiting.assembler
    begin = w.scalar(16) + w.scalar(17)
    w.refuses(begin, a.wait(lds=1), a.scalar_copy(20, 16))
    w.refuses(w.scalar(16), w.scalar(16), text="s16 is overwritten")
    w.runs(begin, a.wait(lds=0), a.scalar_copy(20, 16), a.scalar_copy(21, 17))


def test_counters_that_count_two_kinds(waiting: Waiting) -> None:
    """Before gfx12, LDS and scalar loads have one; gfx9 counts stores with loads, in order."""
    w, a = waiting, waiting.assembler
    wait = a.wait(lds=1)
    mixed = (w.lds(8), w.scalar(16), wait, a.copy(12, 8))
    if a.is_rdna4:
        w.refuses(w.lds(8), w.scalar(16), a.make("s_wait_kmcnt", simm16=0), a.copy(12, 8))
        w.runs(w.lds(8), w.scalar(16), a.make("s_wait_dscnt", simm16=0), a.copy(12, 8))
        both = a.make("s_wait_loadcnt_dscnt", simm16=1 << 8 | 0)
        w.runs(w.load(8), w.load(9), w.lds(10), both, a.copy(12, 8), a.copy(13, 10))
        w.refuses(w.load(8), w.load(9), w.lds(10), both, a.copy(12, 9))
    w.refuses(*mixed)
    w.runs(w.lds(8), w.lds(9), w.scalar(16), wait, a.copy(12, 8))
    w.runs(w.lds(8), w.lds_store(12), wait, a.copy(12, 8))
    w.refuses(w.lds_store(12), w.lds(8), wait, a.copy(12, 8))
    stores = (w.load(8), w.store(12), a.wait(vector=1), a.copy(13, 8))
    if a.is_cdna:
        w.runs(*stores)
    else:
        w.refuses(*stores)
    w.runs(w.load(8), w.store(12), a.wait(vector=0), a.copy(13, 8))


def test_flat_loads_count_twice(waiting: Waiting) -> None:
    w, a = waiting, waiting.assembler
    w.refuses(w.flat(8), a.wait(vector=0), a.copy(12, 8))
    w.refuses(w.flat(8), a.wait(lds=0), a.copy(12, 8))
    w.refuses(w.flat(8), w.flat(9), a.wait(vector=1, lds=1), a.copy(12, 8))
    w.runs(w.flat(8), a.wait(vector=0), a.wait(lds=0), a.copy(12, 8))


def test_exchanges_count_as_lds(waiting: Waiting) -> None:
    w, a = waiting, waiting.assembler
    for name in EXCHANGES:
        code = a.ds(name, 0, vdst=8, addr=4)
        w.refuses(code, a.copy(12, 8))
        w.runs(code, a.wait(lds=0), a.copy(12, 8))


def test_many_loads_without_a_wait(waiting: Waiting) -> None:
    """A counter has six bits: the hardware lets no more than that be pending."""
    w, a = waiting, waiting.assembler
    w.runs(w.load(8) + w.load(9) * 1000, a.wait(vector=62), a.copy(12, 8))
    w.runs(w.store(8) * 1000, w.lds_store(8) * 1000)


# ------------------------------------------------------------------------------------------- races

READ, WRITE, BARRIER = range(3)
Operation = tuple[int, int, int, int]  # kind, address, size, wave


@pytest.fixture(scope="module")
def first_race(hip_driver: Driver) -> Callable[[list[Operation]], int]:
    """The first of some operations that races, as the interpreter sees it; -1 if none does."""
    function = ctypes.CDLL(str(hip_driver.folder / LIBRARY)).sf_isa_races

    def call(operations: list[Operation]) -> int:
        flat = [number for operation in operations for number in operation]
        return int(function((ctypes.c_int * len(flat))(*flat), len(operations)))

    return call


def slow_first_race(operations: list[Operation]) -> int:
    """The same, byte by byte."""
    touched: dict[int, list[tuple[int, int]]] = {}
    for index, (kind, address, size, wave) in enumerate(operations):
        if kind == BARRIER:
            touched = {}
            continue
        for byte in range(address, address + size):
            for other_kind, other in touched.setdefault(byte, []):
                if other != wave and WRITE in (kind, other_kind):
                    return index
            touched[byte].append((kind, wave))
    return -1


def test_races(first_race: Callable[[list[Operation]], int]) -> None:
    assert first_race([(WRITE, 0, 4, 0), (READ, 0, 4, 1)]) == 1
    assert first_race([(WRITE, 0, 4, 0), (BARRIER, 0, 0, 0), (READ, 0, 4, 1)]) == -1
    assert first_race([(READ, 0, 4, 0), (READ, 0, 4, 1), (WRITE, 3, 1, 0)]) == 2
    assert first_race([(WRITE, 0, 2, 0), (WRITE, 2, 2, 1), (READ, 0, 4, 0)]) == 2
    assert first_race([(WRITE, 8, 16, 5), (READ, 8, 8, 5), (WRITE, 24, 4, 6)]) == -1


def test_races_of_random_operations(first_race: Callable[[list[Operation]], int]) -> None:
    rng = np.random.default_rng(23)
    seen: set[bool] = set()
    for _ in range(400):
        operations: list[Operation] = []
        for _ in range(int(rng.integers(2, 40))):
            kind = int(rng.choice([READ, WRITE, BARRIER], p=[0.75, 0.1, 0.15]))
            size = int(rng.choice([1, 2, 4, 8, 16]))
            address = int(rng.integers(0, 64 // size)) * size
            if rng.random() < 0.1:
                address += 1
            operations.append((kind, address, size, int(rng.integers(0, 4))))
        want = slow_first_race(operations)
        assert first_race(operations) == want, operations
        seen.add(want < 0)
    assert seen == {True, False}


def test_races_after_many_barriers(first_race: Callable[[list[Operation]], int]) -> None:
    """Epochs are numbered in 16 bits; what was before a barrier stays forgotten."""
    barriers: list[Operation] = [(BARRIER, 0, 0, 0)] * (2**16 - 1)
    assert first_race([(WRITE, 0, 4, 0), *barriers, (READ, 0, 4, 1)]) == -1
    assert first_race([(WRITE, 0, 4, 0), (READ, 0, 4, 0), *barriers, (WRITE, 0, 4, 1)]) == -1
    assert first_race([*barriers, (WRITE, 0, 4, 0), (READ, 0, 4, 1)]) == len(barriers) + 1


def test_what_is_listed_is_what_is_there() -> None:
    """The names in OPCODES are opcodes of tinygrad's tables."""
    for arch in ARCHS.values():
        known: Any = _ins(arch)
        missing = [name for name in _names(arch) if not hasattr(known, name)]
        assert not missing, (arch, missing)
