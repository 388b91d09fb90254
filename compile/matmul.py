"""Matrix products on CPU vectors: the inner loops, and the layout of the weights they read.

A matrix [N, K] is stored in blocks of NB = 2 * lanes output features; a block is a stream that one
task reads from its beginning to its end. Each output adds up its products in the order of K, however
many rows are computed at once, so a row comes out the same in any company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.kernel import KernelBuilder, Memory, vector_type
from compile.mlir import Scalar

TILES = 2  # vectors of output features in a block
DOT_LANES = {4: "128", 8: "256", 16: "512"}
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Vectors:
    """What a CPU has: f32 lanes of a vector, rows of one product, and bf16 dot products."""

    lanes: int
    max_rows: int
    has_dot: bool = False

    @property
    def block(self) -> int:
        """Output features of a block."""
        return TILES * self.lanes


@dataclass(frozen=True)
class Operand:
    """Elements of `dtype` that products read `unit` at a time: pairs of bf16 for dot products."""

    dtype: str
    unit: int

    @property
    def unit_dtype(self) -> str:
        """Of memory with one unit an element."""
        return "i32" if self.unit == 2 else self.dtype

    @property
    def unit_bytes(self) -> int:
        return self.unit * ITEM_BYTES[self.dtype]

    @property
    def other(self) -> str:
        """The dtype of what it is multiplied with, one value broadcast to all lanes."""
        return "bf16" if self.unit == 2 else "f32"


def operand(dtype: str, vectors: Vectors, *lanes: int) -> Operand:
    """How vectors of these lanes are multiplied: as bf16 pairs where the CPU can."""
    is_dot = dtype == "bf16" and vectors.has_dot and all(n in DOT_LANES for n in lanes)
    return Operand(dtype, 2 if is_dot else 1)


@dataclass(frozen=True)
class Streams:
    """Vectors of an operand: one at each of `starts`, and again every `stride` units."""

    memory: Memory
    operand: Operand
    starts: Sequence[Scalar]
    stride: int
    lanes: int


def product(
    k: KernelBuilder,
    weights: Streams,
    x: Memory,
    rows: Sequence[Scalar],
    num_units: Scalar | int,
    sums: Sequence[Scalar],
) -> list[Scalar]:
    """sums[r, t] + the products of row r of `x` with stream t: f32 vectors, row by row.

    rows: where each row begins in `x`, in units.
    """
    op, lanes = weights.operand, weights.lanes

    def step(i: Scalar, *sums: Scalar) -> list[Scalar]:
        at = i * weights.stride
        loaded = [
            _multiplicand(k, weights.memory.load_vector(start + at, lanes), op, lanes)
            for start in weights.starts
        ]
        result = []
        for r, row in enumerate(rows):
            value = k.broadcast(x.load(row + i), lanes)
            if op.unit == 2:
                value = k.bitcast(value, vector_type(2 * lanes, "bf16"))
            for t, weight in enumerate(loaded):
                total = sums[r * len(loaded) + t]
                result.append(_multiply_add(k, value, weight, total, op, lanes))
        return result

    return k.fold(0, num_units, sums, step)


def _multiplicand(k: KernelBuilder, loaded: Scalar, op: Operand, lanes: int) -> Scalar:
    if op.unit == 2:
        return k.bitcast(loaded, vector_type(2 * lanes, "bf16"))
    return loaded.to(vector_type(lanes, "f32"))


def _multiply_add(
    k: KernelBuilder, a: Scalar, b: Scalar, total: Scalar, op: Operand, lanes: int
) -> Scalar:
    if op.unit == 2:
        name = f"x86.avx512bf16.dpbf16ps.{DOT_LANES[lanes]}"
        return k.intrinsic(name, [total, a, b], total.dtype)
    return k.fma(a, b, total)
