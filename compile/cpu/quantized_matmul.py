"""Products with matrices of 8-bit and 4-bit weights, in integers.

A block of 2 * lanes output features is stored in groups of 32 columns, as
`compile.formats.quantize.packed` writes them: codes, then the features' scales in f16, then with 4
bits their minima in f16. Within a group the products are sums of integers; then the scales of the
weights and of the activations are multiplied in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.cpu.activations import Activations
from compile.cpu.kernel import KernelBuilder, Memory, Views
from compile.cpu.operands import REGISTER_BITS
from compile.cpu.vector_builder import vector_type
from compile.formats.quantize import GROUP, ZERO
from compile.mlir.values import Scalar
from compile.target import VECTORS_PER_BLOCK, Vectors


@dataclass(frozen=True)
class QuantizedBlocks:
    """The blocks of a matrix of dtype "int8" or "int4"."""

    dtype: str
    vectors: Vectors

    @property
    def unit(self) -> int:
        """Columns that lie side by side: four where the CPU has dot products of bytes."""
        return 4 if self.vectors.has_int8_dot else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of a block: codes, scales and minima."""
        block = self.vectors.block
        return GROUP * block + 2 * block if self.dtype == "int8" else GROUP * block // 2 + 4 * block

    @property
    def _scale_bytes(self) -> int:
        """Of scales, and of minima with 4 bits."""
        return (2 if self.dtype == "int8" else 4) * self.vectors.block

    @property
    def _unit_bytes(self) -> int:
        """Of the codes of `unit` columns."""
        size = self.unit * self.vectors.block
        return size if self.dtype == "int8" else size // 2

    def product(
        self, k: KernelBuilder, weights: Views, start: Scalar, num_groups: int, x: Activations,
        rows: Sequence[Scalar], sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """sums + rows of x [M, K] times the block at byte `start`: two f32 vectors a row."""
        lanes = self.vectors.lanes
        kind = vector_type(lanes, "f32")

        def group(g: Scalar, *sums: Scalar) -> list[Scalar]:
            at = start + g * self.group_bytes
            if len(rows) == 1:
                for line in range(0, self.group_bytes, 64):
                    weights["i8"].prefetch(at + (self.vectors.tuning.ahead + line))
            dots = self._dots(k, weights, at, x, rows, g)
            numbers = (at + (self.group_bytes - self._scale_bytes)) // 2
            half = [numbers + t * lanes for t in range(self._scale_bytes // 2 // lanes)]
            scales = [weights["f16"].load_vector(a, lanes).to(kind) for a in half]
            result = []
            for r, row in enumerate(rows):
                scale = x.scale(row, g)
                wide = k.broadcast(scale, lanes)
                total = k.broadcast(x.total(row, g), lanes)
                for t in range(VECTORS_PER_BLOCK):
                    i = r * VECTORS_PER_BLOCK + t
                    value = k.fma(dots[i], scales[t] * wide, sums[i])
                    if self.dtype == "int4":
                        value = k.fma(scales[VECTORS_PER_BLOCK + t], total, value)
                    result.append(value)
            return result

        return k.fold(0, num_groups, sums, group)

    def expand(
        self, k: KernelBuilder, weights: Views, start: Scalar, groups: tuple[Scalar, Scalar],
        memory: Memory, to: Scalar,
    ) -> None:  # fmt: skip
        """Write columns of the block at byte `start` as pairs of bf16: i32 [columns / 2, block].

        groups: the first one, and the one after the last. to: where they go in `memory`, of i32.
        """
        lanes, (first, last) = self.vectors.lanes, groups
        kind = vector_type(lanes, "f32")
        with k.loop(first, last) as g:
            at = start + g * self.group_bytes
            numbers = (at + (self.group_bytes - self._scale_bytes)) // 2
            half = [numbers + t * lanes for t in range(self._scale_bytes // 2 // lanes)]
            loaded = [weights["f16"].load_vector(a, lanes).to(kind) for a in half]
            scales = loaded[:VECTORS_PER_BLOCK]
            minima = loaded[VECTORS_PER_BLOCK:] or [scale * float(-ZERO) for scale in scales]
            line = to + (g - first) * (GROUP // 2 * self.vectors.block)
            for i in range(GROUP // 4):
                quads = self._quads(k, weights["i32"], at // 4 + i * self._unit_bytes // 4)
                for t, (quad, scale, least) in enumerate(zip(quads, scales, minima, strict=True)):
                    floats = [
                        k.fma(
                            k.bits("andi", k.bits("shrui", quad, 8 * j), 255).to(kind), scale, least
                        )
                        for j in range(4)
                    ]
                    for pair in (0, 1):
                        both = k.pairs(floats[2 * pair], floats[2 * pair + 1])
                        at_pair = line + (2 * i + pair) * self.vectors.block + t * lanes
                        memory.store_vector(both, at_pair)

    def _dots(
        self, k: KernelBuilder, weights: Views, at: Scalar, x: Activations, rows: Sequence[Scalar],
        group: Scalar,
    ) -> list[Scalar]:  # fmt: skip
        """Weights of a group without their scales times activations: two f32 vectors a row."""
        lanes = self.vectors.lanes
        kind, whole = vector_type(lanes, "f32"), vector_type(lanes, "i32")
        multiply = self._dots_of_quads if self.unit == 4 else self._dots_of_bytes
        start = [k.scalar(0, whole)] * len(rows)
        if self.dtype == "int8":  # codes are unsigned: ZERO stands for 0
            start = [k.broadcast(x.offset(row, group), lanes) for row in rows]
        *high, low = (
            multiply(
                k, weights, at, x, [x.codes_at(row, group, part) for row in rows],
                start if part == x.parts - 1 else [k.scalar(0, whole)] * len(rows),
            )
            for part in range(x.parts)
        )  # fmt: skip
        dots = [k.bits("shli", a, 7) + b for a, b in zip(*high, low, strict=True)] if high else low
        return [dot.to(kind) for dot in dots]

    def _dots_of_quads(
        self, k: KernelBuilder, weights: Views, at: Scalar, x: Activations, rows: Sequence[Scalar],
        sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """Codes times activations, added to each row's `sums`, with the CPU's dot products of four
        bytes: two i32 vectors for each row."""
        lanes = self.vectors.lanes
        whole, quads = vector_type(lanes, "i32"), vector_type(4 * lanes, "i8")
        name = f"x86.avx512.vpdpbusd.{REGISTER_BITS[lanes]}"
        dots = [total for total in sums for _ in range(VECTORS_PER_BLOCK)]
        for i in range(GROUP // 4):
            codes = self._quads(k, weights["i32"], at // 4 + i * self._unit_bytes // 4)
            codes = [k.bitcast(code, quads) for code in codes]
            for r, row in enumerate(rows):
                value = k.bitcast(k.broadcast(x.codes["i32"].load(row // 4 + i), lanes), quads)
                for t in range(VECTORS_PER_BLOCK):
                    d = r * VECTORS_PER_BLOCK + t
                    dots[d] = k.intrinsic(name, [dots[d], codes[t], value], whole)
        return dots

    def _quads(self, k: KernelBuilder, memory: Memory, at: Scalar) -> list[Scalar]:
        """Four codes a lane, for both vectors of the block's features."""
        lanes = self.vectors.lanes
        if self.dtype == "int8":
            return [memory.load_vector(at + t * lanes, lanes) for t in range(VECTORS_PER_BLOCK)]
        both = memory.load_vector(at, lanes)
        low = k.scalar(0x0F0F0F0F, both.dtype)
        return [k.bits("andi", both, low), k.bits("andi", k.bits("shrui", both, 4), low)]

    def _dots_of_bytes(
        self, k: KernelBuilder, weights: Views, at: Scalar, x: Activations, rows: Sequence[Scalar],
        sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """The same with products in f32, whose 24 bits hold their sums exactly."""
        lanes = self.vectors.lanes
        kind, whole = vector_type(lanes, "f32"), vector_type(lanes, "i32")

        def step(i: Scalar, *sums: Scalar) -> list[Scalar]:
            codes = []
            for t in range(VECTORS_PER_BLOCK if self.dtype == "int8" else 1):
                loaded = weights["i8"].load_vector(at + i * self._unit_bytes + t * lanes, lanes)
                codes.append(loaded.to_unsigned(whole))
            if self.dtype == "int4":
                codes = [k.bits("andi", codes[0], 15), k.bits("shrui", codes[0], 4)]
            values = [code.to(kind) for code in codes]
            wide = [k.broadcast(x.codes["i8"].load(row + i).to("f32"), lanes) for row in rows]
            return [
                k.fma(wide[d // VECTORS_PER_BLOCK], values[d % VECTORS_PER_BLOCK], total)
                for d, total in enumerate(sums)
            ]

        none = k.scalar(0.0, kind)
        dots = k.fold(0, GROUP, [none] * (VECTORS_PER_BLOCK * len(rows)), step)
        return [dot.to_int(whole) + sums[d // VECTORS_PER_BLOCK] for d, dot in enumerate(dots)]

    def element(
        self, k: KernelBuilder, weights: Views, start: Scalar, feature: Scalar, col: Scalar
    ) -> Scalar:
        """One weight of an int8 block, as f32; start: the block's first byte."""
        assert self.dtype == "int8"
        at = start + col // GROUP * self.group_bytes
        code = weights["i8"].load(
            at + col % GROUP // self.unit * self._unit_bytes + feature * self.unit + col % self.unit
        )
        scale = weights["f16"].load((at + GROUP * self.vectors.block) // 2 + feature)
        return (code.to_unsigned("i32") + -ZERO).to("f32") * scale.to("f32")
