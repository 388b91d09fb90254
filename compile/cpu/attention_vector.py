"""Attention with vectors: up to ROWS_PER_TASK rows of a sequence, for one KV head at once."""

from __future__ import annotations

from collections.abc import Callable

from compile.cpu.attention import Attention, AttentionMemory, ContextSlice
from compile.cpu.kernel import KernelBuilder
from compile.cpu.kv_layout import KVLayout
from compile.cpu.operands import LINE_BYTES, Streams, product
from compile.cpu.softmax import SLICE, SPLIT, Softmax, Workspace
from compile.formats.layout import ITEM_BYTES
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from compile.target import Vectors

ROWS_PER_TASK = 4


class VectorAttention(Attention):
    """A task is one KV head of one or ROWS_PER_TASK rows, and one split of their context."""

    rows_per_task = ROWS_PER_TASK
    takes_any_count = False

    def __init__(
        self, k: KernelBuilder, layout: KVLayout, vectors: Vectors, memory: AttentionMemory,
        position: Callable[[Scalar], Scalar], page: Callable[[Scalar, Scalar], Scalar],
    ) -> None:  # fmt: skip
        super().__init__(k, layout, vectors, memory, position, page)
        max_queries = (1 if memory.splits else ROWS_PER_TASK) * self.groups
        self.softmax = Softmax(k, layout, memory.act, memory.splits, position, max_queries)

    def num_tasks(self, num_groups: Scalar, num_splits: Scalar) -> Scalar:
        """One for each group of rows, split of the context and KV head."""
        return num_groups * num_splits * self.config.num_kv_heads

    def task(
        self, number: Scalar, num_groups: Scalar, num_splits: Scalar
    ) -> tuple[Scalar, Scalar, Scalar | None]:
        """Its group of rows, KV head, and in decode its split of the context."""
        heads = self.config.num_kv_heads
        head, group = number % heads, number // heads // num_splits
        return group, head, number // heads % num_splits if self.memory.splits else None

    def attend(
        self, row: Scalar, num_rows: Scalar | int, head: Scalar, layer: Scalar,
        split: Scalar | None = None,
    ) -> None:  # fmt: skip
        """As `Attention.attend`, for all query heads of a KV head."""
        assert isinstance(num_rows, int)
        k = self.k
        space = self.softmax.open(num_rows * self.groups)
        low, high = k.scalar(0, "index"), self.position(row + (num_rows - 1)) + 1
        if split is not None:
            low = split * SPLIT
            high = (low + SPLIT).minimum(high)
        with k.loop(low, high, SLICE) as start:
            self._attend_slice(space, ContextSlice(row, head, layer, start), num_rows, high)
        with k.loop(0, num_rows * self.groups) as j:
            query = head * self.groups + j % self.groups
            self.softmax.store_result(space, j, row + j // self.groups, query, split)

    def _attend_slice(
        self, space: Workspace, context: ContextSlice, num_rows: int, high: Scalar
    ) -> None:
        k, page_size, start = self.k, self.layout.page_size, context.start
        queries, most = num_rows * self.groups, self.vectors.max_rows
        end = (start + SLICE).minimum(high)
        num_pages = (end - start + (page_size - 1)) // page_size
        num_pairs = (num_pages * (page_size // self.layout.position_lanes) + 1) // 2
        batches = [range(i, min(i + most, queries)) for i in range(0, queries, most)]
        with k.loop(0, num_pairs) as pair:
            if num_rows == 1:  # a single row waits for memory
                self._prefetch(context, pair)
            for batch in batches:
                self._score(space, context, batch, pair)
        with k.loop(0, queries) as j:
            last = self.position(context.row + j // self.groups) - start
            self.softmax.online_softmax(space, j, last, num_pairs * 2)
        for batch in batches:
            self._accumulate_values(space, context, batch, num_pages)

    def _prefetch(self, context: ContextSlice, pair: Scalar) -> None:
        """Prefetch keys of the next pair of vectors and values of this one: pages lie far apart."""
        p, cache = self.layout.position_lanes, self.memory.cache[self.layout.operand.dtype]
        size = p * self.config.head_dim
        for t in (0, 1):
            this = context.start + (pair * 2 + t) * p
            [keys, _], [_, values] = (self.starts(context, at) for at in (this + 2 * p, this))
            offset = this % self.layout.page_size * self.config.head_dim
            for line in range(0, size, LINE_BYTES // ITEM_BYTES[cache.dtype]):
                cache.prefetch(keys + (offset + line))
                cache.prefetch(values + (offset + line))

    def _score(self, space: Workspace, context: ContextSlice, queries: range, pair: Scalar) -> None:
        """Scores of two vectors of p positions [queries, 2 * p]."""
        layout, d = self.layout, self.config.head_dim
        p, u, groups = layout.position_lanes, layout.operand.unit, self.groups
        starts = []
        for t in (0, 1):
            position = context.start + (pair * 2 + t) * p
            first, _ = self.starts(context, position)
            starts.append((first + position % layout.page_size // p * (d * p)) // u)
        cache = self.memory.cache[layout.operand.unit_dtype]
        keys = Streams(cache, layout.operand, starts, p, p)
        q, width = self.memory.q[self._unit_dtype], self.memory.q_width
        rows = [
            ((context.row + j // groups) * width + (context.head * groups + j % groups) * d) // u
            for j in queries
        ]
        zero = self.k.scalar(0.0, vector_type(p, "f32"))
        sums = product(self.k, keys, q, rows, d // u, [zero] * (2 * len(rows)))
        for i, value in enumerate(sums):
            at = space.scores + (queries[i // 2]) * SLICE + (pair * 2 + i % 2) * p
            self.softmax.workspace["f32"].store_vector(value, at)

    @property
    def _unit_dtype(self) -> str:
        """The type of memory with a unit of queries or softmax weights in an element."""
        return "i32" if self.layout.operand.unit == 2 else self.softmax.weight_dtype

    def _accumulate_values(
        self, space: Workspace, context: ContextSlice, queries: range, num_pages: Scalar
    ) -> None:
        """Add a slice's values times their softmax weights to the corrected sums of before."""
        k, d, layout = self.k, self.config.head_dim, self.layout
        lanes, u = layout.head_lanes, layout.operand.unit
        width = 2 if d // lanes % 2 == 0 else 1  # vectors of features at once
        memory = self.softmax.workspace["f32"]
        with k.loop(0, d // lanes, width) as first:
            at = [space.values + j * d + (first + t) * lanes for j in queries for t in range(width)]
            factors = [k.broadcast(memory.load(space.factors + j), lanes) for j in queries]
            kept = [memory.load_vector(a, lanes) * factors[i // width] for i, a in enumerate(at)]

            def add_page(page: Scalar, *sums: Scalar, first: Scalar = first) -> list[Scalar]:
                _, values = self.starts(context, context.start + page * layout.page_size)
                starts = [values // u + (first + t) * lanes for t in range(width)]
                cache = self.memory.cache[layout.operand.unit_dtype]
                streams = Streams(cache, layout.operand, starts, d, lanes)
                weights = (
                    (self.softmax.weights_at(space, j) + page * layout.page_size) // u
                    for j in queries
                )
                units = self.softmax.workspace[self._unit_dtype]
                return product(k, streams, units, [*weights], layout.page_size // u, sums)

            for value, a in zip(k.fold(0, num_pages, kept, add_page), at, strict=True):
                memory.store_vector(value, a)
