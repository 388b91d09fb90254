"""Softmax of attention on a CPU, computed while the context is read slice by slice.

A task keeps, of each query, the largest score and the sum of the softmax weights so far. A slice
with a larger score corrects what was summed before (online softmax, Milakov and Gimelshein 2018).
In decode several tasks read splits of one context; `combine` puts their results together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from compile.cpu.activations import Activations
from compile.cpu.kernel import CACHE_LINE, KernelBuilder
from compile.cpu.kv_layout import KVLayout
from compile.formats.layout import ITEM_BYTES, MASKED
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type

SLICE = 256  # positions between two corrections of a softmax
SPLIT = 512  # positions of a task in decode, so that several threads share a long context
UNROLL = 4  # vectors at once in a softmax


@dataclass(frozen=True)
class Workspace:
    """A workgroup's own memory for some queries: where its parts begin, in f32.

    scores [queries, SLICE]: softmax weights overwrite them in place, in the type they are
    multiplied in; each query's begin where its scores began. values [queries, head_dim]: sums of
    weighted values. Then of each query, [queries]: maxima, the largest score so far; totals, the
    sum of its weights; factors, which correct what was added before the current slice.
    """

    scores: Scalar
    values: Scalar
    maxima: Scalar
    totals: Scalar
    factors: Scalar

    @classmethod
    def of(cls, start: Scalar, queries: int, head_dim: int) -> Workspace:
        """The workspace that begins at element `start`."""
        values = start + queries * SLICE
        maxima = values + queries * head_dim
        return cls(start, values, maxima, maxima + queries, maxima + 2 * queries)

    @staticmethod
    def size(queries: int, head_dim: int) -> int:
        """Elements of a workspace, in whole cache lines."""
        return -(-queries * (SLICE + head_dim + 3) // CACHE_LINE) * CACHE_LINE


@dataclass(frozen=True)
class Splits:
    """What attention to splits of a row's context gave; a row has up to `most` splits.

    values [M, most, heads, head_dim]: sums of weighted values. totals [M, most, heads, 2]: the
    largest score, and the sum of the softmax weights.
    """

    values: Memory
    totals: Memory
    most: Scalar


class Softmax:
    """Writes the softmax of scores, and what becomes of the sums of weighted values.

    act: of attention [M, heads, head_dim]. splits: in decode.
    position(row): the last position that a row attends to. max_queries: of one task.
    """

    def __init__(
        self, k: KernelBuilder, layout: KVLayout, act: Activations, splits: Splits | None,
        position: Callable[[Scalar], Scalar], max_queries: int,
    ) -> None:  # fmt: skip
        self.k, self.layout, self.workspace = k, layout, k.stack()
        self.weight_dtype = layout.operand.other
        self._act, self._splits, self._position = act, splits, position
        self._lanes = layout.head_lanes
        self._step = act.step if act.is_quantized else self._lanes  # features stored together
        self.workspace.num_bytes = 4 * Workspace.size(max_queries, layout.config.head_dim)

    def open(self, queries: int) -> Workspace:
        """The workgroup's workspace, for queries that have seen nothing yet."""
        k, d, memory = self.k, self.layout.config.head_dim, self.workspace["f32"]
        space = Workspace.of(k.scalar(0, "index"), queries, d)
        zero, lowest = k.scalar(0.0, "f32"), k.scalar(MASKED, "f32")
        with k.loop(0, queries) as j:
            memory.store(lowest, space.maxima + j)
            memory.store(zero, space.totals + j)
        with k.loop(0, queries * d) as i:
            memory.store(zero, space.values + i)
        return space

    def weights_at(self, space: Workspace, j: Scalar | int) -> Scalar:
        """Where the softmax weights of query j begin, in elements of their own type."""
        return (space.scores + j * SLICE) * (4 // ITEM_BYTES[self.weight_dtype])

    def online_softmax(
        self, space: Workspace, j: Scalar, last: Scalar, num_vectors: Scalar
    ) -> None:
        """Turn the scores of query j into softmax weights, relative to its largest score so far.

        last: the last position of the slice that the query sees; those behind it are masked.
        num_vectors: vectors of scores in the slice.
        """
        k, p, memory = self.k, self.layout.position_lanes, self.workspace["f32"]
        kind = vector_type(p, "f32")
        scores = space.scores + j * SLICE
        weights = self.weights_at(space, j)
        ends, masked = k.broadcast(last.to("i32"), p), k.scalar(MASKED, kind)

        def places(group: Scalar) -> list[Scalar]:
            return [(group * UNROLL + i) * p for i in range(UNROLL)]

        def larger(group: Scalar, *tops: Scalar) -> list[Scalar]:
            found = [memory.load_vector(scores + at, p) for at in places(group)]
            return [k.larger(x, top) for x, top in zip(found, tops, strict=True)]

        def mask(group: Scalar, *tops: Scalar) -> list[Scalar]:
            for at in places(group):
                x = memory.load_vector(scores + at, p)
                x = ends.less(k.lanes_from(at.to("i32"), p)).select(masked, x)
                memory.store_vector(x, scores + at)
            return larger(group, *tops)

        num_groups = (num_vectors + (UNROLL - 1)) // UNROLL
        # Groups of vectors that the query sees wholly need no mask.
        visible = (last + 1).clamp(0, num_groups * (UNROLL * p)) // (UNROLL * p)
        tops = k.fold(0, visible, [masked] * UNROLL, larger)
        tops = k.fold(visible, num_groups, tops, mask)
        before = memory.load(space.maxima + j)
        top = k.largest(reduce(k.larger, tops))
        now = k.element(k.larger(k.broadcast(before, p), top), 0)
        weight = self._weight_below(now)

        def weigh(group: Scalar, *totals: Scalar) -> list[Scalar]:
            found = [weight(memory.load_vector(scores + at, p)) for at in places(group)]
            for x, at in zip(found, places(group), strict=True):
                self.workspace[self.weight_dtype].store_as(x, weights + at)
            return [total + x for x, total in zip(found, totals, strict=True)]

        totals = k.fold(0, num_groups, [k.scalar(0.0, kind)] * UNROLL, weigh)
        factor = k.element(k.exp(k.broadcast(before - now, p)), 0)
        total = memory.load(space.totals + j) * factor + k.sum(reduce(operator.add, totals))
        for value, at in ((now, space.maxima), (total, space.totals), (factor, space.factors)):
            memory.store(value, at + j)

    def _weight_below(self, top: Scalar) -> Callable[[Scalar], Scalar]:
        """What turns a vector of scores into softmax weights relative to `top`, no more exactly
        than the type that they are stored in needs."""
        k, p = self.k, self.layout.position_lanes
        if self.weight_dtype != "bf16" or p != 16:
            wide = k.broadcast(top, p)
            return lambda x: k.exp(x - wide)
        return k.exp_below(top)

    def store_result(
        self, space: Workspace, j: Scalar, row: Scalar, query: Scalar, split: Scalar | None
    ) -> None:
        """Store the result of query j, which is head `query` of a row.

        Without splits the result becomes activations, else it is kept for `combine`.
        """
        k, d, lanes, memory = self.k, self.layout.config.head_dim, self._lanes, self.workspace
        largest, total = (memory["f32"].load(at + j) for at in (space.maxima, space.totals))
        step = self._step

        def values(i: Scalar) -> list[Scalar]:
            start = space.values + j * d + i
            return [memory["f32"].load_vector(start + n, lanes) for n in range(0, step, lanes)]

        if split is None:
            inverse = k.broadcast(k.scalar(1.0, "f32") / total, lanes)
            with k.loop(0, d, step) as i:
                self._act.store([x * inverse for x in values(i)], row, query * d + i)
            return
        assert self._splits
        to = self._split_at(row, split, query)
        self._splits.totals.store(largest, to * 2)
        self._splits.totals.store(total, to * 2 + 1)
        with k.loop(0, d, step) as i:
            for n, value in enumerate(values(i)):
                self._splits.values.store_vector(value, to * d + i + n * lanes)

    def _split_at(self, row: Scalar, split: Scalar, query: Scalar) -> Scalar:
        assert self._splits
        return (row * self._splits.most + split) * self.layout.config.num_heads + query

    def combine(self, row: Scalar) -> None:
        """Store the attention of a row to all splits of its context, as activations."""
        k = self.k
        num_splits = (self._position(row) + SPLIT) // SPLIT
        zero, lowest = k.scalar(0.0, "f32"), k.scalar(MASKED, "f32")
        with k.loop(0, self.layout.config.num_heads) as head:
            self._combine_head(row, head, num_splits, zero, lowest)

    def _combine_head(
        self, row: Scalar, head: Scalar, num_splits: Scalar, zero: Scalar, lowest: Scalar
    ) -> None:
        k, lanes, d, splits = self.k, self._lanes, self.layout.config.head_dim, self._splits
        assert splits
        totals = splits.totals

        def at(split: Scalar) -> Scalar:
            return self._split_at(row, split, head)

        def larger(split: Scalar, top: Scalar) -> list[Scalar]:
            return [top.maximum(totals.load(at(split) * 2))]

        [top] = k.fold(0, num_splits, [lowest], larger)

        def factor(split: Scalar) -> Scalar:
            return (totals.load(at(split) * 2) - top).math("exp")

        def add_total(split: Scalar, total: Scalar) -> list[Scalar]:
            return [total + factor(split) * totals.load(at(split) * 2 + 1)]

        [total] = k.fold(0, num_splits, [zero], add_total)
        inverse = k.broadcast(k.scalar(1.0, "f32") / total, lanes)
        with k.loop(0, d, self._step) as i:

            def add_values(split: Scalar, *sums: Scalar, i: Scalar = i) -> list[Scalar]:
                wide, start = k.broadcast(factor(split), lanes), at(split) * d + i
                loaded = [
                    splits.values.load_vector(start + j * lanes, lanes) for j in range(len(sums))
                ]
                return [k.fma(x, wide, s) for x, s in zip(loaded, sums, strict=True)]

            none = k.scalar(0.0, vector_type(lanes, "f32"))
            sums = k.fold(0, num_splits, [none] * (self._step // lanes), add_values)
            self._act.store([x * inverse for x in sums], row, head * d + i)
