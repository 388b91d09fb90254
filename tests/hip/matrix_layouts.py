"""Where the elements of matrices lie in registers, for each matrix instruction, as data for tests.

Written from documents, not from isa/matrix.cpp:

- AMD Matrix Instruction Calculator 1.3.2 (github.com/ROCm/amd_matrix_instruction_calculator, commit
  2ef91896bcdc4d26624f952e5c905c787cd9bc9e, 20 May 2025): opcodes and formulas ("Matrix element to
  register mapping with no modifiers") of gfx908, gfx90a, gfx942, gfx11 and gfx12.
- IREE (github.com/iree-org/iree, commit 00463496c11aa88d70caf4835d22f066d927ae26),
  IREEGPUAttrs.cpp, getSingleSubgroupLayout: the shapes that only gfx950 has, and the second opinion
  in IREE_LAYOUTS.

An instruction computes D[b] = A[b] B[b] + C[b] for blocks b. A formula says of an element in which
register of its operand it lies, in which half, and in which lane. Its arguments may be numpy
arrays. Of f64 the formula gives the first of two registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Position(NamedTuple):
    """Of one element; or arrays, of many."""

    register: Any
    half: Any
    lane: Any


# (block, i or j, k) for A and B, whose layouts are each other's transposes; (block, i, j) for C, D.
Formula = Callable[[Any, Any, Any], Position]

BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}

MFMA_INPUTS: dict[tuple[int, int, int, int], Formula] = {
    # (M = N, K, blocks, bits of an element)
    (32, 1, 2, 32): lambda b, x, k: Position(0, 0, 32 * b + x),
    (16, 1, 4, 32): lambda b, x, k: Position(0, 0, 16 * b + x),
    (4, 1, 16, 32): lambda b, x, k: Position(0, 0, 4 * b + x),
    (32, 2, 1, 32): lambda b, x, k: Position(0, 0, 32 * k + x),
    (16, 4, 1, 32): lambda b, x, k: Position(0, 0, 16 * k + x),
    (32, 4, 2, 16): lambda b, x, k: Position(k // 2, k % 2, 32 * b + x),
    (16, 4, 4, 16): lambda b, x, k: Position(k // 2, k % 2, 16 * b + x),
    (4, 4, 16, 16): lambda b, x, k: Position(k // 2, k % 2, 4 * b + x),
    (32, 8, 1, 16): lambda b, x, k: Position(k // 2 % 2, k % 2, 32 * (k // 4) + x),
    (16, 16, 1, 16): lambda b, x, k: Position(k // 2 % 2, k % 2, 16 * (k // 4) + x),
    (32, 2, 2, 16): lambda b, x, k: Position(0, k, 32 * b + x),
    (16, 2, 4, 16): lambda b, x, k: Position(0, k, 16 * b + x),
    (4, 2, 16, 16): lambda b, x, k: Position(0, k, 4 * b + x),
    (32, 4, 1, 16): lambda b, x, k: Position(0, k % 2, 32 * (k // 2) + x),
    (16, 8, 1, 16): lambda b, x, k: Position(0, k % 2, 16 * (k // 2) + x),
    (16, 4, 1, 64): lambda b, x, k: Position(0, 0, 16 * k + x),
    (4, 4, 4, 64): lambda b, x, k: Position(0, 0, 4 * b + 16 * k + x),
    # IREE: a lane holds eight elements in a row.
    (32, 16, 1, 16): lambda b, x, k: Position(k % 8 // 2, k % 2, 32 * (k // 8) + x),
    (16, 32, 1, 16): lambda b, x, k: Position(k % 8 // 2, k % 2, 16 * (k // 8) + x),
}

MFMA_OUTPUTS: dict[tuple[int, int, int], Formula] = {
    # (M = N, blocks, bits of an element)
    (32, 2, 32): lambda b, i, j: Position(16 * b + 4 * (i // 8) + i % 4, 0, 32 * (i // 4) % 64 + j),
    (16, 4, 32): lambda b, i, j: Position(4 * b + i % 4, 0, 16 * (i // 4) + j),
    (4, 16, 32): lambda b, i, j: Position(i, 0, 4 * b + j),
    (32, 1, 32): lambda b, i, j: Position(4 * (i // 8) + i % 4, 0, 32 * (i // 4) % 64 + j),
    (16, 1, 32): lambda b, i, j: Position(i % 4, 0, 16 * (i // 4) + j),
    (16, 1, 64): lambda b, i, j: Position(2 * (i // 4), 0, 16 * (i % 4) + j),
    (4, 4, 64): lambda b, i, j: Position(0, 0, 16 * (i % 4) + 4 * b + j),
}

WMMA_INPUTS: dict[str, Formula] = {
    # On RDNA3 the same again in lanes 16 to 31.
    "rdna3": lambda b, x, k: Position(k // 2, k % 2, x),
    "rdna4": lambda b, x, k: Position(2 * (k // 8) + k // 2 % 2, k % 2, 16 * (k // 4 % 2) + x),
}

WMMA_OUTPUTS: dict[tuple[str, int], Formula] = {
    ("rdna3", 32): lambda b, i, j: Position(i // 2, 0, 16 * i % 32 + j),
    # The half is the one that op_sel[2] says.
    ("rdna3", 16): lambda b, i, j: Position(i // 2, 0, 16 * i % 32 + j),
    ("rdna4", 32): lambda b, i, j: Position(i % 8, 0, 16 * (i // 8) + j),
    ("rdna4", 16): lambda b, i, j: Position(i // 2 % 4, i % 2, 16 * (i // 8) + j),
}


@dataclass(frozen=True)
class Layout:
    """One instruction. opcode: of VOP3P."""

    name: str
    arch: str  # "cdna", "rdna3", "rdna4"
    chips: tuple[str, ...]
    opcode: int
    m: int
    n: int
    k: int
    blocks: int
    input_type: str  # of A and B
    output_type: str  # of C and D

    @property
    def lanes(self) -> int:
        """Of a wave."""
        return 64 if self.arch == "cdna" else 32

    @property
    def input_formula(self) -> Formula:
        """For A from (block, i, k), for B from (block, j, k)."""
        if self.arch != "cdna":
            return WMMA_INPUTS[self.arch]
        return MFMA_INPUTS[self.m, self.k, self.blocks, BITS[self.input_type]]

    @property
    def output_formula(self) -> Formula:
        """For C and D, from (block, i, j)."""
        bits = BITS[self.output_type]
        if self.arch != "cdna":
            return WMMA_OUTPUTS[self.arch, bits]
        return MFMA_OUTPUTS[self.m, self.blocks, bits]

    @property
    def copies(self) -> int:
        """How often A and B lie in the wave, each time 16 lanes further."""
        return 2 if self.arch == "rdna3" else 1

    @property
    def leaves_halves(self) -> bool:
        """C and D fill one half of each register only."""
        return self.arch == "rdna3" and BITS[self.output_type] == 16

    @property
    def num_input_registers(self) -> int:
        """Of A, and of B."""
        elements = self.m * self.k * self.blocks * self.copies
        return elements * BITS[self.input_type] // 32 // self.lanes

    @property
    def num_output_registers(self) -> int:
        """Of C, and of D."""
        bits = 32 if self.leaves_halves else BITS[self.output_type]
        return self.m * self.n * self.blocks * bits // 32 // self.lanes


def grid(*sizes: int) -> list[Indices]:
    """The indices of an array of that shape, each as an array of that shape."""
    return list(np.indices(sizes))


ALL_CDNA = ("gfx908", "gfx90a", "gfx942", "gfx950")
SINCE_GFX90A = ALL_CDNA[1:]
SINCE_GFX942 = ALL_CDNA[2:]
BEFORE_GFX942 = ALL_CDNA[:2]
RDNA3 = ("gfx1100", "gfx1101")
RDNA4 = ("gfx1200", "gfx1201")


def mfma(chips: tuple[str, ...], opcode: int, m: int, k: int, blocks: int, kind: str) -> Layout:
    """M = N. Named as gfx942's documents name it, those of other chips as well."""
    output = "f64" if kind == "f64" else "f32"
    number = f"{blocks}b_" if blocks > 1 else ""
    name = f"v_mfma_{output}_{m}x{m}x{k}_{number}{kind}"
    return Layout(name, "cdna", chips, opcode, m, m, k, blocks, kind, output)


