"""Attention of prefill with Intel's tile registers (AMX): 16 rows of a sequence at once.

Pairs of features of 16 keys, and pairs of values, lie in the cache as tiles want them. Names and
shapes as in `cpu_attention`. A task is one query head of a group of rows, so that few rows too are
work for several threads.
"""

from __future__ import annotations

from compile.cpu_attention import CHUNK, Attention, Chunk, KVLayout, Local
from compile.kernel import vector_type
from compile.mlir import Scalar
from compile.tiles import COLUMNS, LINE_BYTES, LINES, Config, Tiles

SUM, X = 0, 1  # registers of scores, and of queries; those of keys:
KEYS = (2, 3, 6, 7)
SHARES, VALUES = 4, 5  # 16 positions; the sums of values take registers 0 to 3
CONFIG = Config({SHARES: (LINES, LINE_BYTES // 2), VALUES: (LINES // 2, LINE_BYTES)})


class TiledAttention(Attention):
    """Writes `attend_rows`, of up to 16 rows."""

    def __init__(self, *arguments: object, tiles: Tiles) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._tiles = tiles

    @property
    def most_queries(self) -> int:
        return LINES

    @staticmethod
    def fits(layout: KVLayout) -> bool:
        """Whether keys are pairs of features of 16 positions, and heads are whole tiles."""
        is_tile = layout.operand.unit == 2 and layout.position_lanes == LINES
        head_dim = layout.config.head_dim
        return is_tile and head_dim % COLUMNS == 0 and head_dim <= COLUMNS * len(KEYS)

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
        local = self._open(workgroup, LINES)
        high = self.position(row + (num_rows - 1)) + 1
        self._tiles.open(CONFIG)
        with self.k.loop(0, high, CHUNK) as start:
            chunk = Chunk(row, query // self.groups, layer, start)
            count = ((start + CHUNK).minimum(high) - start + (LINES - 1)) // LINES
            with self.k.loop(0, count) as i:
                self._score_tile(local, chunk, query, i)
            with self.k.loop(0, num_rows) as r:
                self._soften(local, r, self.position(row + r) - start, count)
                self._correct(local, r)
            self._weigh_tiles(local, chunk, count)
        self._tiles.open()
        with self.k.loop(0, num_rows) as r:
            to = self._partial_at(row + r, self.k.scalar(0, "index"), query)
            self._store_query(local, r, to)

    def _score_tile(self, local: Local, chunk: Chunk, query: Scalar, i: Scalar) -> None:
        """Scores [16 rows] of the chunk's i-th 16 positions."""
        t, d, page = self._tiles, self.config.head_dim, self.layout.page_size
        position, steps = chunk.start + i * LINES, d // COLUMNS
        keys, _ = self._starts(chunk, position)
        at = (keys + position % page * d) * 2
        cache, q = self.memory.cache["bf16"], self.memory.q["bf16"]
        for step in range(steps):
            t.load(KEYS[step], cache, at + step * (LINES * LINE_BYTES), LINE_BYTES)
        t.zero(SUM)
        x = (chunk.row * self.width + query * d) * 2
        for step in range(steps):
            t.load(X, q, x + step * LINE_BYTES, self.width * 2)
            t.multiply_add(SUM, X, KEYS[step])
        t.store(SUM, self.memory.local["f32"], (local.scores + i * LINES) * 4, CHUNK * 4)

    def _correct(self, local: Local, j: Scalar) -> None:
        """Values of a query so far, times its factor."""
        k, memory, lanes = self.k, self.memory.local["f32"], LINES
        factor = k.broadcast(memory.load(local.factors + j), lanes)
        with k.loop(0, self.config.head_dim, lanes) as i:
            at = local.values + j * self.config.head_dim + i
            memory.store_vector(memory.load_vector(at, lanes) * factor, at)

    def _weigh_tiles(self, local: Local, chunk: Chunk, count: Scalar) -> None:
        """Add `count` times 16 values, times the shares of 16 rows."""
        t, d, page = self._tiles, self.config.head_dim, self.layout.page_size
        memory, cache = self.memory.local, self.memory.cache["bf16"]
        for first in range(0, d, 4 * LINES):
            width = min(4, (d - first) // LINES)
            values = [(local.values + first + f * LINES) * 4 for f in range(width)]
            for f, at in enumerate(values):
                t.load(f, memory["f32"], at, d * 4)
            with self.k.loop(0, count) as i:
                position = chunk.start + i * LINES
                shares = (self._shares_at(local) + i * LINES) * 2
                t.load(SHARES, memory["bf16"], shares, CHUNK * 2)
                _, start = self._starts(chunk, position)
                at = (start + position % page * d) * 2 + first * 4
                for f in range(width):
                    t.load(VALUES, cache, at + f * LINE_BYTES, d * 4)
                    t.multiply_add(f, SHARES, VALUES)
            for f, at in enumerate(values):
                t.store(f, memory["f32"], at, d * 4)
