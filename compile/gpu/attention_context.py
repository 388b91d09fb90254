"""The context of prefill's attention on GPUs: from a cache's pages to LDS, and multiplied there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from compile.gpu.attention_tiles import GROUPS, QUERIES, Queries, Sizes, joined, of_all_parts
from compile.gpu.kernel import THREADS, ThreadBuilder
from compile.gpu.pages import Pages
from compile.gpu.tiles import SIDE
from compile.gpu.unpack import CHUNK
from compile.mlir.values import Scalar

Loaded = tuple[list[Scalar], list[list[Scalar]]]  # a thread's keys, and values of tokens


class Context:
    """The tokens that queries from `first` on attend to, as far as position `end`, exclusive."""

    def __init__(self, k: ThreadBuilder, sizes: Sizes, pages: Pages, first: Scalar) -> None:
        assert pages.num_tokens
        self._k, self._sizes, self._pages, heads = k, sizes, pages, sizes.heads
        self._head, self._row = k.workgroup(), k.workgroup(2)
        self._memory = k.shared(sizes.buffer * sizes.buffers, heads.kv_dtype)
        start, end = (x.load(self._row).to("i32") for x in (pages.starts, pages.ends))
        last = ((first + (QUERIES - 1)) // heads.group).minimum(pages.num_tokens - 1)
        last = (start + last.to("i32")).minimum(end - 1)
        self._has_any = (start + (first // heads.group).to("i32")).less(end)
        self.end = self._has_any.select(last + 1, k.scalar(0, "i32"))
        self._last = self.end.largest(k.scalar(1, "i32")) - 1
        self._keys, self._values = _Unit.of_keys(k, sizes), _Unit.of_values(k, sizes)
        self.num_pages = len(self._keys) + len(self._values)

    # From the cache to LDS

    def pages_of(self, position: Scalar) -> list[Scalar]:
        """The page of each of the thread's tokens of the chunk at a position."""
        positions = [
            (position + unit.token).minimum(self._last) for unit in (*self._keys, *self._values)
        ]
        return [self._pages.page_of(self._row, at) for at in positions]

    def first_pages(self) -> list[Scalar]:
        """Those of the first chunk; page 0, which is always there, if the queries attend to
        nothing: such a row may have no page."""
        none = self._k.scalar(0, "i32")
        return [self._has_any.select(page, none) for page in self.pages_of(none)]

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
        head_dim = self._sizes.heads.head_dim
        if self._sizes.width > head_dim:
            zero, last = k.scalar(0.0, keys[0].dtype), k.scalar(head_dim // CHUNK, "index")
            keys = [
                unit.chunk.less(last).select(key, zero)
                for unit, key in zip(self._keys, keys, strict=True)
            ]
        return keys, values

    def _load(self, position: Scalar, page: Scalar, unit: _Unit, *, is_value: bool) -> Scalar:
        head_dim, chunk = self._sizes.heads.head_dim, unit.chunk
        if self._sizes.pitch > head_dim:
            chunk = chunk.minimum(head_dim // CHUNK - 1)
        at = self._pages.at(page, position.minimum(self._last), self._head, chunk * CHUNK)
        return self._pages.load(self._pages.value_at(at) if is_value else at, CHUNK)

    def store(self, loaded: Loaded, start: Scalar) -> None:
        """Store that into the buffer that begins at `start`."""
        k, (keys, values) = self._k, loaded
        for unit, key in zip(self._keys, keys, strict=True):
            with k.when(unit.is_there) if unit.is_there else nullcontext():
                at = self._keys_at(start).at(unit.token.to("index"), unit.chunk)
                self._memory.store_vector(key, at)
        panel = self._values_at(start)
        for unit, of_tokens in zip(self._values, values, strict=True):
            with k.when(unit.is_there) if unit.is_there else nullcontext():
                for i, numbers in enumerate(_transposed(k, of_tokens)):
                    token = unit.token.to("index")
                    at = panel.at(unit.chunk * CHUNK + i, token // CHUNK)
                    self._memory.store_vector(numbers, at + token % CHUNK)

    def _keys_at(self, start: Scalar) -> Panel:
        return Panel(self._k, self._sizes, start, self._sizes.pitch, CHUNK, are_mixed=False)

    def _values_at(self, start: Scalar) -> Panel:
        """Features are rows."""
        sizes = self._sizes
        start = start + sizes.keys
        return Panel(self._k, sizes, start, sizes.chunk, sizes.instruction.sums, are_mixed=True)

    # Products

    def _operands(self, panel: Panel, row: int, chunk: int) -> list[Scalar]:
        """A lane's operands of a step, of rows from `row` on and chunks from `chunk` on."""
        k = self._k
        loaded = [self._memory.load_vector(at, CHUNK) for at in panel.places(row, chunk)]
        return self._sizes.instruction.operands(k, loaded)

    def scores(self, start: Scalar, queries: Queries) -> list[list[Scalar]]:
        """Of each block of queries and each step, the scores of a lane's 8 tokens, unscaled."""
        k, sizes, panel = self._k, self._sizes, self._keys_at(start)
        instruction, count = sizes.instruction, sizes.blocks_of_step
        rows = [
            step * instruction.step + i * instruction.sums
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
        k, sizes, panel = self._k, self._sizes, self._values_at(start)
        instruction = sizes.instruction
        result = [[*of_block] for of_block in sums]
        for step in range(sizes.steps):
            operands = [
                instruction.operands(k, of_all_parts(k, of_block[step])) for of_block in shares
            ]
            for i in range(sizes.features):
                if i % 2 == 0:
                    k.schedule_barrier()
                values = self._operands(panel, i * SIDE, step * instruction.step // CHUNK)
                for of_block, of_queries in zip(result, operands, strict=True):
                    for value, share in zip(values, of_queries, strict=True):
                        of_block[i] = instruction.multiply(k, value, share, of_block[i])
        return result


@dataclass(frozen=True)
class _Unit:
    """What a thread loads of each chunk: 8 numbers of a token, or of some side by side; behind the
    last number of a head, which nobody asks for, others.

    token: of the chunk, i32. chunk: of a head. is_there: None if each thread has such a unit.
    """

    token: Scalar
    chunk: Scalar
    is_there: Scalar | None

    @classmethod
    def of_keys(cls, k: ThreadBuilder, sizes: Sizes) -> list[_Unit]:
        """Neighbouring threads have neighbouring chunks of a token."""
        pieces, found = sizes.pitch // CHUNK, []
        for unit, is_there in _units(k, sizes.chunk * pieces):
            found.append(cls((unit // pieces).to("i32"), unit % pieces, is_there))
        return found

    @classmethod
    def of_values(cls, k: ThreadBuilder, sizes: Sizes) -> list[_Unit]:
        """Four neighbours have neighbouring chunks, so that they read 64 bytes, and others other
        tokens, so that they write into different banks."""
        pieces, found = sizes.pitch // CHUNK, []
        near = min(pieces, 4)
        for unit, is_there in _units(k, GROUPS * pieces):
            token = (unit // near % GROUPS * sizes.tokens).to("i32")
            found.append(cls(token, unit // (near * GROUPS) * near + unit % near, is_there))
        return found


def _units(k: ThreadBuilder, count: int) -> Iterator[tuple[Scalar, Scalar | None]]:
    """A thread's of so many units, a power of two, and whether it has it."""
    if count < THREADS:
        yield k.thread() % count, k.thread().less(k.scalar(count, "index"))
    else:
        yield from ((k.thread() + i, None) for i in range(0, count, THREADS))


@dataclass(frozen=True)
class Panel:
    """Rows of `depth` numbers in LDS from `start` on, of which a lane gets `size` side by side.

    The chunks of a row change places, by a number that differs between rows that neighbouring lanes
    load, or store: so these are in different banks. Places differ in three bits at most, so that a
    lane loads most of its chunks at constant distances. are_mixed: whether rows that are 8 apart
    are stored together.
    """

    k: ThreadBuilder
    sizes: Sizes
    start: Scalar
    depth: int
    size: int
    are_mixed: bool

    @property
    def _count(self) -> int:
        """Chunks that change places with each other"""
        return min(self.depth // CHUNK, CHUNK)

    def _turn(self, row: Scalar, lane: Scalar) -> Scalar:
        """Of a row, and the lane that loads it."""
        turn = lane // (CHUNK // self._count)
        if self.are_mixed:
            turn = self.k.bits("xori", turn, row // CHUNK)
        return turn % self._count

    def at(self, row: Scalar, chunk: Scalar) -> Scalar:
        """Where a chunk of a row is."""
        lane = self.sizes.instruction.multiplied_as(row, self.size)
        place = self.k.bits("xori", self._turn(row, lane), chunk % self._count)
        place = place + chunk // self._count * self._count
        return self.start + row * self.depth + place * CHUNK

    def places(self, row: int, chunk: int) -> list[Scalar]:
        """Where the chunks are that the lane needs, from `chunk` on of its row, from `row` on."""
        k, instruction, count = self.k, self.sizes.instruction, self._count
        lane = k.thread() % k.subgroup
        own = instruction.side_by_side(lane % SIDE, self.size)
        turn, found = self._turn(own, lane % SIDE), []
        for of_lane in instruction.chunks(lane):
            number = chunk + of_lane if isinstance(of_lane, int) else chunk
            place = turn if isinstance(of_lane, int) else k.bits("xori", turn, of_lane)
            change = number ^ row // CHUNK if self.are_mixed else number
            place = k.bits("xori", place, change % count)
            far = row * self.depth + number // count * count * CHUNK
            found.append(self.start + own * self.depth + place * CHUNK + far)
        return found


def _transposed(k: ThreadBuilder, rows: Sequence[Scalar]) -> list[Scalar]:
    """Columns of 2 or 4 rows of 8 numbers."""
    pairs = [k.shuffle(rows[0], rows[1], [i, CHUNK + i]) for i in range(CHUNK)]
    if len(rows) == 2:
        return pairs
    others = [k.shuffle(rows[2], rows[3], [i, CHUNK + i]) for i in range(CHUNK)]
    return [k.shuffle(a, b, range(4)) for a, b in zip(pairs, others, strict=True)]
