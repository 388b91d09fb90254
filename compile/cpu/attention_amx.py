"""Attention of prefill with Intel's tile registers (AMX): ROWS_PER_TASK rows of a sequence at once.

The cache holds bf16 pairs of features of 16 keys, and pairs of values, just as tiles need them. A
task is one query head of a group of rows, so that few rows too are work for several threads.
Values of 32 positions are a tile, but those of a page need not follow those of another: so they are
copied, once for all rows of a task.
"""

from __future__ import annotations

from collections.abc import Callable

from compile.cpu.amx import COLUMNS, LINE_BYTES, LINES, TileRegisters
from compile.cpu.attention import Attention, AttentionMemory, ContextSlice
from compile.cpu.kernel import KernelBuilder
from compile.cpu.kv_layout import KVLayout
from compile.cpu.softmax_tiles import ROWS, SLICE, TILE, TileSoftmax
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from compile.target import Vectors

ROWS_PER_TASK = 2 * ROWS  # which read keys and values from the first cache, but the first time
TILE_BYTES = 4 * TILE
# Registers of scores: sums, keys, queries. Of values: sums, softmax weights, values.
TOTALS, KEYS, QUERIES = (0, 1), (2, 3), (4, 5, 6, 7)
SUMS, WEIGHTS, VALUES = (0, 1, 2, 3), (4, 5), (6, 7)


