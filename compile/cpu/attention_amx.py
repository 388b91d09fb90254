"""Attention of prefill with Intel's tile registers (AMX): ROWS_PER_TASK rows of a sequence at once.

The cache holds bf16 pairs of features of 16 keys, and pairs of values, just as tiles need them. A
task is one query head of a group of rows, so that few rows too are work for several threads.
"""

from __future__ import annotations

from compile.cpu.amx import COLUMNS, LINE_BYTES, LINES, TileConfig, TileRegisters
from compile.cpu.attention import Attention, ContextSlice
from compile.cpu.kv_layout import KVLayout
from compile.cpu.softmax import SLICE, Workspace
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type

ROWS_PER_TASK = 2 * LINES  # two tiles, so that keys and values are read half as often
# Registers: sums; queries or softmax weights; keys or values.
SUMS, X, OTHERS = (0, 1, 2, 3), (4, 5), (6, 7)
HALF = TileConfig({**dict.fromkeys(X, (LINES, LINE_BYTES // 2)),
                   **dict.fromkeys(OTHERS, (LINES // 2, LINE_BYTES))})  # fmt: skip


class AmxAttention(Attention):
    """A task is one query head of up to ROWS_PER_TASK rows, and their whole context."""

    rows_per_task = ROWS_PER_TASK
    takes_any_count = True

    @staticmethod
    def fits(layout: KVLayout) -> bool:
        """Whether keys are pairs of features of 16 positions, and heads are whole tiles."""
        is_tile = layout.operand.unit == 2 and layout.position_lanes == LINES
        return is_tile and layout.config.head_dim % COLUMNS == 0

    @property
    def max_queries(self) -> int:
        """Queries of one task, at most."""
        return ROWS_PER_TASK

    def num_tasks(self, num_groups: Scalar, num_splits: Scalar) -> Scalar:
        """One for each group of rows and query head; nothing is split."""
        return num_groups * self.config.num_heads

    def task(self, number: Scalar, num_splits: Scalar) -> tuple[Scalar, Scalar, Scalar | None]:
        """Its group of rows and query head."""
        query, group = number % self.config.num_heads, number // self.config.num_heads
        return group, query, None

    @property
    def _amx(self) -> TileRegisters:
        assert self.memory.amx
        return self.memory.amx

    @property
    def _positions(self) -> int:
        """Positions whose values are one tile; they must lie in one page."""
        return 2 * LINES if self.layout.page_size % (2 * LINES) == 0 else LINES

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
        space = self.softmax.open(ROWS_PER_TASK)
        high = self.position(row + (num_rows - 1)) + 1
        with self.k.loop(0, high, SLICE) as start:
            context = ContextSlice(row, head // self.groups, layer, start)
            count = ((start + SLICE).minimum(high) - start + (LINES - 1)) // LINES
            with self.k.loop(0, (count + 1) // 2) as i:
                self._score(space, context, head, i)
            with self.k.loop(0, num_rows) as r:
                self.softmax.online_softmax(space, r, self.position(row + r) - start, count)
                self._correct(space, r)
            if self._positions == LINES:
                self._amx.configure(HALF)
            self._accumulate_values(space, context, count)
            if self._positions == LINES:
                self._amx.configure()
        with self.k.loop(0, num_rows) as r:
            self.softmax.store_result(space, r, row + r, head, None)

    def _score(self, space: Workspace, context: ContextSlice, query: Scalar, i: Scalar) -> None:
        """Scores of the slice's i-th 32 positions [ROWS_PER_TASK, 32]."""
        amx, d, page = self._amx, self.config.head_dim, self.layout.page_size
        cache, q, width = self.memory.cache["bf16"], self.memory.q["bf16"], self.memory.q_width
        first, keys = i * (2 * LINES), []
        for n in (0, 1):
            position = context.start + first + n * LINES
            start, _ = self.starts(context, position)
            keys.append((start + position % page * d) * 2)
        for total in SUMS:
            amx.zero(total)
        for step in range(d // COLUMNS):
            for n in (0, 1):
                x = ((context.row + n * LINES) * width + query * d) * 2 + step * LINE_BYTES
                amx.load(X[n], q, x, width * 2)
                at = keys[n] + step * (LINES * LINE_BYTES)
                amx.load(OTHERS[n], cache, at, LINE_BYTES)
            self._multiply_add()
        for i_sum, total in enumerate(SUMS):
            row, column = i_sum // 2 * LINES, i_sum % 2 * LINES
            to = (space.scores + row * SLICE + first + column) * 4
            amx.store(total, self.softmax.workspace["f32"], to, SLICE * 4)

    def _multiply_add(self) -> None:
        for i, total in enumerate(SUMS):
            self._amx.multiply_add(total, X[i // 2], OTHERS[i % 2])

    def _correct(self, space: Workspace, j: Scalar) -> None:
        """Multiply the sums of query j so far by its factor."""
        k, memory, lanes = self.k, self.softmax.workspace["f32"], LINES
        factor = k.broadcast(memory.load(space.factors + j), lanes)
        with k.loop(0, self.config.head_dim, lanes) as i:
            at = space.values + j * self.config.head_dim + i
            memory.store_vector(memory.load_vector(at, lanes) * factor, at)

    def _accumulate_values(self, space: Workspace, context: ContextSlice, count: Scalar) -> None:
        """Add `count` times 16 values, times the softmax weights of all rows."""
        k, amx, d, page = self.k, self._amx, self.config.head_dim, self.layout.page_size
        memory, cache = self.softmax.workspace, self.memory.cache["bf16"]
        for first in range(0, d, 2 * LINES):
            at = [
                (space.values + i // 2 * LINES * d + first + i % 2 * LINES) * 4
                for i in range(len(SUMS))
            ]
            for total, to in zip(SUMS, at, strict=True):
                amx.load(total, memory["f32"], to, d * 4)
            with k.loop(0, (count * LINES + (self._positions - 1)) // self._positions) as i:
                offset = i * self._positions
                position = context.start + offset
                _, start = self.starts(context, position)
                values = (start + position % page * d) * 2 + first * 4
                for n in (0, 1):
                    weights = (self.softmax.weights_at(space, n * LINES) + offset) * 2
                    amx.load(X[n], memory["bf16"], weights, SLICE * 4)
                    amx.load(OTHERS[n], cache, values + n * LINE_BYTES, d * 4)
                self._multiply_add()
            for total, to in zip(SUMS, at, strict=True):
                amx.store(total, memory["f32"], to, d * 4)
