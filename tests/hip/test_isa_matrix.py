"""The interpreter's matrix instructions multiply what lies in the registers of matrix_layouts.

Matrices are made in numpy, put into registers as the documents say, multiplied by the interpreter,
collected again, and compared with a product in float64. All other registers hold random bits, and
every run checks that they keep them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.hip.matrix_layouts import (
    BEFORE_GFX942,
    BITS,
    IREE_LAYOUTS,
    LAYOUTS,
    Formula,
    Layout,
    Position,
    grid,
    iree_lanes,
)
from tests.hip.probe import AGPR, IsaFault, Probe, State

Floats = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint64]

ACCVGPR_MOVES = {"v_accvgpr_read", "v_accvgpr_write", "v_accvgpr_mov_b32"}
# What has a case here; test_isa_ops compares it with what our kernels use.
OPCODES = {layout.name for layout in LAYOUTS} | ACCVGPR_MOVES

# On all chips; and on those alone that differ in what the instruction does, or how it is encoded.
CASES = [(layout, chip) for layout in LAYOUTS for chip in layout.chips]
DIFFERENT = [
    (layout, chip)
    for layout, chip in CASES
    if chip in ("gfx908", "gfx90a", "gfx942", "gfx1100", "gfx1201") or layout.chips == ("gfx950",)
]
CDNA_CASES = [(layout, chip) for layout, chip in DIFFERENT if layout.arch == "cdna"]
WMMA_CASES = [(layout, chip) for layout, chip in DIFFERENT if layout.arch != "cdna"]
# tinygrad describes gfx942 and gfx950.
IN_TINYGRAD = [
    layout
    for layout in LAYOUTS
    if layout.input_type != "bf16" or layout.chips[-1] not in BEFORE_GFX942
]
# Relative error of one rounding to nearest, and the least positive number.
UNIT = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24, "f64": 2.0**-53}
LEAST = {"f16": 2.0**-24, "bf16": 2.0**-133, "f32": 2.0**-149, "f64": 2.0**-1074}
LEAST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}


def name_of(case: object) -> str:
    """The test's name."""
    return case.name if isinstance(case, Layout) else str(case)


on_all_chips = pytest.mark.parametrize(("layout", "chip"), CASES, ids=name_of)
every_case = pytest.mark.parametrize(("layout", "chip"), DIFFERENT, ids=name_of)
every_cdna_case = pytest.mark.parametrize(("layout", "chip"), CDNA_CASES, ids=name_of)
every_wmma_case = pytest.mark.parametrize(("layout", "chip"), WMMA_CASES, ids=name_of)


# ------------------------------------------------------------------------------ numbers and bits


def to_bits(values: npt.ArrayLike, kind: str) -> Bits:
    """The values in a type's form, rounded to nearest."""
    floats = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        if kind == "f64":
            return floats.view(np.uint64).copy()
        if kind == "f32":
            return floats.astype(np.float32).view(np.uint32).astype(np.uint64)
        if kind == "f16":
            return floats.astype(np.float16).view(np.uint16).astype(np.uint64)
        wide = floats.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (wide + np.uint64(0x7FFF) + (wide >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)


def to_floats(bits: Bits, kind: str) -> Floats:
    """What numbers the bits are."""
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "f32":
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def rounded(values: npt.ArrayLike, kind: str) -> Floats:
    """The nearest numbers of a type."""
    return to_floats(to_bits(values, kind), kind)


def product(a: Floats, b: Floats, c: Floats) -> Floats:
    """[block, i, j]"""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.einsum("bik,bkj->bij", a, b) + c)


# --------------------------------------------------------------------------- registers and matrices


def index_of(position: Position, first: int, shift: int = 0) -> tuple[Any, ...]:
    """Into the halves of registers: [register, lane, half]."""
    return first + position.register, position.lane + shift, position.half


