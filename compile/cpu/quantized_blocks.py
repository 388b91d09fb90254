"""QuantizedBlocks: how blocks of quantized weights are read, in vectors of output features.

A block of 2 * lanes output features is stored as `compile.formats.blocks` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.cpu.kernel import KernelBuilder
from compile.cpu.operands import LINE_BYTES
from compile.formats.blocks import GROUP, SUPER_GROUPS, BlockType
from compile.mlir.executable import Memory, Views
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from compile.target import VECTORS_PER_BLOCK, Vectors

UNIT = 4  # columns that lie side by side


@dataclass(frozen=True)
class QuantizedBlocks:
    """The blocks of a matrix of a quantized type."""

    kind: BlockType
    vectors: Vectors

    @property
    def columns(self) -> int:
        """Columns that are stored together."""
        return self.kind.columns

    @property
    def stored_bytes(self) -> int:
        """Bytes of so many columns of a block."""
        return self.kind.stored_bytes * self.vectors.block

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of a block, without d and dmin."""
        return self.kind.group_bytes * self.vectors.block

    @property
    def code_bytes(self) -> int:
        """Those of them that are codes."""
        return self.kind.code_bytes * self.vectors.block

    @property
    def unit_bytes(self) -> int:
        """Bytes of the lower bits of UNIT columns of a block."""
        return UNIT * self.vectors.block * self.kind.low_bytes // GROUP

    @property
    def plane_columns(self) -> int:
        """How many columns a plane has the upper bits of, in each of its bytes."""
        return 8 // self.kind.high_bits

    def prefetch(self, weights: Views, at: Scalar) -> None:
        """Ask for as many bytes as a group has, so far behind the one at byte `at` as is tuned."""
        for byte in range(0, self.group_bytes, LINE_BYTES):
            weights["i8"].prefetch(at + (self.vectors.tuning.ahead + byte))

    def numbers(
        self, k: KernelBuilder, weights: Views, at: Scalar, factors: Sequence[Scalar]
    ) -> list[Scalar]:
        """Scales and then minima of a group, as f32 vectors."""
        lanes = self.vectors.lanes
        count = self.kind.num_numbers * VECTORS_PER_BLOCK
        first = at + self.code_bytes
        if not factors:
            return self._halves(k, weights, first, count)
        whole, kind = vector_type(lanes, "i32"), vector_type(lanes, "f32")
        numbers = []
        for i in range(count):
            loaded = weights["i8"].load_vector(first + i * lanes, lanes)
            signed = self.kind.has_signed_scales
            number = (loaded.to(whole) if signed else loaded.to_unsigned(whole)).to(kind)
            which = i // VECTORS_PER_BLOCK if self.kind.has_minima else 0
            numbers.append(number * factors[which * VECTORS_PER_BLOCK + i % VECTORS_PER_BLOCK])
        return numbers

    def factors(self, k: KernelBuilder, weights: Views, start: Scalar) -> list[Scalar]:
        """d of a super-block and then, if it has minima, -dmin, as f32 vectors."""
        count = VECTORS_PER_BLOCK * (2 if self.kind.has_minima else 1)
        loaded = self._halves(k, weights, start + SUPER_GROUPS * self.group_bytes, count)
        return [value if i < VECTORS_PER_BLOCK else value * -1.0 for i, value in enumerate(loaded)]

    def _halves(self, k: KernelBuilder, weights: Views, at: Scalar, count: int) -> list[Scalar]:
        """Vectors of f16 one after the other, as f32."""
        lanes = self.vectors.lanes
        numbers = at // 2
        half = [numbers + t * lanes for t in range(count)]
        return [weights["f16"].load_vector(a, lanes).to(vector_type(lanes, "f32")) for a in half]

    def expand(
        self, k: KernelBuilder, weights: Views, start: Scalar, groups: tuple[Scalar, Scalar],
        memory: Memory, to: Scalar,
    ) -> None:  # fmt: skip
        """Write columns of the block at byte `start` as pairs of bf16: i32 [columns / 2, block].

        groups: the first one, and the one after the last. to: where they go in `memory`, of i32.
        """
        lanes, (first, last) = self.vectors.lanes, groups
        parts, kind = GROUP // self.kind.group, vector_type(self.vectors.lanes, "f32")
        with k.loop(first, last) as g:
            at, factors = self._group_at(k, weights, start, g)
            self.prefetch(weights, at)
            numbers = self.numbers(k, weights, at, factors)
            scales = numbers[: parts * VECTORS_PER_BLOCK]
            minima = numbers[len(scales) :] or [s * float(-self.kind.zero) for s in scales]
            line = to + (g - first) * (GROUP // 2 * self.vectors.block)
            for i in range(GROUP // 4):
                quads = self.quads(k, weights["i32"], at, i)
                of_part = slice(i * parts // (GROUP // 4) * VECTORS_PER_BLOCK, None)
                both = zip(quads, scales[of_part], minima[of_part], strict=False)
                for t, (quad, scale, least) in enumerate(both):
                    floats = [
                        k.fma(
                            k.bits("andi", k.bits("shrui", quad, 8 * j), 255).to(kind), scale, least
                        )
                        for j in range(4)
                    ]
                    for pair in (0, 1):
                        pairs = k.pairs(floats[2 * pair], floats[2 * pair + 1])
                        at_pair = line + (2 * i + pair) * self.vectors.block + t * lanes
                        memory.store_vector(pairs, at_pair)

    def _group_at(
        self, k: KernelBuilder, weights: Views, start: Scalar, group: Scalar
    ) -> tuple[Scalar, list[Scalar]]:
        """The first byte of a group of the block at byte `start`, and its factors."""
        if not self.kind.has_super_blocks:
            return start + group * self.group_bytes, []
        first = start + group // SUPER_GROUPS * self.stored_bytes
        return first + group % SUPER_GROUPS * self.group_bytes, self.factors(k, weights, first)

    def quads(self, k: KernelBuilder, memory: Memory, start: Scalar, i: int) -> list[Scalar]:
        """Quad i of a group, four codes a lane, for both vectors of the block's features."""
        lanes = self.vectors.lanes
        at = start // 4 + i * self.unit_bytes // 4
        if self.kind.bits == 8:
            return [memory.load_vector(at + t * lanes, lanes) for t in range(VECTORS_PER_BLOCK)]
        both = memory.load_vector(at, lanes)
        low = k.scalar(0x0F0F0F0F, both.dtype)
        codes = [k.bits("andi", both, low), k.bits("andi", k.bits("shrui", both, 4), low)]
        if not self.kind.high_bits:
            return codes
        planes = start // 4 + (self.kind.low_bytes // 4 + i // self.plane_columns) * 2 * lanes
        shift = 4 - i % self.plane_columns * self.kind.high_bits
        mask = k.scalar(0x10101010 * (2**self.kind.high_bits - 1), both.dtype)
        for t in range(VECTORS_PER_BLOCK):
            plane = memory.load_vector(planes + t * lanes, lanes)
            shifted = k.bits("shli" if shift > 0 else "shrui", plane, abs(shift))
            codes[t] = k.bits("ori", codes[t], k.bits("andi", shifted, mask))
        return codes
