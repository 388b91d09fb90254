"""Quantized matrices as GPUs read them: where each byte lies, and how codes become numbers.

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

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import GROUP, SUPER_GROUPS, BlockType, Groups
from compile.mlir.executable import ExecutableBuilder, Views
from compile.mlir.values import Scalar

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


class QuantizedMatrix:
    """A matrix in a binding of a kernel, as it lies in memory. Rows and columns are indices."""

    def __init__(self, k: ExecutableBuilder, kind: BlockType, columns: int) -> None:
        self._k, self.kind = k, kind
        self.num_groups = -(-columns // kind.columns) * kind.columns // GROUP
        self._block_bytes = self.num_groups // (kind.columns // GROUP) * column_bytes(kind)
        self._memory = Views(k, k.binding(read_only=True)).open("i32", "f16", "i8")

    def weight(self, row: Scalar, column: Scalar) -> Scalar:
        """One weight, an f32 number."""
        kind, k = self.kind, self._k
        group, r, c = self._group(row, column // GROUP), row % ROWS, column % GROUP
        if kind.bits == 8:
            code = self._code(group + c // 16 * (16 * ROWS) + r * 16, 8, c % 16)
        else:
            code = self._code(group + r * 16, 4, c)
        if h := kind.high_bits:
            high = self._code(group + kind.low_bytes * ROWS + r * (4 * h), h, c)
            code = code + high * 16
        part = c // kind.group if kind.group < GROUP else k.scalar(0, "index")
        [scale, *minimum] = self._numbers(row, column // GROUP, part)
        value = (code - kind.zero).to("f32") * scale
        return value + minimum[0] if minimum else value

    def load(self, row: Scalar, group: Scalar) -> tuple[list[Scalar], list[Scalar]]:
        """What a lane reads of 32 columns of a row: words of codes, then scales, then minima.

        The words are vectors of i32: the lower bits, and the upper ones of codes that have some.
        """
        kind, at, r = self.kind, self._group(row, group), row % ROWS
        words = [
            self._memory["i32"].load_vector((at + r * 16) // 4 + part * 4 * ROWS, 4)
            for part in range(kind.low_bytes // 16)
        ]
        if h := kind.high_bits:
            words.append(self._memory["i32"].load_vector(at // 4 + r * h + kind.low_bytes * 4, h))
        zero, one = (self._k.scalar(i, "index") for i in (0, 1))
        numbers = self._numbers(row, group, zero)
        if kind.group < GROUP:
            numbers += self._numbers(row, group, one)
        return words, numbers

    def unpack(self, words: Sequence[Scalar]) -> list[Scalar]:
        """Codes minus zero of the words of `load`, as pairs of f16 in the order of columns.

        1024 + code, where the code is the lower bits of the f16 number, and then minus 1024.
        """
        k, kind = self._k, self.kind
        num_low = len(words) - (1 if kind.high_bits else 0)
        low, bits = words[:num_low], 8 if kind.bits == 8 else 4
        pairs: list[Scalar] = []
        for word in (k.element(vector, i) for vector in low for i in range(4)):
            for j in range(16 // bits):
                code = k.bits(
                    "andi", k.bits("shrui", word, bits * j), (1 << bits) - 1 << 16 | (1 << bits) - 1
                )
                if kind.high_bits:
                    code = k.bits("ori", code, self._high(words[-1], len(pairs)))
                code = k.bits("ori", code, 0x64006400)
                pair = k.bitcast(k.broadcast(code, 1), "vector<2xf16>")
                pairs.append(pair - (1024.0 + kind.zero))
        return pairs

    def _high(self, words: Scalar, pair: int) -> Scalar:
        """The upper bits of a pair of codes, where they belong."""
        h, k = self.kind.high_bits, self._k
        word, place = divmod(pair, 16 // h)
        found, shift = k.element(words, word), h * place - 4
        moved = k.bits("shrui", found, shift) if shift > 0 else found
        moved = k.bits("shli", found, -shift) if shift < 0 else moved
        return k.bits("andi", moved, ((1 << h) - 1) * 0x00100010)

    def _group(self, row: Scalar, group: Scalar) -> Scalar:
        """Where 32 columns of a block begin, in bytes."""
        offset: Scalar = group_offset(self.kind, group)
        return row // ROWS * self._block_bytes + offset

    def _code(self, at: Scalar, bits: int, column: Scalar) -> Scalar:
        """A code, i32, of words from byte `at` on."""
        per_word = WORD // bits
        word = self._memory["i32"].load((at + column // per_word * 4) // 4)
        place = column % per_word
        shift = place // 2 * bits + place % 2 * 16
        return self._k.bits("andi", self._k.bits("shrui", word, shift.to("i32")), (1 << bits) - 1)

    def _numbers(self, row: Scalar, group: Scalar, part: Scalar) -> list[Scalar]:
        """The scale, f32, and where there are minima the minimum of a group of columns.

        part: which of the scales of 32 columns.
        """
        kind, k = self.kind, self._k
        r, at = row % ROWS, self._group(row, group) + kind.code_bytes * ROWS
        if not kind.has_super_blocks:
            first = at // 2 + r * kind.num_numbers
            return [self._memory["f16"].load(first + i).to("f32") for i in range(kind.num_numbers)]
        factors = group // SUPER_GROUPS * column_bytes(kind) + SUPER_GROUPS * group_bytes(kind)
        factors = (factors + row // ROWS * self._block_bytes) // 2
        first = at + r * 2
        if not kind.has_minima:
            scale = self._memory["i8"].load(first + part).to("i32").to("f32")
            return [scale * self._memory["f16"].load(factors + r).to("f32")]
        numbers = [
            self._memory["i8"].load(first + i).to_unsigned("i32").to("f32")
            * self._memory["f16"].load(factors + r * 2 + i).to("f32")
            for i in range(2)
        ]
        return [numbers[0], k.scalar(0.0, "f32") - numbers[1]]