def scatter(
    state: State, first: int, position: Position, bits: Bits, kind: str, shift: int = 0
) -> None:
    """Puts elements into registers from `first` on, in lanes that are `shift` further."""
    halves = state.vgprs.view(np.uint16).reshape(len(state.vgprs), -1, 2)
    register, lane, half = np.broadcast_arrays(*index_of(position, first, shift))
    for part in range(BITS[kind] // 16):
        piece = (bits >> np.uint64(16 * part) & np.uint64(0xFFFF)).astype(np.uint16)
        halves[register + part // 2, lane, half + part % 2] = piece


def gather(state: State, first: int, position: Position, kind: str) -> Bits:
    """What `scatter` puts there."""
    halves = state.vgprs.view(np.uint16).reshape(len(state.vgprs), -1, 2)
    register, lane, half = np.broadcast_arrays(*index_of(position, first))
    pieces = [
        halves[register + part // 2, lane, half + part % 2].astype(np.uint64)
        << np.uint64(16 * part)
        for part in range(BITS[kind] // 16)
    ]
    return np.asarray(sum(pieces[1:], pieces[0]))


@dataclass(frozen=True)
class Registers:
    """The first registers of the operands; AGPR and more are accumulation registers."""

    a: int
    b: int
    c: int | float  # a float is an inline constant
    d: int


@dataclass(frozen=True)
class Inputs:
    """Matrices as numbers of the instruction's types."""

    a: Floats  # [block, i, k]
    b: Floats  # [block, k, j]
    c: Floats  # [block, i, j]

    @property
    def exact(self) -> Floats:
        return product(self.a, self.b, self.c)

    @property
    def magnitude(self) -> Floats:
        """The sum of what the summands' magnitudes are."""
        return product(abs(self.a), abs(self.b), abs(self.c))


@dataclass
class Case:
    """An instruction on a chip."""

    probe: Probe
    layout: Layout
    chip: str
    seed: int = 1
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    @property
    def flushes(self) -> bool:
        """Whether denormals count as zeros."""
        return self.chip == "gfx90a" and BITS[self.layout.input_type] == 16

    # Instructions

    def registers(self, a: int = 16, b: int = 32, c: int | float = 64, d: int = 128) -> Registers:
        """gfx908 has C and D in accumulation registers, always."""
        offset = AGPR if self.chip == "gfx908" else 0
        return Registers(a, b, c if isinstance(c, float) else c + offset, d + offset)

    def encode(self, registers: Registers, **fields: int) -> bytes:
        """The instruction's bytes."""
        ins, layout = ins_of(self.layout), self.layout
        v: Any = ins.v
        sources = [registers.a, registers.b, registers.c]
        if layout.arch == "cdna":
            fields.setdefault("acc", sum((r >= AGPR) << k for k, r in enumerate(sources[:2])))
            if self.chip != "gfx908":  # which has no such bit
                fields.setdefault("acc_cd", int(registers.d >= AGPR))

        def operand(register: int | float, count: int) -> Any:
            if isinstance(register, float):
                return register or 0  # there is no inline 0.0
            return v[register % AGPR : register % AGPR + count - 1]

        num_in, num_out = layout.num_input_registers, layout.num_output_registers
        operands = [
            operand(registers.d, num_out),
            operand(registers.a, num_in),
            operand(registers.b, num_in),
            operand(registers.c, num_out),
        ]
        if self.chip in BEFORE_GFX942 and layout.input_type == "bf16":
            # tinygrad's tables are those of gfx942: a relative's encoding with another opcode.
            relative = ins.VOP3P_MFMA(relative_of(ins, layout), *operands, **fields)
            code = bytearray(relative.to_bytes())
            code[2] = code[2] & 0x80 | layout.opcode
            return bytes(code)
        return bytes(getattr(ins, layout.name)(*operands, **fields).to_bytes())

    # Matrices

    def numbers(self, shape: tuple[int, ...], kind: str) -> Floats:
        """Numbers of both signs and of many magnitudes."""
        magnitudes = np.ldexp(self.random.uniform(1, 2, shape), self.random.integers(-6, 6, shape))
        return rounded(magnitudes * self.random.choice([-1, 1], shape), kind)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of A, B and C."""
        s = self.layout
        return (s.blocks, s.m, s.k), (s.blocks, s.k, s.n), (s.blocks, s.m, s.n)

    def random_inputs(self) -> Inputs:
        a, b, c = self.shapes()
        kind = self.layout.input_type
        return Inputs(
            self.numbers(a, kind), self.numbers(b, kind), self.numbers(c, self.layout.output_type)
        )

    def integers(self) -> Inputs:
        """Small enough that every sum is exact in the type of D."""
        most = 3 if self.layout.output_type == "bf16" else 8
        a, b, c = (
            self.random.integers(-most, most + 1, shape).astype(np.float64)
            for shape in self.shapes()
        )
        return Inputs(a, b, c)

    def zeros(self) -> Inputs:
        a, b, c = (np.zeros(shape) for shape in self.shapes())
        return Inputs(a, b, c)

    # Runs

    def state(self, inputs: Inputs, registers: Registers, half: int = 0) -> State:
        """Registers with the matrices in them, and random bits everywhere else."""
        s = self.layout
        state = State(lanes=s.lanes)
        state.vgprs = random_registers().copy()
        state.exec = 2**s.lanes - 1
        if not isinstance(registers.c, float):
            position = self.outputs(half)
            scatter(state, registers.c, position, to_bits(inputs.c, s.output_type), s.output_type)
        block, i, k = grid(s.blocks, s.m, s.k)
        a = to_bits(inputs.a, s.input_type)
        b = to_bits(inputs.b.transpose(0, 2, 1), s.input_type)
        for copy in range(s.copies):
            position = s.input_formula(block, i, k)
            scatter(state, registers.a, position, a, s.input_type, 16 * copy)
            scatter(state, registers.b, position, b, s.input_type, 16 * copy)
        return state

    def outputs(self, half: int = 0) -> Position:
        """Where C and D are."""
        s = self.layout
        position = s.output_formula(*grid(s.blocks, s.m, s.n))
        return position._replace(half=position.half + half)

    def run_on(self, state: State, registers: Registers, half: int = 0, **fields: int) -> Floats:
        """Runs it and gives D. Nothing else may have changed."""
        before = state.copy()
        self.probe.run(self.chip, self.encode(registers, **fields), state)
        kind, position = self.layout.output_type, self.outputs(half)
        bits = gather(state, registers.d, position, kind)
        scatter(before, registers.d, position, bits, kind)
        assert np.array_equal(state.vgprs, before.vgprs)
        assert np.array_equal(state.sgprs, before.sgprs)
        return to_floats(bits, kind)

    def run(
        self, inputs: Inputs, registers: Registers | None = None, half: int = 0, **fields: int
    ) -> Floats:
        registers = registers or self.registers()
        return self.run_on(self.state(inputs, registers, half), registers, half, **fields)


@cache
def random_registers() -> npt.NDArray[np.uint32]:
    """Of a wave."""
    return np.random.default_rng(1).integers(0, 2**32, State().vgprs.shape, np.uint32)


def ins_of(layout: Layout) -> ModuleType:
    """tinygrad's instructions."""
    return import_module(f"tinygrad.runtime.autogen.amd.{layout.arch}.ins")


def relative_of(ins: Any, layout: Layout) -> Any:
    """An opcode whose operands have as many registers."""
    relatives = {
        (1, 32): "V_MFMA_F32_32X32X1_2B_F32",
        (1, 16): "V_MFMA_F32_32X32X2_F32",
        (1, 4): "V_MFMA_F32_16X16X4_F32",
        (2, 32): "V_MFMA_F32_32X32X4_2B_F16",
        (2, 16): "V_MFMA_F32_32X32X8_F16",
        (2, 4): "V_MFMA_F32_16X16X16_F16",
    }
    counts = layout.num_input_registers, layout.num_output_registers
    if layout.blocks == 4:  # 16 registers, as 32x32 in one block has them
        assert counts[1] == 16
    return getattr(ins.VOP3POp, relatives[counts])


def check_equal(got: Floats, want: Floats) -> None:
    """To the bit, but for what kind of NaN it is."""
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))


# ---------------------------------------------------------------------------------- the tables


def positions_of(formula: Formula, *sizes: int) -> list[tuple[int, int, int]]:
    arrays = np.broadcast_arrays(*formula(*grid(*sizes)), np.zeros(sizes, int))[:3]
    return list(zip(*(array.ravel().tolist() for array in arrays), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_layouts_use_every_place_once(layout: Layout) -> None:
    s = layout
    inputs = positions_of(s.input_formula, s.blocks, s.m, s.k)
    outputs = positions_of(s.output_formula, s.blocks, s.m, s.n)
    for places, count, kind, copies in (
        (inputs, s.num_input_registers, s.input_type, s.copies),
        (outputs, s.num_output_registers, s.output_type, 1),
    ):
        assert len(set(places)) == len(places)
        size = 32 if s.leaves_halves and places is outputs else BITS[kind]
        assert len(places) * copies * size == count * 32 * s.lanes
        step = max(1, size // 32)
        assert {register for register, _, _ in places} == set(range(0, count, step))
        assert {lane for _, _, lane in places} == set(range(s.lanes // copies))


@pytest.mark.parametrize(("arch", "name"), IREE_LAYOUTS)
def test_layouts_agree_with_iree(arch: str, name: str) -> None:
    """Of RDNA4 but for the order of K, which is the same in A and B and so does not matter."""
    tiles_a, tiles_c = IREE_LAYOUTS[arch, name]
    layout = next(x for x in LAYOUTS if (x.arch, x.name) == (arch, name))

    def number(position: Position, kind: str, leaves_halves: bool) -> Any:
        """Of an element in its lane."""
        if BITS[kind] == 16 and not leaves_halves:
            return 2 * position.register + position.half
        return position.register * 32 // max(32, BITS[kind])

    _, i, k = grid(1, layout.m, layout.k)
    if arch == "rdna4":
        k = 8 * (k // 4 % 2) + 4 * (k // 8) + k % 4  # the half wave becomes the upper part
    ours = layout.input_formula(0, i, grid(1, layout.m, layout.k)[2])
    lane, element = iree_lanes(tiles_a, i, k)
    np.testing.assert_array_equal(np.broadcast_to(ours.lane, i.shape), lane)
    elements = number(ours, layout.input_type, False)
    np.testing.assert_array_equal(np.broadcast_to(elements, i.shape), element)

    _, i, j = grid(1, layout.m, layout.n)
    ours = layout.output_formula(0, i, j)
    lane, element = iree_lanes(tiles_c, i, j)
    np.testing.assert_array_equal(ours.lane, lane)
    elements = number(ours, layout.output_type, layout.leaves_halves)
    np.testing.assert_array_equal(np.broadcast_to(elements, i.shape), element)


@pytest.mark.parametrize("layout", IN_TINYGRAD, ids=name_of)
def test_opcodes_and_sizes_are_those_of_tinygrad(layout: Layout) -> None:
    op = getattr(ins_of(layout).VOP3POp, layout.name.upper())
    assert op.value == layout.opcode
    operands = import_module(f"tinygrad.runtime.autogen.amd.{layout.arch}.operands").OPERANDS[op]
    sizes = {name: bits // 32 for name, (_, bits, _) in operands.items()}
    num_in, num_out = layout.num_input_registers, layout.num_output_registers
    assert sizes == {"src0": num_in, "src1": num_in, "src2": num_out, "vdst": num_out}


# -------------------------------------------------------------------------------------- products


@on_all_chips
def test_sums_of_integers_are_exact(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    (line,) = isa_probe.decode(chip, case.encode(case.registers()))
    assert line.name == layout.name
    inputs = case.integers()
    check_equal(case.run(inputs), inputs.exact)


@every_case
def test_one_k_at_a_time(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """A row of A with one element other than zero picks a row of B, and so pins where both are."""
    case = Case(isa_probe, layout, chip)
    block, i = grid(layout.blocks, layout.m)
    for k in range(layout.k):
        inputs = case.random_inputs()
        inputs.a[...] = 0
        inputs.a[:, :, k] = np.ldexp(1.0, (block + i) % 5 - 2)
        inputs.c[...] = 0
        want = inputs.a[:, :, k, None] * inputs.b[:, k, None, :]
        check_equal(case.run(inputs), rounded(want, layout.output_type))


@every_case
def test_c_comes_through(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    zeros = case.zeros()
    inputs = Inputs(zeros.a, zeros.b, case.random_inputs().c)
    check_equal(case.run(inputs), inputs.c)


@every_case
def test_random_numbers(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """Within the error of K + 1 sums that are each rounded to f32, and a rounding to D's type."""
    case = Case(isa_probe, layout, chip)
    for _ in range(2):
        inputs = case.random_inputs()
        sums = UNIT["f64" if layout.output_type == "f64" else "f32"]
        bound = UNIT[layout.output_type] * abs(inputs.exact)
        bound += (layout.k + 1) * sums * inputs.magnitude
        assert (abs(case.run(inputs) - inputs.exact) <= bound).all()


# ------------------------------------------------------------------------------- special numbers


@every_case
def test_infinities_and_nans(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    inputs = case.integers()
    last = layout.blocks - 1, layout.m - 1, layout.k - 1
    inputs.b[inputs.b == 0] = 1
    inputs.b[0, 0, 0] = 0
    inputs.a[0, 0, 0] = np.inf  # of row 0: times 0 it is NaN, else infinite
    inputs.a[last] = np.nan
    inputs.c[0, 1, :] = np.inf
    inputs.c[0, 2, 1] = np.nan
    inputs.c[0, 0, 1] = -np.inf * np.sign(inputs.b[0, 0, 1])  # infinities of both signs
    want = inputs.exact
    assert np.isnan(want[0, 0, :2]).all()
    assert np.isnan(want[layout.blocks - 1, layout.m - 1]).all()
    check_equal(case.run(inputs), want)


@every_case
def test_what_is_too_large_becomes_infinite(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """But in f32 no sum of products of f16 is, unless C is large."""
    case = Case(isa_probe, layout, chip)
    inputs = case.zeros()
    largest = {"f16": 65504.0, "bf16": 2.0**127, "f32": 2.0**127, "f64": 2.0**1023}
    inputs.a[:, :, 0] = largest[layout.input_type]
    for factor in (4.0, -4.0):
        inputs.b[:, 0, :] = factor
        want = rounded(inputs.exact, layout.output_type)
        assert (layout.input_type, layout.output_type) == ("f16", "f32") or np.isinf(want).all()
        check_equal(case.run(inputs), want)


@every_case
def test_zeros_have_signs(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    inputs = case.zeros()
    inputs.a[...] = 1
    inputs.b[...] = -0.0
    inputs.c[...] = -0.0
    assert (np.signbit(case.run(inputs)) != case.flushes).all()  # those are +0 there
    if case.flushes:
        return
    inputs.c[:, 1, :] = 0.0
    inputs.a[:, 2, 0] = -1  # +0 among the products
    minus = np.signbit(case.run(inputs))
    assert not minus[:, 1:3].any()
    assert minus[:, 0].all() and minus[:, 3].all()


@every_case
def test_denormals(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """Kept, but for 16-bit types on gfx90a: there neither inputs nor results are denormal."""
    case = Case(isa_probe, layout, chip)
    kind, out = layout.input_type, layout.output_type
    factor = 2.0**20 if kind == "f16" and out == "f32" else 1.0  # away from f32's own denormals
    inputs = case.zeros()
    inputs.a[:, :, 0] = LEAST_NORMAL[kind] - LEAST[kind]
    inputs.b[:, 0, :] = rounded(min(factor, 32768.0), kind)
    want = inputs.exact
    assert (want > 0).all()
    check_equal(case.run(inputs), np.zeros_like(want) if case.flushes else want)
    swapped = Inputs(inputs.b.transpose(0, 2, 1), inputs.a.transpose(0, 2, 1), inputs.c)
    check_equal(case.run(swapped), np.zeros_like(want) if case.flushes else swapped.exact)

    inputs = case.zeros()  # C
    inputs.c[...] = -3 * LEAST[out]
    zero = np.full_like(inputs.c, 0.0)
    check_equal(case.run(inputs), zero if case.flushes else inputs.c)

    if kind != "f16":  # a product
        inputs.c[...] = 0
        inputs.a[:, :, 0] = np.sqrt(LEAST_NORMAL[kind]) / 2
        inputs.b[:, 0, :] = -np.sqrt(LEAST_NORMAL[kind])
        check_equal(case.run(inputs), -zero if case.flushes else inputs.exact)


@every_wmma_case
def test_results_are_rounded_once(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """Just above the middle of two numbers: rounded to f32 before, it would be the middle."""
    case = Case(isa_probe, layout, chip)
    inputs = case.zeros()
    inputs.c[...] = 1
    inputs.a[:, :, 0], inputs.b[:, 0, :] = UNIT[layout.output_type], 1
    inputs.a[:, :, 1], inputs.b[:, 1, :] = 2.0**-14, 2.0**-14
    assert (case.run(inputs) == 1 + 2 * UNIT[layout.output_type]).all()


# ------------------------------------------------------------------------------------- operands


@every_cdna_case
def test_accumulation_registers(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """gfx908 has C and D there always."""
    case = Case(isa_probe, layout, chip)
    for accumulators in ("cd", "bcd", "abcd") if chip == "gfx908" else ("", "a", "bcd", "abcd"):
        a, b, c, d = (AGPR * (name in accumulators) for name in "abcd")
        inputs = case.integers()
        check_equal(case.run(inputs, Registers(a + 2, b + 34, c + 66, d + 224)), inputs.exact)


@every_case
def test_d_may_be_c_or_overlap_anything(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """All is read before anything is written."""
    case = Case(isa_probe, layout, chip)
    for c, d in ((64, 64), (66, 64), (64, 66), (64, 16), (64, 32)):
        inputs = case.integers()
        check_equal(case.run(inputs, case.registers(c=c, d=d)), inputs.exact)


@every_case
def test_c_may_be_a_constant(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    for constant in (0.0, 1.0, -4.0, 0.5):
        inputs = case.integers()
        inputs.c[...] = constant
        want = rounded(inputs.exact, layout.output_type)
        check_equal(case.run(inputs, case.registers(c=constant)), want)


@every_cdna_case
def test_mfma_ignores_exec(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    registers = case.registers()
    for mask in (0, 1, 0x0123456789ABCDEF):
        inputs = case.integers()
        state = case.state(inputs, registers)
        state.exec = mask
        check_equal(case.run_on(state, registers), inputs.exact)


# ------------------------------------------------------------------------------------- modifiers


@every_wmma_case
def test_negated_inputs_of_wmma(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """Elements of A and B in lower and in upper halves apart; C negated, or its magnitude."""
    case = Case(isa_probe, layout, chip)
    for neg, neg_hi in ((1, 0), (2, 0), (4, 0), (0, 1), (0, 2), (0, 4), (4, 4), (7, 7), (5, 2)):
        inputs = case.integers()
        a, b, c = inputs.a.copy(), inputs.b.copy(), inputs.c
        for bits, first in ((neg, 0), (neg_hi, 1)):
            if bits & 1:
                a[:, :, first::2] *= -1
            if bits & 2:
                b[:, first::2, :] *= -1
        c = abs(c) if neg_hi & 4 else c
        c = -c if neg & 4 else c
        check_equal(case.run(inputs, neg=neg, neg_hi=neg_hi), product(a, b, c))


@every_wmma_case
def test_op_sel_of_wmma(isa_probe: Probe, layout: Layout, chip: str) -> None:
    """Bit 2 takes the upper halves of C and D, where RDNA3 has results of 16 bits."""
    case = Case(isa_probe, layout, chip)
    inputs = case.integers()
    if layout.leaves_halves:
        check_equal(case.run(inputs, half=1, opsel=4), inputs.exact)
    else:
        with pytest.raises(IsaFault, match=rf"op_sel.*{layout.name}"):
            case.run(inputs, opsel=4)
    for opsel in (1, 2):
        with pytest.raises(IsaFault, match="op_sel"):
            case.run(inputs, opsel=opsel)


@every_wmma_case
def test_what_wmma_refuses(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    registers, inputs = case.registers(), case.integers()
    state = case.state(inputs, registers)
    state.exec = 0xFFFF
    with pytest.raises(IsaFault, match="lanes switched off"):
        case.run_on(state, registers)
    with pytest.raises(IsaFault, match="clamp"):
        case.run(inputs, clmp=1)
    state = case.state(inputs, registers)
    state.lanes, state.exec = 64, 2**32 - 1
    with pytest.raises(IsaFault, match="waves of 32"):
        case.run_on(state, registers)


@pytest.mark.parametrize("name", ["a", "b"])
def test_rdna3_wants_inputs_twice(isa_probe: Probe, name: str) -> None:
    layout = next(x for x in LAYOUTS if x.arch == "rdna3")
    case = Case(isa_probe, layout, "gfx1100")
    registers = case.registers()
    state = case.state(case.integers(), registers)
    first = getattr(registers, name)
    state.vgprs[first + 5, 20] ^= 1
    with pytest.raises(IsaFault, match=f"do not repeat lanes 0 to 15 of v{first + 5}"):
        case.run_on(state, registers)


@every_cdna_case
def test_what_mfma_refuses(isa_probe: Probe, layout: Layout, chip: str) -> None:
    case = Case(isa_probe, layout, chip)
    for name in ("cbsz", "abid", "blgp"):
        with pytest.raises(IsaFault, match=rf"cbsz, abid and blgp.*{layout.name}"):
            case.run(case.integers(), None, 0, **{name: 1})


# ------------------------------------------------------------------------- accumulation registers


@pytest.mark.parametrize("chip", ["gfx908", "gfx90a", "gfx942", "gfx950"])
@pytest.mark.parametrize("mask", [2**64 - 1, 0x0123456789ABCDEF], ids=hex)
def test_moves_of_accumulation_registers(isa_probe: Probe, chip: str, mask: int) -> None:
    """These obey EXEC."""
    ins: Any = import_module("tinygrad.runtime.autogen.amd.cdna.ins")
    v = ins.v
    moves = [
        ("v_accvgpr_read", ins.v_accvgpr_read(v[3], v[5]), 3, AGPR + 5),
        ("v_accvgpr_write", ins.v_accvgpr_write(v[3], v[5]), AGPR + 3, 5),
        ("v_accvgpr_write", ins.v_accvgpr_write(v[7], 1.0), AGPR + 7, 0x3F800000),
    ]
    if chip != "gfx908":
        mov = ins.v_accvgpr_mov_b32_e32(v[9], v[5])
        moves.append(("v_accvgpr_mov_b32", mov, AGPR + 9, AGPR + 5))
    lanes = np.array([mask >> lane & 1 for lane in range(64)], bool)
    for name, move, to, source in moves:
        state = State(lanes=64)
        state.vgprs = random_registers().copy()
        state.exec = mask
        want = state.vgprs.copy()
        value = state.vgprs[source] if source < len(want) else np.full(64, source, np.uint32)
        want[to] = np.where(lanes, value, want[to])
        assert isa_probe.decode(chip, move.to_bytes())[0].name == name
        isa_probe.run(chip, move.to_bytes(), state)
        np.testing.assert_array_equal(state.vgprs, want)
