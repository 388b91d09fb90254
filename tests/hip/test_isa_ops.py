"""Every form of every arithmetic instruction in our kernels does what AMD's documents say.

The instructions are those of compiled models, byte for byte. A form is an operation with its kinds
of operands and its modifiers; one instruction of each runs in the interpreter, on edge cases and
random numbers in all lanes, and the oracle says what every register must hold afterwards.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.hip.driver import compile_code_object
from tests.hip.modules import model_emitter
from tests.hip.oracle import (
    EXEC,
    M0,
    Batch,
    Fields,
    NoCase,
    Result,
    ScalarWrite,
    VectorWrite,
    arch_of,
    decode,
    expected,
)
from tests.hip.pcode import Array, Value, ones
from tests.hip.probe import KEEP_DENORMALS, NUM_SGPRS, NUM_VGPRS, IsaFault, Probe, State
from tests.support.tiny import CODE_CHIPS, CODE_OPTIONS, MACHINE_CODE_CHIPS, TINY
from tests.support.vision_reference import IDEFICS3, LLAVA

FLUSH_F32 = 0x30  # MODE: these bits are off where float32 denormals become zeros
IEEE = 0x200  # MODE: signalling NaNs come out quiet; gfx12 has no such bit
WAVES = 5  # states in which a vector instruction runs; scalar ones run in more
SCALAR_WAVES = 48
INSTRUCTIONS = 3  # of one form, with different registers and constants

# Tested in other modules, each of which lists its operations in OPCODES.
ELSEWHERE = {
    "test_isa_memory": (
        "global_", "flat_", "scratch_", "buffer_", "tbuffer_", "ds_", "s_load_", "s_buffer_",
    ),
    "test_isa_matrix": ("v_mfma_", "v_smfmac_", "v_wmma_", "v_swmmac_", "v_accvgpr_"),
}  # fmt: skip
# Timing and messages: they change nothing that a test could see. Waits are test_isa_memory's.
NOTHING = {
    "s_nop", "s_clause", "s_delay_alu", "s_endpgm", "s_sendmsg", "s_setprio",
    "s_waitcnt", "s_waitcnt_depctr", "s_waitcnt_vscnt", "s_wait_alu", "s_wait_loadcnt",
    "s_wait_storecnt", "s_wait_dscnt", "s_wait_kmcnt", "s_set_inst_prefetch_distance",
    "s_wait_loadcnt_dscnt", "s_wait_storecnt_dscnt", "s_wait_idle", "s_sleep",
}  # fmt: skip
BRANCHES = {
    "s_branch", "s_cbranch_scc0", "s_cbranch_scc1", "s_cbranch_vccz", "s_cbranch_vccnz",
    "s_cbranch_execz", "s_cbranch_execnz",
}  # fmt: skip
MODES = {"s_setreg_imm32_b32", "s_denorm_mode", "s_round_mode"}
INDEXING = {f"s_set_gpr_idx_{what}" for what in ("on", "off", "idx", "mode")}
BARRIERS = {"s_barrier", "s_barrier_signal", "s_barrier_wait"}
UNREACHED = {"s_code_end"}  # fills what follows the last kernel
CONTROL = NOTHING | BRANCHES | MODES | INDEXING | BARRIERS | UNREACHED


# ------------------------------------------------------------------------------------ inventory


@dataclass(frozen=True)
class Form:
    """One instruction of a chip's kernels."""

    chip: str
    name: str
    text: str  # as an assembler writes it
    code: bytes


