"""Products with matrices of quantized weights, in integers.

Within a group the products are sums of integers; then the scales of the weights and of the
activations are multiplied in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.cpu.activations import Activations
from compile.cpu.kernel import KernelBuilder
from compile.cpu.operands import REGISTER_BITS, Ahead
from compile.cpu.quantized_blocks import QuantizedBlocks
from compile.formats.blocks import GROUP, SUPER_GROUPS, ZERO
from compile.mlir.executable import Views
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from compile.target import VECTORS_PER_BLOCK

# Dot products of two i16, by f32 lanes
PAIRS = {4: "x86.sse2.pmadd.wd", 8: "x86.avx2.pmadd.wd", 16: "x86.avx512.pmaddw.d.512"}


@dataclass(frozen=True)
class QuantizedProduct:
    """Rows of activations x [M, K], which are integers, times blocks of a matrix."""

    k: KernelBuilder
    blocks: QuantizedBlocks
    weights: Views
    x: Activations
    rows: Sequence[Scalar]
    ahead: Ahead | None = None

    @property
    def _lanes(self) -> int:
        return self.blocks.vectors.lanes

    def add(self, start: Scalar, cols: int, sums: Sequence[Scalar]) -> list[Scalar]:
        """sums + the product with the block at byte `start`: two f32 vectors a row."""
        k, blocks = self.k, self.blocks
        num_stored = -(-cols // blocks.columns)

        def group(g: Scalar, *sums: Scalar) -> list[Scalar]:
            return self._add_group(start + g * blocks.group_bytes, g, [], sums)

        def super_block(i: Scalar, *sums: Scalar) -> list[Scalar]:
            first = start + i * blocks.stored_bytes
            factors = blocks.factors(k, self.weights, first)

            def group(g: Scalar, *sums: Scalar) -> list[Scalar]:
                at = first + g * blocks.group_bytes
                return self._add_group(at, i * SUPER_GROUPS + g, factors, sums)

            return k.fold(0, SUPER_GROUPS, sums, group)

        body = super_block if blocks.kind.has_super_blocks else group
        return k.fold(0, num_stored, sums, body)

    def _add_group(
        self, at: Scalar, group: Scalar, factors: Sequence[Scalar], sums: Sequence[Scalar]
    ) -> list[Scalar]:
        """sums + the products of a group of 32 columns that begins at byte `at`."""
        k, blocks, x, lanes = self.k, self.blocks, self.x, self._lanes
        parts = GROUP // blocks.kind.group
        if len(self.rows) == 1:
            blocks.prefetch(self.weights, at)
        if self.ahead:
            self.ahead.prefetch(self.weights["i8"], 1, group)
        dots = [self._dots(at, group, part) for part in range(parts)]
        scales = blocks.numbers(k, self.weights, at, factors)
        minima = scales[parts * VECTORS_PER_BLOCK :]
        result = []
        for r, row in enumerate(self.rows):
            scale = x.scale(row, group)
            wide = k.broadcast(scale, lanes)
            total = k.broadcast(x.total(row, group), lanes)
            for t in range(VECTORS_PER_BLOCK):
                i = r * VECTORS_PER_BLOCK + t
                value = sums[i]
                for part in range(parts):
                    value = k.fma(dots[part][i], scales[part * VECTORS_PER_BLOCK + t] * wide, value)
                if minima:
                    value = k.fma(minima[t], total, value)
                result.append(value)
        return result

    def _dots(self, at: Scalar, group: Scalar, half: int) -> list[Scalar]:
        """Weights of a group without their scales times activations: two f32 vectors a row.

        half: of the 32 columns, if a group has only 16.
        """
        k, x = self.k, self.x
        kind, whole = vector_type(self._lanes, "f32"), vector_type(self._lanes, "i32")
        is_paired, num_parts = x.integers.is_paired, x.integers.parts
        multiply = self._dots_of_pairs if is_paired else self._dots_of_quads
        start = [k.scalar(0, whole)] * len(self.rows)
        if self.blocks.kind.zero:  # codes are unsigned: this one stands for 0
            start = [k.broadcast(self._offset(row, group, half), self._lanes) for row in self.rows]
        *high, low = (
            multiply(
                at, [x.codes_at(row, group, part) for row in self.rows], half,
                start if part == num_parts - 1 else [k.scalar(0, whole)] * len(self.rows),
            )
            for part in range(num_parts)
        )  # fmt: skip
        dots = [k.bits("shli", a, 7) + b for a, b in zip(*high, low, strict=True)] if high else low
        return [dot.to(kind) for dot in dots]

    def _offset(self, row: Scalar, group: Scalar, half: int) -> Scalar:
        """What a group's activations times -zero are, i32."""
        kind, x = self.blocks.kind, self.x
        is_whole = kind.group == GROUP
        offset = x.offset(row, group) if is_whole else x.half_offset(row, group, half)
        shift = (ZERO // kind.zero).bit_length() - 1  # it is that of ZERO, a larger power of 2
        return self.k.bits("shrsi", offset, shift) if shift else offset

    def _dots_of_quads(
        self, at: Scalar, rows: Sequence[Scalar], half: int, sums: Sequence[Scalar]
    ) -> list[Scalar]:
        """Codes times activations, added to each row's `sums`, with the CPU's dot products of four
        bytes: two i32 vectors for each row."""
        k, lanes = self.k, self._lanes
        whole, quads = vector_type(lanes, "i32"), vector_type(4 * lanes, "i8")
        name = f"x86.avx512.vpdpbusd.{REGISTER_BITS[lanes]}"
        dots = [total for total in sums for _ in range(VECTORS_PER_BLOCK)]
        count = self.blocks.kind.group // 4
        for i in range(half * count, (half + 1) * count):
            codes = self.blocks.quads(k, self.weights["i32"], at, i)
            codes = [k.bitcast(code, quads) for code in codes]
            for r, row in enumerate(rows):
                word = self.x.codes["i32"].load(row // 4 + i)
                value = k.bitcast(k.broadcast(word, lanes), quads)
                for t in range(VECTORS_PER_BLOCK):
                    d = r * VECTORS_PER_BLOCK + t
                    dots[d] = k.intrinsic(name, [dots[d], codes[t], value], whole)
        return dots

    def _dots_of_pairs(
        self, at: Scalar, rows: Sequence[Scalar], half: int, sums: Sequence[Scalar]
    ) -> list[Scalar]:
        """The same for activations of 16 bits, with dot products of two i16."""
        k, lanes = self.k, self._lanes
        whole, pairs = vector_type(lanes, "i32"), vector_type(2 * lanes, "i16")
        low = k.scalar(255, pairs)
        dots = [total for total in sums for _ in range(VECTORS_PER_BLOCK)]
        count = self.blocks.kind.group // 4
        for i in range(half * count, (half + 1) * count):
            quads = self.blocks.quads(k, self.weights["i32"], at, i)
            codes = [k.bitcast(quad, pairs) for quad in quads]
            for odd in range(2):  # columns 0 and 2, then 1 and 3
                wide = [k.bits("shrui", c, 8) if odd else k.bits("andi", c, low) for c in codes]
                for r, row in enumerate(rows):
                    word = self.x.codes["i32"].load(row // 4 + (2 * i + odd))
                    value = k.bitcast(k.broadcast(word, lanes), pairs)
                    for t in range(VECTORS_PER_BLOCK):
                        d = r * VECTORS_PER_BLOCK + t
                        dots[d] = dots[d] + k.intrinsic(PAIRS[lanes], [wide[t], value], whole)
        return dots
