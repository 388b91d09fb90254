"""What an arithmetic instruction does to a wave, from AMD's documents: the oracle of test_isa_ops.

tinygrad decodes the bytes into the fields of their encoding and carries AMD's pseudo-code. Here
operands are fetched as the fields say, with all modifiers; `pcode` runs the text on them; and the
result lists what is written where. Nothing is taken from the interpreter under test.

A batch holds several waves in different states. Arrays are [waves, lanes] for vector instructions
and [waves] for scalar ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.hip import pcode
from tests.hip.pcode import Array, Context, PcodeError, Value, boolean, real, retype, unsigned

VCC, M0, EXEC = 106, 124, 126  # numbers of registers in a State
_NULL, _LITERAL = 124, 255  # numbers in encodings; NULL is RDNA's
_FLOATS = (0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 4.0, -4.0)  # inline constants 240 to 247
_INV_2PI = {16: 0x3118, 32: 0x3E22F983, 64: 0x3FC45F306DC9C882}


class NoCase(Exception):
    """The oracle does not know what the instruction does."""


@dataclass
class Batch:
    """Several waves before an instruction."""

    vgprs: npt.NDArray[np.uint32]  # [waves, registers, 64]
    sgprs: npt.NDArray[np.uint32]  # [waves, 128]
    scc: npt.NDArray[np.uint32]  # [waves]
    mode: int
    lanes: int

    @property
    def waves(self) -> int:
        return len(self.sgprs)

    @property
    def flushes_f32(self) -> bool:
        """Whether float32 denormals become zeros."""
        return self.mode & 0x30 == 0

    def ieee(self) -> Value:
        """What texts call WAVE_MODE.IEEE. gfx12 has no such bit, and its texts do not ask."""
        return boolean(np.full((self.waves, 1), self.mode >> 9 & 1))

    def scalar(self, index: int, count: int = 1) -> Array:
        """Scalar registers [index, index + count) as one number, [waves]."""
        value = self.sgprs[:, index].astype(np.uint64)
        if count == 2:
            value = value | self.sgprs[:, index + 1].astype(np.uint64) << np.uint64(32)
        return value

    def vector(self, index: int, count: int = 1) -> Array:
        """Vector registers [index, index + count) as one number, [waves, lanes]."""
        value = self.vgprs[:, index, : self.lanes].astype(np.uint64)
        if count == 2:
            high = self.vgprs[:, index + 1, : self.lanes].astype(np.uint64)
            value = value | high << np.uint64(32)
        return value

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """A mask in scalar registers, a bit a lane: [waves, lanes]."""
        return self.bits_of(self.scalar(index, self.lanes // 32))

    def bits_of(self, masks: Array) -> npt.NDArray[np.bool_]:
        """Masks [waves] as a bit a lane: [waves, lanes]."""
        lane = np.arange(self.lanes, dtype=np.uint64)
        return np.asarray(masks[:, None] >> lane & np.uint64(1), bool)

    def mask_of(self, bits: npt.NDArray[np.bool_]) -> Array:
        """The opposite: [waves, lanes] as masks [waves]."""
        weights = np.uint64(1) << np.arange(self.lanes, dtype=np.uint64)
        return np.asarray(np.where(bits, weights, np.uint64(0)).sum(axis=1, dtype=np.uint64))


@dataclass
class VectorWrite:
    """Vector registers [index, index + count) in the lanes of `mask`."""

    index: int
    count: int
    bits: Array  # [waves, lanes]
    mask: npt.NDArray[np.bool_]  # [waves, lanes]
    floats: set[tuple[int, int]]  # (lowest bit, width) of float results, where one NaN is another
    # By how much a float32 result may be off: an approximation [waves, lanes], 0 is exact. Where
    # `or_bits` is given, its results are right as well.
    slack: Array | None = None
    or_bits: Array | None = None


@dataclass
class ScalarWrite:
    """Scalar registers [index, index + count)."""

    index: int
    count: int
    bits: Array  # [waves]
    slack: Array | None = None  # these two as in VectorWrite
    or_bits: Array | None = None
    is_float: bool = False


@dataclass
class Result:
    """All that an instruction writes."""

    vectors: list[VectorWrite] = field(default_factory=list)
    scalars: list[ScalarWrite] = field(default_factory=list)
    scc: Array | None = None
    mode: int | None = None


# ----------------------------------------------------------------------------------------- fields


def arch_of(chip: str) -> str:
    """tinygrad's name of the chip's family."""
    return {"gfx9": "cdna", "gfx11": "rdna3", "gfx12": "rdna4"}[chip[:-2]]


class Fields:
    """One instruction: the fields of its encoding, and what its documents say of its operands."""

    def __init__(self, inst: Any, arch: str) -> None:
        self.inst, self.arch = inst, arch
        self.format: str = type(inst).__name__
        self.base = self.format.split("_")[0]  # "VOP3" of "VOP3_SDST_LIT"
        self.op = getattr(inst, "op", None)
        self.name = plain_name(self.op.name) if self.op is not None else ""
        self.stand_in = ""  # what the tables call it, where they do not know the operation

    def get(self, name: str, default: int = 0) -> int:
        """A field as a number: of a register, its number in the encoding of sources."""
        value = getattr(self.inst, name, default)
        return value if isinstance(value, int) else int(value.offset)

    def has(self, name: str) -> bool:
        return hasattr(self.inst, name)

    def type_of(self, name: str) -> tuple[str, int]:
        """(format, bits) of an operand: ("F32", 32), ("PK2_F16", 32)."""
        operands = self.inst.operands
        for key in (name, name.removeprefix("v"), "v" + name, "s" + name):
            if key in operands:
                form, bits, _ = operands[key]
                return (form.name.removeprefix("FMT_NUM_") if form else "B32"), bits
        raise NoCase(f"no case for {self.name}: operand {name} is not in the tables")

    def sources(self) -> list[str]:
        """The names of the fields of S0, S1 and S2, of those that the operation has."""
        used = {key[-4:] for key in self.inst.operands}  # "src1" of "vsrc1" and "ssrc1"
        # With SDWA and DPP, src0 only says so, and vsrc0 is the register.
        return [
            next(name for name in (f"v{source}", f"s{source}", source) if self.has(name))
            for source in ("src0", "src1", "src2")
            if source in used
        ]


def plain_name(name: str) -> str:
    """ "V_ADD_F32_E32" as "v_add_f32"."""
    return name.lower().removesuffix("_e32").removesuffix("_e64")


# Operations of gfx908 and gfx90a that later chips lost, and with them the tables of CDNA. By
# (operation bits, whether VOP3): the name, and the number of one with equal operands.
_LOST = {
    (0x1C1, True): ("v_mad_f32", 0x1CB),  # v_fma_f32
    (0x116, True): ("v_mac_f32", 0x13B),  # v_fmac_f32
    (0x16, False): ("v_mac_f32", 0x3B),
}


def decode(code: bytes, chip: str) -> Fields:
    """The fields of one instruction. Raises ValueError where tinygrad does not know it."""
    from tinygrad.renderer.amd import decode_inst

    name, word = "", int.from_bytes(code[:4], "little")
    if chip in ("gfx908", "gfx90a"):
        is_vop3 = word >> 26 == 0x34
        low, mask = (16, 0x3FF) if is_vop3 else (25, 0x3F)
        lost = _LOST.get((word >> low & mask, is_vop3))
        if lost and (is_vop3 or word >> 31 == 0):
            name, stand_in = lost
            word = word & ~(mask << low) | stand_in << low
    arch = arch_of(chip)
    fields = Fields(decode_inst(word.to_bytes(4, "little") + code[4:], arch), arch)
    fields.stand_in = fields.name if name else ""
    fields.name = name or fields.name
    return fields


def text_of(op: Any, arch: str) -> str:
    """AMD's pseudo-code of an operation, empty if there is none."""
    tables = import_module(f"tinygrad.runtime.autogen.amd.{arch}.str_pcode")
    text: str = tables.PCODE.get(op, "")
    return text