def wmma(arch: str, chips: tuple[str, ...], opcode: int, output: str, kind: str) -> Layout:
    """Always 16x16x16."""
    name = f"v_wmma_{output}_16x16x16_{kind}"
    return Layout(name, arch, chips, opcode, 16, 16, 16, 1, kind, output)


LAYOUTS = [
    mfma(ALL_CDNA, 0x40, 32, 1, 2, "f32"),
    mfma(ALL_CDNA, 0x41, 16, 1, 4, "f32"),
    mfma(ALL_CDNA, 0x42, 4, 1, 16, "f32"),
    mfma(ALL_CDNA, 0x44, 32, 2, 1, "f32"),
    mfma(ALL_CDNA, 0x45, 16, 4, 1, "f32"),
    mfma(ALL_CDNA, 0x48, 32, 4, 2, "f16"),
    mfma(ALL_CDNA, 0x49, 16, 4, 4, "f16"),
    mfma(ALL_CDNA, 0x4A, 4, 4, 16, "f16"),
    mfma(ALL_CDNA, 0x4C, 32, 8, 1, "f16"),
    mfma(ALL_CDNA, 0x4D, 16, 16, 1, "f16"),
    mfma(("gfx950",), 0x54, 16, 32, 1, "f16"),
    mfma(("gfx950",), 0x55, 32, 16, 1, "f16"),
    # Named v_mfma_f32_32x32x2bf16 and so on.
    mfma(BEFORE_GFX942, 0x68, 32, 2, 2, "bf16"),
    mfma(BEFORE_GFX942, 0x69, 16, 2, 4, "bf16"),
    mfma(BEFORE_GFX942, 0x6B, 4, 2, 16, "bf16"),
    mfma(BEFORE_GFX942, 0x6C, 32, 4, 1, "bf16"),
    mfma(BEFORE_GFX942, 0x6D, 16, 8, 1, "bf16"),
    # Named v_mfma_f32_32x32x4bf16_1k and so on.
    mfma(("gfx90a",), 0x63, 32, 4, 2, "bf16"),
    mfma(("gfx90a",), 0x64, 16, 4, 4, "bf16"),
    mfma(("gfx90a",), 0x65, 4, 4, 16, "bf16"),
    mfma(("gfx90a",), 0x66, 32, 8, 1, "bf16"),
    mfma(("gfx90a",), 0x67, 16, 16, 1, "bf16"),
    mfma(SINCE_GFX942, 0x5D, 32, 4, 2, "bf16"),
    mfma(SINCE_GFX942, 0x5E, 16, 4, 4, "bf16"),
    mfma(SINCE_GFX942, 0x5F, 4, 4, 16, "bf16"),
    mfma(SINCE_GFX942, 0x60, 32, 8, 1, "bf16"),
    mfma(SINCE_GFX942, 0x61, 16, 16, 1, "bf16"),
    mfma(("gfx950",), 0x35, 16, 32, 1, "bf16"),
    mfma(("gfx950",), 0x37, 32, 16, 1, "bf16"),
    mfma(SINCE_GFX90A, 0x6E, 16, 4, 1, "f64"),
    mfma(SINCE_GFX90A, 0x6F, 4, 4, 4, "f64"),
    *[
        wmma(arch, chips, opcode, output, kind)
        for arch, chips in (("rdna3", RDNA3), ("rdna4", RDNA4))
        for opcode, output, kind in (
            (0x40, "f32", "f16"),
            (0x41, "f32", "bf16"),
            (0x42, "f16", "f16"),
            (0x43, "bf16", "bf16"),
        )
    ],
]


