"""Attention of a CPU kernel: rotary embedding, the cache's layout, and the softmax over a context.

Shapes: M rows, G query heads per KV head (KH), D head_dim, P tokens a page. A layer of a page holds
keys [KH, P/p, D/u, p, u], then values [KH, P/u, D, u]: vectors of p positions or of features, in
units of u (pairs of bf16, where the CPU multiplies them).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from compile.cpu.kernel import LINE, KernelBuilder, Memory, Views, lanes_of, vector_type
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Activations, Streams, product
from compile.formats.layout import ITEM_BYTES, MASKED
from compile.mlir.builder import Scalar
from compile.target import Vectors

QUERY_ROWS = 4  # rows of one sequence that attend together
CHUNK = 256  # positions between two corrections of a softmax
LINE_BYTES = 64  # of a cache
UNROLL = 4  # vectors at once in a softmax
SPLIT = 512  # positions of a task in decode, so that several threads share a long context


@dataclass(frozen=True)
class Local:
    """A workgroup's own memory for some queries: where its parts begin, in f32.

    Scores [queries, CHUNK], which become shares of their own type, each query's where its scores
    began; values [queries, D], then of each query the largest score so far, the total of its
    shares, and the factor that corrects what was added before.
    """

    scores: Scalar
    values: Scalar
    maxima: Scalar
    totals: Scalar
    factors: Scalar

    @classmethod
    def of(cls, start: Scalar, queries: int, head_dim: int) -> Local:
        values = start + queries * CHUNK
        maxima = values + queries * head_dim
        return cls(start, values, maxima, maxima + queries, maxima + 2 * queries)

    @staticmethod
    def size(queries: int, head_dim: int) -> int:
        return -(-queries * (CHUNK + head_dim + 3) // LINE) * LINE


@dataclass(frozen=True)
class Chunk:
    """What some rows of a sequence, from `row` on, attend to: CHUNK positions from `start` on."""

    row: Scalar
    head: Scalar
    layer: Scalar
    start: Scalar


@dataclass(frozen=True)
class Splits:
    """Attention to each of at most `most` splits of a row's context: values [M, most, heads, D],
    and totals [M, most, heads, 2]: the largest score, and the total of shares."""

    values: Memory
    totals: Memory
    most: Scalar


@dataclass(frozen=True)
class AttentionMemory:
    """What `Attention` reads and writes, in all types needed.

    qkv: rows of queries, keys and values [M, qkv_width]. rope: where the angles [positions, 2, D/2]
    begin in `floats`. q: queries [M, q_width], scaled. act: for attention [M, heads, D]. splits: of
    decode.
    """

    qkv: Memory
    qkv_width: int
    floats: Memory
    rope: Scalar
    cache: Views
    q: Views
    q_width: int
    local: Views
    act: Activations
    splits: Splits | None = None


class Attention:
    """Writes the phases between a layer's two projections.

    position(row), page(row, position): what the tables say.
    """

    def __init__(
        self,
        k: KernelBuilder,
        layout: KVLayout,
        vectors: Vectors,
        memory: AttentionMemory,
        position: Callable[[Scalar], Scalar],
        page: Callable[[Scalar, Scalar], Scalar],
    ) -> None:
        self.k, self.layout, self.config = k, layout, layout.config
        self.vectors, self.memory = vectors, memory
        self.position, self.page = position, page
        c = self.config
        self.groups = c.num_heads // c.num_kv_heads
        self.width = memory.q_width
        self._other = layout.operand.other  # of queries and shares
        self._units = "i32" if layout.operand.unit == 2 else self._other
        self._lanes = layout.head_lanes
        act = memory.act  # features of which are stored together
        self._step = act.step if act.format.is_quantized else self._lanes
        self.local_size = Local.size(self.most_queries, c.head_dim)

    @property
    def most_queries(self) -> int:
        """Of one task."""
        return QUERY_ROWS * self.groups

    # Queries, keys and values

    def rotate_and_store(self, row: Scalar, head: Scalar, layer: Scalar) -> None:
        """Rotary embedding (Su et al. 2021, rotate-half form) of a KV head's queries and key.

        Queries, scaled, go to [M, heads, D]; key and value to their page.
        """
        c, d = self.config, self.config.head_dim
        half = d // 2
        lanes = math.gcd(half, self.vectors.lanes)
        start = row * self.memory.qkv_width
        position = self.position(row)
        angles = self.memory.rope + position * d
        key, value = self._slots(row, position, layer, head)
        for g in range(self.groups):
            query = head * self.groups + g
            for i in range(0, half, lanes):
                rotated = self._rotated(start + query * d, angles, i, lanes)
                for feature, x in zip((i, i + half), rotated, strict=True):
                    at = row * self.width + query * d + feature
                    self.memory.q[self._other].store_as(x * (1 / math.sqrt(d)), at)
        key_row = start + (head + c.num_heads) * d
        for i in range(0, half, lanes):
            rotated = self._rotated(key_row, angles, i, lanes)
            for feature, x in zip((i, i + half), rotated, strict=True):
                self._scatter(x, feature, key)
        value_row = start + (head + c.num_heads + c.num_kv_heads) * d
        for i in range(0, d, lanes):
            self._scatter(self.memory.qkv.load_vector(value_row + i, lanes), i, value)

    def store_key_value(self, row: Scalar, position: Scalar, head: Scalar) -> None:
        """A key and a value as they are, to their page."""
        c, d, lanes = self.config, self.config.head_dim, self.layout.head_lanes
        key, value = self._slots(row, position, self.k.scalar(0, "index"), head)
        for first, at in ((c.num_heads, key), (c.num_heads + c.num_kv_heads, value)):
            start = row * self.memory.qkv_width + (head + first) * d
            for i in range(0, d, lanes):
                x = self.memory.qkv.load_vector(start + i, lanes)
                self._scatter(x.to(vector_type(lanes, "f32")), i, at)

    def store_zero_value(self, row: Scalar, position: Scalar, head: Scalar) -> None:
        """Behind the last position of a page that is read: shares of nothing must not be NaN."""
        _, value = self._slots(row, position, self.k.scalar(0, "index"), head)
        lanes = self.layout.head_lanes
        for i in range(0, self.config.head_dim, lanes):
            self._scatter(self.k.scalar(0.0, vector_type(lanes, "f32")), i, value)

    def _rotated(self, row: Scalar, angles: Scalar, i: int, lanes: int) -> tuple[Scalar, Scalar]:
        half = self.config.head_dim // 2
        x0, x1 = (self.memory.qkv.load_vector(row + i + h, lanes) for h in (0, half))
        cos, sin = (self.memory.floats.load_vector(angles + i + h, lanes) for h in (0, half))
        return x0 * cos - x1 * sin, x1 * cos + x0 * sin

    def _slots(
        self, row: Scalar, position: Scalar, layer: Scalar, head: Scalar
    ) -> tuple[Callable[[int], Scalar], Callable[[int], Scalar]]:
        """Where each feature of a token's key and value goes."""
        layout = self.layout
        slot = position % layout.page_size
        keys, values = layout.starts(self.page(row, position), layer, head)
        return (
            lambda feature: layout.key_at(keys, slot, feature),
            lambda feature: layout.value_at(values, slot, feature),
        )

    def _scatter(self, x: Scalar, first: int, at: Callable[[int], Scalar]) -> None:
        """Store the elements of a vector, features `first` and on, one by one."""
        cache, lanes = self.memory.cache[self.layout.operand.dtype], lanes_of(x)
        x = self.k.convert(x, cache.dtype)
        for lane in range(lanes):
            cache.store(self.k.element(x, lane), at(first + lane))

    # The context

    def attend(
        self,
        workgroup: Scalar,
        row: Scalar,
        num_rows: int,
        head: Scalar,
        split: Scalar | None,
        layer: Scalar,
    ) -> None:
        """Attention of some rows of a sequence to a split of their context, or to all of it.

        Chunk by chunk, each correcting what was added before (Milakov and Gimelshein 2018).
        """
        k = self.k
        local = self._open(workgroup, num_rows * self.groups)
        low, high = k.scalar(0, "index"), self.position(row + (num_rows - 1)) + 1
        if split is not None:
            low = split * SPLIT
            high = (low + SPLIT).minimum(high)
        with k.loop(low, high, CHUNK) as start:
            self._attend_chunk(local, Chunk(row, head, layer, start), num_rows, high)
        with k.loop(0, num_rows * self.groups) as j:
            query = head * self.groups + j % self.groups
            self._finish(local, j, row + j // self.groups, query, split)

    def _open(self, workgroup: Scalar, queries: int) -> Local:
        """Memory of the workgroup's own, of queries that have seen nothing yet."""
        k, d, memory = self.k, self.config.head_dim, self.memory.local["f32"]
        local = Local.of(workgroup * self.local_size, queries, d)
        zero, lowest = k.scalar(0.0, "f32"), k.scalar(MASKED, "f32")
        with k.loop(0, queries) as j:
            memory.store(lowest, local.maxima + j)
            memory.store(zero, local.totals + j)
        with k.loop(0, queries * d) as i:
            memory.store(zero, local.values + i)
        return local

    def _attend_chunk(self, local: Local, chunk: Chunk, num_rows: int, high: Scalar) -> None:
        k, page_size, start = self.k, self.layout.page_size, chunk.start
        queries, most = num_rows * self.groups, self.vectors.max_rows
        end = (start + CHUNK).minimum(high)
        num_pages = (end - start + (page_size - 1)) // page_size
        num_pairs = (num_pages * (page_size // self.layout.position_lanes) + 1) // 2
        batches = [range(i, min(i + most, queries)) for i in range(0, queries, most)]
        with k.loop(0, num_pairs) as pair:
            if num_rows == 1:  # which waits for memory
                self._prefetch(chunk, pair)
            for batch in batches:
                self._score(local, chunk, batch, pair)
        with k.loop(0, queries) as j:
            last = self.position(chunk.row + j // self.groups) - start
            self._soften(local, j, last, num_pairs * 2)
        for batch in batches:
            self._weigh(local, chunk, batch, num_pages)

    def _prefetch(self, chunk: Chunk, pair: Scalar) -> None:
        """The keys of the next pair of vectors, and the values of this one: pages lie far apart."""
        p, cache = self.layout.position_lanes, self.memory.cache[self.layout.operand.dtype]
        size = p * self.config.head_dim
        for t in (0, 1):
            this = chunk.start + (pair * 2 + t) * p
            [keys, _], [_, values] = (self._starts(chunk, at) for at in (this + 2 * p, this))
            offset = this % self.layout.page_size * self.config.head_dim
            for line in range(0, size, LINE_BYTES // ITEM_BYTES[cache.dtype]):
                cache.prefetch(keys + (offset + line))
                cache.prefetch(values + (offset + line))

    def _score(self, local: Local, chunk: Chunk, queries: range, pair: Scalar) -> None:
        """Scores [queries, 2 p] of two vectors of positions."""
        layout, d = self.layout, self.config.head_dim
        p, u, groups = layout.position_lanes, layout.operand.unit, self.groups
        starts = []
        for t in (0, 1):
            position = chunk.start + (pair * 2 + t) * p
            first, _ = self._starts(chunk, position)
            starts.append((first + position % layout.page_size // p * (d * p)) // u)
        cache = self.memory.cache[layout.operand.unit_dtype]
        keys = Streams(cache, layout.operand, starts, p, p)
        rows = [
            ((chunk.row + j // groups) * self.width + (chunk.head * groups + j % groups) * d) // u
            for j in queries
        ]
        zero = self.k.scalar(0.0, vector_type(p, "f32"))
        sums = product(
            self.k, keys, self.memory.q[self._units], rows, d // u, [zero] * (2 * len(rows))
        )
        for i, value in enumerate(sums):
            at = local.scores + (queries[i // 2]) * CHUNK + (pair * 2 + i % 2) * p
            self.memory.local["f32"].store_vector(value, at)

    def _soften(self, local: Local, j: Scalar, last: Scalar, num_tiles: Scalar) -> None:
        """Scores of a query to shares, relative to its largest score so far; hides those behind
        position `last` of the chunk."""
        k, p, memory = self.k, self.layout.position_lanes, self.memory.local["f32"]
        kind = vector_type(p, "f32")
        scores = local.scores + j * CHUNK
        shares = self._shares_at(local, j)
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

        num_groups = (num_tiles + (UNROLL - 1)) // UNROLL
        visible = (last + 1).clamp(0, num_groups * (UNROLL * p)) // (UNROLL * p)  # wholly
        tops = k.fold(0, visible, [masked] * UNROLL, larger)
        tops = k.fold(visible, num_groups, tops, mask)
        before = memory.load(local.maxima + j)
        now = before.maximum(k.maximum(reduce(k.larger, tops)))
        wide = k.broadcast(now, p)

        def share(group: Scalar, *totals: Scalar) -> list[Scalar]:
            found = [k.exp(memory.load_vector(scores + at, p) - wide) for at in places(group)]
            for x, at in zip(found, places(group), strict=True):
                self.memory.local[self._other].store_as(x, shares + at)
            return [total + x for x, total in zip(found, totals, strict=True)]

        totals = k.fold(0, num_groups, [k.scalar(0.0, kind)] * UNROLL, share)
        factor = k.element(k.exp(k.broadcast(before - now, p)), 0)
        total = memory.load(local.totals + j) * factor + k.sum(reduce(operator.add, totals))
        for value, at in ((now, local.maxima), (total, local.totals), (factor, local.factors)):
            memory.store(value, at + j)

    def _starts(self, chunk: Chunk, position: Scalar) -> tuple[Scalar, Scalar]:
        """Of the keys and of the values in the page that holds a position."""
        return self.layout.starts(self.page(chunk.row, position), chunk.layer, chunk.head)

    def _shares_at(self, local: Local, j: Scalar | int) -> Scalar:
        """Where a query's shares begin, in elements of their own type."""
        return (local.scores + j * CHUNK) * (4 // ITEM_BYTES[self._other])

    def _weigh(self, local: Local, chunk: Chunk, queries: range, num_pages: Scalar) -> None:
        """Add the values of a chunk, times their shares, to what is kept of the chunks before."""
        k, d, layout = self.k, self.config.head_dim, self.layout
        lanes, u = layout.head_lanes, layout.operand.unit
        width = 2 if d // lanes % 2 == 0 else 1
        memory = self.memory.local["f32"]
        with k.loop(0, d // lanes, width) as tile:
            at = [local.values + j * d + (tile + t) * lanes for j in queries for t in range(width)]
            factors = [k.broadcast(memory.load(local.factors + j), lanes) for j in queries]
            kept = [memory.load_vector(a, lanes) * factors[i // width] for i, a in enumerate(at)]

            def add_page(page: Scalar, *sums: Scalar) -> list[Scalar]:
                _, values = self._starts(chunk, chunk.start + page * layout.page_size)
                starts = [values // u + (tile + t) * lanes for t in range(width)]
                cache = self.memory.cache[layout.operand.unit_dtype]
                streams = Streams(cache, layout.operand, starts, d, lanes)
                rows = [(self._shares_at(local, j) + page * layout.page_size) // u for j in queries]
                units = self.memory.local[self._units]
                return product(k, streams, units, rows, layout.page_size // u, sums)

            for value, a in zip(k.fold(0, num_pages, kept, add_page), at, strict=True):
                memory.store_vector(value, a)

    def _finish(
        self, local: Local, j: Scalar, row: Scalar, query: Scalar, split: Scalar | None
    ) -> None:
        """What became of a query: as activations, or to be combined with other splits."""
        k, d, lanes, memory = self.k, self.config.head_dim, self._lanes, self.memory
        largest, total = (memory.local["f32"].load(at + j) for at in (local.maxima, local.totals))
        step = self._step

        def values(i: Scalar) -> list[Scalar]:
            start = local.values + j * d + i
            return [
                memory.local["f32"].load_vector(start + n, lanes) for n in range(0, step, lanes)
            ]

        if split is None:
            inverse = k.broadcast(k.scalar(1.0, "f32") / total, lanes)
            with k.loop(0, d, step) as i:
                memory.act.store([x * inverse for x in values(i)], row, query * d + i)
            return
        assert memory.splits
        to = self._split_at(row, split, query)
        memory.splits.totals.store(largest, to * 2)
        memory.splits.totals.store(total, to * 2 + 1)
        with k.loop(0, d, step) as i:
            for n, value in enumerate(values(i)):
                memory.splits.values.store_vector(value, to * d + i + n * lanes)

    def _split_at(self, row: Scalar, split: Scalar, query: Scalar) -> Scalar:
        assert self.memory.splits
        return (row * self.memory.splits.most + split) * self.config.num_heads + query

    def combine(self, row: Scalar) -> None:
        """The attention of a row, of all its splits, as activations."""
        k, lanes, d, of_splits = self.k, self._lanes, self.config.head_dim, self.memory.splits
        assert of_splits
        splits = (self.position(row) + SPLIT) // SPLIT
        zero, lowest = k.scalar(0.0, "f32"), k.scalar(MASKED, "f32")
        totals = of_splits.totals
        with k.loop(0, self.config.num_heads) as head:

            def at(split: Scalar, head: Scalar = head) -> Scalar:
                return self._split_at(row, split, head)

            def larger(split: Scalar, top: Scalar) -> list[Scalar]:
                return [top.maximum(totals.load(at(split) * 2))]

            [top] = k.fold(0, splits, [lowest], larger)

            def weight(split: Scalar, top: Scalar = top) -> Scalar:
                return (totals.load(at(split) * 2) - top).math("exp")

            def add_total(split: Scalar, total: Scalar) -> list[Scalar]:
                return [total + weight(split) * totals.load(at(split) * 2 + 1)]

            [total] = k.fold(0, splits, [zero], add_total)
            inverse = k.broadcast(k.scalar(1.0, "f32") / total, lanes)
            with k.loop(0, d, self._step) as i:

                def add(split: Scalar, *sums: Scalar, i: Scalar = i) -> list[Scalar]:
                    share, start = k.broadcast(weight(split), lanes), at(split) * d + i
                    loaded = [
                        of_splits.values.load_vector(start + j * lanes, lanes)
                        for j in range(len(sums))
                    ]
                    return [k.fma(x, share, s) for x, s in zip(loaded, sums, strict=True)]

                none = k.scalar(0.0, vector_type(lanes, "f32"))
                sums = k.fold(0, splits, [none] * (self._step // lanes), add)
                self.memory.act.store([x * inverse for x in sums], row, head * d + i)