# --------------------------------------------------------------------------------------- operands


def _constant(number: int, form: str, width: int) -> int | None:
    """An inline constant in the form that an operand wants, None if `number` is none."""
    if 128 <= number <= 208:
        signed = number - 128 if number <= 192 else 192 - number
        return signed & ((1 << max(width, 32)) - 1)
    if not 240 <= number <= 248:
        return None
    size = 64 if "F64" in form else 16 if width == 16 or form == "PK2_F16" else 32
    if form in ("BF16", "PK2_BF16"):
        raise NoCase("a bf16 constant")
    if number == 248:
        return _INV_2PI[size]
    return int(pcode.real(np.array([_FLOATS[number - 240]], f"f{size // 8}")).bits[0])


def _literal(literal: int, form: str, width: int) -> int:
    """The 32-bit constant behind an instruction in the form that an operand wants."""
    if form == "F64":
        return literal << 32
    if width == 64 and form == "I64" and literal >> 31:
        return literal | 0xFFFFFFFF00000000
    return literal


def is_true16(fields: Fields, width: int) -> bool:
    """Whether the encoding's 8 bits of a vector register name a half of one of 128."""
    return fields.arch != "cdna" and fields.base in ("VOP1", "VOP2", "VOPC") and width == 16


def scalar_index(number: int, arch: str) -> int | None:
    """An encoding's scalar register as a number in a State; None is NULL."""
    if arch == "cdna":
        return number
    return None if number == _NULL else M0 if number == 125 else number


class Fetch:
    """Reads operands of one instruction in all lanes of a batch."""

    def __init__(self, fields: Fields, batch: Batch, literal: int | None) -> None:
        self.fields, self.batch, self.literal = fields, batch, literal
        self.is_vector = fields.base.startswith("V")
        self.shape = (batch.waves, batch.lanes) if self.is_vector else (batch.waves,)

    def number(self, number: int, form: str, width: int) -> Array:
        """The operand that the encoding calls `number`: its bits in each lane."""
        count = 2 if width == 64 else 1
        if number >= 256:
            return self._vector(number - 256, count, width)
        constant = _constant(number, form, width)
        if number == _LITERAL:
            if self.literal is None:
                raise NoCase(f"no case for {self.fields.name}: a literal, but none is there")
            constant = _literal(self.literal, form, width)
        if constant is not None:
            return np.full(self.shape, constant, np.uint64)
        return self._spread(self._scalar(number, count))

    def _vector(self, index: int, count: int, width: int) -> Array:
        if is_true16(self.fields, width):
            return np.asarray(self.batch.vector(index & 127) >> np.uint64(16 * (index >> 7)))
        return self.batch.vector(index, count)

    def _scalar(self, number: int, count: int) -> Array:
        batch, masks = self.batch, self.batch.lanes // 32
        if number == 251:
            return np.asarray(batch.scalar(VCC, masks) == 0, np.uint64)
        if number == 252:
            return np.asarray(batch.scalar(EXEC, masks) == 0, np.uint64)
        if number == 253:
            return batch.scc.astype(np.uint64)
        index = scalar_index(number, self.fields.arch)
        if index is None:
            return np.zeros(batch.waves, np.uint64)
        if index > 127:
            raise NoCase(f"no case for {self.fields.name}: operand {number}")
        return batch.scalar(index, count)

    def _spread(self, values: Array) -> Array:
        return np.broadcast_to(values[:, None], self.shape) if self.is_vector else values


def _signs(bits: Array, width: int, negate: int, absolute: int) -> Array:
    """The float modifiers: |x| first, then -x."""
    sign = np.uint64(1 << (width - 1))
    if absolute:
        bits = bits & ~sign
    return np.asarray(bits ^ sign if negate else bits)


def _selected(bits: Array, select: int, sext: int) -> tuple[Array, int]:
    """The part of a register that SDWA selects, and its width."""
    if select == 6:
        return bits, 32
    width, low = (8, 8 * select) if select < 4 else (16, 16 * (select - 4))
    part = retype(unsigned(bits >> np.uint64(low)), "i" if sext else "u", width)
    return pcode.extend(part, 32).bits, width


