"""Writes the tables that decode.cpp includes: `python tables.py OUT`.

They come from AMD's machine-readable ISA as tinygrad carries it: for each family of chips the
encodings in the order in which decoding tries them, where their fields are, and for each opcode
its name, and its operands' types and numbers of registers.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygrad.renderer.amd import _load_formats
from tinygrad.renderer.amd.dsl import EnumBitField, FixedBitField

Described = dict[Any, dict[str, tuple[Any, int, Any]]]  # opcode -> field -> what AMD says of it

# A variant of an encoding adds a dword for what the main one has no room for.
VARIANTS = ("LIT", "DPP16", "DPP8", "SDWA")

# tinygrad's list of encodings lacks these two; both are found by their fixed bits alone.
MISSING = {"rdna3": ["MUBUF"], "rdna4": ["VBUFFER"], "cdna": []}

# Of VOP3PX2 tinygrad knows no fixed bits in the first dword: it would match others as well.
LEFT_OUT = {"VOP3PX2", "VINTERP", "VOPC_SDWA_SDST"}  # the last is found as a variant

# AMD's file for CDNA describes gfx942 and gfx950. Opcodes that mean something else on gfx908 and
# gfx90a, or are there only: (encoding, number, name, whose operands they have, registers of the
# sources where those differ).
EARLIER: list[tuple[str, int, str, str, int]] = [
    ("VOP2", 22, "v_mac_f32", "V_FMAC_F32_E32", 0),
    ("VOP2", 23, "v_madmk_f32", "V_FMAMK_F32_E32", 0),
    ("VOP2", 24, "v_madak_f32", "V_FMAAK_F32_E32", 0),
    ("VOP3", 278, "v_mac_f32", "V_FMAC_F32_E64", 0),
    ("VOP3", 449, "v_mad_f32", "V_FMA_F32_E64", 0),
    ("VOP3P_MFMA", 84, "v_mfma_i32_32x32x8_i8", "V_MFMA_I32_32X32X16_I8", 1),
    ("VOP3P_MFMA", 85, "v_mfma_i32_16x16x16_i8", "V_MFMA_I32_16X16X32_I8", 1),
    ("VOP3P_MFMA", 99, "v_mfma_f32_32x32x4_2b_bf16", "V_MFMA_F32_32X32X4_2B_BF16", 0),
    ("VOP3P_MFMA", 100, "v_mfma_f32_16x16x4_4b_bf16", "V_MFMA_F32_16X16X4_4B_BF16", 0),
    ("VOP3P_MFMA", 101, "v_mfma_f32_4x4x4_16b_bf16", "V_MFMA_F32_4X4X4_16B_BF16", 0),
    ("VOP3P_MFMA", 102, "v_mfma_f32_32x32x8_bf16", "V_MFMA_F32_32X32X8_BF16", 0),
    ("VOP3P_MFMA", 103, "v_mfma_f32_16x16x16_bf16", "V_MFMA_F32_16X16X16_BF16", 0),
    ("VOP3P_MFMA", 104, "v_mfma_f32_32x32x2_2b_bf16", "V_MFMA_F32_32X32X4_2B_BF16", 1),
    ("VOP3P_MFMA", 105, "v_mfma_f32_16x16x2_4b_bf16", "V_MFMA_F32_16X16X4_4B_BF16", 1),
    ("VOP3P_MFMA", 107, "v_mfma_f32_4x4x2_16b_bf16", "V_MFMA_F32_4X4X4_16B_BF16", 1),
    ("VOP3P_MFMA", 108, "v_mfma_f32_32x32x4_bf16", "V_MFMA_F32_32X32X8_BF16", 1),
    ("VOP3P_MFMA", 109, "v_mfma_f32_16x16x8_bf16", "V_MFMA_F32_16X16X16_BF16", 1),
]

# What one thing is called in several encodings.
FIELD_NAMES = {
    "ssrc0": "src0", "vsrc0": "src0", "srcy0": "src0", "scale_src0": "src0",
    "ssrc1": "src1", "vsrc1": "src1", "vsrcy1": "src1",
    "vdst": "dst", "sdata": "dst", "vdsty": "dst",
    "vaddr": "addr", "vdata": "data", "data0": "data", "vsrc": "data",
    "rsrc": "srsrc", "clmp": "clamp", "bc": "bound_ctrl", "ioffset": "offset",
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """What an opcode says of one operand. kind: where the register is; type: of constants."""

    field: str
    kind: str
    type: str
    registers: int
    is_16_bits: bool


def constant_type(fmt: str, bits: int) -> str:
    """The form that constants take for an operand of AMD's data format `fmt`."""
    for part, name in (("BF16", "bf16"), ("F16", "f16"), ("F64", "f64"), ("I64", "i64")):
        if fmt.endswith(part):
            return name
    if re.fullmatch("NUM_[UBM]64", fmt):
        return "b64"
    return "b16" if re.fullmatch("NUM_[UIB]16", fmt) and bits == 16 else "b32"


