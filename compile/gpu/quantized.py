"""Quantized matrices as GPUs read them: where each byte lies.

`packed` makes the bytes of types of `compile.formats.blocks`, for [N, K] matrices whose rows are
padded to a multiple of ROWS with weights of 0, and columns to a multiple of the type's `columns`:
[N / 16, K / columns, bytes] u8. A block of 16 rows is one stream; 32 columns of it are, for every
row of the 16, one row after the other,

1. the codes, or of codes of 5 and 6 bits the four lower bits: 16 bytes a row. Of 8-bit codes come
   those of the first 16 columns of all rows, then those of the others;
2. the upper bits of 5-bit codes, 4 bytes a row, or of 6-bit ones, 8 bytes a row;
3. the scale, and where there are minima the minimum, side by side: f16, or one byte each in
   super-blocks. q6_k has the scale of the first 16 columns and that of the others instead.

In super-blocks these parts come eight times, then d of each row, and where there are minima dmin
beside it, f16. All parts begin at multiples of 16 bytes.

Codes of n bits (1, 2, 4 or 8) are stored in words of 32 bits, little-endian, 32 / n columns each:
column 2j in the bits from n * j on of the word's lower half, column 2j + 1 in those of its upper
half. So `word >> n * j & mask` has two neighbours in two halves, where instructions on pairs of
f16 want them, whatever n is.

A lane reads the 16 bytes of a row at once, its neighbour those of the next row: 16 lanes read 256
bytes in a row, and 32 or 64 lanes do so of two or four groups of columns. Lanes l, l + 16, ... hold
the same row, as those of a 16x16x16 matrix instruction do.

Rows of ffn_gate_up are eight gates, then the eight ups that they are multiplied with, and so on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import GROUP, SUPER_GROUPS, BlockType, Groups

ROWS = 16  # of a block
WORD = 32  # bits

Bytes = NDArray[np.uint8]


def packed(groups: Groups) -> Bytes:
    """Rows as they lie in memory: [rows / 16, K / columns, bytes] u8."""
    kind, (rows, cols) = groups.kind, groups.codes.shape
    shape = (rows // ROWS, ROWS, cols // GROUP, GROUP)
    codes = groups.codes.reshape(shape).transpose(0, 2, 1, 3)  # [blocks, groups, 16, 32]
    low_bits = kind.bits - kind.high_bits
    words = _words((codes & ((1 << low_bits) - 1)).astype(np.uint8), low_bits)
    # 16 bytes of every row, then, of 8-bit codes, the other 16
    parts = [words.reshape(*words.shape[:3], -1, 16).swapaxes(2, 3)]
    if kind.high_bits:
        parts.append(_words((codes >> low_bits).astype(np.uint8), kind.high_bits))
    parts.append(_by_row(groups.numbers, cols // GROUP))
    flat = [np.ascontiguousarray(part).reshape(*shape[::2], -1) for part in parts]
    whole = np.concatenate(flat, axis=-1).reshape(shape[0], cols // kind.columns, -1)
    if not groups.factors:
        return whole
    factors = _by_row(groups.factors, whole.shape[1]).reshape(*whole.shape[:2], -1)
    return np.concatenate([whole, factors], axis=-1)


def _words(codes: Bytes, bits: int) -> Bytes:
    """Codes [..., 32] of some bits as the bytes of words [..., 4 * bits]."""
    pairs = codes.reshape(*codes.shape[:-1], -1, WORD // 2 // bits, 2).astype(np.uint32)
    shifts = np.arange(0, WORD // 2, bits, dtype=np.uint32)[:, None]
    shifts = shifts + np.array([0, WORD // 2], np.uint32)
    words = np.bitwise_or.reduce(pairs << shifts, axis=(-2, -1)).astype("<u4")
    return np.ascontiguousarray(words).view(np.uint8)


def _by_row(numbers: Any, count: int) -> Bytes:
    """Arrays [rows, n] as bytes, the numbers of a row side by side: [blocks, count, 16, bytes]."""
    each = np.stack([x.reshape(-1, ROWS, count, x.shape[1] // count) for x in numbers], axis=-1)
    by_row = np.ascontiguousarray(each.transpose(0, 2, 1, 3, 4))
    return by_row.reshape(*by_row.shape[:3], -1).view(np.uint8)


def group_bytes(kind: BlockType) -> int:
    """Bytes of 32 columns of a block, without d and dmin."""
    return ROWS * kind.group_bytes


def column_bytes(kind: BlockType) -> int:
    """Bytes of `columns` columns of a block."""
    return ROWS * kind.stored_bytes


def group_offset(kind: BlockType, group: Any) -> Any:
    """Where 32 columns of a block begin in its stream, by their number, an integer or index."""
    if not kind.has_super_blocks:
        return group * group_bytes(kind)
    return group // SUPER_GROUPS * column_bytes(kind) + group % SUPER_GROUPS * group_bytes(kind)
