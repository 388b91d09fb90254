"""Softmax on GPUs in pieces: of tokens that threads have, and of splits of a context.

Shapes: N rows of one token each, H query heads, D head_dim, S splits of the context. A state is
what is known of a softmax's weighted sum so far; it is corrected as larger scores come (Milakov and
Gimelshein 2018). Scores are in powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

from compile.formats.layout import ITEM_BYTES
from compile.gpu.kernel import THREADS, Kernel, ThreadBuilder
from compile.mlir.executable import ExecutableBuilder, Memory
from compile.mlir.values import Scalar
from compile.mlir.vectors import lanes_of

LOAD = 16  # bytes
NOTHING = -1e30  # the maximum of no scores

State = tuple[Scalar, Scalar, Scalar]  # largest score, sum of exponentials, sum of values
Exp2 = Callable[[ExecutableBuilder, Scalar], Scalar]


@dataclass(frozen=True)
class Lanes:
    """How the threads of a workgroup share D numbers of many tokens.

    piece: numbers of a thread. count: threads that have a token, a power of two.
    """

    piece: int
    count: int

    @classmethod
    def of(cls, head_dim: int, dtype: str) -> Lanes:
        """Pieces of LOAD bytes that lie in one half of a head."""
        piece = math.gcd(head_dim // 2, LOAD // ITEM_BYTES[dtype])
        while head_dim // piece > 32:
            piece *= 2
        return cls(piece, 1 << (head_dim // piece - 1).bit_length())

    @property
    def slots(self) -> int:
        """Tokens that a workgroup has at once."""
        return THREADS // self.count

    def place(self, k: ThreadBuilder, head_dim: int) -> tuple[Scalar, Scalar | None]:
        """Where a thread's numbers begin, and whether it has any, if that must be asked; who has
        none is given the last."""
        start = k.thread() % self.count * self.piece
        if self.count * self.piece == head_dim:
            return start, None
        has_numbers = start.less(k.scalar(head_dim, "index"))
        return start.minimum(head_dim - self.piece), has_numbers


# States


def exp2_fast(k: ExecutableBuilder, x: Scalar) -> Scalar:
    """One instruction of a GPU, which gives 0 where a result is denormal."""
    return k.intrinsic("amdgcn.exp2", [x], "f32")


def exp2_exact(k: ExecutableBuilder, x: Scalar) -> Scalar:
    """The same for CPUs."""
    return x.math("exp2")


def larger_of(k: ExecutableBuilder, a: Scalar, b: Scalar) -> Scalar:
    """The larger of two numbers of f32; the other where one is NaN."""
    return k.op(f"arith.maxnumf {a.name}, {b.name} : f32", "f32")


def of_token(
    k: ExecutableBuilder, scores: Sequence[Scalar], value: Scalar, has_token: Scalar
) -> list[State]:
    """The state of each head's score of one token, if it is there, else of none."""
    none, zero, one = (k.scalar(number, "f32") for number in (NOTHING, 0.0, 1.0))
    total = k.convert(value, "f32")
    total = has_token.select(total, k.scalar(0.0, total.dtype))
    weight = has_token.select(one, zero)
    return [(has_token.select(score, none), weight, total) for score in scores]


def add_tokens(
    k: ExecutableBuilder, exp2: Exp2, state: State, scores: Sequence[Scalar],
    values: Sequence[Scalar],
) -> State:  # fmt: skip
    """A state with more tokens, whose values are vectors of a float type."""
    top, weight, total = state
    larger = reduce(lambda a, b: larger_of(k, a, b), scores, top)
    factor, lanes = exp2(k, top - larger), lanes_of(total)
    weight, total = weight * factor, total * k.broadcast(factor, lanes)
    for score, value in zip(scores, values, strict=True):
        share = exp2(k, score - larger)
        weight = weight + share
        total = k.fma(k.broadcast(share, lanes), k.convert(value, "f32"), total)
    return larger, weight, total


def flattened(states: Sequence[State]) -> list[Scalar]:
    """States as a loop carries them."""
    return [x for state in states for x in state]


def unflattened(flat: Sequence[Scalar]) -> list[State]:
    """States that a loop has carried."""
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def merge(
    k: ThreadBuilder, lanes: Lanes, head_dim: int, states: Sequence[State],
    has_numbers: Scalar | None, finish: Callable[[int, Scalar, Scalar, Scalar, Scalar], None],
) -> None:  # fmt: skip
    """One state of all threads' states of each of some heads.

    finish: called with the head, a place in D, its sum, the largest score, the sum of exponentials.
    """
    thread, waves = k.thread(), THREADS // k.subgroup
    wave, is_leader = thread // k.subgroup, (thread % k.subgroup).equals(0)
    slot, start = thread // lanes.count, thread % lanes.count * lanes.piece
    tops, weights = (k.shared(len(states) * waves, "f32") for _ in range(2))
    sums = k.shared(2 * lanes.slots * head_dim, "f32")  # of two heads in turn
    for i, (top, _, _) in enumerate(states):
        largest = k.reduce("maxnumf", top)
        with k.when(is_leader):
            tops.store(largest, wave + i * waves)
    k.barrier()
    for i, (top, weight, total) in enumerate(states):
        largest = reduce(
            lambda a, b: larger_of(k, a, b), [tops.load(i * waves + w) for w in range(waves)]
        )
        factor = exp2_fast(k, top - largest)
        weight = k.reduce("add", weight * factor) * (1 / lanes.count)  # which each lane has
        with k.when(is_leader):
            weights.store(weight, wave + i * waves)
        begin = i % 2 * lanes.slots * head_dim
        total = total * k.broadcast(factor, lanes.piece)
        with k.when(has_numbers) if has_numbers else nullcontext():
            sums.store_vector(total, slot * head_dim + start + begin)
        k.barrier()
        whole = reduce(add, [weights.load(i * waves + w) for w in range(waves)])
        for first in range(0, head_dim, THREADS):
            place = thread + first
            with k.when(place.less(k.scalar(head_dim, "index"))):
                finish(i, place, _column(k, sums, place + begin, lanes.slots, head_dim),
                       largest, whole)  # fmt: skip


