"""Quantized weights: their types, rows of a matrix in one of them, and how these lie in memory.

A weight is scale * (code - zero), or where a type has minima scale * code + minimum. The weights of
a group, which are columns of a row side by side, share scale and minimum.

    type  GGUF's      code - zero  group  scale     minimum        bits a weight
    int8  Q8_0        8 bits - 128    32  f16                              8.5
    int4  Q4_0, Q4_1  4 bits          32  f16       f16                    5
    q5_0  Q5_0        5 bits - 16     32  f16                              5.5
    q5_1  Q5_1        5 bits          32  f16       f16                    6
    q4_k  Q4_K        4 bits          32  d * u8    -(dmin * u8)           4.625
    q5_k  Q5_K        5 bits          32  d * u8    -(dmin * u8)           5.625
    q6_k  Q6_K        6 bits - 32     16  d * i8                           6.5625

d and dmin are f16, one for each super-block of 256 columns of a row. All products with them are
exact in f32, so each weight is the f32 number that GGUF's own formula gives.

A matrix is stored in blocks of rows, each one stream of bytes. Of 32 columns of a block come, for
every row of it:

1. The codes, `unit` columns of all rows, then the next `unit` columns. A code of 8 bits is a byte.
   Else a byte holds the four lower bits of two codes: in its low half those of a row in the first
   half of the block, in its high half those of the row block / 2 further on.
2. The upper bits of codes of 5 and 6 bits, h = 1 or 2 each, in planes of `unit` bytes of all rows.
   Byte b of a row's `unit` has those of columns b, b + unit, b + 2 unit, ..., from its lowest bits
   on; 8 / h columns fill a plane. With unit 4 that is one plane for 5 bits and two for 6.
3. The scales of all rows, of Q6_K those of the first 16 columns and then those of the others; then
   the minima. They are f16, or bytes in super-blocks.

In super-blocks these parts come eight times, then d of all rows, then dmin.

The kernel (`compile.cpu.quantized_matmul`) loads lower bits once for two vectors of rows, masks and
shifts them apart, shifts a plane so that the upper bits stand above them, and has codes that are
unsigned bytes, whatever their type. Their products with activations are sums of integers, to which
scales, minima and zero are applied in f32, a group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # weights of a row that share a scale, and activations that do
ZERO = 128  # the 8-bit code of 0
SUPER_GROUPS = 8  # groups of 32 of a super-block

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """A type of quantized weights; see the module."""

    name: str
    bits: int  # of a code
    zero: int = 0  # the code that stands for 0, of types without minima
    has_minima: bool = False
    group: int = GROUP
    has_super_blocks: bool = False  # whose scales and minima are integers
    has_signed_scales: bool = False

    @property
    def columns(self) -> int:
        """Columns that are stored together: of a group of 32, or of a super-block."""
        return GROUP * SUPER_GROUPS if self.has_super_blocks else GROUP

    @property
    def high_bits(self) -> int:
        """Bits of a code that lie apart from the four lower ones."""
        return self.bits - 4 if self.bits < 8 else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of 32 columns of a row."""
        return GROUP * self.bits // 8

    @property
    def low_bytes(self) -> int:
        """Those of them that are not of upper bits."""
        return GROUP * (self.bits - self.high_bits) // 8

    @property
    def num_numbers(self) -> int:
        """Scales and minima of 32 columns of a row."""
        return GROUP // self.group * (2 if self.has_minima else 1)

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of a row, without d and dmin."""
        return self.code_bytes + self.num_numbers * (1 if self.has_super_blocks else 2)

    @property
    def stored_bytes(self) -> int:
        """Bytes of `columns` columns of a row."""
        if not self.has_super_blocks:
            return self.group_bytes
        return SUPER_GROUPS * self.group_bytes + (4 if self.has_minima else 2)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("int8", 8, zero=ZERO),
        BlockType("int4", 4, has_minima=True),
        BlockType("q5_0", 5, zero=16),
        BlockType("q5_1", 5, has_minima=True),
        BlockType("q4_k", 4, has_minima=True, has_super_blocks=True),
        BlockType("q5_k", 5, has_minima=True, has_super_blocks=True),
        BlockType("q6_k", 6, zero=32, group=16, has_super_blocks=True, has_signed_scales=True),
    )
}


@dataclass(frozen=True)
class Groups:
    """Quantized rows of a type.

    codes: [rows, K] u8. numbers: scales and, if the type has them, minima [rows, K / group]: f16,
    or in super-blocks u8 or i8. factors: of super-blocks, what scales are multiplied by and what
    minima are, [rows, K / 256] f16.
    """

    kind: BlockType
    codes: NDArray[np.uint8]
    numbers: Sequence[NDArray[Any]]
    factors: Sequence[NDArray[np.float16]] = ()

    @classmethod
    def zeros(cls, kind: BlockType, rows: int, cols: int) -> Groups:
        """Weights that are all 0; cols: a multiple of the type's `columns`."""
        integer = np.int8 if kind.has_signed_scales else np.uint8
        dtype = integer if kind.has_super_blocks else np.float16
        count = 2 if kind.has_minima else 1
        factors = count if kind.has_super_blocks else 0
        return cls(
            kind,
            np.full((rows, cols), kind.zero, np.uint8),
            [np.zeros((rows, cols // kind.group), dtype) for _ in range(count)],
            [np.zeros((rows, cols // kind.columns), np.float16) for _ in range(factors)],
        )

    def put(self, rows: slice, other: Groups) -> None:
        """Replace the first columns of these rows by all of another of the same type."""
        ours, theirs = ((g.codes, *g.numbers, *g.factors) for g in (self, other))
        for kept, found in zip(ours, theirs, strict=True):
            kept[rows, : found.shape[1]] = found

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """Of which groups or super-blocks scale and minimum are numbers: [rows, K / columns]."""
        floats = self.factors or self.numbers
        is_finite: NDArray[np.bool_] = np.isfinite(np.stack(floats)).all(axis=0)
        return is_finite

    def dequantized(self) -> Floats:
        """The weights [rows, K] f32."""
        codes = self.codes.reshape(len(self.codes), -1, self.kind.group).astype(np.float32)
        scales, *minima = (self._in_f32(i) for i in range(len(self.numbers)))
        values = (codes - self.kind.zero) * scales
        if minima:
            values = values - minima[0] if self.factors else values + minima[0]
        return values.reshape(self.codes.shape)

    def _in_f32(self, which: int) -> Floats:
        """Scales or minima [rows, K / group, 1], times d or dmin."""
        numbers = self.numbers[which].astype(np.float32)
        if self.factors:
            factors = self.factors[which].astype(np.float32)
            numbers *= factors.repeat(numbers.shape[1] // factors.shape[1], axis=1)
        return numbers[..., None]


def packed(groups: Groups, block: int, unit: int) -> NDArray[np.uint8]:
    """Rows in blocks of `block`, as they lie in memory: [rows / block, K / columns, bytes] u8."""
    kind, (rows, cols) = groups.kind, groups.codes.shape
    num_blocks, num_groups = rows // block, cols // GROUP
    codes = groups.codes.reshape(num_blocks, block, num_groups, GROUP // unit, unit)
    codes = codes.transpose(0, 2, 3, 1, 4)  # [blocks, groups, 32 / unit, block, unit]
    parts: list[NDArray[Any]] = [codes]
    if kind.bits < 8:
        first, second = codes[..., : block // 2, :], codes[..., block // 2 :, :]
        parts = [first & 15 | second << 4]
    if h := kind.high_bits:
        high = (codes >> 4).reshape(num_blocks, num_groups, -1, 8 // h, block, unit)
        shifts = np.arange(0, 8, h).astype(np.uint8)[:, None, None]
        parts.append(np.bitwise_or.reduce(high << shifts, axis=3))
    flat = [part.reshape(num_blocks, num_groups, -1) for part in parts]
    flat += [_turned(numbers, block, num_groups) for numbers in groups.numbers]
    whole = np.concatenate(flat, axis=-1).reshape(num_blocks, cols // kind.columns, -1)
    factors = [_turned(values, block, whole.shape[1]) for values in groups.factors]
    return np.concatenate([whole, *factors], axis=-1)


def _turned(numbers: NDArray[Any], block: int, count: int) -> NDArray[np.uint8]:
    """Numbers [rows, n] as bytes of all rows of a block: [rows / block, count, bytes]."""
    by_block = numbers.reshape(len(numbers) // block, block, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(by_block).view(np.uint8).reshape(len(by_block), count, -1)
