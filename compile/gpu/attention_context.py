"""The context of prefill's attention on GPUs: from a cache's pages to LDS, and multiplied there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from compile.gpu.attention_tiles import GROUPS, QUERIES, Queries, Sizes, joined, of_all_parts
from compile.gpu.kernel import THREADS, ThreadBuilder
from compile.gpu.pages import Pages
from compile.gpu.tiles import SIDE, Panel
from compile.gpu.unpack import CHUNK
from compile.mlir.values import Scalar

Loaded = tuple[list[Scalar], list[list[Scalar]]]  # a thread's keys, and values of tokens


class Context:
    """The tokens that queries from `first` on attend to, as far as position `end`, exclusive."""

    def __init__(self, k: ThreadBuilder, sizes: Sizes, pages: Pages, first: Scalar) -> None:
        assert pages.num_tokens
        self._k, self._sizes, self._pages, heads = k, sizes, pages, sizes.heads
        self._head, self._row = k.workgroup(1), k.workgroup(2)
        self._memory = k.shared(sizes.buffer * sizes.buffers, heads.kv_dtype)
        start, end = (x.load(self._row).to("i32") for x in (pages.starts, pages.ends))
        last = ((first + (QUERIES - 1)) // heads.group).minimum(pages.num_tokens - 1)
        last = (start + last.to("i32")).minimum(end - 1)
        self._has_any = (start + (first // heads.group).to("i32")).less(end)
        self.end = self._has_any.select(last + 1, k.scalar(0, "i32"))
        self._last = self.end.largest(k.scalar(1, "i32")) - 1
        self._keys = [_Unit.of_keys(k, sizes, i) for i in range(0, sizes.key_units, THREADS)]
        self._values = [_Unit.of_values(k, sizes, i) for i in range(0, sizes.value_units, THREADS)]
        self.num_pages = len(self._keys) + len(self._values)

    # From the cache to LDS

    def pages_of(self, position: Scalar) -> list[Scalar]:
        """The page of each of the thread's tokens of the chunk at a position; page 0, which is
        always there, if the queries attend to nothing: such a row may have no page."""
        positions = [
            (position + unit.token).minimum(self._last) for unit in (*self._keys, *self._values)
        ]
        none = self._k.scalar(0, "i32")
        return [self._has_any.select(self._pages.page_of(self._row, at), none) for at in positions]

    def load(self, position: Scalar, pages: Sequence[Scalar]) -> Loaded:
        """The thread's part of the chunk at a position; instead of tokens behind the last one, that
        one. Then there are no others, which may be NaN, in the product with values."""
        k, count = self._k, len(self._keys)
        keys = [
            self._load(position + unit.token, page, unit, is_value=False)
            for unit, page in zip(self._keys, pages[:count], strict=True)
        ]
        values = [
            [
                self._load(position + unit.token + i, page, unit, is_value=True)
                for i in range(self._sizes.tokens)
            ]
            for unit, page in zip(self._values, pages[count:], strict=True)
        ]
        if self._sizes.width > self._sizes.heads.head_dim:
            zero, last = k.scalar(0.0, keys[0].dtype), k.scalar(self._sizes.chunks, "index")
            keys = [
                unit.chunk.less(last).select(key, zero)
                for unit, key in zip(self._keys, keys, strict=True)
            ]
        return keys, values

    def _load(self, position: Scalar, page: Scalar, unit: _Unit, *, is_value: bool) -> Scalar:
        start = unit.chunk.minimum(self._sizes.chunks - 1) * CHUNK
        at = self._pages.at(page, position.minimum(self._last), self._head, start)
        return self._pages.load(self._pages.value_at(at) if is_value else at, CHUNK)

    def store(self, loaded: Loaded, start: Scalar) -> None:
        """Store that into the buffer that begins at `start`."""
        k, (keys, values) = self._k, loaded
        for unit, key in zip(self._keys, keys, strict=True):
            with k.when(unit.is_there) if unit.is_there else nullcontext():
                self._key_panel(start).store(key, unit.token.to("index"), unit.chunk)
        panel = self._value_panel(start)
        for unit, of_tokens in zip(self._values, values, strict=True):
            with k.when(unit.is_there) if unit.is_there else nullcontext():
                for i, numbers in enumerate(_transposed(k, of_tokens)):
                    token = unit.token.to("index")
                    at = panel.at(unit.chunk * CHUNK + i, token // CHUNK)
                    self._memory.store_vector(numbers, at + token % CHUNK)

    def _key_panel(self, start: Scalar) -> Panel:
        return Panel(self._k, self._memory, start, self._sizes.pitch)

    def _value_panel(self, start: Scalar) -> Panel:
        """Features are rows."""
        return ValuePanel(self._k, self._memory, start + self._sizes.keys, self._sizes.chunk)

    # Products

    def _operands(self, panel: Panel, row: Scalar, first: int) -> list[Scalar]:
        """A lane's operands of a step, from chunk `first` of a row on."""
        k, instruction = self._k, self._sizes.instruction
        lane = k.thread() % k.subgroup
        chunks = [k.as_index(chunk) + first for chunk in instruction.chunks(lane)]
        return instruction.operands(
            k, [self._memory.load_vector(panel.at(row, chunk), CHUNK) for chunk in chunks]
        )

    def scores(self, start: Scalar, queries: Queries) -> list[list[Scalar]]:
        """Of each block of queries and each step, the scores of a lane's 8 tokens, unscaled."""
        k, sizes, panel = self._k, self._sizes, self._key_panel(start)
        instruction, count = sizes.instruction, sizes.blocks_of_step
        row = instruction.side_by_side(k.thread() % SIDE, CHUNK)
        rows = [
            row + (step * instruction.step + i * instruction.sums)
            for step in range(sizes.steps)
            for i in range(count)
        ]
        zero = k.scalar(0.0, f"vector<{instruction.sums}xf32>")
        sums = [[zero] * len(rows) for _ in range(sizes.blocks)]
        for n in range(sizes.width // instruction.step):
            k.schedule_barrier()
            for i, row in enumerate(rows):
                keys = self._operands(panel, row, n * instruction.step // CHUNK)
                for of_block, operands in zip(sums, queries.operands, strict=True):
                    for key, query in zip(keys, operands[n], strict=True):
                        of_block[i] = instruction.multiply(k, key, query, of_block[i])
        return [
            [joined(k, of_block[i : i + count]) for i in range(0, len(rows), count)]
            for of_block in sums
        ]

    def add_values(
        self, start: Scalar, shares: Sequence[Sequence[Scalar]], sums: Sequence[Sequence[Scalar]]
    ) -> list[list[Scalar]]:
        """The sums of each block of queries and features, with values times shares: a lane's chunk
        of each block and step."""
        k, sizes, panel = self._k, self._sizes, self._value_panel(start)
        instruction = sizes.instruction
        row = instruction.side_by_side(k.thread() % SIDE, instruction.sums)
        result = [[*of_block] for of_block in sums]
        for step in range(sizes.steps):
            k.schedule_barrier()
            operands = [
                instruction.operands(k, of_all_parts(k, of_block[step])) for of_block in shares
            ]
            for i in range(sizes.features):
                values = self._operands(panel, row + i * SIDE, step * instruction.step // CHUNK)
                for of_block, of_queries in zip(result, operands, strict=True):
                    for value, share in zip(values, of_queries, strict=True):
                        of_block[i] = instruction.multiply(k, value, share, of_block[i])
        return result


@dataclass(frozen=True)
class _Unit:
    """What a thread loads of each chunk: 8 numbers of a token, or of some side by side.

    token: of the chunk, i32. chunk: of a head. is_there: None if each thread has such a unit.
    """

    token: Scalar
    chunk: Scalar
    is_there: Scalar | None

    @classmethod
    def of_keys(cls, k: ThreadBuilder, sizes: Sizes, first: int) -> _Unit:
        """Neighbouring threads have neighbouring chunks of a token."""
        unit, is_there = _unit(k, first, sizes.key_units)
        pieces = sizes.width // CHUNK
        return cls((unit // pieces).to("i32"), unit % pieces, is_there)

    @classmethod
    def of_values(cls, k: ThreadBuilder, sizes: Sizes, first: int) -> _Unit:
        """Four neighbours have neighbouring chunks, so that they read 64 bytes, and others other
        tokens, so that they write into different banks."""
        unit, is_there = _unit(k, first, sizes.value_units)
        near = math.gcd(sizes.chunks, 4)
        chunk = unit // (near * GROUPS) * near + unit % near
        return cls((unit // near % GROUPS * sizes.tokens).to("i32"), chunk, is_there)


def _unit(k: ThreadBuilder, first: int, count: int) -> tuple[Scalar, Scalar | None]:
    """The thread's unit from `first` on of so many, and whether there is one."""
    unit = k.thread() + first
    if first + THREADS <= count:
        return unit, None
    return unit.minimum(count - 1), unit.less(k.scalar(count, "index"))


class ValuePanel(Panel):
    """Rows are features: lanes that store have every eighth."""

    def at(self, row: Scalar, chunk: Scalar | int) -> Scalar:
        """Where a chunk of a row is."""
        k, count = self.k, self.depth // CHUNK
        turn = k.bits("xori", row // (CHUNK // count), row // CHUNK) % count
        return self.start + row * self.depth + k.bits("xori", turn, chunk) * CHUNK


def _transposed(k: ThreadBuilder, rows: Sequence[Scalar]) -> list[Scalar]:
    """Columns of 2 or 4 rows of 8 numbers."""
    pairs = [k.shuffle(rows[0], rows[1], [i, CHUNK + i]) for i in range(CHUNK)]
    if len(rows) == 2:
        return pairs
    others = [k.shuffle(rows[2], rows[3], [i, CHUNK + i]) for i in range(CHUNK)]
    return [k.shuffle(a, b, range(4)) for a, b in zip(pairs, others, strict=True)]
