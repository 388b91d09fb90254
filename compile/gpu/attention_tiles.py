"""Tiles of prefill's attention on GPUs: their sizes, queries and softmax.

Shapes: H query heads, KH KV heads, G = H / KH query heads of a KV head, D head_dim. A step is 16 or
32 tokens, or features, whose numbers lanes load at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

from compile.gpu.attention import HIDDEN
from compile.gpu.kernel import THREADS, ThreadBuilder, dot2
from compile.gpu.pages import Heads, Pages, Token
from compile.gpu.softmax import NOTHING, exp2_fast, larger_of
from compile.gpu.tiles import SIDE, Instruction
from compile.gpu.unpack import CHUNK
from compile.mlir.values import Scalar

QUERIES = 128  # of a workgroup
GROWTH = 8.0  # of shares beyond one, in powers of two, before sums are corrected
GROUPS = 16  # of tokens side by side, in a chunk, of which threads load values


@dataclass(frozen=True)
class Sizes:
    """What a chip and a head make of a workgroup.

    chunk: tokens between two barriers. buffers: chunks in LDS, so that one is written while another
    is read. blocks: of 16 queries, of a wave. width: of a key in LDS, with zeros. pitch: from a key
    to the next, and how many rows are of values: a power of two, for numbers that are easy to tell.
    """

    heads: Heads
    instruction: Instruction
    subgroup: int
    chunk: int
    buffers: int
    blocks: int
    width: int
    pitch: int

    @classmethod
    def of(cls, heads: Heads, k: ThreadBuilder) -> Sizes:
        """As much as leaves room for two workgroups in LDS, and the registers."""
        instruction, waves = Instruction.of(k.chip), THREADS // k.subgroup
        width = -(-heads.head_dim // instruction.step) * instruction.step
        chunk = 64 if k.subgroup == 64 and width <= 128 else 32
        buffers = 1 if k.subgroup == 64 else 2
        pitch = 1 << (width - 1).bit_length()
        blocks = QUERIES // waves // SIDE
        return cls(heads, instruction, k.subgroup, chunk, buffers, blocks, width, pitch)

    @property
    def features(self) -> int:
        """Blocks of 16 features of a value"""
        return -(-self.heads.head_dim // SIDE)

    @property
    def steps(self) -> int:
        """Of a chunk: tokens that are multiplied with values at once"""
        return self.chunk // self.instruction.step

    @property
    def blocks_of_step(self) -> int:
        """Of 16 tokens"""
        return self.instruction.step // SIDE

    @property
    def keys(self) -> int:
        """Numbers of a chunk's keys in LDS"""
        return self.chunk * self.pitch

    @property
    def buffer(self) -> int:
        """Numbers of a chunk in LDS"""
        return 2 * self.keys

    @property
    def tokens(self) -> int:
        """Side by side, of which a thread loads values"""
        return self.chunk // GROUPS


