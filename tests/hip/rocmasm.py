"""A second reading of compiled kernels: the assembly that iree-compile writes beside them.

`--iree-hal-dump-executable-intermediates-to` gives it (`*.rocmasm`). It comes from the same LLVM
as the code object, and owes nothing to the tables that the interpreter decodes with.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from tests.hip.probe import Line

# A name, operands, and modifiers in any order: equal for equal instructions however written.
Parts = tuple[str, tuple[str, ...], frozenset[str]]

PADDING = ("s_nop", "s_code_end")  # what fills the gaps of an alignment

# What s_delay_alu's symbols stand for.
DELAYS = {
    "NO_DEP": 0, "VALU_DEP_1": 1, "VALU_DEP_2": 2, "VALU_DEP_3": 3, "VALU_DEP_4": 4,
    "TRANS32_DEP_1": 5, "TRANS32_DEP_2": 6, "TRANS32_DEP_3": 7, "FMA_ACCUM_CYCLE_1": 8,
    "SALU_CYCLE_1": 9, "SALU_CYCLE_2": 10, "SALU_CYCLE_3": 11,
}  # fmt: skip
SKIPS = {"SAME": 0, "NEXT": 1, "SKIP_1": 2, "SKIP_2": 3, "SKIP_3": 4, "SKIP_4": 5}
DELAY_FIELDS = {"instid0": (0, DELAYS), "instskip": (4, SKIPS), "instid1": (7, DELAYS)}
# depctr_*: lowest bit and width; all others of these bits are set.
DEPENDENCIES = {
    "sa_sdst": (0, 1), "va_vcc": (1, 1), "vm_vsrc": (2, 3), "hold_cnt": (7, 1), "va_ssrc": (8, 1),
    "va_sdst": (9, 3), "va_vdst": (12, 4),
}  # fmt: skip
HARDWARE_REGISTERS = {"HW_REG_MODE": 1}
INDEXED = {"SRC0": 1, "SRC1": 2, "SRC2": 4, "DST": 8}  # operands, of s_set_gpr_idx_on
MESSAGES = {"MSG_DEALLOC_VGPRS": 3}


@dataclass(frozen=True)
class Function:
    """A kernel's code in a code object."""

    name: str
    address: int
    code: bytes


def read_functions(image: bytes) -> list[Function]:
    """The kernels of a code object (an ELF file), by address."""
    (header_offset,) = struct.unpack_from("<Q", image, 0x28)
    count, _ = struct.unpack_from("<HH", image, 0x3C)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", image, header_offset + 64 * k) for k in range(count)
    ]
    symbols = next(s for s in sections if s[1] == 2)  # SHT_SYMTAB
    names = sections[symbols[6]][4]
    functions = []
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section, address, size = struct.unpack_from("<IBBHQQ", image, at)
        if info & 15 != 2:  # STT_FUNC
            continue
        text = image[names + name : image.index(0, names + name)].decode()
        start = address - sections[section][3] + sections[section][4]
        functions.append(Function(text, address, image[start : start + size]))
    return sorted(functions, key=lambda function: function.address)


@dataclass
class Listing:
    """A kernel's assembly. alignments and labels: what stands before which instruction."""

    instructions: list[str] = field(default_factory=list)
    alignments: dict[int, int] = field(default_factory=dict)  # index -> bytes
    labels: dict[str, int] = field(default_factory=dict)


def parse_listings(text: str) -> dict[str, Listing]:
    """The kernels of a .rocmasm file by name."""
    names = set(re.findall(r"^\s*\.type\s+(\S+),@function", text, re.MULTILINE))
    listings: dict[str, Listing] = {}
    current: Listing | None = None
    for raw in text.splitlines():
        line = raw.split(";")[0].split("//")[0].strip()
        if line.endswith(":"):
            if line[:-1] in names:
                current = listings[line[:-1]] = Listing()
            elif current is not None:
                current.labels[line[:-1]] = len(current.instructions)
        elif line.startswith(".section"):
            current = None
        elif current is None or not line:
            continue
        elif line.startswith(".p2align"):
            power = int(line.split()[1].rstrip(","))
            current.alignments[len(current.instructions)] = 1 << power
        elif not line.startswith("."):
            current.instructions.append(line)
    return listings