class Operands:
    """The sources of one instruction, all modifiers applied."""

    def __init__(self, fields: Fields, batch: Batch, literal: int | None) -> None:
        self.fields, self.batch = fields, batch
        self.fetch = Fetch(fields, batch, literal)
        # Lanes that DPP lets through.
        self.enabled = np.ones(self.fetch.shape, bool)
        self.registers: dict[str, Value | list[Value]] = {}
        for k, name in enumerate(fields.sources()):
            form, width = fields.type_of(name)
            if form == "M64":  # a mask, which the text calls VCC
                continue
            width = 32 if width in (8, 24) else width  # parts that the text takes itself
            self.registers[f"S{k}"] = unsigned(self._source(k, name, form, width), width)

    def _source(self, k: int, name: str, form: str, width: int) -> Array:
        fields = self.fields
        number = fields.get(name)
        if fields.has(f"s{k}") and fields.get(f"s{k}"):  # SDWA: the 8 bits name a scalar register
            number -= 256 if number >= 256 else 0
        bits = self.fetch.number(number, form, width)
        if "DPP" in fields.format and k == 0:
            bits, self.enabled = exchanged(bits, fields, self.batch)
        if "SDWA" in fields.format:
            return self._sdwa(bits, k)
        if fields.base == "VOP3P":
            return self._packed(bits, k, form, width, is_constant=number in range(128, 256))
        if fields.base == "VOP3" and fields.get("opsel") >> k & 1:
            if width != 16:
                raise NoCase(f"no case for {fields.name}: op_sel of {width} bits")
            bits = bits >> np.uint64(16)
        negate = fields.get("neg") >> k & 1 or fields.get(f"src{k}_neg")
        absolute = fields.get("abs") >> k & 1 or fields.get(f"src{k}_abs")
        return _signs(bits, width, negate, absolute)

    def _sdwa(self, bits: Array, k: int) -> Array:
        fields = self.fields
        part, width = _selected(bits, fields.get(f"src{k}_sel"), fields.get(f"src{k}_sext"))
        negate, absolute = fields.get(f"src{k}_neg"), fields.get(f"src{k}_abs")
        if (negate or absolute) and width == 8:
            raise NoCase(f"no case for {fields.name}: the sign of a byte")
        return _signs(part, width, negate, absolute)

    def _packed(self, bits: Array, k: int, form: str, width: int, *, is_constant: bool) -> Array:
        """VOP3P: the halves that op_sel and op_sel_hi select, each with its own sign."""
        fields = self.fields
        if not form.startswith("PK2_"):
            return bits
        half = width // 2
        low_of, high_of = fields.get("opsel") >> k & 1, opsel_hi(fields) >> k & 1
        if is_constant and half == 32 and (low_of or high_of):
            raise NoCase(f"no case for {fields.name}: the upper half of a 64-bit constant")
        parts = []
        for chosen, negate in ((low_of, fields.get("neg")), (high_of, fields.get("neg_hi"))):
            part = np.asarray(bits >> np.uint64(half * chosen) & pcode.ones(half))
            parts.append(_signs(part, half, negate >> k & 1, 0))
        return np.asarray(parts[0] | parts[1] << np.uint64(half))


def opsel_hi(fields: Fields) -> int:
    """op_sel_hi of all three sources."""
    return fields.get("opsel_hi") | fields.get("opsel_hi2") << 2


def dpp_sources(control: int, lanes: int) -> Array:
    """Which lane each lane reads, by AMD's table of DPP_CTRL; -1 where there is none. [lanes]."""
    lane = np.arange(lanes)
    row, at = lane & ~15, lane & 15
    count = control & 15
    if control < 0x100:  # quad_perm
        return (lane & ~3) | (control >> 2 * (lane & 3) & 3)
    if 0x101 <= control <= 0x10F:  # row_shl
        return np.where(at + count < 16, lane + count, -1)
    if 0x111 <= control <= 0x11F:  # row_shr
        return np.where(at >= count, lane - count, -1)
    if 0x121 <= control <= 0x12F:  # row_ror
        return row | (at - count & 15)
    if control == 0x140:  # row_mirror
        return row | 15 - at
    if control == 0x141:  # row_half_mirror
        return (lane & ~7) | 7 - (lane & 7)
    if control == 0x142 and lanes == 64:  # row_bcast:15
        return np.where(lane > 15, row - 1, -1)
    if control == 0x143 and lanes == 64:  # row_bcast:31
        return np.where(lane > 31, 31, -1)
    if 0x150 <= control <= 0x15F:  # row_share, row_newbcast
        return row | count
    if 0x160 <= control <= 0x16F and lanes == 32:  # row_xmask
        return row | at ^ count
    raise NoCase(f"no case for dpp_ctrl {control:#x}")


def exchanged(bits: Array, fields: Fields, batch: Batch) -> tuple[Array, npt.NDArray[np.bool_]]:
    """A source after DPP, and the lanes that may be written.

    A lane that reads outside its row, or from an inactive lane, gets 0 with bound_ctrl and is not
    written without; rows and banks that the masks leave out are not written either.
    """
    if fields.get("fi"):
        raise NoCase(f"no case for {fields.name}: fetch of inactive lanes")
    source = dpp_sources(fields.get("dpp"), batch.lanes)
    is_valid = (source >= 0) & batch.mask(EXEC)[:, source]
    lane = np.arange(batch.lanes)
    enabled = fields.get("row_mask") >> (lane >> 4) & 1 & fields.get("bank_mask") >> (lane >> 2 & 3)
    moved = np.where(is_valid, bits[:, source], np.uint64(0))
    return moved, (enabled == 1) & (is_valid | bool(fields.get("bc")))


# ---------------------------------------------------------------------------------------- by hand

Registers = Mapping[str, Any]
Hand = Callable[[Registers, "Fields", bool], Context]


def outcome(**registers: Value) -> Context:
    """What an oracle written by hand returns: the registers that it writes."""
    context = Context(dict(registers), False, {})
    for name, value in registers.items():
        floats = {(0, value.width)} if value.kind == "f" else set()
        context.written[name] = pcode.Written((1 << value.width) - 1, floats)
    return context


