"""Attention of decode on GPUs, over the pages of a KV cache, which are read where they lie.

Shapes: N rows of one token each, B pages a row, P tokens a page, L layers, H query heads, KH KV
heads, G = H / KH query heads of a KV head, D head_dim, S splits of the context.

A workgroup has one KV head of a row, and one split of its context: chunks of tokens, every S-th of
them. A few lanes have a token, 16 bytes of its key and of its value each, and use them for all G
query heads. Each group of lanes keeps a softmax of its own, corrected as larger scores come
(Milakov and Gimelshein 2018); at the end those of a workgroup become one, and those of all splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compile.gpu.kernel import THREADS, Kernel, Kernels, ThreadBuilder, dot2
from compile.gpu.pages import Heads, Pages, Token
from compile.gpu.softmax import (
    Combination,
    Lanes,
    State,
    add_tokens,
    add_tokens_fast,
    exp2_exact,
    flattened,
    merge,
    of_token,
    unflattened,
)
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.executable import ExecutableBuilder, Memory
from compile.mlir.values import Scalar

TOKENS = 4  # side by side, which a group of lanes loads at once; a page has a multiple of them
# Rows times KV heads that keep a chip busy without splits, which cost a launch: MI300X has three
# times as many compute units as the largest Radeon
ENOUGH, ENOUGH_FOR_GFX9 = 64, 256
# Below so many on gfx9, two workgroups share a KV head's queries: the splits of a context of 1,024
# tokens are too few
FEW_FOR_GFX9 = 16
WORKGROUPS = 256  # that splits make of fewer
HIDDEN = -3e38  # the score of a token that is not there, which has no weight beside any other
PRECISION = ("bf16", "f16", "f32")  # from the least


@dataclass(frozen=True)
class DecodeAttention(Kernel):
    """Rotates queries and keys, stores keys and values in the cache, and attends.

    Bindings: queries, keys and values [N, (H + 2 KH) * D] f32; cosines and sines of all positions
    [context, 2, D/2] f32; first positions [N] i64, which are those of the tokens; lengths after
    them [N] i64; page ids [N, B] i64; the cache; the result. Constants: N, B, the layer, S.
    Workgroups: S, KH times parts of its queries, N.

    The result is what rows attend to, [N, H * D] of `dtype`; or with splits [S, N, H * (D + 2)]
    f32, of each split the sums of values of all heads, then of each head the largest score, in
    powers of two, and the sum of exponentials. Rows that only pad the batch store nothing. A row
    reads what it stores itself from its registers, and nothing that another stores in this call.
    is_prefill: rows have several tokens, which are stored already. Their number stands in for S;
    queries, keys, values and result are of all tokens, the result zeros for those of padding.
    """

    heads: Heads
    dtype: str
    is_split: bool = False
    is_prefill: bool = False

    @property
    def name(self) -> str:
        """By the sizes that differ within a module."""
        suffix = "_split" if self.is_split else "_prefill" if self.is_prefill else ""
        return f"attend_{self.heads.name}{suffix}"

    @property
    def result(self) -> tuple[str, str]:
        """Of the cache, then of the result; queries and keys are rounded to the cache's type."""
        kv, dtype = self.heads.kv_dtype, "f32" if self.is_split else self.dtype
        least = min(kv, dtype, key=lambda name: PRECISION.index(name))
        return (dtype if kv == dtype else f"{kv},{dtype}"), least

    @property
    def lanes(self) -> Lanes:
        """Of a key or value."""
        return Lanes.of(self.heads.head_dim, self.heads.kv_dtype)

    @property
    def chunk(self) -> int:
        """Tokens that a workgroup loads at once."""
        return self.lanes.slots * TOKENS

    # What a thread does

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        heads, lanes, pages = self.heads, self.lanes, self._pages(k)
        parts = heads.group // heads.queries
        split, part, row = (k.workgroup(axis) for axis in range(3))
        token, head = Token(pages, row, split if self.is_prefill else None), part // parts
        if self.is_prefill:
            split, is_stored, has_own = k.scalar(0, "index"), k.scalar(0, "i1"), token.is_valid
        else:
            has_own = split.equals(0)
            is_stored = k.bits("andi", has_own, (part % parts).equals(0))
            is_stored = k.bits("andi", is_stored, token.is_valid)
        new = self._prepare(k, pages, token, part, head, is_stored)
        k.barrier()
        start, has_numbers = lanes.place(k, heads.head_dim)
        *queries, key, value = [
            new.load_vector(start + i * heads.head_dim, lanes.piece)
            for i in range(heads.queries + 2)
        ]
        if has_numbers:
            zero = k.scalar(0.0, key.dtype)
            queries = [has_numbers.select(query, zero) for query in queries]
        is_first = k.bits("andi", has_own, (k.thread() // lanes.count).equals(0))
        scores = [self._score(k, query, key) for query in queries]
        states = of_token(k, scores, value, is_first, is_fast=heads.kv_dtype == "f16")
        place = head * heads.head_dim + start
        states = self._attend(k, pages, token, place, queries, states, split.to("i32"))

        def finish(i: Scalar, place: Scalar, *sums: Scalar) -> None:
            self._finish(token, part * heads.queries + i, split, place, *sums)

        merge(k, lanes, heads.head_dim, states, has_numbers, finish)

    def _prepare(
        self, k: ThreadBuilder, pages: Pages, token: Token, part: Scalar, head: Scalar,
        is_stored: Scalar,
    ) -> Memory:  # fmt: skip
        """In local memory, queries of a workgroup times the scale of scores, and the key and value
        of their token, which are stored in the cache, too."""
        heads, piece = self.heads, self.lanes.piece
        while piece % 4 == 0 and (heads.queries + 2) * heads.head_dim <= piece // 2 * THREADS:
            piece //= 2
        pieces, queries = heads.head_dim // piece, k.scalar(heads.queries, "index")
        end = (heads.queries + 2) * pieces
        new = k.shared(end * piece, heads.kv_dtype)
        for first in range(0, end, THREADS):
            unit = k.thread() + first
            which, start = unit // pieces, unit % pieces * piece
            with k.when(unit.less(k.scalar(end, "index"))):
                is_query, is_value = which.less(queries), which.equals(heads.queries + 1)
                other = head + heads.num_heads
                other = is_value.select(other + heads.num_kv_heads, other)
                source = is_query.select(part * heads.queries + which, other)
                scale = is_query.select(k.scalar(heads.scale, "f32"), k.scalar(1.0, "f32"))
                x = token.rotated(source, start, piece) * k.broadcast(scale, piece)
                x = is_value.select(token.numbers(source, start, piece), x)
                x = k.convert(x, heads.kv_dtype)
                new.store_vector(x, unit * piece)
                with k.when(is_query.select(k.scalar(0, "i1"), is_stored)):
                    at = token.place(head, start) + (which - queries) * (heads.token // 2)
                    pages.store(x, at)
        return new

    def _attend(
        self, k: ThreadBuilder, pages: Pages, token: Token, start: Scalar,
        queries: Sequence[Scalar], states: Sequence[State], split: Scalar,
    ) -> list[State]:  # fmt: skip
        """The states with all tokens before `token` that the thread has; start: of its numbers in
        their keys."""
        first = (k.thread() // self.lanes.count * TOKENS).to("i32")
        step = pages.splits * self.chunk
        last = token.num_before.largest(k.scalar(1, "i32")) - 1
        no_head = k.scalar(0, "index")

        def attend(chunk: Scalar, page: Scalar, *flat: Scalar) -> list[Scalar]:
            position = first + chunk * self.chunk
            following = pages.page_of(token.row, (position + step).minimum(last))
            at = pages.at(page, position, no_head, start)
            places = [at + u * self.heads.token for u in range(TOKENS)]
            keys = [pages.load(place, self.lanes.piece) for place in places]
            values = [pages.load(pages.value_at(place), self.lanes.piece) for place in places]
            # What lies behind the last token may be NaN
            seen = [(position + u).less(token.num_before) for u in range(TOKENS)]
            none, zero = k.scalar(HIDDEN, "f32"), k.scalar(0.0, values[0].dtype)
            values = [is_seen.select(v, zero) for is_seen, v in zip(seen, values, strict=True)]
            states = unflattened(flat)
            for q, query in enumerate(queries):
                scores = [
                    is_seen.select(self._score(k, query, key), none)
                    for is_seen, key in zip(seen, keys, strict=True)
                ]
                states[q] = add_tokens_fast(k, states[q], scores, values)
            return [following, *flattened(states)]

        page = pages.page_of(token.row, (first + split * self.chunk).minimum(last))
        state = [page, *flattened(states)]
        chunks = token.chunks_before(self.chunk)
        return unflattened(k.fold(split, chunks, state, attend, step=pages.splits)[1:])

    def _score(self, k: ThreadBuilder, query: Scalar, key: Scalar) -> Scalar:
        """The score of a key in powers of two; each lane of a token has it."""
        total, pairs = k.scalar(0.0, "f32"), self.lanes.piece // 2
        if self.heads.kv_dtype == "f16":
            for i in range(pairs):
                a, b = (k.shuffle(x, x, [2 * i, 2 * i + 1]) for x in (query, key))
                total = dot2(k, a, b, total)
        else:
            a, b = (k.convert(x, "f32") for x in (query, key))
            for i in range(self.lanes.piece):
                total = k.fma(k.element(a, i), k.element(b, i), total)
        if self.lanes.count > 1:
            total = k.reduce("add", total, self.lanes.count)
        return total

    def _pages(self, k: ExecutableBuilder) -> Pages:
        dtype = "f32" if self.is_split else self.dtype
        return Pages(k, self.heads, dtype, is_prefill=self.is_prefill)

    def _finish(
        self, token: Token, head: Scalar, split: Scalar, place: Scalar, total: Scalar, top: Scalar,
        weight: Scalar,
    ) -> None:  # fmt: skip
        """Store number `place` of what a head attends to, or of what a split leaves of it."""
        if self.is_split:
            token.pages.leave(token.row, head, split, place, total, top, weight)
            return
        value = total / weight
        if self.is_prefill:
            value = token.is_valid.select(value, token.pages.k.scalar(0.0, "f32"))
        token.pages.finish(token.out_row * self.heads.num_heads + head, place, value)

    # The same in loops

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Head by head, a split after the other; of a head, one half after the other."""
        heads, pages = self.heads, self._pages(k)
        half = heads.head_dim // 2
        starts = [k.scalar(start, "index") for start in (0, half)]
        with (
            k.loop(0, pages.num_rows) as row,
            k.loop(0, pages.num_tokens or 1) as number,
            k.loop(0, heads.num_kv_heads) as head,
        ):
            token = Token(pages, row, number if self.is_prefill else None)
            key, value = (head + (heads.num_heads + more) for more in (0, heads.num_kv_heads))
            keys = [k.convert(token.rotated(key, at, half), heads.kv_dtype) for at in starts]
            values = [k.convert(token.numbers(value, at, half), heads.kv_dtype) for at in starts]
            if not self.is_prefill:
                with k.when(token.is_valid):
                    for at, key, value in zip(starts, keys, values, strict=True):
                        pages.store(key, token.place(head, at))
                        pages.store(value, pages.value_at(token.place(head, at)))
            splits = pages.splits.to("index")
            with k.loop(0, heads.group) as i, k.loop(0, splits) as split:
                query = head * heads.group + i
                self._attend_plainly(k, token, head, query, split, keys, values)

    def _attend_plainly(
        self, k: ExecutableBuilder, token: Token, kv_head: Scalar, head: Scalar, split: Scalar,
        keys: Sequence[Scalar], values: Sequence[Scalar],
    ) -> None:  # fmt: skip
        """What a query head and a split of a row leave; keys, values: of the token, as halves."""
        pages, half = token.pages, self.heads.head_dim // 2
        starts = [k.scalar(start, "index") for start in (0, half)]
        queries = [
            k.convert(token.rotated(head, start, half) * self.heads.scale, self.heads.kv_dtype)
            for start in starts
        ]

        def score(keys: Sequence[Scalar]) -> Scalar:
            total = k.scalar(0.0, "f32")
            for a, b in zip(queries, keys, strict=True):
                total = k.sum(k.convert(a, "f32") * k.convert(b, "f32"), total)
            return total

        def attend_token(position: Scalar, *flat: Scalar) -> list[Scalar]:
            page, states = pages.page_of(token.row, position), unflattened(flat)
            places = [pages.at(page, position, kv_head, start) for start in starts]
            found = score([pages.load(place, half) for place in places])
            for i, place in enumerate(places):
                value = pages.load(pages.value_at(place), half)
                states[i] = add_tokens(k, exp2_exact, states[i], [found], [value])
            return flattened(states)

        def attend(chunk: Scalar, *flat: Scalar) -> list[Scalar]:
            first = chunk * self.chunk
            end = (first + self.chunk).minimum(token.num_before)
            return k.fold(first, end, flat, attend_token)

        own, number = score(keys), split.to("i32")
        has_own = token.is_valid if self.is_prefill else split.equals(0)
        states = [of_token(k, [own], value, has_own)[0] for value in values]
        chunks = token.chunks_before(self.chunk)
        flat = k.fold(number, chunks, flattened(states), attend, step=pages.splits)
        for start, (top, weight, total) in zip(starts, unflattened(flat), strict=True):
            for i in range(half):
                number = k.element(total, i)
                self._finish(token, head, split, start + i, number, top, weight)


def attend(
    kernels: Kernels, heads: Heads, dtype: str, inputs: Sequence[Tensor], cache: Tensor,
    layer: Dim,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What rows attend to [N, H * D] in `dtype`, and the cache.

    inputs: queries, keys and values, cosines and sines, first positions, lengths, page ids: as of
    `DecodeAttention`. layer: its number.
    """
    num_rows, num_pages = inputs[-1].shape
    busy = int(num_rows) * heads.num_kv_heads
    is_gfx9 = kernels.target.subgroup == 64
    enough = ENOUGH_FOR_GFX9 if is_gfx9 else ENOUGH
    if is_gfx9 and busy < FEW_FOR_GFX9 and heads.queries % 2 == 0:
        heads = replace(heads, shares=2)
    kernel = DecodeAttention(heads, dtype, busy < enough)
    parts = heads.num_heads // heads.queries
    out = Tensor("", (num_rows, heads.num_heads * heads.head_dim), dtype)
    if not kernel.is_split:
        constants = [num_rows, num_pages, layer, 1]
        cache, out = kernels.call(kernel, (1, parts, num_rows), constants, inputs, [cache], [out])
        return out, cache
    most = 1 << (WORKGROUPS // (busy * heads.shares)).bit_length() - 1
    tokens = kernels.b.product(num_pages, heads.page_size)
    splits = _power_of_two(kernels.b, kernels.tiles(tokens, kernel.chunk), most)
    sums = Tensor("", (splits, num_rows, heads.summed), "f32")
    cache, sums = kernels.call(
        kernel, (splits, parts, num_rows), [num_rows, num_pages, layer, splits], inputs, [cache],
        [sums],
    )  # fmt: skip
    [out] = kernels.call(
        Combination(heads.num_heads, heads.head_dim, dtype), (heads.num_heads, num_rows, 1),
        [num_rows, splits], [sums], outputs=[out],
    )  # fmt: skip
    return out, cache


def _power_of_two(b: Builder, size: Dim, most: int) -> Dim:
    """The power of two that is not smaller than a size, but at most `most`, which is one: so there
    are few sizes of what splits leave, each of which the runtime keeps memory for."""
    bits = b.index(size) - 1
    for shift in (1, 2, 4, 8, 16):
        by = b.scalar(shift, "index")
        lower = b.op(f"arith.shrui {bits.name}, {by.name} : index", "index")
        bits = b.op(f"arith.ori {bits.name}, {lower.name} : index", "index")
    return (bits + 1).unsigned_minimum(b.scalar(most, "index")).name
