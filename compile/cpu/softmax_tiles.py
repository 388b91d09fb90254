"""Softmax of attention with tile registers, whose scores and softmax weights lie as tiles.

It is that of `softmax`, with what costs less beside products that fast: few positions at a time,
which stay in the first cache; exponentials as exact as the bf16 that they become; and sums of
before are corrected only where a larger score was found.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

from compile.cpu.activations import Activations
from compile.cpu.amx import COLUMNS, LINES
from compile.cpu.kernel import KernelBuilder
from compile.cpu.vector_builder import LOG2_E
from compile.formats.layout import MASKED
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type

SLICE = 64  # positions at a time
ROWS = 2 * LINES  # queries of two tiles, so that keys and values are read half as often
UNROLL = 4  # vectors at once
TILE = LINES * LINES  # f32, or pairs of bf16


@dataclass(frozen=True)
class TileWorkspace:
    """A workgroup's own memory for queries of one head: where its parts begin, in f32.

    For ROWS queries at a time, scores [SLICE/16, ROWS, 16], and softmax weights [SLICE/32, ROWS,
    16 pairs of bf16]. Values of a slice, as tiles [SLICE/32, head_dim/16, 16, 16 pairs of bf16].
    For all queries, sums [queries, head_dim] of weighted values; of each, totals, 16 parts of the
    sum of its weights; and maxima, the largest score so far.
    """

    queries: int
    head_dim: int

    scores = 0
    weights = scores + SLICE * ROWS
    values = weights + SLICE * ROWS // 2

    @property
    def sums(self) -> int:
        """Where sums of weighted values begin."""
        return self.values + SLICE * self.head_dim // 2

    @property
    def totals(self) -> int:
        """Where the parts of sums of weights begin."""
        return self.sums + self.queries * self.head_dim

    @property
    def maxima(self) -> int:
        """Where the largest scores begin."""
        return self.totals + self.queries * LINES

    @property
    def num_bytes(self) -> int:
        """The size of all."""
        return 4 * (self.maxima + self.queries)


class TileSoftmax:
    """Writes the softmax of `queries` queries of one head, in memory `workspace`."""

    def __init__(self, k: KernelBuilder, act: Activations, queries: int, head_dim: int) -> None:
        self._k, self._act, self._queries = k, act, queries
        self.space = TileWorkspace(queries, head_dim)
        self.workspace = k.stack()
        self.workspace.num_bytes = self.space.num_bytes

    def begin(self) -> None:
        """Queries have seen nothing yet."""
        k, memory, space = self._k, self.workspace["f32"], self.space
        kind = vector_type(LINES, "f32")
        zero, lowest = k.scalar(0.0, kind), k.scalar(MASKED, kind)
        with k.loop(space.sums, space.maxima, LINES) as i:
            memory.store_vector(zero, i)
        with k.loop(0, self._queries, LINES) as i:
            memory.store_vector(lowest, i + space.maxima)

    def weigh(self, first: Scalar, row: Scalar, last: Scalar, count: Scalar) -> None:
        """Turn scores of a query into softmax weights, relative to its largest score so far.

        first: of the ROWS queries. row: among them. last: the last position of the slice that it
        sees; those behind it are masked. count: tiles of 16 positions in the slice.
        """
        k, memory, space = self._k, self.workspace["f32"], self.space
        kind = vector_type(LINES, "f32")
        query, scores = first + row, row * LINES
        ends, masked = k.broadcast(last.to("i32"), LINES), k.scalar(MASKED, kind)

        def places(group: Scalar) -> list[Scalar]:
            return [(group * UNROLL + i) * (ROWS * LINES) + scores for i in range(UNROLL)]

        def larger(group: Scalar, *tops: Scalar) -> list[Scalar]:
            found = [memory.load_vector(at, LINES) for at in places(group)]
            return [k.larger(x, top) for x, top in zip(found, tops, strict=True)]

        def mask(group: Scalar, *tops: Scalar) -> list[Scalar]:
            for i, at in enumerate(places(group)):
                position = ((group * UNROLL + i) * LINES).to("i32")
                is_hidden = ends.less(k.lanes_from(position, LINES))
                memory.store_vector(is_hidden.select(masked, memory.load_vector(at, LINES)), at)
            return larger(group, *tops)

        num_groups = (count + (UNROLL - 1)) // UNROLL
        # Groups of vectors that the query sees wholly need no mask.
        visible = (last + 1).clamp(0, num_groups * (UNROLL * LINES)) // (UNROLL * LINES)
        tops = k.fold(0, visible, [masked] * UNROLL, larger)
        tops = k.fold(visible, num_groups, tops, mask)
        self._raise_maximum(query, k.element(k.largest(reduce(k.larger, tops)), 0))
        weight = k.exp_below(memory.load(query + space.maxima))

        def weigh(group: Scalar, *totals: Scalar) -> list[Scalar]:
            found = [memory.load_vector(at, LINES) for at in places(group)]
            weights = [weight(x) for x in found]
            for i in range(0, UNROLL, 2):
                tile = (group * UNROLL + i) * (ROWS * COLUMNS // 2) + 2 * space.weights
                joined = k.join(weights[i], weights[i + 1])
                self.workspace["bf16"].store_vector(joined, tile + row * COLUMNS)
            return [total + x for total, x in zip(totals, weights, strict=True)]

        parts = query * LINES + space.totals
        none = [k.scalar(0.0, kind)] * (UNROLL - 1)
        totals = k.fold(0, num_groups, [memory.load_vector(parts, LINES), *none], weigh)
        memory.store_vector(reduce(operator.add, totals), parts)

    def _raise_maximum(self, query: Scalar, top: Scalar) -> None:
        """If `top` is larger than all before, correct what was added relative to them."""
        k, memory, space, d = self._k, self.workspace["f32"], self.space, self.space.head_dim
        before = memory.load(query + space.maxima)
        with k.when(before.is_below(top)):
            memory.store(top, query + space.maxima)
            factor = k.exp2(k.broadcast((before - top) * LOG2_E, LINES))
            starts = [query * d + (space.sums + i) for i in range(0, d, LINES)]
            for at in [query * LINES + space.totals, *starts]:
                memory.store_vector(memory.load_vector(at, LINES) * factor, at)

    def store_result(self, query: Scalar, row: Scalar, feature: Scalar) -> None:
        """Store the result of a query as activations of a row, from `feature` on."""
        k, memory, space, d = self._k, self.workspace["f32"], self.space, self.space.head_dim
        total = k.sum(memory.load_vector(query * LINES + space.totals, LINES))
        inverse = k.broadcast(k.scalar(1.0, "f32") / total, LINES)
        with k.loop(0, d, self._act.step) as i:
            start = query * d + space.sums + i
            values = [memory.load_vector(start + n, LINES) for n in range(0, self._act.step, LINES)]
            self._act.store([x * inverse for x in values], row, feature + i)