def _f32(registers: Registers, name: str, flushes: bool) -> Array:
    """A source as float32 numbers."""
    value = retype(registers[name], "f", 32)
    return (pcode.flush(value) if flushes else value).floats()


def _rounded(numbers: Array, flushes: bool) -> Value:
    """float64 numbers, rounded to float32."""
    value = real(numbers.astype(np.float32))
    return pcode.flush(value) if flushes else value


def _rndne(registers: Registers, fields: Fields, flushes: bool) -> Context:
    return outcome(D0=_rounded(np.rint(_f32(registers, "S0", flushes)), flushes))


def _ldexp(registers: Registers, fields: Fields, flushes: bool) -> Context:
    power = retype(registers["S1"], "i", 32).integers()
    wide = _f32(registers, "S0", flushes).astype(np.float64)
    return outcome(D0=_rounded(np.ldexp(wide, np.clip(power, -400, 400).astype(int)), flushes))


def _mad_f32(registers: Registers, fields: Fields, flushes: bool) -> Context:
    addend = "S2" if "S2" in registers else "D0"  # v_mac adds to its destination
    a, b, c = (_f32(registers, name, True) for name in ("S0", "S1", addend))
    product = pcode.flush(real(a * b)).floats()
    return outcome(D0=pcode.flush(real(product + c)))


def _exponents(numbers: Array) -> Array:
    return (numbers.view(np.uint32) >> 23 & 255).astype(int)


def _div_scale(registers: Registers, fields: Fields, flushes: bool) -> Context:
    s0, s1, s2 = (_f32(registers, name, flushes) for name in ("S0", "S1", "S2"))
    raw = [retype(registers[name], "u", 32).bits for name in ("S0", "S1", "S2")]
    with np.errstate(all="ignore"):
        inverse, quotient = 1.0 / s1.astype(np.float64), s2.astype(np.float64) / s1
    is_denominator, is_numerator = raw[0] == raw[1], raw[0] == raw[2]
    up, down = np.ldexp(s0, 64), np.ldexp(s0, -64)
    scaled_denominator, scaled_numerator = (
        np.where(is_scaled, up, s0) for is_scaled in (is_denominator, is_numerator)
    )
    # The text has "up" here too, which makes infinity of a denominator above 2 ** 126.
    down_denominator = np.where(is_denominator, down, s0)
    nan = np.full_like(s0, np.nan)
    # In the order of the text: (condition, D0, VCC).
    cases: list[tuple[Array, Array, bool]] = [
        ((s1 == 0) | (s2 == 0), nan, False),
        (_exponents(s2) - _exponents(s1) >= 96, scaled_denominator, True),
        (_is_denormal(s1), up, False),
        (_is_denormal(inverse) & _is_denormal(quotient), down_denominator, True),
        (_is_denormal(inverse), down, False),
        (_is_denormal(quotient), scaled_numerator, True),
        (_exponents(s2) <= 23, up, False),
    ]
    conditions = [condition for condition, _, _ in cases]
    value = np.select(conditions, [result for _, result, _ in cases], s0)
    carry = np.select(conditions, [np.full(s0.shape, carry) for _, _, carry in cases], False)
    return outcome(D0=real(value.astype(np.float32)), VCC=boolean(carry))


def _is_denormal(numbers: Array) -> Array:
    """Whether numbers are below float32's smallest normal one, but not zero."""
    return np.asarray((numbers != 0) & (np.abs(numbers) < 2.0**-126))


def _div_fmas(registers: Registers, fields: Fields, flushes: bool) -> Context:
    a, b, c = (_f32(registers, name, flushes) for name in ("S0", "S1", "S2"))
    shift = np.where(registers["VCC"].truth(), np.where(_exponents(c) > 127, 64, -64), 0)
    return outcome(D0=_rounded(np.ldexp(pcode.fused(a, b, c), shift), flushes))


def _div_fixup(registers: Registers, fields: Fields, flushes: bool) -> Context:
    s0, s1, s2 = (_f32(registers, name, flushes) for name in ("S0", "S1", "S2"))
    sign = np.where(np.signbit(s1) ^ np.signbit(s2), np.float32(-1), np.float32(1))
    cases = [np.isnan(s1) | np.isnan(s2), (s1 == 0) & (s2 == 0), np.isinf(s1) & np.isinf(s2),
             (s1 == 0) | np.isinf(s2), np.isinf(s1) | (s2 == 0),
             _exponents(s2) - _exponents(s1) < -150, _exponents(s0) == 255]  # fmt: skip
    nan, infinity = np.full_like(s0, np.nan), sign * np.float32(np.inf)
    # The text asks whether the exponent of S1 is 255, which it cannot be here: it means S0's, of a
    # quotient that overflowed.
    results = [nan, nan, nan, infinity, sign * 0, sign * 0, infinity]
    found = np.select(cases, results, sign * np.abs(s0)).astype(np.float32)
    return outcome(D0=pcode.flush(real(found)) if flushes else real(found))


def _perm(registers: Registers, fields: Fields, flushes: bool) -> Context:
    data = registers["S1"].bits | registers["S0"].bits << np.uint64(32)
    selector = registers["S2"].bits
    result = np.zeros_like(data)
    for k in range(4):
        chosen = selector >> np.uint64(8 * k) & np.uint64(255)
        byte = data >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        # 8 to 11 repeat the sign of bytes 1, 3, 5, 7; 12 is 0; from 13 on all bits are set.
        bit = (chosen & np.uint64(3)) * np.uint64(16) + np.uint64(15)
        sign = (data >> bit & np.uint64(1)) * np.uint64(255)
        special = [np.full_like(sign, 255), np.zeros_like(sign), sign]
        value = np.select([chosen >= 13, chosen == 12, chosen >= 8], special, byte)
        result |= value << np.uint64(8 * k)
    return outcome(D0=unsigned(result))


