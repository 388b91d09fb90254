"""Quantized weights as numbers, in registers: 32 columns of a row at a time.

A code c below 1,024 becomes the f16 number 1024 + c by setting bits above it, so two codes that
stand in the halves of a word are two numbers after a shift, a mask and an or. What is then
subtracted, 1024 and the code of zero, leaves them exact. Times the scale, plus the minimum, they
are rounded once in f16, and in f32 not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.formats.blocks import GROUP, SUPER_GROUPS, BlockType
from compile.gpu.quantized import ROWS, column_bytes, group_bytes, group_offset
from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar
from compile.mlir.vectors import lanes_of, vector_type

CHUNK = 8  # columns that are unpacked at once
BIAS = 0x6400  # the bits of 1024 in f16
LOW_BITS = 4  # of a code, whose others lie apart


@dataclass(frozen=True)
class Packed:
    """32 columns of a row as they lie in memory; of types without upper bits or super-blocks, these
    are empty."""

    codes: Sequence[Scalar]  # vectors of four words
    upper: Sequence[Scalar]  # a vector of one word or two
    numbers: Scalar  # scales and minima: a word of f16 numbers, or of bytes
    factors: Scalar | None  # d, and dmin where there are minima: a word of f16 numbers


class QuantizedMatrix:
    """A matrix [N, K] of a type in a kernel's next binding, as `compile.gpu.quantized` tells.

    columns: K. Rows and columns of the matrix, and numbers of groups of 32 columns, are indices.
    """

    def __init__(self, k: ExecutableBuilder, kind: BlockType, columns: int) -> None:
        self.k, self.kind = k, kind
        whole = -(-columns // kind.columns)
        self.num_groups = whole * kind.columns // GROUP
        self._block_bytes = whole * column_bytes(kind)
        self._words = k.view(k.binding(read_only=True), "i32")
        self._bias = k.in_register(BIAS | BIAS << 16)

    def load(self, row: Scalar, group: Scalar) -> Packed:
        """32 columns of a row."""
        kind, in_block, start = self.kind, row % ROWS, row // ROWS * self._block_bytes
        at = start + group_offset(kind, group)
        codes = [
            self._vector(at + (in_block * 16 + piece * ROWS * 16), 4)
            for piece in range(kind.low_bytes // 16)
        ]
        at_upper, size = at + ROWS * kind.low_bytes, kind.code_bytes - kind.low_bytes
        upper = [self._vector(at_upper + in_block * size, size // 4)] if size else []
        at_numbers, size = at + ROWS * kind.code_bytes, kind.group_bytes - kind.code_bytes
        numbers = self._word(at_numbers, in_block, size)
        if not kind.has_super_blocks:
            return Packed(codes, upper, numbers, None)
        at_factors = start + group // SUPER_GROUPS * column_bytes(kind)
        at_factors += SUPER_GROUPS * group_bytes(kind)
        size = 4 if kind.has_minima else 2
        return Packed(codes, upper, numbers, self._word(at_factors, in_block, size))

    def _vector(self, at: Scalar, lanes: int) -> Scalar:
        return self._words.load_vector(at // 4, lanes)

    def _word(self, at: Scalar, row: Scalar, size: int) -> Scalar:
        """Two or four bytes of a row in the block, in the lower bits of a word.

        Loads of 16 bits may write one half of a register while a load of the other is under way, as
        code for gfx11 did; whole words are loaded instead.
        """
        if size == 4:
            return self._words.load(at // 4 + row)
        assert size == 2
        shift = (row % 2 * 16).to("i32")
        return self.k.bits("shrui", self._words.load(at // 4 + row // 2), shift)

    def unpack(self, packed: Packed, dtype: str = "f16") -> list[Scalar]:
        """The weights: four vectors of 8 numbers, in f16 or f32."""
        k, weights = self.k, []
        scales, minimum = self.numbers(packed, dtype)
        for i, code in enumerate(self.codes(packed)):
            codes = k.convert(code, dtype)
            scale = k.broadcast(scales[i * len(scales) * CHUNK // GROUP], CHUNK)
            if minimum:
                weights.append(k.fma(codes, scale, k.broadcast(minimum, CHUNK)))
            else:
                weights.append(codes * scale)
        return weights

    def codes(self, packed: Packed) -> list[Scalar]:
        """The codes minus that of zero: four vectors of 8 f16 numbers."""
        k, kind8 = self.k, f"vector<{CHUNK}xf16>"
        zero = k.scalar(1024 + self.kind.zero, kind8)
        return [
            k.bitcast(self._biased_codes(packed, i), kind8) - zero for i in range(GROUP // CHUNK)
        ]

    def numbers(self, packed: Packed, dtype: str = "f32") -> tuple[list[Scalar], Scalar | None]:
        """The scale, or those of both halves, and the minimum if there is one, in f16 or f32."""
        kind = self.kind
        item = "i8" if kind.has_super_blocks else "f16"
        numbers = [self._element(packed.numbers, item, i) for i in range(kind.num_numbers)]
        if packed.factors:
            for i, number in enumerate(numbers):
                is_minimum = kind.has_minima and i == 1
                factor = self._element(packed.factors, "f16", int(is_minimum)).to("f32")
                wide = number.to("i32") if kind.has_signed_scales else number.to_unsigned("i32")
                product = factor * wide.to("f32")
                numbers[i] = product * -1.0 if is_minimum else product
        numbers = [number.to(dtype) for number in numbers]
        return (numbers[:1], numbers[1]) if kind.has_minima else (numbers, None)

    def _element(self, word: Scalar, dtype: str, i: int) -> Scalar:
        """Number i of a word of bytes or f16 numbers."""
        kind = vector_type(2 if dtype == "f16" else 4, dtype)
        return self.k.element(self.k.bitcast(self.k.broadcast(word, 1), kind), i)

    def _biased_codes(self, packed: Packed, i: int) -> Scalar:
        """Four words, with two codes each in their halves, under the bits of 1024."""
        kind = self.kind
        low_bits = kind.bits - kind.high_bits
        low = self._pairs(packed.codes, low_bits, i)
        if kind.high_bits:
            upper = self._pairs(packed.upper, kind.high_bits, i)
            low = self.k.bits("ori", low, self.k.bits("shli", upper, LOW_BITS))
        return self.k.bits("ori", low, self.k.broadcast(self._bias, CHUNK // 2))

    def _pairs(self, vectors: Sequence[Scalar], bits: int, i: int) -> Scalar:
        """Codes of some bits, of the columns 8 * i to 8 * i + 7."""
        k, in_word = self.k, 16 // bits  # pairs in a word
        first = i * CHUNK // 2  # pair
        words = [(first + pair) // in_word for pair in range(CHUNK // 2)]
        lanes = lanes_of(vectors[0])
        vector = vectors[words[0] // lanes]
        word = k.shuffle(vector, vector, [index % lanes for index in words])
        shifts = [bits * ((first + pair) % in_word) for pair in range(CHUNK // 2)]
        amounts = k.op(f"arith.constant dense<{shifts}> : {word.dtype}", word.dtype)
        return k.bits("andi", k.bits("shrui", word, amounts), ((1 << bits) - 1) * 0x10001)
