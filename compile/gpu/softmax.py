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
from compile.gpu.kernel import THREADS, Kernel, ThreadBuilder, dot2
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
    """The larger of two numbers of f32; anything where one is NaN."""
    return k.op(f"arith.maxnumf {a.name}, {b.name} fastmath<nnan> : f32", "f32")


def of_token(
    k: ExecutableBuilder, scores: Sequence[Scalar], value: Scalar, has_token: Scalar,
    *, is_fast: bool = False,
) -> list[State]:  # fmt: skip
    """The state of each head's score of one token, if it is there, else of none. is_fast: f16
    values become f32 in dot products of two, as conversions take four times as long on gfx9."""
    none, zero, one = (k.scalar(number, "f32") for number in (NOTHING, 0.0, 1.0))
    weight, lanes = has_token.select(one, zero), lanes_of(value)
    if is_fast:
        kind = "vector<2xf16>"
        shares = [
            has_token.select(k.op(f"arith.constant dense<{one_of}> : {kind}", kind),
                             k.scalar(0.0, kind))
            for one_of in ([1.0, 0.0], [0.0, 1.0])
        ]  # fmt: skip
        pairs = [k.shuffle(value, value, [i, i + 1]) for i in range(0, lanes, 2)]
        total = k.vector([dot2(k, pair, share, zero) for pair in pairs for share in shares])
    else:
        total = k.convert(value, "f32")
        total = has_token.select(total, k.scalar(0.0, total.dtype))
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


def add_tokens_fast(
    k: ExecutableBuilder, state: State, scores: Sequence[Scalar], values: Sequence[Scalar]
) -> State:  # fmt: skip
    """`add_tokens` on a GPU. With an even number of f16 values, exponentials are rounded to f16 as
    well, and two tokens are added at once."""
    if not values[0].dtype.endswith("xf16>"):
        return add_tokens(k, exp2_fast, state, scores, values)
    top, weight, total = state
    larger = reduce(lambda a, b: larger_of(k, a, b), scores, top)
    factor, ones = exp2_fast(k, top - larger), k.scalar(1.0, "vector<2xf16>")
    weight, lanes = weight * factor, lanes_of(total)
    total = total * k.broadcast(factor, lanes)
    sums = [k.element(total, i) for i in range(lanes)]
    for first in range(0, len(values), 2):
        a, b = values[first : first + 2]
        both = [exp2_fast(k, score - larger) for score in scores[first : first + 2]]
        shares = k.intrinsic("amdgcn.cvt.pkrtz", both, "vector<2xf16>")
        weight = dot2(k, ones, shares, weight)
        sums = [
            dot2(k, k.shuffle(a, b, [i, i + lanes]), shares, sum_) for i, sum_ in enumerate(sums)
        ]
    return larger, weight, k.vector(sums)


def flattened(states: Sequence[State]) -> list[Scalar]:
    """States as a loop carries them."""
    return [x for state in states for x in state]


