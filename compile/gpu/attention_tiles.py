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
from compile.gpu.kernel import THREADS, ThreadBuilder
from compile.gpu.pages import Heads, Pages, Token
from compile.gpu.softmax import NOTHING, exp2_fast, larger_of
from compile.gpu.tiles import SIDE, Instruction
from compile.gpu.unpack import CHUNK
from compile.mlir.values import Scalar

QUERIES = 128  # of a workgroup
GROUPS = 16  # of tokens side by side, in a chunk, of which threads load values


@dataclass(frozen=True)
class Sizes:
    """What a chip and a head make of a workgroup.

    chunk: tokens between two barriers. buffers: chunks in LDS, so that one is written while another
    is read. blocks: of 16 queries, of a wave. width: of a key in LDS, with zeros. pitch: from a key
    to the next.
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
        chunk, buffers = (64, 1) if k.subgroup == 64 and width <= 128 else (32, 2)
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
        return self.keys + self.features * SIDE * self.chunk

    @property
    def chunks(self) -> int:
        """Of 8 numbers, of a head"""
        return self.heads.head_dim // CHUNK

    @property
    def tokens(self) -> int:
        """Side by side, of which a thread loads values"""
        return self.chunk // GROUPS

    @property
    def key_units(self) -> int:
        """What threads load of a chunk's keys"""
        return self.chunk * self.width // CHUNK

    @property
    def value_units(self) -> int:
        """What threads load of a chunk's values"""
        return GROUPS * self.chunks


class Queries:
    """Queries from `first` on, of which a lane has one of each block."""

    def __init__(self, k: ThreadBuilder, sizes: Sizes, pages: Pages, first: Scalar) -> None:
        assert pages.num_tokens
        self._k, self._sizes, self._pages, heads = k, sizes, pages, sizes.heads
        lane, wave = k.thread() % k.subgroup, k.thread() // k.subgroup
        self._lane, self._part, kv_head = lane, lane // SIDE, k.workgroup(1)
        own = first + wave * (sizes.blocks * SIDE) + lane % SIDE
        queries = [own + i * SIDE for i in range(sizes.blocks)]
        numbers = [query // heads.group for query in queries]
        self._is_inside = [number.less(pages.num_tokens) for number in numbers]
        last = pages.num_tokens - 1
        self._tokens = [Token(pages, k.workgroup(2), number.minimum(last)) for number in numbers]
        self._heads = [kv_head * heads.group + query % heads.group for query in queries]
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
        x = k.convert(x, heads.kv_dtype)
        if self._sizes.width == heads.head_dim:
            return x
        return chunk.less(k.scalar(count, "index")).select(x, k.scalar(0.0, x.dtype))

    def seen(self, position: Scalar) -> list[Scalar]:
        """Of each block, how many tokens from `position` on a query sees, before the lane's first
        one; fewer than one for none: i32."""
        before = position + self._part.to("i32") * CHUNK
        return [token.position - before for token in self._tokens]

    def finish(self, sums: Sequence[Sequence[Scalar]]) -> None:
        """Store what queries attend to: sums of each block of queries and each of features."""
        k, sizes, heads = self._k, self._sizes, self._sizes.heads
        start = self._part * sizes.instruction.sums
        for token, head, inside, of_block in zip(
            self._tokens, self._heads, self._is_inside, sums, strict=True
        ):
            with k.when(inside):
                for i, total in enumerate(of_block):
                    value = token.is_valid.select(total, k.scalar(0.0, total.dtype))
                    place = start + i * SIDE
                    has_place = place.less(k.scalar(heads.head_dim, "index"))
                    is_whole = (i + 1) * SIDE <= heads.head_dim
                    with nullcontext() if is_whole else k.when(has_place):
                        self._pages.finish(token.out_row, head, place, value)


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
        self, scores: Sequence[Sequence[Scalar]], seen: Sequence[Scalar], state: Sequence[Scalar]
    ) -> tuple[list[list[Scalar]], list[Scalar], list[list[Scalar]]]:
        """Shares of tokens in the cache's type, and the state without their values.

        scores: a lane's, of each block and step. seen: as of `Queries`.
        """
        k, sizes = self._k, self._sizes
        shares, states, sums = [], [], []
        for i, (of_block, count) in enumerate(zip(scores, seen, strict=True)):
            top, weight = state[2 * i], state[2 * i + 1]
            hidden = k.scalar(HIDDEN, "f32")
            found = [
                [
                    k.scalar(step * sizes.instruction.step + n, "i32").less(count + 1)
                    .select(k.element(vector, n), hidden)
                    for n in range(CHUNK)
                ]
                for step, vector in enumerate(of_block)
            ]  # fmt: skip
            largest = reduce(lambda a, b: larger_of(k, a, b), [x for step in found for x in step])
            largest = larger_of(k, top, _across_parts(k, largest, lambda a, b: larger_of(k, a, b)))
            base = largest * -self._scale
            factor = exp2_fast(k, k.fma(top, k.scalar(self._scale, "f32"), base))
            weight = weight * factor
            exponentials = [
                [
                    exp2_fast(k, k.fma(score, k.scalar(self._scale, "f32"), base))
                    for score in of_step
                ]
                for of_step in found
            ]
            weight = reduce(add, [x for step in exponentials for x in step], weight)
            shares.append(
                [k.convert(k.vector(of_step), sizes.heads.kv_dtype) for of_step in exponentials]
            )
            states += [largest, weight]
            start = 2 * sizes.blocks + i * sizes.features
            wide = k.broadcast(factor, sizes.instruction.sums)
            sums.append([total * wide for total in state[start : start + sizes.features]])
        return shares, states, sums

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


def joined(k: ThreadBuilder, sums: Sequence[Scalar]) -> Scalar:
    """A lane's 8 scores, of one instruction's sums or two's."""
    return sums[0] if len(sums) == 1 else k.shuffle(sums[0], sums[1], range(CHUNK))