def operand_of(arch: str, field: str, description: tuple[Any, int, Any]) -> Operand:
    fmt, bits, place = description[0].name[4:], description[1], description[2].name[4:]
    is_scalar = place.startswith(("SREG", "SDST", "EXEC", "SSRC", "SMEM_OFFSET"))
    kind = "scalar" if is_scalar else "accumulator" if place.endswith("ACCVGPR") else "any"
    if "_OR_ACCVGPR" in place:
        kind = "either"  # a bit of the encoding says which
    if fmt == "NUM_M64" and arch != "cdna":  # a mask of lanes
        bits = 32
    return Operand(
        FIELD_NAMES.get(field, field),
        kind,
        constant_type(fmt, bits),
        max(1, bits // 32),
        bits == 16,
    )


def operands_of(arch: str, op: Any, described: dict[str, tuple[Any, int, Any]]) -> list[Operand]:
    """Operands that are registers or constants; what else a field says decode.cpp knows."""
    is_scalar = type(op).__name__.startswith("SOP")
    numbers = ("SIMM", "LABEL", "HWREG", "SENDMSG", "WAIT", "DELAY", "CLAUSE", "VERSION", "SLEEP")
    return [
        operand_of(arch, "dst" if is_scalar and field == "sdst" else field, description)
        for field, description in described.items()
        if not description[2].name[4:].startswith(numbers)
    ]


class Pool:
    """Rows of lists that are stored one after the other, equal lists once."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.starts: dict[tuple[str, ...], int] = {}

    def add(self, rows: list[str]) -> str:
        """The list's place as "first, count"."""
        key = tuple(rows)
        if key not in self.starts:
            self.starts[key] = len(self.rows)
            self.rows += rows
        return f"{self.starts[key]}, {len(rows)}"


def plain_name(name: str) -> str:
    """The name for handlers. AMD's file for CDNA has kept an older name of v_fma_mix."""
    return re.sub("_e(32|64)$", "", name.lower()).replace("v_mad_mix", "v_fma_mix")


def operand_rows(operands: list[Operand]) -> list[str]:
    return [
        f"{{Field::{o.field}, Place::{o.kind}, Type::{o.type}, {o.registers}, "
        f"{str(o.is_16_bits).lower()}}}"
        for o in operands
    ]


def fields_of(encoding: type) -> dict[str, Any]:
    return dict(encoding._fields)  # type: ignore[attr-defined]


def field_rows(encoding: type) -> list[str]:
    """Fields that are not fixed; `encoding` stands for all fixed ones."""
    rows = []
    for name, field in fields_of(encoding).items():
        if isinstance(field, FixedBitField):
            continue
        # VOP1_DPP16 and its like have both: src0 only says that the variant is there.
        is_marker = name == "src0" and "vsrc0" in fields_of(encoding)
        if name == "sdst" and encoding.__name__.startswith("SOP"):
            name = "dst"
        name = "marker" if is_marker else FIELD_NAMES.get(name, name)
        base = getattr(field, "_valid_range", (0, 0))[0]
        shift = getattr(field, "_align", 1).bit_length() - 1
        rows.append(f"{{Field::{name}, {field.lo}, {field.hi - field.lo + 1}, {base}, {shift}}}")
    return rows


def fixed_bits(encoding: type) -> tuple[int, int]:
    mask = value = 0
    for field in fields_of(encoding).values():
        if isinstance(field, FixedBitField):
            mask |= field.mask << field.lo
            value |= field.default << field.lo
    assert mask < 1 << 32
    return mask, value


def size_of(encoding: type) -> int:
    """Bytes."""
    return int(encoding._base_size)  # type: ignore[attr-defined]


def opcode_field(encoding: type) -> EnumBitField:
    field = fields_of(encoding).get("op") or fields_of(encoding).get("opy")
    assert isinstance(field, EnumBitField)
    return field


def allowed(encoding: type) -> set[Any]:
    """The opcodes of an encoding."""
    field = opcode_field(encoding)
    return set(field._enum) if field.allowed is None else set(field.allowed)


def variants_of(module: ModuleType, name: str) -> dict[str, type]:
    """An encoding ("") and its variants."""
    found = {"": vars(module)[name]}
    for suffix in VARIANTS:
        for full in (f"{name}_{suffix}_SDST", f"{name}_{suffix}"):  # comparisons have the former
            if full in vars(module):
                found[suffix] = vars(module)[full]
    return found


class Writer:
    """Collects the rows of all families of chips."""

    def __init__(self) -> None:
        self.fields, self.operands, self.opcodes = Pool(), Pool(), Pool()
        self.formats: dict[str, list[str]] = {}

    def add(self, arch: str) -> None:
        """All encodings of a family, each followed by its variants, which have its opcodes."""
        module = import_module(f"tinygrad.runtime.autogen.amd.{arch}.ins")
        described = import_module(f"tinygrad.runtime.autogen.amd.{arch}.operands").OPERANDS
        names = [encoding.__name__ for encoding in _load_formats()[arch]] + MISSING[arch]
        names = [name for name in names if not name.endswith(VARIANTS) and name not in LEFT_OUT]
        self.formats[arch] = []
        for name in names:
            variants = variants_of(module, name)
            taken = {op for other in names if other != name for op in allowed(vars(module)[other])}
            opcodes = allowed(variants[""]).union(*map(allowed, variants.values()))
            opcodes -= taken - allowed(variants[""])
            rows = self.opcode_rows(arch, opcodes, described)
            if arch == "cdna":
                rows += self.earlier_rows(name, opcode_field(variants[""]), described)
            place = self.opcodes.add(rows)
            for suffix, encoding in variants.items():
                full = f"{name}_{suffix}" if suffix else name
                mask, value = fixed_bits(encoding)
                self.formats[arch].append(
                    f'{{"{full}", Variant::{suffix.lower() or "none"}, {size_of(encoding)}, '
                    f"{mask:#x}, {value:#x}, {self.fields.add(field_rows(encoding))}, {place}}}"
                )

    def opcode_rows(self, arch: str, opcodes: set[Any], described: Described) -> list[str]:
        return [
            self.opcode_row(
                op.value, plain_name(op.name), operands_of(arch, op, described.get(op, {})), False
            )
            for op in sorted(opcodes, key=lambda op: op.value)
        ]

    def earlier_rows(self, name: str, field: EnumBitField, described: Described) -> list[str]:
        rows = []
        for encoding, number, opcode_name, like, registers in EARLIER:
            if encoding != name:
                continue
            op = field._enum[like]
            operands = [
                replace(operand, registers=registers)
                if registers and operand.field in ("src0", "src1")
                else operand
                for operand in operands_of("cdna", op, described[op])
            ]
            rows.append(self.opcode_row(number, opcode_name, operands, True))
        return rows

    def opcode_row(self, number: int, name: str, operands: list[Operand], earlier: bool) -> str:
        place = self.operands.add(operand_rows(operands))
        return f'{{{number}, "{name}", {place}, {str(earlier).lower()}}}'

    def text(self) -> str:
        with_fields = [*self.fields.rows, *self.operands.rows]
        parts = [
            enum("Field", [row[1:].split(",")[0] for row in with_fields]),
            enum("Type", [row.split(", ")[2] for row in self.operands.rows]),
            enum("Place", [row.split(", ")[1] for row in self.operands.rows]),
            array("FieldRow", "FIELDS", self.fields.rows),
            array("OperandRow", "OPERANDS", self.operands.rows),
            array("OpcodeRow", "OPCODES", self.opcodes.rows),
            *(array("FormatRow", f"{arch.upper()}_FORMATS", rows)
              for arch, rows in self.formats.items()),
        ]  # fmt: skip
        return "// Written by tables.py.\n" + "".join(parts)


def enum(name: str, scoped: list[str]) -> str:
    values = sorted({value.split("::")[1] for value in scoped})
    return f"enum class {name} : uint8_t {{ {', '.join(values)} }};\n"


def array(row: str, name: str, rows: list[str]) -> str:
    lines = "".join(f"    {text},\n" for text in rows)
    return f"constexpr {row} {name}[] = {{\n{lines}}};\n"


def main() -> None:
    writer = Writer()
    for arch in ("cdna", "rdna3", "rdna4"):
        writer.add(arch)
    Path(sys.argv[1]).write_text(writer.text())


if __name__ == "__main__":
    main()