def text_section(path: Path) -> bytes:
    """The code of an ELF file."""
    data = path.read_bytes()
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    count, names_at = struct.unpack_from("<HH", data, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", data, offset + 64 * k) for k in range(count)]
    names = sections[names_at][4]
    for name, _, _, _, start, size in sections:
        if data[names + name : data.index(b"\0", names + name)] == b".text":
            return data[start : start + size]
    raise ValueError(f"{path} has no code")


def _operand_kind(fields: Fields, name: str) -> str:
    """What kind of operand a field names, as far as an interpreter could care."""
    number = fields.get(name)
    if number >= 256:
        return "v"
    if number >= 240:
        return {255: "literal", 253: "scc"}.get(number, "float")
    if number >= 128:
        return "integer"
    return {106: "vcc", 124: "s124", 125: "s125", 126: "exec"}.get(number, "s")


def _form_of(fields: Fields) -> tuple[Any, ...]:
    """What makes two instructions the same form."""
    key: list[Any] = [fields.format]
    registers: list[int] = []
    for name, description in fields.inst._fields:
        if name in ("encoding", "literal", "simm16", "simm32"):
            continue
        is_register = any(part in name for part in ("src", "dst")) and not any(
            part in name for part in ("sel", "neg", "abs", "sext", "unused")
        )
        if not is_register:
            value = description.__get__(fields.inst)
            key.append((name, getattr(value, "name", value)))
            continue
        number = fields.get(name)
        key.append((name, _operand_kind(fields, name)))
        # Where the destination is a source as well, it must be read first.
        key.append([number == other for other in registers])
        registers.append(number)
        if fields.arch != "cdna" and fields.base in ("VOP1", "VOP2", "VOPC") and number >= 256:
            key.append(number - 256 > 127 and "16" in fields.name)
    return tuple(map(str, key))


def is_elsewhere(name: str) -> bool:
    """Whether another module tests the operation."""
    return any(name.startswith(starts) for starts in ELSEWHERE.values())


def code_files(path: Path) -> list[Path]:
    """A code object, or all of a folder."""
    return sorted(path.rglob("*.hsaco")) if path.is_dir() else [path]


@dataclass
class Inventory:
    """What occurs in a chip's kernels."""

    names: set[str] = field(default_factory=set)  # of all operations
    control: dict[str, set[bytes]] = field(default_factory=dict)  # name: instructions
    forms: dict[tuple[Any, ...], list[Form]] = field(default_factory=dict)

    def add(self, form: Form) -> None:
        """Files an instruction that was not seen before."""
        if form.name in CONTROL:
            self.control.setdefault(form.name, set()).add(form.code)
        elif not is_elsewhere(form.name):
            alike = self.forms.setdefault(_key(form), [])
            if len(alike) < INSTRUCTIONS:
                alike.append(form)


@cache
def inventory_of(chip: str, path: Path, probe: Probe) -> Inventory:
    """What occurs in the code objects at `path`."""
    found = Inventory()
    seen: set[bytes] = set()
    for file in code_files(path):
        code = text_section(file)
        for line in probe.decode(chip, code):
            found.names.add(line.name)
            instruction = code[line.pc : line.pc + line.size]
            if instruction not in seen:
                seen.add(instruction)
                found.add(Form(chip, line.name, line.text, instruction))
    return found


def _key(form: Form) -> tuple[Any, ...]:
    try:
        return _form_of(decode(form.code, form.chip))
    except ValueError:  # not in tinygrad's tables
        return (form.name,)


# ---------------------------------------------------------------------------------------- states


def _f32_pool(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    """Floats: special ones, denormals, near each other, of all sizes, with small integers."""
    special = np.array([
        0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001,
        0x7F800001, 0xFFA00000, 1, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x7F7FFFFF,
        0xFF7FFFFF, 0x3F000000, 0x3EFFFFFF, 0xBEFFFFFF, 0x3FC00000, 0x40200000, 0xC0200000,
        0x4B000001, 0x4EFFFFFF, 0x4F000000, 0xCF000000, 0xCF000001, 0x4F7FFFFF, 0x4F800000,
        0x477FE000, 0x477FF000, 0x33000000, 0x33000001, 0x387FC000, 0x43000000, 0xC3160000,
    ], np.uint32)  # fmt: skip
    numbers = rng.normal(size=count) * 2.0 ** rng.integers(-12, 12, count)
    kinds = rng.integers(0, 20, count)
    mantissa = rng.integers(0, 2**24, count, np.uint32)
    small = rng.integers(-160, 160, count).astype(np.int64)
    halves = rng.integers(-100, 100, count) / 2
    return np.select(
        [kinds < 6, kinds < 7, kinds < 8, kinds < 9, kinds < 10, kinds < 11],
        [
            rng.choice(special, count),
            mantissa & 0x007FFFFF | (mantissa >> 23) << 31,  # denormal
            (small & 0xFFFFFFFF).astype(np.uint32),
            halves.astype(np.float32).view(np.uint32),
            rng.integers(0, 2**32, count, np.uint32),
            (numbers * 2.0**100).astype(np.float32).view(np.uint32),
        ],
        numbers.astype(np.float32).view(np.uint32),
    ).astype(np.uint32)


def _f16_pool(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    """Pairs of float16."""
    special = np.array([
        0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0xFD00, 1, 0x8001,
        0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3800, 0x37FF, 0x3E00, 0x4100, 0x1400,
    ], np.uint32)  # fmt: skip
    size = 2 * count
    kinds = rng.integers(0, 10, size)
    numbers = rng.normal(size=size) * 2.0 ** rng.integers(-6, 6, size)
    halves = np.select(
        [kinds < 3, kinds < 4],
        [rng.choice(special, size), rng.integers(0, 2**16, size, np.uint32)],
        numbers.astype(np.float16).view(np.uint16).astype(np.uint32),
    ).astype(np.uint32)
    return halves[:count] | halves[count:] << np.uint32(16)


def _integer_pool(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    """Integers: limits, shift amounts, small ones of both signs, all bits at random."""
    special = np.array([
        0, 1, 2, 3, 31, 32, 33, 63, 64, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFF,
        0x800000, 0xFFFFFF, 0x1000000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFF8000, 0xFFFFFFFE,
        0xFFFFFFFF,
    ], np.uint32)  # fmt: skip
    kinds = rng.integers(0, 10, count)
    small = (rng.integers(-70, 70, count) & 0xFFFFFFFF).astype(np.uint32)
    return np.select(
        [kinds < 4, kinds < 6],
        [rng.choice(special, count), small],
        rng.integers(0, 2**32, count, np.uint32),
    ).astype(np.uint32)


def _mixed_pool(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    """Some of each: a third that is right for whatever the operand is."""
    pools = [pool(rng, count) for pool in (_f32_pool, _f16_pool, _integer_pool)]
    return np.choose(rng.integers(0, 3, count), pools).astype(np.uint32)


POOLS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.uint32]]] = {
    "f32": _f32_pool, "f16": _f16_pool, "integer": _integer_pool, "mixed": _mixed_pool,
}  # fmt: skip


def pool_of(fields: Fields) -> str:
    """Which numbers suit the operation's sources."""
    if fields.base == "VOPD":
        return "f32"
    if "_mix" in fields.name:
        return "mixed"
    forms = [fields.type_of(name)[0] for name in fields.sources()]
    if any("F32" in form for form in forms):
        return "f32"
    return "f16" if any("F16" in form for form in forms) else "integer"


@cache
def _registers(pool: str, waves: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Vector and scalar registers of some waves, all filled."""
    rng = np.random.default_rng(zlib.crc32(pool.encode()) + waves)
    vectors = POOLS[pool](rng, waves * NUM_VGPRS * 64).reshape(waves, NUM_VGPRS, 64)
    return vectors, POOLS[pool](rng, waves * NUM_SGPRS).reshape(waves, NUM_SGPRS)


def batch_for(form: Form, fields: Fields, mode: int, rng: np.random.Generator) -> Batch:
    """States in which to run a form: all lanes active, some, few, none."""
    is_vector = fields.base.startswith("V")
    waves = WAVES if is_vector else SCALAR_WAVES
    lanes = 64 if fields.arch == "cdna" else 32
    vectors, scalars = _registers(pool_of(fields), waves)
    scalars = scalars.copy()
    scalars[:, EXEC : EXEC + 2] = rng.integers(0, 2**32, (waves, 2), np.uint32)
    scalars[0, EXEC : EXEC + 2] = 0xFFFFFFFF
    scalars[1, EXEC : EXEC + 2] &= scalars[2, EXEC : EXEC + 2] & scalars[3, EXEC : EXEC + 2]
    scalars[4, EXEC : EXEC + 2] = 0 if "readfirst" in form.name or not is_vector else 0x00FF00FF
    scalars[:, M0] = rng.integers(0, 64, waves)
    scc = rng.integers(0, 2, waves, np.uint32)
    return Batch(vectors, scalars, scc, mode, lanes)


# ------------------------------------------------------------------------------------- comparison


@dataclass
class After:
    """What the interpreter left."""

    vgprs: npt.NDArray[np.uint32]
    sgprs: npt.NDArray[np.uint32]
    scc: npt.NDArray[np.uint32]
    modes: set[int]


def run(probe: Probe, form: Form, batch: Batch) -> After:
    """The batch after one instruction. Raises IsaFault."""
    vgprs = batch.vgprs.copy() if form.name[0] == "v" else batch.vgprs
    sgprs, scc = batch.sgprs.copy(), batch.scc.copy()
    modes = set()
    for wave in range(batch.waves):
        state = State(batch.lanes, vgprs[wave], sgprs[wave], int(scc[wave]), batch.mode)
        probe.run(form.chip, form.code, state)
        scc[wave] = state.scc
        modes.add(state.mode)
    return After(vgprs, sgprs, scc, modes)


def _agree(got: Array, want: Array, floats: set[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Whether bits are equal; in float results any NaN will do for another."""
    same = got == want
    if same.all() or not floats:
        return np.asarray(same)
    rest = np.uint64(0xFFFFFFFFFFFFFFFF)
    is_right = np.ones(same.shape, bool)
    for low, width in floats:
        parts = [bits >> np.uint64(low) & ones(width) for bits in (got, want)]
        nans = [np.isnan(Value(part, "f", width).floats()) for part in parts]
        is_right &= (parts[0] == parts[1]) | (nans[0] & nans[1])
        rest &= ~(ones(width) << np.uint64(low))
    return np.asarray(is_right & (got & rest == want & rest))


def _is_close(got: Array, want: Array, slack: Array) -> npt.NDArray[np.bool_]:
    """Whether float32 results are near enough. What is exactly 0, infinite or NaN must be so."""
    with np.errstate(invalid="ignore"):
        a, b = (Value(bits, "f", 32).floats().astype(np.float64) for bits in (got, want))
        return _agree(got, want, {(0, 32)}) | ((np.abs(a - b) <= slack) & (b != 0) & np.isfinite(b))


def _judge(
    got: Array, write: VectorWrite | ScalarWrite, floats: set[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """Where the bits of a result are right."""
    right = _agree(got, write.bits, floats)
    if write.slack is not None:
        right |= _is_close(got, write.bits, write.slack)
        if write.or_bits is not None:
            right |= _is_close(got, write.or_bits, write.slack)
    return right


def check_vector(write: VectorWrite, before: Batch, after: After) -> str:
    """What is wrong with a vector result, if anything. The rest is compared without it."""
    view = Batch(after.vgprs, after.sgprs, after.scc, before.mode, before.lanes)
    got = view.vector(write.index, write.count)
    right = _judge(got, write, write.floats) | ~write.mask
    for k in range(write.count):
        old = before.vgprs[:, write.index + k, : before.lanes]
        target = after.vgprs[:, write.index + k, : before.lanes]
        np.copyto(target, old, where=write.mask)
    if right.all():
        return ""
    wave, lane = (int(x) for x in np.argwhere(~right)[0])
    digits = 8 * write.count
    return (
        f"v{write.index} of lane {lane}, wave {wave}: "
        f"{int(got[wave, lane]):0{digits}x}, not {int(write.bits[wave, lane]):0{digits}x}"
        f" ({int((~right).sum())} lanes differ)"
    )


def check_scalar(write: ScalarWrite, before: Batch, after: After) -> str:
    """The same for a scalar result."""
    view = Batch(after.vgprs, after.sgprs, after.scc, before.mode, before.lanes)
    got = view.scalar(write.index, write.count)
    right = _judge(got, write, {(0, 32)} if write.is_float else set())
    span = slice(write.index, write.index + write.count)
    after.sgprs[:, span] = before.sgprs[:, span]
    if right.all():
        return ""
    wave = int(np.argwhere(~right)[0][0])
    return f"s{write.index}, wave {wave}: {int(got[wave]):x}, not {int(write.bits[wave]):x}"


def check_rest(result: Result, before: Batch, after: After) -> str:
    """What else has changed."""
    scc = before.scc if result.scc is None else result.scc
    if not np.array_equal(after.scc, scc):
        wave = int(np.argwhere(after.scc != scc)[0][0])
        return f"SCC of wave {wave}: {after.scc[wave]}, not {scc[wave]}"
    if after.modes != {before.mode}:
        return f"MODE became {after.modes}"
    for name, new, old in (("v", after.vgprs, before.vgprs), ("s", after.sgprs, before.sgprs)):
        if new is not old and not np.array_equal(new, old):
            return f"{name}{int(np.argwhere(new != old)[0][1])} changed"
    return ""


def check(probe: Probe, form: Form) -> Iterator[str]:
    """Runs one form in all modes; what is wrong, in words."""
    try:
        fields = decode(form.code, form.chip)
    except ValueError:
        yield f"no case for {form.name}"
        return
    if fields.base != "VOPD" and fields.name != form.name:
        yield f"decoded as {form.name}, by tinygrad as {fields.name}"
    keep = KEEP_DENORMALS | (0 if fields.arch == "rdna4" else IEEE)
    for mode in [keep] if pool_of(fields) == "integer" else [keep, keep & ~FLUSH_F32]:
        rng = np.random.default_rng(zlib.crc32(form.code))
        batch = batch_for(form, fields, mode, rng)
        try:
            result = expected(fields, batch)
            after = run(probe, form, batch)
        except (NoCase, IsaFault) as error:
            yield str(error)
            return
        problems = [check_scalar(write, batch, after) for write in result.scalars]
        problems += [check_vector(write, batch, after) for write in result.vectors]
        problems.append(check_rest(result, batch, after))
        yield from (f"{problem}; MODE {mode:#x}" for problem in problems if problem)


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_every_form(chip: str, isa_probe: Probe, code_objects: dict[str, Path]) -> None:
    check_forms(inventory_of(chip, code_objects[chip], isa_probe), isa_probe)


@pytest.mark.slow
@pytest.mark.parametrize("chip", MACHINE_CODE_CHIPS)
def test_every_form_of_other_models(
    chip: str, isa_probe: Probe, hip_cache: Path, tmp_path: Path
) -> None:
    """In f32 and bf16, and with both vision towers."""
    for dtype, vision in (("f32", IDEFICS3), ("bf16", LLAVA)):
        options = replace(CODE_OPTIONS, target=chip, weight_dtype=dtype, kv_dtype=dtype)
        mlir = tmp_path / "model.mlir"
        mlir.write_text(model_emitter(TINY, options, vision).emit())
        inventory = inventory_of(chip, compile_code_object(mlir, chip, hip_cache), isa_probe)
        check_forms(inventory, isa_probe)
        check_names(inventory.names)


def check_forms(inventory: Inventory, isa_probe: Probe) -> None:
    forms = inventory.forms.values()
    assert len(forms) > 200
    problems = [
        f"{form.text} [{form.code.hex()}]: {problem}"
        for alike in forms
        for form in alike
        for problem in check(isa_probe, form)
    ]
    assert not problems, f"{len(problems)} of {len(forms)} forms:\n" + "\n".join(problems[:60])


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_every_other_operation_is_tested_elsewhere(
    chip: str, isa_probe: Probe, code_objects: dict[str, Path]
) -> None:
    check_names(inventory_of(chip, code_objects[chip], isa_probe).names)


def check_names(names: set[str]) -> None:
    for module, starts in ELSEWHERE.items():
        covered: set[str] = import_module(f"tests.hip.{module}").OPCODES
        missing = {name for name in names if name.startswith(starts)} - covered
        assert not missing, f"{module} has no case for {sorted(missing)}"


# -------------------------------------------------------------------------------- control, by hand


class Assembler:
    """Instructions of a family, through tinygrad's tables."""

    def __init__(self, chip: str) -> None:
        arch = arch_of(chip)
        self.ins = import_module(f"tinygrad.runtime.autogen.amd.{arch}.ins")
        self.is_cdna = arch == "cdna"

    def sopp(self, name: str, constant: int = 0) -> bytes:
        op = self.ins.SOPPOp[name.upper()]
        return bytes(self.ins.SOPP(op, simm16=constant & 0xFFFF).to_bytes())

    def sopk(self, name: str, register: int, constant: int) -> bytes:
        from tinygrad.renderer.amd.dsl import s

        op = self.ins.SOPKOp[name.upper()]
        return bytes(self.ins.SOPK(op, sdst=s[register], simm16=constant & 0xFFFF).to_bytes())

    def vop(self, name: str, *operands: Any) -> bytes:
        """A VOP1, VOP2 or VOP3 instruction by its name in the tables."""
        return bytes(getattr(self.ins, name)(*operands).to_bytes())

    def index_on(self, register: int, operands: int) -> bytes:
        """s_set_gpr_idx_on, whose second field is no register but says which operands."""
        from tinygrad.renderer.amd.dsl import s

        op = self.ins.SOPCOp.S_SET_GPR_IDX_ON
        return bytes(self.ins.SOPC(op, ssrc0=s[register], ssrc1=s[operands]).to_bytes())

    def vop3(self, name: str, to: int, *sources: int, **modifiers: int) -> bytes:
        """An operation on vector registers in the encoding that has modifiers."""
        from tinygrad.renderer.amd.dsl import v

        op = self.ins.VOP3Op[name.upper()]
        registers = {f"src{k}": v[number] for k, number in enumerate(sources)}
        return bytes(self.ins.VOP3(op, vdst=v[to], **registers, **modifiers).to_bytes())


def _wave(chip: str, **values: int) -> State:
    """A state with s0 and s1 zero, all lanes active."""
    state = State(64 if chip.startswith("gfx9") else 32)
    state.exec = 2**state.lanes - 1
    for name, value in values.items():
        setattr(state, name, value)
    return state


def _branch_cases(lanes: int) -> list[tuple[str, dict[str, int], bool]]:
    """(branch, state, whether it is taken)."""
    top = 1 << (lanes - 1)
    cases: list[tuple[str, dict[str, int], bool]] = [("s_branch", {}, True)]
    cases += [(f"s_cbranch_scc{k}", {"scc": value}, k == value) for k in (0, 1) for value in (0, 1)]
    for mask in (0, 1, top):
        for register in ("vcc", "exec"):
            cases.append((f"s_cbranch_{register}z", {register: mask}, mask == 0))
            cases.append((f"s_cbranch_{register}nz", {register: mask}, mask != 0))
    return cases


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_branches(chip: str, isa_probe: Probe) -> None:
    """A branch skips one of two moves, or does not."""
    assemble = Assembler(chip)
    first, second = (assemble.sopk("s_movk_i32", register, 7) for register in (0, 1))
    cases = _branch_cases(64 if assemble.is_cdna else 32)
    assert {name for name, _, _ in cases} == BRANCHES
    for name, values, is_taken in cases:
        state = _wave(chip, **values)
        isa_probe.run(chip, assemble.sopp(name, 1) + first + second, state)
        assert state.sgprs[:2].tolist() == [0 if is_taken else 7, 7], (name, values)


@pytest.mark.parametrize("chip", ["gfx1100", "gfx1201"])
def test_branches_on_vcc_see_32_lanes(chip: str, isa_probe: Probe) -> None:
    assemble = Assembler(chip)
    for name, is_taken in (("s_cbranch_vccz", True), ("s_cbranch_vccnz", False)):
        state = _wave(chip)
        state.sgprs[107] = 5  # VCC_HI, which wave32 has no lanes for
        skipped = assemble.sopp(name, 1) + assemble.sopk("s_movk_i32", 0, 7)
        isa_probe.run(chip, skipped + assemble.sopp("s_endpgm"), state)
        assert state.sgprs[0] == (0 if is_taken else 7), name


@pytest.mark.parametrize("chip", ["gfx908", "gfx90a", "gfx942"])
def test_indexed_registers(chip: str, isa_probe: Probe) -> None:
    """Between s_set_gpr_idx_on and off, M0 is added to the register that a move reads or writes.
    Kernels that run out of registers have it; those of the inventory do not."""
    assemble = Assembler(chip)
    move = assemble.vop("v_mov_b32_e32", *_vectors(4, 2))
    for operands, is_read, is_written in ((1, 1, 0), (8, 0, 1), (9, 1, 1), (6, 0, 0)):
        state = _wave(chip)
        state.vgprs[:] = np.arange(state.vgprs.size).reshape(state.vgprs.shape)
        state.sgprs[0], state.sgprs[M0] = 0x703, 0xABCDEF00
        before, mode, m0 = state.vgprs.copy(), state.mode, 0xABCD0F03 | operands << 12
        isa_probe.run(chip, assemble.index_on(0, operands) + move, state)
        assert np.array_equal(state.vgprs[4 + 3 * is_written], before[2 + 3 * is_read])
        assert state.sgprs[M0] == m0 and state.mode == mode | 1 << 27
        isa_probe.run(chip, assemble.sopp("s_set_gpr_idx_mode", 1), state)
        assert state.sgprs[M0] == m0 & ~0xF000 | 0x1000
        with pytest.raises(IsaFault, match="only v_mov_b32"):
            isa_probe.run(chip, assemble.vop("v_not_b32_e32", *_vectors(4, 2)), state.copy())
        isa_probe.run(chip, assemble.sopp("s_set_gpr_idx_off") + move, state)
        assert np.array_equal(state.vgprs[4], state.vgprs[2]) and state.mode == mode


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_unsigned_sums_and_differences_saturate(chip: str, isa_probe: Probe) -> None:
    """With clamp."""
    assemble, rng = Assembler(chip), np.random.default_rng(5)
    kind = "" if assemble.is_cdna else "nc_"
    for name, exact in (
        ("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("subrev", lambda a, b: b - a),
    ):  # fmt: skip
        code = assemble.vop3(f"v_{name}_{kind}u32", 2, 0, 1, clmp=1)
        for _ in range(20):
            state = _wave(chip)
            state.vgprs[:2] = _integer_pool(rng, 2 * 64).reshape(2, 64)
            sources = state.vgprs[:2, : state.lanes].astype(np.int64)
            isa_probe.run(chip, code, state)
            want = np.clip(exact(*sources), 0, 2**32 - 1)
            assert (state.vgprs[2, : state.lanes] == want).all(), name
        for modifiers in {"neg": 1}, {"neg": 1, "clmp": 1}, {"omod": 1}:
            code = assemble.vop3(f"v_{name}_{kind}u32", 2, 0, 1, **modifiers)
            with pytest.raises(IsaFault, match="of floats on integers"):
                isa_probe.run(chip, code, _wave(chip))


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_a_loop(chip: str, isa_probe: Probe) -> None:
    """A branch backwards, and s_endpgm ends what follows."""
    assemble = Assembler(chip)
    add = "s_addk_co_i32" if chip == "gfx1201" else "s_addk_i32"
    code = (
        assemble.sopk("s_movk_i32", 0, 5)
        + assemble.sopk(add, 1, 3)
        + assemble.sopk(add, 0, -1)
        + assemble.vop("s_cmp_lg_u32", *_scalars(0), 0)
        + assemble.sopp("s_cbranch_scc1", -4)
        + assemble.sopp("s_endpgm")
        + assemble.sopk("s_movk_i32", 1, 99)
    )
    state = _wave(chip)
    isa_probe.run(chip, code, state)
    assert state.sgprs[:2].tolist() == [0, 15]


def _vectors(*numbers: int) -> list[Any]:
    from tinygrad.renderer.amd.dsl import v

    return [v[number] for number in numbers]


def _scalars(*numbers: int) -> list[Any]:
    from tinygrad.renderer.amd.dsl import s

    return [s[number] for number in numbers]


def _mode_after(name: str, code: bytes, mode: int) -> int:
    """MODE after an instruction that sets a part of it."""
    constant = int.from_bytes(code[:2], "little")
    if name == "s_denorm_mode":
        return mode & ~0xF0 | (constant & 15) << 4
    if name == "s_round_mode":
        return mode & ~0xF | constant & 15
    register, offset, size = constant & 63, constant >> 6 & 31, (constant >> 11) + 1
    assert register == 1, "only MODE"
    mask = ((1 << size) - 1) << offset
    return mode & ~mask | int.from_bytes(code[4:8], "little") << offset & mask


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_control(chip: str, isa_probe: Probe, code_objects: dict[str, Path]) -> None:
    """What sets modes sets them, barriers let one wave pass, the others change nothing."""
    rng = np.random.default_rng(0)
    found = inventory_of(chip, code_objects[chip], isa_probe).control
    for name, codes in found.items():
        for code in () if name in BRANCHES | INDEXING | UNREACHED else codes:
            before = _wave(chip, scc=1, mode=0xF0 if name in NOTHING else 0x3A5)
            before.vgprs[:] = rng.integers(0, 2**32, before.vgprs.shape, np.uint32)
            before.sgprs[:] = rng.integers(0, 2**32, before.sgprs.shape, np.uint32)
            after = before.copy()
            signal = min(found["s_barrier_signal"]) if name == "s_barrier_wait" else b""
            isa_probe.run(chip, signal + code, after)
            want = _mode_after(name, code, before.mode) if name in MODES else before.mode
            assert after.mode == want, (name, code.hex())
            assert after.scc == 1
            assert np.array_equal(after.vgprs, before.vgprs), (name, code.hex())
            assert np.array_equal(after.sgprs, before.sgprs), (name, code.hex())


# --------------------------------------------------------------------------------------- division


def _division(chip: str) -> list[bytes]:
    """v5 = v0 / v1, by the instructions that compilers use for a correctly rounded quotient."""
    from tinygrad.renderer.amd.dsl import VCC, s, v

    assemble = Assembler(chip)
    suffix = "_e64" if assemble.is_cdna else ""
    unused = s[6:7] if assemble.is_cdna else s[6]

    def fma(*operands: Any) -> bytes:
        return assemble.vop("v_fma_f32" + suffix, *operands)

    scale, one = "v_div_scale_f32", 1.0
    return [
        assemble.vop(scale, v[2], unused, v[1], v[1], v[0]),  # the denominator, scaled
        assemble.vop(scale, v[3], VCC, v[0], v[1], v[0]),  # the numerator, scaled
        assemble.vop("v_rcp_f32_e32", v[4], v[2]),
        fma(v[5], -v[2], v[4], one),
        fma(v[4], v[5], v[4], v[4]),
        assemble.vop("v_mul_f32_e32", v[5], v[3], v[4]),
        fma(v[6], -v[2], v[5], v[3]),
        fma(v[5], v[6], v[4], v[5]),
        fma(v[6], -v[2], v[5], v[3]),
        assemble.vop("v_div_fmas_f32" + suffix, v[5], v[6], v[4], v[5]),
        assemble.vop("v_div_fixup_f32" + suffix, v[5], v[5], v[1], v[0]),
    ]


def _expect_quotients(vgprs: npt.NDArray[np.uint32]) -> None:
    """v5 is v0 / v1, rounded correctly, denormals and overflow included."""
    numerator, denominator, got = (vgprs[k].view(np.float32).ravel() for k in (0, 1, 5))
    with np.errstate(all="ignore"):
        want = numerator / denominator
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    k = int(same.argmin())
    assert same.all(), f"{numerator[k]!r} / {denominator[k]!r}: {got[k]!r}, not {want[k]!r}"


def test_division_by_the_oracle() -> None:
    """What BY_HAND says of the three operations adds up, which AMD's texts by themselves do not."""
    rng = np.random.default_rng(4)
    vectors = _f32_pool(rng, 200 * 8 * 64).reshape(200, 8, 64)
    batch = Batch(
        vectors, np.zeros((200, NUM_SGPRS), np.uint32), np.zeros(200, np.uint32), 0xF0, 64
    )
    batch.sgprs[:, EXEC : EXEC + 2] = 0xFFFFFFFF
    for instruction in _division("gfx942"):
        result = expected(decode(instruction, "gfx942"), batch)
        for write in result.vectors:
            vectors[:, write.index] = write.bits
        for mask in result.scalars:
            for k in range(2):
                batch.sgprs[:, mask.index + k] = mask.bits >> np.uint64(32 * k) & ones(32)
    _expect_quotients(vectors.swapaxes(0, 1))


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_division(chip: str, isa_probe: Probe) -> None:
    """v_div_scale, v_div_fmas and v_div_fixup together give the correctly rounded quotient.

    AMD's texts of the three are thin; this holds whatever the oracle says of each.
    """
    code, rng = b"".join(_division(chip)), np.random.default_rng(3)
    for _ in range(40):
        state = _wave(chip)
        state.vgprs[:2] = _f32_pool(rng, 2 * 64).reshape(2, 64)
        isa_probe.run(chip, code, state)
        _expect_quotients(np.ascontiguousarray(state.vgprs[:8, : state.lanes]))
