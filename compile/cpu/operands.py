"""Products of float vectors on CPUs: how elements are multiplied, and the innermost loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.cpu.kernel import KernelBuilder
from compile.formats.layout import ITEM_BYTES
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from compile.target import Vectors

LINE_BYTES = 64  # of a CPU's cache
REGISTER_BITS = {4: "128", 8: "256", 16: "512"}  # by f32 lanes


@dataclass(frozen=True)
class Operand:
    """Floats that products read `unit` at a time: 2 for dot products of bf16 pairs, else 1.

    splits: pairs become two f32 instead, each for a multiply-add of its own.
    """

    dtype: str
    unit: int
    splits: bool = False

    @property
    def unit_dtype(self) -> str:
        """The type of memory whose elements are units."""
        return "i32" if self.unit == 2 else self.dtype

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.unit * ITEM_BYTES[self.dtype]

    @property
    def other(self) -> str:
        """The dtype of the other factor, of which one unit is broadcast to all lanes."""
        return "bf16" if self.unit == 2 and not self.splits else "f32"


def operand(dtype: str, vectors: Vectors, *lanes: int) -> Operand:
    """How floats are multiplied in vectors of each of these `lanes`: as pairs where the CPU can."""
    is_dot = dtype == "bf16" and vectors.has_dot and all(n in REGISTER_BITS for n in lanes)
    return Operand(dtype, 2 if is_dot else 1)


@dataclass(frozen=True)
class Streams:
    """Vectors of weights, keys or values: at each of `starts`, and again every `stride` units."""

    memory: Memory
    operand: Operand
    starts: Sequence[Scalar]
    stride: int
    lanes: int
    ahead: int = 0  # units to prefetch


@dataclass(frozen=True)
class Ahead:
    """What a product prefetches while it reads something else: in each step `stride` bytes more,
    from byte `start` on, into the second level, as the first one holds what is read."""

    start: Scalar
    stride: int

    def prefetch(self, memory: Memory, item_bytes: int, step: Scalar) -> None:
        """Prefetch the bytes of a step; item_bytes: of an element of the memory."""
        for byte in range(0, self.stride, LINE_BYTES):
            memory.prefetch((self.start + step * self.stride + byte) // item_bytes, level=2)


def product(
    k: KernelBuilder,
    weights: Streams,
    x: Memory,
    rows: Sequence[Scalar],
    num_units: Scalar | int,
    sums: Sequence[Scalar],
    ahead: Ahead | None = None,
) -> list[Scalar]:
    """sums + rows of `x` times streams of weights: f32 vectors, of each row one per stream.

    rows: where each row begins in `x`, in units. num_units: vectors of each stream that are read,
    and units of each row.
    """
    op, lanes = weights.operand, weights.lanes

    def step(i: Scalar, *sums: Scalar) -> list[Scalar]:
        at = i * weights.stride
        if weights.ahead:
            for start in weights.starts:
                weights.memory.prefetch(start + (at + weights.ahead))
        if ahead:
            ahead.prefetch(weights.memory, op.unit_bytes, i)
        loaded = [weights.memory.load_vector(start + at, lanes) for start in weights.starts]
        multiplicands = [_multiplicands(k, vector, op, lanes) for vector in loaded]
        totals = list(sums)
        for r, row in enumerate(rows):
            for j in range(len(multiplicands[0])):
                value = k.broadcast(x.load(row + (i * 2 + j if op.splits else i)), lanes)
                if op.other == "bf16":
                    value = k.bitcast(value, vector_type(2 * lanes, "bf16"))
                for t, weights_of in enumerate(multiplicands):
                    n = r * len(loaded) + t
                    totals[n] = _multiply_add(k, value, weights_of[j], totals[n], op, lanes)
        return totals

    return k.fold(0, num_units, sums, step)


def _multiplicands(k: KernelBuilder, loaded: Scalar, op: Operand, lanes: int) -> list[Scalar]:
    """What a vector of units is multiplied as: the first of a pair is in its lower half."""
    floats = vector_type(lanes, "f32")
    if op.splits:
        halves = k.bits("shli", loaded, 16), k.bits("andi", loaded, -65536)
        return [k.bitcast(half, floats) for half in halves]
    if op.unit == 2:
        return [k.bitcast(loaded, vector_type(2 * lanes, "bf16"))]
    return [loaded.to(floats)]


def _multiply_add(
    k: KernelBuilder, a: Scalar, b: Scalar, total: Scalar, op: Operand, lanes: int
) -> Scalar:
    if op.other == "bf16":
        name = f"x86.avx512bf16.dpbf16ps.{REGISTER_BITS[lanes]}"
        return k.intrinsic(name, [total, a, b], total.dtype)
    return k.fma(a, b, total)