class Queries:
    """Queries from `first` on, of which a lane has one of each block."""

    def __init__(self, k: ThreadBuilder, sizes: Sizes, pages: Pages, first: Scalar) -> None:
        assert pages.num_tokens
        self._k, self._sizes, self._pages, heads = k, sizes, pages, sizes.heads
        lane, wave = k.thread() % k.subgroup, k.thread() // k.subgroup
        self._lane, self._part, kv_head = lane, lane // SIDE, k.workgroup()
        start = pages.starts.load(k.workgroup(2)).to("i32")
        self._first_position = start + (first // heads.group).to("i32")
        own = first + wave * (sizes.blocks * SIDE) + lane % SIDE
        queries = [own + i * SIDE for i in range(sizes.blocks)]
        numbers = [query // heads.group for query in queries]
        self._is_inside = [number.less(pages.num_tokens) for number in numbers]
        last = pages.num_tokens - 1
        self._tokens = [Token(pages, k.workgroup(2), number.minimum(last)) for number in numbers]
        self._heads = [kv_head * heads.group + query % heads.group for query in queries]
        # Of the result, in 32 bits, as registers have no room for more
        self._rows = [
            token.out_row.to("i32") * heads.num_heads + head.to("i32")
            for token, head in zip(self._tokens, self._heads, strict=True)
        ]
        pieces = range(0, sizes.width // CHUNK, sizes.instruction.step // CHUNK)
        self.operands = [
            [self._operands(token, head, piece) for piece in pieces]
            for token, head in zip(self._tokens, self._heads, strict=True)
        ]

    def _operands(self, token: Token, head: Scalar, first: int) -> list[Scalar]:
        """Of a step of features, from chunk `first` on."""
        k, instruction = self._k, self._sizes.instruction
        chunks = [k.as_index(chunk) + first for chunk in instruction.chunks(self._lane)]
        return instruction.operands(k, [self._rotated(token, head, chunk) for chunk in chunks])

    def _rotated(self, token: Token, head: Scalar, chunk: Scalar) -> Scalar:
        """A chunk of a query, zeros behind its last one."""
        k, heads = self._k, self._sizes.heads
        count, piece = heads.head_dim // CHUNK, math.gcd(heads.head_dim // 2, CHUNK)
        start = chunk.minimum(count - 1) * CHUNK
        found = [token.rotated(head, start + i, piece) for i in range(0, CHUNK, piece)]
        x = found[0] if len(found) == 1 else k.shuffle(found[0], found[1], range(CHUNK))
        x = rounded(k, x, heads.kv_dtype)
        if self._sizes.width == heads.head_dim:
            return x
        return chunk.less(k.scalar(count, "index")).select(x, k.scalar(0.0, x.dtype))

    def masked(self, scores: Sequence[Sequence[Scalar]], position: Scalar) -> list[list[Scalar]]:
        """A lane's scores of each block and step of the chunk at a position, HIDDEN where a token
        follows the query; most chunks have no such token."""
        k, sizes = self._k, self._sizes
        flat = [vector for of_block in scores for vector in of_block]

        def hide() -> list[Scalar]:
            hidden, found = k.scalar(HIDDEN, flat[0].dtype), []
            before = position + self._part.to("i32") * CHUNK
            for token, of_block in zip(self._tokens, scores, strict=True):
                last = token.position - before
                for i, vector in enumerate(of_block):
                    number = k.lanes_from(k.scalar(i * sizes.instruction.step, "i32"), CHUNK)
                    follows = k.broadcast(last, CHUNK).less(number)
                    found.append(follows.select(hidden, vector))
            return found

        has_hidden = self._first_position.less(position + (sizes.chunk - 1))
        flat = k.choose(has_hidden, hide, lambda: flat, [vector.dtype for vector in flat])
        return [flat[i : i + sizes.steps] for i in range(0, len(flat), sizes.steps)]

    def finish(self, sums: Sequence[Sequence[Scalar]]) -> None:
        """Store what queries attend to: sums of each block of queries and each of features."""
        k, sizes, heads = self._k, self._sizes, self._sizes.heads
        start = self._part * sizes.instruction.sums
        for token, row, inside, of_block in zip(
            self._tokens, self._rows, self._is_inside, sums, strict=True
        ):
            with k.when(inside):
                for i, total in enumerate(of_block):
                    value = token.is_valid.select(total, k.scalar(0.0, total.dtype))
                    place = start + i * SIDE
                    has_place = place.less(k.scalar(heads.head_dim, "index"))
                    is_whole = (i + 1) * SIDE <= heads.head_dim
                    with nullcontext() if is_whole else k.when(has_place):
                        self._pages.finish(row.to_unsigned("index"), place, value)


class Softmax:
    """States of a lane's queries: the largest score and the lane's sum of exponentials of each
    block, then sums of values of each block and each of features."""

    def __init__(self, k: ThreadBuilder, sizes: Sizes, scale: float) -> None:
        self._k, self._sizes, self._scale = k, sizes, scale

    def first(self) -> list[Scalar]:
        """That of no token."""
        k, sizes = self._k, self._sizes
        none, zero = k.scalar(NOTHING, "f32"), k.scalar(0.0, "f32")
        sums = k.scalar(0.0, f"vector<{sizes.instruction.sums}xf32>")
        return [none, zero] * sizes.blocks + [sums] * (sizes.blocks * sizes.features)

    def add(
        self, scores: Sequence[Sequence[Scalar]], state: Sequence[Scalar]
    ) -> tuple[list[list[Scalar]], list[Scalar], list[list[Scalar]]]:
        """Shares of tokens in the cache's type, and the state without their values.

        scores: a lane's, of each block and step. The largest score changes only where it grows by
        more than a factor of 2^GROWTH, up to which shares may grow instead.
        """
        sizes = self._sizes
        shares, states, sums = [], [], []
        for i, of_block in enumerate(scores):
            start = 2 * sizes.blocks + i * sizes.features
            chunks, top, (weight, *totals) = self._add(
                of_block, state[2 * i], [state[2 * i + 1], *state[start : start + sizes.features]]
            )
            shares.append(chunks)
            states += [top, weight]
            sums.append(totals)
        return shares, states, sums

    def _add(
        self, scores: Sequence[Scalar], top: Scalar, old: Sequence[Scalar]
    ) -> tuple[list[Scalar], Scalar, list[Scalar]]:
        """Of a block its shares, the largest score, and what was `old`, the sum of exponentials
        and sums of values."""
        k, scale = self._k, self._k.scalar(self._scale, "f32")
        found = [k.element(vector, n) for vector in scores for n in range(CHUNK)]
        largest = reduce(lambda a, b: larger_of(k, a, b), found)
        largest = _across_parts(k, largest, lambda a, b: larger_of(k, a, b))
        is_larger = (top + GROWTH / self._scale).is_below(largest)
        new = is_larger.select(largest, top)
        base = new * -self._scale
        of_tokens = [exp2_fast(k, k.fma(score, scale, base)) for score in found]
        weight, *totals = k.choose(
            is_larger, lambda: self._times(old, exp2_fast(k, k.fma(top, scale, base))),
            lambda: old, [x.dtype for x in old],
        )  # fmt: skip
        chunks, weight = self._shares(of_tokens, weight)
        return chunks, new, [weight, *totals]

    def _times(self, numbers: Sequence[Scalar], factor: Scalar) -> list[Scalar]:
        """A number and vectors times a factor."""
        k, (first, *vectors) = self._k, numbers
        wide = k.broadcast(factor, self._sizes.instruction.sums)
        return [first * factor, *(vector * wide for vector in vectors)]

    def _shares(self, numbers: Sequence[Scalar], weight: Scalar) -> tuple[list[Scalar], Scalar]:
        """Chunks in the cache's type, and the weight with them."""
        k, kind = self._k, self._sizes.heads.kv_dtype
        if kind == "f16":
            pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
            # Cut, not rounded, for one instruction; the sum is of what they have become
            pair = "vector<2xf16>"
            cut = [k.intrinsic("amdgcn.cvt.pkrtz", of_two, pair) for of_two in pairs]
            for of_two in cut:
                weight = dot2(k, of_two, k.scalar(1.0, pair), weight)
            words = [k.element(k.bitcast(of_two, "vector<1xi32>"), 0) for of_two in cut]
            count = CHUNK // 2
            chunks = [k.vector(words[i : i + count]) for i in range(0, len(words), count)]
            return [k.bitcast(words, "vector<8xf16>") for words in chunks], weight
        chunks = [k.vector(numbers[i : i + CHUNK]) for i in range(0, len(numbers), CHUNK)]
        return [rounded(k, chunk, kind) for chunk in chunks], reduce(add, numbers, weight)

    def finish(self, state: Sequence[Scalar]) -> list[list[Scalar]]:
        """What queries attend to, of each block and each of features."""
        k, sizes, result = self._k, self._sizes, []
        for i in range(sizes.blocks):
            weight = _across_parts(k, state[2 * i + 1], add)
            start = 2 * sizes.blocks + i * sizes.features
            factor = k.broadcast(k.scalar(1.0, "f32") / weight, sizes.instruction.sums)
            result.append([total * factor for total in state[start : start + sizes.features]])
        return result


# Lanes


def _other(k: ThreadBuilder, value: Scalar, distance: int) -> Scalar:
    """The value (32 bits) of the lane whose number differs by 16 or 32."""
    if k.subgroup == 32:
        bits = k.bitcast(value, "i32")
        same = [k.scalar(number, "i32") for number in (0x76543210, -0x1234568)]  # 0xFEDCBA98
        no = k.scalar(0, "i1")
        found = k.intrinsic("amdgcn.permlanex16", [bits, bits, *same, no, no], "i32")
        return k.bitcast(found, value.dtype)
    return k.shuffle_xor(value, distance)


def _across_parts(
    k: ThreadBuilder, value: Scalar, join: Callable[[Scalar, Scalar], Scalar]
) -> Scalar:
    """The sum, or the largest, of all lanes that have the same query."""
    for distance in (SIDE, 2 * SIDE)[: k.subgroup // 32]:
        value = join(value, _other(k, value, distance))
    return value


def of_all_parts(k: ThreadBuilder, chunk: Scalar) -> list[Scalar]:
    """The chunks that a lane needs for its operand, of the one that it has."""
    if Instruction.of(k.chip).operand != SIDE:
        return [chunk]
    words = k.bitcast(chunk, "vector<4xi32>")
    other = k.vector([_other(k, k.element(words, i), SIDE) for i in range(4)])
    other = k.bitcast(other, chunk.dtype)
    is_low = (k.thread() % k.subgroup).less(k.scalar(SIDE, "index"))
    return [is_low.select(chunk, other), is_low.select(other, chunk)]


def rounded(k: ThreadBuilder, chunk: Scalar, dtype: str) -> Scalar:
    """8 finite numbers of f32 in another type. For bf16 LLVM takes many instructions on most chips;
    these are three for two numbers, by which halves become larger."""
    if dtype != "bf16":
        return k.convert(chunk, dtype)
    bits = k.bitcast(chunk, "vector<8xi32>") + 0x8000
    low, high = (k.shuffle(bits, bits, range(first, CHUNK, 2)) for first in (0, 1))
    words = k.bits("ori", k.bits("shrui", low, 16), k.bits("andi", high, -0x10000))
    return k.bitcast(words, "vector<8xbf16>")


def joined(k: ThreadBuilder, sums: Sequence[Scalar]) -> Scalar:
    """A lane's 8 scores, of one instruction's sums or two's."""
    return sums[0] if len(sums) == 1 else k.shuffle(sums[0], sums[1], range(CHUNK))