def unflattened(flat: Sequence[Scalar]) -> list[State]:
    """States that a loop has carried."""
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def merge(
    k: ThreadBuilder, lanes: Lanes, head_dim: int, states: Sequence[State],
    has_numbers: Scalar | None, finish: Callable[[Scalar, Scalar, Scalar, Scalar, Scalar], None],
) -> None:  # fmt: skip
    """One state of all threads' states of each of some heads.

    finish: called with the head, a place in D, its sum, the largest score, the sum of exponentials.
    """
    thread, slots, pitch = k.thread(), lanes.slots, lanes.slots * head_dim
    slot, lane = thread // lanes.count, thread % lanes.count
    tops, weights = (k.shared(len(states) * slots, "f32") for _ in range(2))
    sums = k.shared(min(2, len(states)) * pitch, "f32")  # of two heads at once

    def of_slots(memory: Memory, head: Scalar) -> list[Scalar]:
        """A head's number of each slot."""
        size = min(4, slots)
        loaded = [memory.load_vector(head * slots + i, size) for i in range(0, slots, size)]
        return [k.element(vector, i) for vector in loaded for i in range(size)]

    with k.when(lane.equals(0)):
        for i, (top, _, _) in enumerate(states):
            tops.store(top, slot + i * slots)
    k.barrier()
    for first in range(0, len(states), 2):
        largest = []
        for i, (top, weight, total) in enumerate(states[first : first + 2]):
            all_tops = of_slots(tops, k.as_index(first + i))
            largest.append(reduce(lambda a, b: larger_of(k, a, b), all_tops))
            factor = exp2_fast(k, top - largest[i])
            with k.when(lane.equals(0)):
                weights.store(weight * factor, slot + (first + i) * slots)
            total = total * k.broadcast(factor, lanes.piece)
            with k.when(has_numbers) if has_numbers else nullcontext():
                sums.store_vector(total, slot * head_dim + lane * lanes.piece + i * pitch)
        k.barrier()
        end = len(largest) * head_dim
        for start in range(0, end, THREADS):
            unit = thread + start
            with k.when(unit.less(k.scalar(end, "index"))):
                which, place = unit // head_dim, unit % head_dim
                top = which.equals(0).select(largest[0], largest[-1])
                total = _column(k, sums, which * pitch + place, slots, head_dim)
                whole = reduce(add, of_slots(weights, which + first))
                finish(which + first, place, total, top, whole)
        if first + 2 < len(states):
            k.barrier()


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
        last = views.splits - 1

        def add_two(split: Scalar, *state: Scalar) -> list[Scalar]:
            second = split + lanes.slots
            found = [views.of(split, row, head, start, lanes.piece)]
            top, weight, values = views.of(second.minimum(last), row, head, start, lanes.piece)
            is_there = second.less(views.splits)
            top = is_there.select(top, k.scalar(NOTHING, "f32"))
            weight = is_there.select(weight, k.scalar(0.0, "f32"))
            return self._add(k, exp2_fast, state, [*found, (top, weight, values)])

        first = (thread // lanes.count).to("i32")
        state = k.fold(first, views.splits, state, add_two, step=2 * lanes.slots)

        def finish(_: Scalar, place: Scalar, total: Scalar, __: Scalar, weight: Scalar) -> None:
            at = (row * self.num_heads + head) * self.head_dim + place
            inverse = k.intrinsic("amdgcn.rcp", [weight], "f32")
            views.out.store((total * inverse).to(self.dtype), at)

        merge(k, lanes, self.head_dim, unflattened(state), has_numbers, finish)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Head by head."""
        views, zero = self._views(k), k.scalar(0, "index")
        with k.loop(0, views.num_rows) as row, k.loop(0, self.num_heads) as head:
            _, weight, total = k.fold(
                k.scalar(0, "i32"), views.splits, self._first(k, self.head_dim),
                lambda split, *state: self._add(
                    k, exp2_exact, state, [views.of(split, row, head, zero, self.head_dim)]
                ),
            )  # fmt: skip
            value = total / k.broadcast(weight, self.head_dim)
            views.out.store_as(value, (row * self.num_heads + head) * self.head_dim)

    def _views(self, k: ExecutableBuilder) -> _Splits:
        parts = k.view(k.binding(read_only=True), "f32")
        out = k.view(k.binding(), self.dtype)
        return _Splits(k, self, parts, out, k.constant(), k.constant().to("i32"))

    def _first(self, k: ExecutableBuilder, piece: int) -> list[Scalar]:
        none, zero = k.scalar(NOTHING, "f32"), k.scalar(0.0, "f32")
        return [none, zero, k.broadcast(zero, piece)]

    def _add(
        self, k: ExecutableBuilder, exp2: Exp2, state: Sequence[Scalar], splits: Sequence[State]
    ) -> list[Scalar]:  # fmt: skip
        """A state with those of some splits more."""
        top, weight, total = state
        larger = reduce(lambda a, b: larger_of(k, a, b), [split[0] for split in splits], top)
        old, lanes = exp2(k, top - larger), lanes_of(total)
        weight, total = weight * old, total * k.broadcast(old, lanes)
        for found, more, values in splits:
            new = exp2(k, found - larger)
            weight = k.fma(more, new, weight)
            total = k.fma(k.broadcast(new, lanes), values, total)
        return [larger, weight, total]


@dataclass(frozen=True)
class _Splits:
    """What both forms of `Combination` read and write. splits: i32, as all places of parts."""

    k: ExecutableBuilder
    kernel: Combination
    parts: Memory
    out: Memory
    num_rows: Scalar
    splits: Scalar

    def of(self, split: Scalar, row: Scalar, head: Scalar, start: Scalar, piece: int) -> State:
        """What a split leaves of a head: its numbers from `start` on, `piece` of them."""
        k, parts, count, size = self.k, self.parts, self.kernel.num_heads, self.kernel.head_dim
        begin = (split * self.num_rows.to("i32") + row.to("i32")) * (count * (size + 2))
        begin = begin.to_unsigned("index")
        at = begin + count * size + head * 2
        weight = parts.load(at + 1)
        is_there = k.scalar(0.0, "f32").is_below(weight)
        top = is_there.select(parts.load(at), k.scalar(NOTHING, "f32"))
        return top, weight, parts.load_vector(begin + head * size + start, piece)