def _column(k: ThreadBuilder, sums: Memory, at: Scalar, count: int, pitch: int) -> Scalar:
    """The sum of a column of `count` numbers."""
    unroll = min(count, 8)
    [total] = k.fold(
        0, count, [k.scalar(0.0, "f32")],
        lambda row, total: [
            reduce(add, [sums.load((row + i) * pitch + at) for i in range(unroll)], total)
        ],
        step=unroll,
    )  # fmt: skip
    return total


# Splits


@dataclass(frozen=True)
class Combination(Kernel):
    """What rows attend to, [N, H * D] of `dtype`, from what `DecodeAttention` left of S splits.

    Bindings: the splits [S, N, H * (D + 2)] f32, the result. Constants: N, S. Workgroups: H, N.
    """

    num_heads: int
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """By its sizes."""
        return f"combine_splits_{self.num_heads}x{self.head_dim}_{self.dtype}"

    @property
    def result(self) -> tuple[str, str]:
        """Computed in f32."""
        return self.dtype, self.dtype

    @property
    def _lanes(self) -> Lanes:
        return Lanes.of(self.head_dim, "f32")

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does: a piece of some of the splits, which come together at the end."""
        lanes, views = self._lanes, self._views(k)
        head, row, thread = k.workgroup(), k.workgroup(1), k.thread()
        start, has_numbers = lanes.place(k, self.head_dim)
        state = self._first(k, lanes.piece)
        state = k.fold(
            thread // lanes.count, views.splits, state,
            lambda split, *state: self._add(k, exp2_fast, views, state, split, row, head, start),
            step=lanes.slots,
        )  # fmt: skip

        def finish(_: int, place: Scalar, total: Scalar, __: Scalar, weight: Scalar) -> None:
            at = (row * self.num_heads + head) * self.head_dim + place
            views.out.store((total / weight).to(self.dtype), at)

        merge(k, lanes, self.head_dim, unflattened(state), has_numbers, finish)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Head by head."""
        views, zero = self._views(k), k.scalar(0, "index")
        with k.loop(0, views.num_rows) as row, k.loop(0, self.num_heads) as head:
            _, weight, total = k.fold(
                0, views.splits, self._first(k, self.head_dim),
                lambda split, *state: self._add(
                    k, exp2_exact, views, state, split, row, head, zero
                ),
            )  # fmt: skip
            value = total / k.broadcast(weight, self.head_dim)
            views.out.store_as(value, (row * self.num_heads + head) * self.head_dim)

    def _views(self, k: ExecutableBuilder) -> _Splits:
        parts = k.view(k.binding(read_only=True), "f32")
        out = k.view(k.binding(), self.dtype)
        return _Splits(parts, out, k.constant(), k.constant())

    def _first(self, k: ExecutableBuilder, piece: int) -> list[Scalar]:
        none, zero = k.scalar(NOTHING, "f32"), k.scalar(0.0, "f32")
        return [none, zero, k.broadcast(zero, piece)]

    def _add(
        self, k: ExecutableBuilder, exp2: Exp2, views: _Splits, state: Sequence[Scalar],
        split: Scalar, row: Scalar, head: Scalar, start: Scalar,
    ) -> list[Scalar]:  # fmt: skip
        """A state with a split more."""
        top, weight, total = state
        begin = (split * views.num_rows + row) * (self.num_heads * (self.head_dim + 2))
        at = begin + self.num_heads * self.head_dim + head * 2
        more = views.parts.load(at + 1)
        found = k.scalar(0.0, "f32").is_below(more).select(
            views.parts.load(at), k.scalar(NOTHING, "f32")
        )  # fmt: skip
        values = views.parts.load_vector(begin + head * self.head_dim + start, lanes_of(total))
        larger = larger_of(k, top, found)
        old, new = exp2(k, top - larger), exp2(k, found - larger)
        total = total * k.broadcast(old, lanes_of(total))
        total = k.fma(k.broadcast(new, lanes_of(total)), values, total)
        return [larger, k.fma(more, new, weight * old), total]


@dataclass(frozen=True)
class _Splits:
    """What both forms of `Combination` read and write."""

    parts: Memory
    out: Memory
    num_rows: Scalar
    splits: Scalar