def _mix(registers: Registers, fields: Fields, flushes: bool, form: str) -> Context:
    a, b, c = (_mix_source(registers, k, fields, flushes) for k in range(3))
    single = pcode.fused(a, b, c).astype(np.float32)
    if fields.get("clmp"):
        raise NoCase(f"no case for {fields.name}: clamp")
    if form == "f32":
        return outcome(D0=_rounded(single, flushes))
    low = 16 if form == "hi" else 0
    half = real(single.astype(np.float16))  # as the text says: rounded twice
    old = registers["D0"].bits & ~np.uint64(0xFFFF << low)
    context = outcome(D0=unsigned(old | half.bits << np.uint64(low)))
    context.written["D0"].floats = {(low, 16)}
    return context


def _mix_source(registers: Registers, k: int, fields: Fields, flushes: bool) -> Array:
    """A source of v_fma_mix: float16 where op_sel_hi says so, of the half that op_sel says.

    There neg_hi is the absolute value, and neg_lo the sign.
    """
    value = registers[f"S{k}"]
    negate, absolute = fields.get("neg") >> k & 1, fields.get("neg_hi") >> k & 1
    if opsel_hi(fields) >> k & 1:
        half = value.bits >> np.uint64(16 * (fields.get("opsel") >> k & 1)) & np.uint64(0xFFFF)
        signed = Value(_signs(half, 16, negate, absolute), "f", 16)
        return pcode.to_float(signed, 32).floats()
    signed = Value(_signs(value.bits, 32, negate, absolute), "f", 32)
    return (pcode.flush(signed) if flushes else signed).floats()


def _pk_mov(registers: Registers, fields: Fields, flushes: bool) -> Context:
    # The operands' low halves are those that op_sel names.
    low, high = (registers[name].bits & np.uint64(0xFFFFFFFF) for name in ("S0", "S1"))
    return outcome(D0=unsigned(low | high << np.uint64(32), 64))


def _dot2(registers: Registers, fields: Fields, flushes: bool, kind: str, to: str) -> Context:
    total = _f32(registers, to, flushes).astype(np.float64)
    for low in (0, 16):
        a, b = (_half(registers[name].bits, low, kind) for name in ("S0", "S1"))
        total = total + a.astype(np.float64) * b
    return outcome(D0=_rounded(total, flushes))


def _half(bits: Array, low: int, kind: str) -> Array:
    return Value(bits >> np.uint64(low) & np.uint64(0xFFFF), kind, 16).floats()


def _sum(registers: Registers, fields: Fields, flushes: bool, form: str) -> Context:
    a, b = (registers[name].bits.astype(np.int64) for name in ("S0", "S1"))
    exact = {"add": a + b, "sub": a - b, "subrev": b - a}[form]
    bounded = np.clip(exact, 0, 2**32 - 1) if fields.get("clmp") else exact & (2**32 - 1)
    return outcome(D0=unsigned(bounded.astype(np.uint64)))


def _pack_toward_zero(registers: Registers, fields: Fields, flushes: bool) -> Context:
    packed, places = np.uint64(0), {"S0": 0, "S1": 16}
    for name, low in places.items():
        source = _f32(registers, name, flushes)
        nearest = pcode.to_float(real(source), 16)  # infinities and NaNs
        with np.errstate(all="ignore"):
            size = np.abs(source.astype(np.float64))
            unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(size, 1e-300))), -14) - 10)
            cut = np.copysign(np.minimum(np.floor(size / unit) * unit, 65504), source)
        is_finite = np.isfinite(source)
        cut = real(np.where(is_finite, cut, 0).astype(np.float16)).bits
        packed = packed | np.where(is_finite, cut, nearest.bits) << np.uint64(low)
    context = outcome(D0=unsigned(packed))
    context.written["D0"].floats = {(low, 16) for low in places.values()}
    return context


# Dot products, with the kind of their operands, and what they are added to
DOTS = {
    "v_dot2c_f32_bf16": ("bf", "D0"), "v_dot2c_f32_f16": ("f", "D0"),
    "v_dot2acc_f32_f16": ("f", "D0"), "v_dot2_f32_f16": ("f", "S2"),
}  # fmt: skip

# Unsigned sums and differences
SUMS = {f"v_{form}_{kind}u32": form for form in ("add", "sub", "subrev") for kind in ("", "nc_")}

# What AMD's text of an operation cannot tell, with the reason.
BY_HAND: dict[str, tuple[Hand, str]] = {
    "v_rndne_f32": (_rndne, "The text adds 0.5, which is rounded itself: 0.49999997 gives 1."),
    "s_rndne_f32": (_rndne, "As v_rndne_f32."),
    "v_ldexp_f32": (_ldexp, "2 ** S1 leaves float32's range; the prose adds S1 to the exponent."),
    "v_mad_f32": (_mad_f32, "Not in the tables. It rounds twice, and flushes whatever MODE says."),
    "v_mac_f32": (_mad_f32, "As v_mad_f32."),
    "v_div_scale_f32": (_div_scale, "DENORM stands for any denormal of float32, VCC for a bit."),
    "v_div_fmas_f32": (_div_fmas, "Undoes div_scale's 2 ** 64 in the direction that S2 tells."),
    "v_div_fixup_f32": (_div_fixup, "UNDERFLOW and 32'F(0xffc00000) have no definition."),
    "v_perm_b32": (_perm, "A function with statements, beyond this evaluator."),
    "v_pk_mov_b32": (_pk_mov, "The text applies op_sel itself."),
    **{
        name: (partial(_dot2, kind=kind, to=to), "The order of sums is open; here they are exact.")
        for name, (kind, to) in DOTS.items()
    },
    **{
        name: (partial(_sum, form=form), "The text does not tell of clamp.")
        for name, form in SUMS.items()
    },
    **dict.fromkeys(
        ("v_cvt_pkrtz_f16_f32", "v_cvt_pk_rtz_f16_f32"),
        (_pack_toward_zero, "The text sets a rounding mode."),
    ),
    "v_fma_mix_f32": (partial(_mix, form="f32"), "Modifiers differ from those of other VOP3P."),
    "v_fma_mixlo_f16": (partial(_mix, form="lo"), "As v_fma_mix_f32."),
    "v_fma_mixhi_f16": (partial(_mix, form="hi"), "As v_fma_mix_f32."),
}