class AmxAttention(Attention):
    """A task is one query head of up to ROWS_PER_TASK rows, and their whole context."""

    rows_per_task = ROWS_PER_TASK
    takes_any_count = True

    @staticmethod
    def fits(layout: KVLayout) -> bool:
        """Whether keys are pairs of features of 16 positions, and heads are whole tiles."""
        is_tile = layout.operand.unit == 2 and layout.position_lanes == LINES
        return is_tile and layout.config.head_dim % COLUMNS == 0

    def __init__(
        self, k: KernelBuilder, layout: KVLayout, vectors: Vectors, memory: AttentionMemory,
        position: Callable[[Scalar], Scalar], page: Callable[[Scalar, Scalar], Scalar],
    ) -> None:  # fmt: skip
        super().__init__(k, layout, vectors, memory, position, page)
        self._softmax = TileSoftmax(k, memory.act, ROWS_PER_TASK, self.config.head_dim)

    def num_tasks(self, num_groups: Scalar, num_splits: Scalar) -> Scalar:
        """One for each group of rows and query head; nothing is split."""
        return num_groups * self.config.num_heads

    def task(
        self, number: Scalar, num_groups: Scalar, num_splits: Scalar
    ) -> tuple[Scalar, Scalar, Scalar | None]:
        """Its group of rows and query head. Groups of a head follow one another, so that its keys
        and values stay in a core's cache; those that see most come first, for no thread should
        begin one of them last."""
        return num_groups - number % num_groups - 1, number // num_groups, None

    @property
    def _amx(self) -> TileRegisters:
        assert self.memory.amx
        return self.memory.amx

    # Keys and values

    def store(self, start: Scalar, first: Scalar, count: Scalar, size: int, head: Scalar) -> None:
        """As `Attention.store`; stores 16 whole positions as tiles."""
        assert size == LINES
        with self.k.when(count.equals(size)):
            self._store_tile(start + first, first, head)
        with self.k.when(count.less(self.k.scalar(size, "index"))):
            super().store(start, first, count, size, head)

    def _store_tile(self, row: Scalar, position: Scalar, head: Scalar) -> None:
        """Keys and values of 16 rows as they are, to positions from `position` on, whose keys
        begin a vector of the page."""
        k, c, d, unit = self.k, self.config, self.config.head_dim, self.layout.operand.unit
        cache, pairs = self.memory.cache["i32"], vector_type(LINES, "i32")
        slot = position % self.layout.page_size
        starts = self.layout.starts(self.page(row, position), k.scalar(0, "index"), head)
        keys, values = ((start + slot * d) // unit for start in starts)
        for first in range(0, d, COLUMNS):
            lines = [self._bf16(row + r, head + c.num_heads, first, COLUMNS) for r in range(LINES)]
            for i, column in enumerate(k.transpose([k.bitcast(x, pairs) for x in lines])):
                cache.store_vector(column, keys + (first // unit + i) * LINES)
        both = [lane // 2 + lane % 2 * LINES for lane in range(2 * LINES)]
        for r in range(0, LINES, 2):
            for first in range(0, d, LINES):
                of_values = head + (c.num_heads + c.num_kv_heads)
                a, b = (self._bf16(row + (r + i), of_values, first, LINES) for i in (0, 1))
                pair = k.bitcast(k.shuffle(a, b, both), pairs)
                cache.store_vector(pair, values + (r // 2 * d + first))

    def _bf16(self, row: Scalar, head: Scalar, first: int, count: int) -> Scalar:
        """Features of a head; heads are counted through queries, keys and values."""
        at = row * self.memory.qkv_width + head * self.config.head_dim + first
        return self.memory.qkv.load_vector(at, count)

    # The context

    def attend(
        self, row: Scalar, num_rows: Scalar | int, head: Scalar, layer: Scalar,
        split: Scalar | None = None,
    ) -> None:  # fmt: skip
        """As `Attention.attend`; `head` is a query head."""
        assert isinstance(num_rows, Scalar) and split is None
        k = self.k
        self._softmax.begin()
        with k.loop(0, self._end(row, num_rows), SLICE) as start:
            context = ContextSlice(row, head // self.groups, layer, start)
            self._copy_values(context, self._num_tiles(self._end(row, num_rows), start))
            with k.loop(0, num_rows, ROWS) as first:
                count = (num_rows - first).minimum(k.scalar(ROWS, "index"))
                end = self._end(row + first, count)
                with k.when(start.less(end)):
                    self._attend_slice(context, head, first, count, self._num_tiles(end, start))
        with k.loop(0, num_rows) as r:
            self._softmax.store_result(r, row + r, head * self.config.head_dim)

    def _end(self, row: Scalar, num_rows: Scalar) -> Scalar:
        """The position behind the last one that any of these rows attends to."""
        return self.position(row + num_rows - 1) + 1

    def _num_tiles(self, end: Scalar, start: Scalar) -> Scalar:
        """Tiles of 16 positions of the slice from `start` on that lie before `end`."""
        return ((start + SLICE).minimum(end) - start + (LINES - 1)) // LINES

    def _attend_slice(
        self, context: ContextSlice, query: Scalar, first: Scalar, num_rows: Scalar, count: Scalar
    ) -> None:
        """Attention of up to ROWS rows, from `first` of the task on, to `count` tiles of keys."""
        self._score(context, query, first, count)
        with self.k.loop(0, num_rows) as r:
            last = self.position(context.row + first + r) - context.start
            self._softmax.weigh(first, r, last, count)
        self._add_values(first, (count + 1) // 2)

    def _copy_values(self, context: ContextSlice, count: Scalar) -> None:
        """Copy `count` times the values of 16 positions, and those that fill the last tile."""
        k, d, cache, space = self.k, self.config.head_dim, self.memory.cache, self._softmax.space
        to, half = self._softmax.workspace["i32"], LINES // 2
        with k.loop(0, (count + 1) // 2 * 2) as i:
            position = context.start + i * LINES
            _, values = self.starts(context, position)
            start = (values + position % self.layout.page_size * d) // 2
            tile = i // 2 * (d * LINES) + (i % 2 * (half * LINES) + space.values)
            with k.loop(0, half) as pair:
                for feature in range(0, d, LINES):
                    x = cache["i32"].load_vector(start + pair * d + feature, LINES)
                    to.store_vector(x, tile + (pair * LINES + feature * LINES))

    def _score(self, context: ContextSlice, query: Scalar, first: Scalar, count: Scalar) -> None:
        """Scores of ROWS queries from `first` of the task on, with `count` tiles of keys."""
        k, amx, d, width = self.k, self._amx, self.config.head_dim, self.memory.q_width
        cache, q, memory = self.memory.cache["bf16"], self.memory.q["bf16"], self._softmax.workspace
        start = ((context.row + first) * width + query * d) * 2
        scores, steps = self._softmax.space.scores * 4, d // COLUMNS
        stay = steps * len(TOTALS) <= len(QUERIES)  # in registers

        def load_queries(step: int) -> None:
            for n in range(len(TOTALS)):
                at = start + (n * LINES * width * 2 + step * LINE_BYTES)
                amx.load(self._queries(step, n), q, at, width * 2)

        for step in range(steps) if stay else ():
            load_queries(step)
        with k.loop(0, count) as i:
            position = context.start + i * LINES
            keys, _ = self.starts(context, position)
            at = (keys + position % self.layout.page_size * d) * 2
            for total in TOTALS:
                amx.zero(total)
            for step in range(steps):
                if not stay:
                    load_queries(step)
                key = KEYS[step % len(KEYS)]
                amx.load(key, cache, at + step * TILE_BYTES, LINE_BYTES)
                for n, total in enumerate(TOTALS):
                    amx.multiply_add(total, self._queries(step, n), key)
            for n, total in enumerate(TOTALS):
                to = i * (len(TOTALS) * TILE_BYTES) + (scores + n * TILE_BYTES)
                amx.store(total, memory["f32"], to, LINE_BYTES)

    def _queries(self, step: int, n: int) -> int:
        """The register of a tile of queries."""
        return QUERIES[(step * len(TOTALS) + n) % len(QUERIES)]

    def _add_values(self, first: Scalar, count: Scalar) -> None:
        """Add `count` times 32 values, times the softmax weights of ROWS rows from `first` on."""
        k, amx, d, space = self.k, self._amx, self.config.head_dim, self._softmax.space
        memory = self._softmax.workspace["f32"]
        for feature in range(0, d, 2 * LINES):
            at = [
                (first * d + (space.sums + i // 2 * LINES * d + feature + i % 2 * LINES)) * 4
                for i in range(len(SUMS))
            ]
            for total, to in zip(SUMS, at, strict=True):
                amx.load(total, memory, to, d * 4)
            with k.loop(0, count) as i:
                weights = i * (2 * TILE_BYTES) + space.weights * 4
                values = i * (d * LINE_BYTES) + (space.values * 4 + feature * LINE_BYTES)
                for n in (0, 1):
                    amx.load(WEIGHTS[n], memory, weights + n * TILE_BYTES, LINE_BYTES)
                    amx.load(VALUES[n], memory, values + n * TILE_BYTES, LINE_BYTES)
                for j, total in enumerate(SUMS):
                    amx.multiply_add(total, WEIGHTS[j // 2], VALUES[j % 2])
            for total, to in zip(SUMS, at, strict=True):
                amx.store(total, memory, to, d * 4)