def compare(listing: Listing, decoded: Sequence[Line]) -> list[str]:
    """What differs between a kernel's assembly and its decoded code."""
    pairs = list(_align(listing, decoded))
    if len(pairs) != len(listing.instructions) or not _ends_with(pairs, decoded):
        return [f"{len(listing.instructions)} instructions are written, {len(decoded)} decoded"]
    labels = {
        name: pairs[index][1].pc for name, index in listing.labels.items() if index < len(pairs)
    }
    return [
        f"{line.pc}: written {written!r}, decoded {line.format} {line.text!r}"
        for written, line in pairs
        if _differ(written, line, labels)
    ]


def in_common(listing: Listing, decoded: Sequence[Line]) -> list[Line]:
    """The longest run of decoded instructions, with gaps, that the assembly has as well.

    iree-compile generates code twice, from a module and for the assembly from its copy, and a few
    kernels come out with other registers or in another order. Where branches lead is left out.
    """
    written = [_without_target(text) for text in listing.instructions]
    decoded = without_padding(decoded)
    read = [_without_target(line.text) for line in decoded]
    matcher = SequenceMatcher(None, written, read, autojunk=False)
    return [
        decoded[block.b + k] for block in matcher.get_matching_blocks() for k in range(block.size)
    ]


def without_padding(decoded: Sequence[Line]) -> list[Line]:
    """All but what an assembler may have put into gaps."""
    return [line for line in decoded if line.name not in PADDING]


def _without_target(text: str) -> tuple[Parts, ...]:
    if text.startswith(("s_branch", "s_cbranch_")):
        text = text.split()[0]
    return tuple(parts_of(half) for half in text.split("::"))


def _ends_with(pairs: Sequence[tuple[str, Line]], decoded: Sequence[Line]) -> bool:
    """Whether only padding stands behind the last pair."""
    last = pairs[-1][1].pc
    return all(line.pc <= last or line.name in PADDING for line in decoded)


def _align(listing: Listing, decoded: Sequence[Line]) -> Iterator[tuple[str, Line]]:
    """Pairs of what is written and what is decoded; padding is left out."""
    lines = iter(decoded)
    line = next(lines, None)
    for index, written in enumerate(listing.instructions):
        alignment = listing.alignments.get(index, 4)
        while line is not None and line.pc % alignment and line.name in PADDING:
            line = next(lines, None)
        if line is None:
            return
        yield written, line
        line = next(lines, None)


def _differ(written: str, line: Line, labels: dict[str, int]) -> bool:
    for name, address in labels.items():
        if written.endswith(name) and written[-len(name) - 1].isspace():
            written = written[: -len(name)] + str(address)
    return (
        [parts_of(half) for half in written.split("::")]
        != [parts_of(half) for half in line.text.split("::")]
        or not _suffix_agrees(written, line.format)
        or line.name not in plain_name(line.text)
    )


def _suffix_agrees(written: str, encoding: str) -> bool:
    """Whether an encoding is the one that the mnemonic's suffix names."""
    name = written.split()[0]
    if name.endswith("_dpp"):
        return "DPP" in encoding and ("_e64_" not in name or "VOP3" in encoding)
    if name.endswith("_sdwa"):
        return "SDWA" in encoding
    if name.endswith("_e32"):
        return encoding.split("_")[0] in ("VOP1", "VOP2", "VOPC")
    return not name.endswith("_e64") or encoding.startswith("VOP3")


def plain_name(text: str) -> str:
    return re.sub(r"(_e64|_e32)?(_dpp|_sdwa)?$", "", text.split()[0])