# Approximations: by how many units in the last place hardware may miss the rounded result.
ULPS = {
    **dict.fromkeys(("v_exp_f32", "v_log_f32", "v_rcp_f32", "v_rcp_iflag_f32", "v_rsq_f32"), 1),
    **dict.fromkeys(("v_sqrt_f32", "v_s_rcp_f32", "v_s_exp_f32", "v_s_rsq_f32"), 1),
}


# ------------------------------------------------------------------------------------ across lanes


def _readfirstlane(fields: Fields, batch: Batch, fetch: Fetch) -> Result:
    """The first active lane; lane 0 if there is none."""
    active = batch.mask(EXEC)
    lane = np.where(active.any(axis=1), active.argmax(axis=1), 0)
    return _to_scalar(fields, _lane_of(fields, fetch, lane))


def _readlane(fields: Fields, batch: Batch, fetch: Fetch) -> Result:
    """The lane that S1 names, active or not."""
    chosen = fetch.number(fields.get("src1"), "B32", 32)[:, 0]
    return _to_scalar(fields, _lane_of(fields, fetch, (chosen % batch.lanes).astype(int)))


def _lane_of(fields: Fields, fetch: Fetch, lane: Array) -> Array:
    values = fetch.number(fields.get("src0"), "B32", 32)
    return values[np.arange(len(values)), lane]


def _to_scalar(fields: Fields, values: Array) -> Result:
    index = scalar_index(fields.get("vdst") % 256, fields.arch)
    return Result(scalars=[] if index is None else [ScalarWrite(index, 1, values)])


def _permlanex16(fields: Fields, batch: Batch, fetch: Fetch) -> Result:
    """Each lane reads a lane of the other row of its pair, which S1 and S2 name in 4 bits a lane.

    op_sel[0] fetches from inactive lanes too, op_sel[1] gives 0 where there is none to fetch from.
    """
    values = fetch.number(fields.get("src0"), "B32", 32)
    low, high = (fetch.number(fields.get(name), "B32", 32)[:, :1] for name in ("src1", "src2"))
    select = (low & np.uint64(0xFFFFFFFF)) | (high & np.uint64(0xFFFFFFFF)) << np.uint64(32)
    lane = np.arange(batch.lanes, dtype=np.uint64)
    at = select >> (lane & np.uint64(15)) * np.uint64(4) & np.uint64(15)
    source = ((lane & np.uint64(0x30)) ^ np.uint64(16) | at).astype(int)
    active, opsel = batch.mask(EXEC), fields.get("opsel")
    is_valid = np.take_along_axis(active, source, 1) | bool(opsel & 1)
    moved = np.where(is_valid, np.take_along_axis(values, source, 1), np.uint64(0))
    mask = active & (is_valid | bool(opsel & 2))
    return Result(vectors=[VectorWrite(fields.get("vdst") - 256, 1, moved, mask, set())])


def _movrels(fields: Fields, batch: Batch, fetch: Fetch) -> Result:
    """The source's number is raised by M0."""
    index = fields.get("src0") - 256 + batch.scalar(M0).astype(int)
    moved = batch.vgprs[np.arange(batch.waves), index, : batch.lanes].astype(np.uint64)
    write = VectorWrite(fields.get("vdst") - 256, 1, moved, batch.mask(EXEC), set())
    return Result(vectors=[write])


# These read other lanes, or registers that are not operands: beyond texts for one lane.
ACROSS: dict[str, Callable[[Fields, Batch, Fetch], Result]] = {
    "v_readfirstlane_b32": _readfirstlane,
    "v_readlane_b32": _readlane,
    "v_permlanex16_b32": _permlanex16,
    "v_movrels_b32": _movrels,
}


# -------------------------------------------------------------------------------------- evaluation


def _registers(fields: Fields, operands: Operands, literal: int | None) -> dict[str, Any]:
    """What a text may read besides S0 to S2."""
    batch = operands.batch
    registers: dict[str, Any] = dict(operands.registers)
    if literal is not None:
        registers["SIMM32"] = unsigned(np.full(operands.fetch.shape, literal, np.uint64))
    registers["WAVE_MODE.IEEE"] = batch.ieee()
    registers["laneId"] = unsigned(np.arange(batch.lanes))
    return registers


def _functions(arch: str, flushes: bool, ieee: Any) -> dict[str, pcode.Function]:
    """Instructions that texts call by name, by their own texts."""

    def caller(name: str) -> pcode.Function:
        text = _text_by_name(name, arch)

        def call(*values: Value) -> Value:
            registers: dict[str, Any] = {f"S{k}": value for k, value in enumerate(values)}
            registers["WAVE_MODE.IEEE"] = ieee
            functions = _functions(arch, flushes, ieee)
            return pcode.evaluate(text, registers, flush_f32=flushes, functions=functions)["D0"]

        return call

    return _Lazy(caller)


class _Lazy(dict[str, pcode.Function]):
    """A function for each name that begins as an instruction's does, made when it is called."""

    def __init__(self, make: Callable[[str], pcode.Function]) -> None:
        super().__init__()
        self.make = make

    def get(self, name: str, default: Any = None) -> Any:
        return self.make(name) if name.startswith("v_") else default


def _text_by_name(name: str, arch: str) -> str:
    """The text of an operation in whatever encoding has it."""
    enum = import_module(f"tinygrad.runtime.autogen.amd.{arch}.enum")
    for table, suffix in (
        ("VOP2Op", "_E32"), ("VOP1Op", "_E32"), ("VOP3Op", ""), ("VOP3Op", "_E64"),
    ):  # fmt: skip
        op = getattr(getattr(enum, table), name.upper() + suffix, None)
        if op is not None:
            return text_of(op, arch)
    raise NoCase(f"no text of {name}")


