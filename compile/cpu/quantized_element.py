"""Single weights of a quantized matrix, as the embedding is looked up."""

from __future__ import annotations

from compile.cpu.kernel import KernelBuilder
from compile.cpu.quantized_blocks import UNIT, QuantizedBlocks
from compile.formats.blocks import GROUP, SUPER_GROUPS
from compile.mlir.executable import Memory, Views
from compile.mlir.values import Scalar


def element(
    k: KernelBuilder, blocks: QuantizedBlocks, weights: Views, start: Scalar, feature: Scalar,
    col: Scalar,
) -> Scalar:  # fmt: skip
    """One weight, as f32, of the block of a matrix that begins at byte `start`."""
    kind = blocks.kind
    first = start + col // kind.columns * blocks.stored_bytes
    at = first
    if kind.has_super_blocks:
        at = first + col % kind.columns // GROUP * blocks.group_bytes
    code = _code(k, blocks, weights["i8"], at, feature, col)
    part = 0 if kind.group == GROUP else col % GROUP // kind.group
    numbers = [_number(blocks, weights, first, at, feature, part)]
    if kind.has_minima:
        numbers.append(_number(blocks, weights, first, at, feature, None))
    value = (code.to_unsigned("i32") + -kind.zero).to("f32") * numbers[0].to("f32")
    if not kind.has_minima:
        return value
    minimum = numbers[1].to("f32")
    return value - minimum if kind.has_super_blocks else value + minimum


def _code(
    k: KernelBuilder, blocks: QuantizedBlocks, memory: Memory, at: Scalar, feature: Scalar,
    col: Scalar,
) -> Scalar:  # fmt: skip
    """The code of a column and feature, i8; at: the first byte of its group."""
    kind, unit, lanes, block = blocks.kind, UNIT, blocks.vectors.lanes, blocks.vectors.block
    h, low_at = kind.high_bits, at + col % GROUP // unit * blocks.unit_bytes
    if kind.bits == 8:
        return memory.load(low_at + feature * unit + col % unit)
    both = memory.load(low_at + feature % lanes * unit + col % unit)
    code = k.bits("andi", k.bits("shrui", both, (feature // lanes * 4).to("i8")), 15)
    if not h:
        return code
    column = col % GROUP // unit  # of those that a byte's bits are of, in all planes
    plane_at = at + column // blocks.plane_columns * (unit * block) + kind.low_bytes * block
    plane = memory.load(plane_at + feature * unit + col % unit)
    high = k.bits("shrui", plane, (column % blocks.plane_columns * h).to("i8"))
    return k.bits("ori", code, k.bits("shli", k.bits("andi", high, 2**h - 1), 4))


def _number(
    blocks: QuantizedBlocks, weights: Views, first: Scalar, at: Scalar, feature: Scalar,
    part: Scalar | int | None,
) -> Scalar:  # fmt: skip
    """A scale of the group at byte `at`, of which columns `part` says; None: the minimum.

    first: the first byte of the super-block. f16, or times d or dmin f32.
    """
    kind, block = blocks.kind, blocks.vectors.block
    which = kind.num_numbers - 1 if part is None else part
    numbers = at + blocks.code_bytes
    if not kind.has_super_blocks:
        return weights["f16"].load(_plus(numbers // 2 + feature, which, block))
    integer = weights["i8"].load(_plus(numbers + feature, which, block))
    number = integer.to("i32") if kind.has_signed_scales else integer.to_unsigned("i32")
    factors = (first + SUPER_GROUPS * blocks.group_bytes) // 2 + feature
    factor = weights["f16"].load(_plus(factors, part is None, block))
    return number.to("f32") * factor.to("f32")


def _plus(index: Scalar, count: Scalar | int, size: int) -> Scalar:
    """index + count * size."""
    if isinstance(count, int):
        return index + count * size if count else index
    return index + count * size
