"""The interpreter decodes our kernels as two other readers do: tinygrad and iree-compile."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.hip.probe import Line, Probe
from tests.hip.rocmasm import (
    Function,
    compare,
    in_common,
    parse_listings,
    parts_of,
    read_functions,
    without_padding,
)
from tests.support.tiny import CODE_CHIPS

ARCHS = {"gfx9": "cdna", "gfx11": "rdna3", "gfx12": "rdna4"}

# Encodings that tinygrad's decoder leaves out.
UNKNOWN_TO_TINYGRAD = {"rdna3": "MUBUF", "rdna4": "VBUFFER"}

# Opcodes of gfx908 and gfx90a that mean something else on gfx942, which tinygrad describes.
EARLIER = re.compile("v_(mac|mad|madmk|madak)_f32|v_mfma_.*_bf16|v_mfma_i32_.*")


def arch_of(chip: str) -> str:
    return next(arch for prefix, arch in ARCHS.items() if chip.startswith(prefix))


def is_earlier(chip: str, name: str) -> bool:
    """Whether tinygrad describes another instruction in its place."""
    return chip in ("gfx908", "gfx90a") and EARLIER.fullmatch(name) is not None


def decode_functions(probe: Probe, chip: str, image: Path) -> list[tuple[Function, list[Line]]]:
    """The kernels of a code object with their instructions."""
    functions = read_functions(image.read_bytes())
    return [
        (function, probe.decode(chip, function.code, function.address)) for function in functions
    ]


def forms_of(lines: list[Line]) -> set[tuple[str, ...]]:
    """What is decoded by the same rules: encodings, opcodes, and names of modifiers."""
    forms = set()
    for line in lines:
        for half in line.text.split("::"):
            name, _, modifiers = parts_of(half)
            names = {modifier.split(":")[0].split("(")[0] for modifier in modifiers}
            forms.add((line.format, name, *sorted(names if name != "s_waitcnt" else ())))
    return forms


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_decoding_agrees_with_the_assembly_of_iree_compile(
    chip: str, isa_probe: Probe, code_objects: dict[str, Path]
) -> None:
    """Nine of ten kernels do to the last operand, and every form of instruction somewhere.

    iree-compile makes code twice, for the object and for the assembly, and in a few kernels another
    one. A form that occurs only there is read by tinygrad alone, in the test below.
    """
    image = code_objects[chip]
    listings = parse_listings(image.with_suffix(".rocmasm").read_text())
    kernels = decode_functions(isa_probe, chip, image)
    assert {function.name for function, _ in kernels} == set(listings)
    everything, agreed, different = [], [], []
    for function, lines in kernels:
        everything += without_padding(lines)
        if differences := compare(listings[function.name], lines):
            different.append((function.name, differences[:3]))
            agreed += in_common(listings[function.name], lines)
        else:
            agreed += without_padding(lines)
    assert len(different) <= 0.12 * len(kernels), different
    assert len(agreed) >= 0.97 * len(everything), different
    unknown = UNKNOWN_TO_TINYGRAD.get(arch_of(chip))
    unconfirmed = forms_of(everything) - forms_of(agreed)
    assert len(unconfirmed) <= 3, unconfirmed
    assert not {form for form in unconfirmed if form[0] == unknown or is_earlier(chip, form[1])}


# tinygrad


def registers_of_text(line: Line) -> Counter[str]:
    """First registers of the vector and scalar operands, numbered as tinygrad does."""
    registers: Counter[str] = Counter()
    for half in line.text.split("::"):
        name, operands, _ = parts_of(half)
        # tinygrad takes the scalar destinations of these for vector registers on CDNA, or for
        # numbers; nor does it know of SDWA's scalar sources.
        is_left_out = name.startswith("v_read") or line.format == "VOPC_SDWA"
        for operand in operands[is_left_out:]:
            if match := re.search(r"\b([vsa])\[?(\d+)(:\d+\])?(\.h)?", operand):
                is_short = line.format.split("_")[0] in ("VOP1", "VOP2", "VOPC")
                half_bit = 128 if match[4] and is_short else 0  # tinygrad leaves it in the number
                letter = "s" if match[1] == "s" and "SDWA" not in line.format else "v"
                registers[f"{letter}{int(match[2]) + half_bit}"] += 1
    return registers


def registers_of_tinygrad(instruction: Any) -> Counter[str]:
    """The same of all fields, also of those that the opcode does not use."""
    values = [getattr(instruction, name) for name, _ in instruction._fields]
    offsets = [value.offset for value in values if hasattr(value, "offset")]
    return Counter(f"v{offset - 256}" if offset >= 256 else f"s{offset}" for offset in offsets)


def check_against_tinygrad(chip: str, line: Line, code: bytes) -> None:
    """Size, opcode and registers of one instruction."""
    from tinygrad.renderer.amd import decode_inst

    arch = arch_of(chip)
    if line.format == UNKNOWN_TO_TINYGRAD.get(arch) or is_earlier(chip, line.name):
        return
    instruction: Any = decode_inst(code + bytes(16), arch)
    opcode = instruction.op if hasattr(instruction, "op") else instruction.opx
    name = re.sub("_e(32|64)$", "", opcode.name.lower())
    assert (name, instruction.size()) == (line.name, line.size), line
    assert registers_of_text(line) <= registers_of_tinygrad(instruction), (line, instruction)


@pytest.mark.parametrize("chip", CODE_CHIPS)
def test_decoding_agrees_with_tinygrad(
    chip: str, isa_probe: Probe, code_objects: dict[str, Path]
) -> None:
    seen: set[bytes] = set()
    for function, lines in decode_functions(isa_probe, chip, code_objects[chip]):
        for line in lines:
            start = line.pc - function.address
            code = function.code[start : start + line.size]
            if code not in seen:
                seen.add(code)
                check_against_tinygrad(chip, line, code)