class Tiles(NamedTuple):
    """IREE's way to say how a matrix of two dimensions lies in a wave.

    Each dimension, rows first, has outer * thread * element indices, element running fastest. Its
    thread index is (lane // stride) % thread. A lane's elements are numbered over outer, then over
    element.
    """

    outer: tuple[int, int]
    thread: tuple[int, int]
    strides: tuple[int, int]
    element: tuple[int, int]


def iree_lanes(tiles: Tiles, row: Any, column: Any) -> tuple[Any, Any]:
    """The lane of an element, 0 in dimensions that lanes repeat; and its number in the lane."""
    lane, outer, inner = 0, 0, 0
    for dimension, index in enumerate((row, column)):
        thread, element = tiles.thread[dimension], tiles.element[dimension]
        lane = lane + index // element % thread * tiles.strides[dimension]
        outer = outer * tiles.outer[dimension] + index // (thread * element)
        inner = inner * element + index % element
    return lane, outer * (tiles.element[0] * tiles.element[1]) + inner


def _split_k(m: int, k: int) -> Tiles:
    groups = 64 // m
    return Tiles((1, 1), (m, groups), (1, m), (1, k // groups))


_C16 = Tiles((1, 1), (4, 16), (16, 1), (4, 1))
_C32 = Tiles((4, 1), (2, 32), (32, 1), (4, 1))
_RDNA3_A = Tiles((1, 1), (16, 1), (1, 0), (1, 16))
_RDNA4_A = Tiles((1, 1), (16, 2), (1, 16), (1, 8))
_RDNA4_C = Tiles((1, 1), (2, 16), (16, 1), (8, 1))

# (A, C) of the instructions that IREE uses.
IREE_LAYOUTS: dict[tuple[str, str], tuple[Tiles, Tiles]] = {
    ("cdna", "v_mfma_f32_16x16x4_f32"): (_split_k(16, 4), _C16),
    ("cdna", "v_mfma_f32_16x16x16_f16"): (_split_k(16, 16), _C16),
    ("cdna", "v_mfma_f32_32x32x8_f16"): (_split_k(32, 8), _C32),
    ("cdna", "v_mfma_f32_16x16x32_f16"): (_split_k(16, 32), _C16),
    ("cdna", "v_mfma_f32_32x32x16_f16"): (_split_k(32, 16), _C32),
    ("cdna", "v_mfma_f32_16x16x8_bf16"): (_split_k(16, 8), _C16),
    ("cdna", "v_mfma_f32_32x32x4_bf16"): (_split_k(32, 4), _C32),
    ("cdna", "v_mfma_f32_16x16x16_bf16"): (_split_k(16, 16), _C16),
    ("cdna", "v_mfma_f32_32x32x8_bf16"): (_split_k(32, 8), _C32),
    ("cdna", "v_mfma_f32_16x16x32_bf16"): (_split_k(16, 32), _C16),
    ("cdna", "v_mfma_f32_32x32x16_bf16"): (_split_k(32, 16), _C32),
    ("cdna", "v_mfma_f64_16x16x4_f64"): (
        _split_k(16, 4),
        Tiles((4, 1), (4, 16), (16, 1), (1, 1)),
    ),
    ("rdna3", "v_wmma_f32_16x16x16_f16"): (
        _RDNA3_A,
        Tiles((8, 1), (2, 16), (16, 1), (1, 1)),
    ),
    ("rdna3", "v_wmma_f32_16x16x16_bf16"): (
        _RDNA3_A,
        Tiles((8, 1), (2, 16), (16, 1), (1, 1)),
    ),
    ("rdna4", "v_wmma_f32_16x16x16_f16"): (_RDNA4_A, _RDNA4_C),
    ("rdna4", "v_wmma_f32_16x16x16_bf16"): (_RDNA4_A, _RDNA4_C),
    ("rdna4", "v_wmma_f16_16x16x16_f16"): (_RDNA4_A, _RDNA4_C),
    ("rdna4", "v_wmma_bf16_16x16x16_bf16"): (_RDNA4_A, _RDNA4_C),
}
