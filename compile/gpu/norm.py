"""RMS norm inside of kernels on GPUs: what a row is multiplied with before its weight.

A row is multiplied with this before it is rounded to 16 bits: before, its numbers may be larger
than f16 has (models have features of thousands), or so small that they lose bits.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from compile.gpu.kernel import THREADS, ThreadBuilder
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

PIECE = 4  # numbers of f32 that are loaded at once


def squares_of(
    k: ThreadBuilder, x: Memory, start: Scalar, depth: int, lane: Scalar, lanes: int
) -> Scalar:  # fmt: skip
    """A lane's share, one of `lanes`, of the squares of `depth` numbers f32 from `start` on; depth:
    a multiple of PIECE."""
    total = k.scalar(0.0, f"vector<{PIECE}xf32>")
    for first in range(0, depth, lanes * PIECE):
        column = lane * PIECE + first
        value = x.load_vector(start + column.minimum(depth - PIECE), PIECE)
        if first + lanes * PIECE > depth:
            inside = column.less(k.scalar(depth, "index"))
            value = inside.select(value, k.scalar(0.0, value.dtype))
        total = k.fma(value, value, total)
    return k.sum(total)


def scale_of(squares: Scalar, depth: int, epsilon: float) -> Scalar:
    """What the norm multiplies a row with, whose sum of squares this is."""
    return (squares * (1 / depth) + epsilon).math("rsqrt")


def scale_of_row(k: ThreadBuilder, x: Memory, depth: int, epsilon: float) -> Scalar:
    """The same of a row x [depth] f32, by all of a workgroup's threads; with a barrier."""
    waves, zero = THREADS // k.subgroup, k.scalar(0, "index")
    total = k.reduce("add", squares_of(k, x, zero, depth, k.thread(), THREADS))
    parts = k.shared(waves, "f32")
    with k.when((k.thread() % k.subgroup).equals(0)):
        parts.store(total, k.thread() // k.subgroup)
    k.barrier()
    return scale_of(reduce(add, [parts.load(i) for i in range(waves)]), depth, epsilon)