def expected(fields: Fields, batch: Batch) -> Result:
    """What the instruction writes. Raises NoCase where that is not known."""
    literal = fields.get("literal") if fields.has("literal") else None
    try:
        if fields.base == "VOPD":
            return _dual(fields, batch, literal)
        if fields.name in ACROSS:
            return ACROSS[fields.name](fields, batch, Fetch(fields, batch, literal))
        if fields.base.startswith("V"):
            return _vector(fields, batch, literal)
        return _scalar(fields, batch, literal)
    except PcodeError as error:
        raise NoCase(f"no case for {fields.name}: {error}") from error


def _run(name: str, text: str, fields: Fields, registers: dict[str, Any], flushes: bool) -> Context:
    """The by-hand oracle of an operation if there is one, else AMD's text."""
    with np.errstate(all="ignore"):
        if name in BY_HAND:
            return BY_HAND[name][0](registers, fields, flushes)
        if not text:
            raise NoCase(f"no case for {name}")
        functions = _functions(fields.arch, flushes, registers.get("WAVE_MODE.IEEE"))
        return pcode.evaluate(text, registers, flush_f32=flushes, functions=functions)


def _vector(fields: Fields, batch: Batch, literal: int | None) -> Result:
    """VOP1, VOP2, VOP3, VOP3P, VOPC, VOP3SD."""
    operands = Operands(fields, batch, literal)
    registers = _registers(fields, operands, literal)
    is_comparison = fields.name.startswith("v_cmp")
    if fields.name.startswith("v_s_"):
        return _one_lane(fields, batch, registers)
    carry_in = fields.get("src2") if fields.has("src2") and _has_mask_source(fields) else VCC
    registers["VCC"] = boolean(batch.bits_of(operands.fetch._scalar(carry_in, batch.lanes // 32)))
    target = None if is_comparison else Target(fields, batch)
    if target is not None:
        registers["D0"] = unsigned(target.old, 32 * target.count)
    run = partial(_run, fields.name, text_of(fields.op, fields.arch), fields, registers)
    context = run(batch.flushes_f32)
    enabled = batch.mask(EXEC) & operands.enabled
    result = Result(scalars=_mask_writes(fields, batch, context, enabled, is_comparison))
    if target is not None:
        write = target.write(context, enabled)
        if fields.name in ULPS and not batch.flushes_f32:
            write.or_bits = target.write(run(True), enabled).bits
        write.slack = _slack(fields.name, registers, write.bits)
        result.vectors.append(write)
    return result


def _has_mask_source(fields: Fields) -> bool:
    return "src2" in fields.inst.operands and fields.type_of("src2")[0] == "M64"


def _slack(name: str, registers: Registers, bits: Array) -> Array | None:
    """How far the result may be off."""
    with np.errstate(all="ignore"):
        numbers = Value(bits, "f", 32).floats().astype(np.float64)
        if name in ULPS:
            spacing = np.ldexp(1.0, np.maximum(np.frexp(numbers)[1] - 24, -149))
            return np.asarray(np.where(np.isfinite(numbers), spacing * ULPS[name], 0))
        if name in DOTS:
            kind, to = DOTS[name]
            parts = np.abs(_f32(registers, to, False).astype(np.float64))
            for low in (0, 16):
                a, b = (
                    _half(registers[n].bits, low, kind).astype(np.float64) for n in ("S0", "S1")
                )
                parts = parts + np.abs(a * b)
            return np.asarray(np.where(np.isfinite(parts), parts * 2.0**-22 + 2.0**-126, np.inf))
    return None


def _one_lane(fields: Fields, batch: Batch, registers: dict[str, Any]) -> Result:
    """RDNA4's v_s_*: scalar operands, in a vector encoding; whatever EXEC is."""
    scalars = {k: Value(v.bits[:, 0], v.kind, v.width) for k, v in registers.items() if k[0] == "S"}
    text = text_of(fields.op, fields.arch)
    value = _run(fields.name, text, fields, scalars, batch.flushes_f32)["D0"].bits
    flushed = _run(fields.name, text, fields, scalars, True)["D0"].bits
    index = scalar_index(fields.get("vdst") % 256, fields.arch)
    assert index is not None
    slack = _slack(fields.name, scalars, value)
    return Result(scalars=[ScalarWrite(index, 1, value, slack, flushed, is_float=True)])


def _mask_writes(
    fields: Fields,
    batch: Batch,
    context: Context,
    enabled: npt.NDArray[np.bool_],
    is_comparison: bool,
) -> list[ScalarWrite]:
    """Masks that a vector instruction writes: bits of lanes that do not run are 0."""
    writes = []
    for name in context.written:
        if name == "EXEC":
            number: int | None = EXEC
        elif name == "VCC" or (name == "D0" and is_comparison):
            number = _mask_number(fields)
        elif name == "D1":
            number = fields.get("sdst")
        else:
            continue
        index = number if number == EXEC else scalar_index(number or 0, fields.arch)
        if index is not None:
            bits = np.broadcast_to(context[name].truth(), enabled.shape) & enabled
            writes.append(ScalarWrite(index, batch.lanes // 32, batch.mask_of(bits)))
    return writes


def _mask_number(fields: Fields) -> int:
    """Where a carry or the result of a comparison goes."""
    if "SDWA" in fields.format:
        return fields.get("sdst") if fields.get("sd") else VCC
    if fields.base == "VOP3SD":
        return fields.get("sdst")
    return fields.get("vdst") if fields.base == "VOP3" else VCC


class Target:
    """The vector register that an instruction writes."""

    def __init__(self, fields: Fields, batch: Batch) -> None:
        self.fields = fields
        _, self.width = fields.type_of("vdst")
        self.count = 2 if self.width == 64 else 1
        self.index = fields.get("vdst") - 256
        self.is_high = False
        if is_true16(fields, self.width):
            self.index, self.is_high = self.index & 127, bool(self.index >> 7)
        elif fields.base == "VOP3" and self.width == 16:
            self.is_high = bool(fields.get("opsel") >> 3 & 1)
        self.old = batch.vector(self.index, self.count)

    def write(self, context: Context, enabled: npt.NDArray[np.bool_]) -> VectorWrite:
        """D0 as the text left it, with what the encoding does to a result."""
        note = context.written["D0"]
        bits = np.broadcast_to(context["D0"].bits, self.old.shape)
        floats = note.floats
        if self.fields.get("omod"):
            raise NoCase(f"no case for {self.fields.name}: omod")
        if self.fields.get("clmp") and self.fields.name not in SUMS:
            bits = self._clamped(bits, floats)
        if "SDWA" in self.fields.format:
            bits = self._sdwa(bits)
        elif self.width == 16 and note.mask == 0xFFFF and self.fields.base != "VOP3P":
            bits, floats = self._half(bits, floats)
        return VectorWrite(self.index, self.count, bits, enabled, floats)

    def _clamped(self, bits: Array, floats: set[tuple[int, int]]) -> Array:
        """Floats into [0, 1], NaN to 0."""
        if len(floats) != 1 or self.count != 1:
            raise NoCase(f"no case for {self.fields.name}: clamp")
        ((_, width),) = floats
        numbers = Value(bits & pcode.ones(width), "f", width).floats()
        return real(np.where(numbers > 0, np.minimum(numbers, 1), 0).astype(numbers.dtype)).bits

    def _half(
        self, bits: Array, floats: set[tuple[int, int]]
    ) -> tuple[Array, set[tuple[int, int]]]:
        """16 bits go into one half. The other stays, but gfx9 clears what is above the lower."""
        if self.is_high:
            kept = self.old & np.uint64(0xFFFF)
            return kept | (bits & np.uint64(0xFFFF)) << np.uint64(16), {(16, w) for _, w in floats}
        kept = self.old & np.uint64(0 if self.fields.arch == "cdna" else 0xFFFF0000)
        return kept | bits & np.uint64(0xFFFF), floats

    def _sdwa(self, bits: Array) -> Array:
        """The result goes into the selected part; the rest is cleared, or kept."""
        select, unused = self.fields.get("dst_sel"), self.fields.get("dst_unused")
        if select == 6:
            return bits
        width, low = (8, 8 * select) if select < 4 else (16, 16 * (select - 4))
        mask = np.uint64(((1 << width) - 1) << low)
        if unused == 1:
            raise NoCase(f"no case for {self.fields.name}: sign extension of an SDWA result")
        rest = self.old & ~mask if unused == 2 else np.uint64(0)
        return rest | bits << np.uint64(low) & mask


def _dual(fields: Fields, batch: Batch, literal: int | None) -> Result:
    """VOPD: two operations at once; both read before either writes."""
    fetch = Fetch(fields, batch, literal)
    result = Result()
    for half in "xy":
        op = fields.inst.opx if half == "x" else fields.inst.opy
        index = getattr(fields.inst, f"vdst{half}").offset - 256
        registers: dict[str, Any] = {
            "S0": unsigned(fetch.number(fields.get(f"src{half}0"), "B32", 32)),
            "S1": unsigned(fetch.number(fields.get(f"vsrc{half}1"), "B32", 32)),
            "D0": unsigned(batch.vector(index)),
            "VCC": boolean(batch.mask(VCC)),
            "WAVE_MODE.IEEE": batch.ieee(),
        }
        if literal is not None:
            registers["SIMM32"] = unsigned(np.full(fetch.shape, literal, np.uint64))
        name = plain_name(op.name).replace("_dual_", "_")
        text = _text_by_name(name, fields.arch)
        context = _run(name, text, fields, registers, batch.flushes_f32)
        floats = context.written["D0"].floats
        bits = np.broadcast_to(context["D0"].bits, fetch.shape)
        slack = _slack(name, registers, bits)
        result.vectors.append(VectorWrite(index, 1, bits, batch.mask(EXEC), floats, slack))
    return result


def _scalar(fields: Fields, batch: Batch, literal: int | None) -> Result:
    """SOP1, SOP2, SOPC, SOPK."""
    operands = Operands(fields, batch, literal)
    registers: dict[str, Any] = dict(operands.registers)
    wide = 64 if batch.lanes == 64 else 32
    registers["SCC"] = Value(batch.scc.astype(np.uint64), "u", 1)
    registers["EXEC"] = unsigned(batch.scalar(EXEC, wide // 32), wide)
    if literal is not None:
        registers["SIMM32"] = unsigned(np.full(batch.waves, literal, np.uint64))
    count, number = 1, None
    if fields.has("sdst"):
        count = 2 if fields.type_of("sdst")[1] == 64 else 1
        number = scalar_index(fields.get("sdst"), fields.arch)
        old = np.zeros(batch.waves, np.uint64) if number is None else batch.scalar(number, count)
        registers["D0"] = unsigned(old, 32 * count)
    if fields.base == "SOPK":
        _add_constant(fields, batch, registers)
    text = text_of(fields.op, fields.arch)
    context = _run(fields.name, text, fields, registers, batch.flushes_f32)
    return _scalar_result(batch, context, number, count)


def _add_constant(fields: Fields, batch: Batch, registers: dict[str, Any]) -> None:
    """SOPK's 16 bits: RDNA's texts call them SIMM16, CDNA's S0, or S1 in comparisons."""
    constant = unsigned(np.full(batch.waves, fields.get("simm16"), np.uint64), 16)
    registers["SIMM16"] = constant
    if "cmpk" in fields.name:
        registers["S0"], registers["S1"] = registers["D0"], constant
    else:
        registers["S0"] = constant


def _scalar_result(batch: Batch, context: Context, number: int | None, count: int) -> Result:
    result = Result()
    if "EXEC" in context.written:
        bits = np.broadcast_to(context["EXEC"].bits, (batch.waves,))
        result.scalars.append(ScalarWrite(EXEC, batch.lanes // 32, bits))
    if "D0" in context.written and number is not None:
        bits = np.broadcast_to(context["D0"].bits, (batch.waves,))
        is_float = bool(context.written["D0"].floats)
        result.scalars.append(ScalarWrite(number, count, bits, is_float=is_float))
    if "SCC" in context.written:
        result.scc = np.broadcast_to(context["SCC"].truth(), (batch.waves,)).astype(np.uint32)
    return result
