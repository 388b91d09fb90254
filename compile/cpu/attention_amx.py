"""Attention of prefill with Intel's tile registers (AMX): ROWS rows of a sequence at once.

Pairs of features of 16 keys, and pairs of values, lie in the cache as tiles want them. Names and
shapes as in `cpu_attention`. A task is one query head of a group of rows, so that few rows too are
work for several threads.
"""

from __future__ import annotations

from compile.cpu.amx import COLUMNS, LINE_BYTES, LINES, WHOLE, Config, Tiles
from compile.cpu.attention import CHUNK, Attention, Chunk, Local
from compile.cpu.kernel import vector_type
from compile.cpu.kv_layout import KVLayout
from compile.mlir.builder import Scalar

ROWS = 2 * LINES  # two tiles, so that keys and values are read half as often
SUMS, X, OTHERS = (0, 1, 2, 3), (4, 5), (6, 7)  # registers; of X for queries and their shares
HALF = Config({**dict.fromkeys(X, (LINES, LINE_BYTES // 2)),
               **dict.fromkeys(OTHERS, (LINES // 2, LINE_BYTES))})  # fmt: skip


class TiledAttention(Attention):
    """Writes `attend_rows`, of up to ROWS rows."""

    def __init__(self, *arguments: object, tiles: Tiles) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._tiles = tiles
        # Positions whose values are one tile, which lie in one page.
        self._positions = 2 * LINES if self.layout.page_size % (2 * LINES) == 0 else LINES
        self._of_values = WHOLE if self._positions == 2 * LINES else HALF

    @property
    def most_queries(self) -> int:
        return ROWS

    @staticmethod
    def fits(layout: KVLayout) -> bool:
        """Whether keys are pairs of features of 16 positions, and heads are whole tiles."""
        is_tile = layout.operand.unit == 2 and layout.position_lanes == LINES
        head_dim = layout.config.head_dim
        return is_tile and head_dim % COLUMNS == 0

    def store_tile(self, row: Scalar, position: Scalar, head: Scalar) -> None:
        """Keys and values of 16 rows as they are, to where the 16 positions from `position` on,
        which begin a vector, lie in their page."""
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
        """Features of a head of queries, keys or values."""
        at = row * self.memory.qkv_width + head * self.config.head_dim + first
        return self.memory.qkv.load_vector(at, count)

    def attend_rows(
        self, workgroup: Scalar, row: Scalar, num_rows: Scalar, query: Scalar, layer: Scalar
    ) -> None:
        """Attention of one query head of rows of one sequence to all of their context."""
        local = self._open(workgroup, ROWS)
        high = self.position(row + (num_rows - 1)) + 1
        with self.k.loop(0, high, CHUNK) as start:
            chunk = Chunk(row, query // self.groups, layer, start)
            count = ((start + CHUNK).minimum(high) - start + (LINES - 1)) // LINES
            with self.k.loop(0, (count + 1) // 2) as i:
                self._score_tiles(local, chunk, query, i)
            with self.k.loop(0, num_rows) as r:
                self._soften(local, r, self.position(row + r) - start, count)
                self._correct(local, r)
            self._configure(self._of_values)
            self._weigh_tiles(local, chunk, count)
            self._configure(WHOLE)
        with self.k.loop(0, num_rows) as r:
            self._finish(local, r, row + r, query, None)

    def _score_tiles(self, local: Local, chunk: Chunk, query: Scalar, i: Scalar) -> None:
        """Scores of the chunk's i-th 32 positions."""
        t, d, page = self._tiles, self.config.head_dim, self.layout.page_size
        cache, q = self.memory.cache["bf16"], self.memory.q["bf16"]
        first, keys = i * (2 * LINES), []
        for n in (0, 1):
            position = chunk.start + first + n * LINES
            start, _ = self._starts(chunk, position)
            keys.append((start + position % page * d) * 2)
        for total in SUMS:
            t.zero(total)
        for step in range(d // COLUMNS):
            for n in (0, 1):
                x = ((chunk.row + n * LINES) * self.width + query * d) * 2 + step * LINE_BYTES
                t.load(X[n], q, x, self.width * 2)
                at = keys[n] + step * (LINES * LINE_BYTES)
                t.load(OTHERS[n], cache, at, LINE_BYTES)
            self._multiply_add()
        for i_sum, total in enumerate(SUMS):
            row, column = i_sum // 2 * LINES, i_sum % 2 * LINES
            to = (local.scores + row * CHUNK + first + column) * 4
            t.store(total, self.memory.local["f32"], to, CHUNK * 4)

    def _configure(self, config: Config) -> None:
        if self._of_values != WHOLE:
            self._tiles.open(config)

    def _multiply_add(self) -> None:
        for i, total in enumerate(SUMS):
            self._tiles.multiply_add(total, X[i // 2], OTHERS[i % 2])

    def _correct(self, local: Local, j: Scalar) -> None:
        """Values of a query so far, times its factor."""
        k, memory, lanes = self.k, self.memory.local["f32"], LINES
        factor = k.broadcast(memory.load(local.factors + j), lanes)
        with k.loop(0, self.config.head_dim, lanes) as i:
            at = local.values + j * self.config.head_dim + i
            memory.store_vector(memory.load_vector(at, lanes) * factor, at)

    def _weigh_tiles(self, local: Local, chunk: Chunk, count: Scalar) -> None:
        """Add `count` times 16 values, times the shares of all rows."""
        k, t, d, page = self.k, self._tiles, self.config.head_dim, self.layout.page_size
        memory, cache = self.memory.local, self.memory.cache["bf16"]
        for first in range(0, d, 2 * LINES):
            at = [
                (local.values + i // 2 * LINES * d + first + i % 2 * LINES) * 4
                for i in range(len(SUMS))
            ]
            for total, to in zip(SUMS, at, strict=True):
                t.load(total, memory["f32"], to, d * 4)
            with k.loop(0, (count * LINES + (self._positions - 1)) // self._positions) as i:
                offset = i * self._positions
                position = chunk.start + offset
                _, start = self._starts(chunk, position)
                values = (start + position % page * d) * 2 + first * 4
                for n in (0, 1):
                    shares = (self._shares_at(local, n * LINES) + offset) * 2
                    t.load(X[n], memory["bf16"], shares, CHUNK * 4)
                    t.load(OTHERS[n], cache, values + n * LINE_BYTES, d * 4)
                self._multiply_add()
            for total, to in zip(SUMS, at, strict=True):
                t.store(total, memory["f32"], to, d * 4)