def parts_of(text: str) -> Parts:
    """An instruction's name, operands and modifiers, numbers in one form."""
    name, _, rest = text.strip().partition(" ")
    name = _one_name(plain_name(name))
    if name in ("s_delay_alu", "s_waitcnt_depctr", "s_wait_alu", "s_sendmsg"):
        return name, (str(_symbolic(rest)),), frozenset()
    if name == "s_waitcnt":
        return name, (), frozenset(rest.split())
    rest = re.sub(r"(hwreg|gpr_idx)\([^)]*\)", lambda match: str(_symbolic(match[0])), rest)
    operands: list[str] = []
    modifiers: set[str] = set()
    for part in _split(rest, ","):
        first, *others = _split(part, " ")
        operands.append(_operand(first))
        modifiers.update(_modifier(other) for other in others)
    if operands and re.match(r"(offset|quad_perm|dpp8|row_|op_sel|gds)", operands[-1]):
        modifiers.add(_modifier(operands.pop()))
    if name == "s_barrier_wait":
        operands = [str(int(operands[0]) & 0xFFFF)]
    return name, tuple(operands), frozenset(modifiers - {""})


def _one_name(name: str) -> str:
    """LLVM's and AMD's names of one instruction."""
    if name.startswith(("v_mfma_", "v_smfmac_")):
        name = re.sub(r"_\d+b_", "_", name.removesuffix("_1k")).replace("_", "")
    return name.replace("accvgpr_read_b32", "accvgpr_read").replace(
        "accvgpr_write_b32", "accvgpr_write"
    )


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that are in no brackets; empty ones are left out."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> str:
    text = re.sub(r"\b(v\d+)\.l\b", r"\1", text)
    if match := re.fullmatch(r"neg\((.*)\)", text):
        text = "-" + match[1]
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return str(int(text, 0) & 0xFFFFFFFF)
    return "0.15915494" if text == "0.15915494309189532" else text


def _modifier(text: str) -> str:
    name, _, value = text.partition(":")
    if name == "bound_ctrl":  # CDNA writes 0 for what RDNA writes as 1
        return name
    if name == "offset" and value.startswith("swizzle("):
        return f"offset:{_swizzle(value)}"
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", value):
        return f"{name}:{int(value, 0)}" if int(value, 0) or name != "offset" else ""
    return text


def _swizzle(text: str) -> int:
    """The offset of ds_swizzle_b32."""
    mode, *rest = [part.strip() for part in text[len("swizzle(") : -1].split(",")]
    if mode == "QUAD_PERM":
        return 0x8000 | sum(int(lane) << (2 * k) for k, lane in enumerate(rest))
    and_mask, or_mask, xor_mask = 31, 0, 0
    if mode == "SWAP":
        xor_mask = int(rest[0])
    elif mode == "REVERSE":
        xor_mask = int(rest[0]) - 1
    elif mode == "BROADCAST":
        and_mask, or_mask = 32 - int(rest[0]), int(rest[1])
    else:  # BITMASK_PERM, "01pip" from the highest bit on
        bits = rest[0].strip('"')
        and_mask, or_mask, xor_mask = (
            int("".join(str(int(bit in which)) for bit in bits), 2) for which in ("pi", "1", "i")
        )
    return and_mask | or_mask << 5 | xor_mask << 10


def _symbolic(text: str) -> int:
    """The 16 bits that symbols like sendmsg(...) and instid0(...) stand for."""
    if re.fullmatch(r"0x[0-9a-f]+|\d+", text.strip()):
        return int(text, 0)
    value = 0
    is_dependency = "depctr_" in text
    for _, (low, width) in DEPENDENCIES.items() if is_dependency else ():
        value |= ((1 << width) - 1) << low
    for name, argument in re.findall(r"(\w+)\(([^)]*)\)", text):
        if name == "sendmsg":
            value |= MESSAGES[argument]
        elif name == "gpr_idx":
            value |= sum(INDEXED[part.strip()] for part in argument.split(",") if part.strip())
        elif name == "hwreg":
            register, offset, size = (part.strip() for part in argument.split(","))
            value |= HARDWARE_REGISTERS[register] | int(offset) << 6 | (int(size) - 1) << 11
        elif is_dependency:
            low, width = DEPENDENCIES[name.removeprefix("depctr_")]
            value &= ~(((1 << width) - 1) << low)
            value |= int(argument) << low
        else:
            low, meanings = DELAY_FIELDS[name]
            value |= meanings[argument] << low
    return value
