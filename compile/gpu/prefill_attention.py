"""Attention of prefill on GPUs, by matrix instructions, over pages that are read where they lie.

Shapes: N rows of S tokens each, B pages a row, P tokens a page, H query heads, KH KV heads,
G = H / KH query heads of a KV head, D head_dim.

A launch stores keys and values in the cache. A second one attends (Dao et al. 2022): a workgroup
has 128 queries of a KV head, those of G heads of a token side by side. Chunk after chunk of the
context goes through LDS, values transposed; loads of the next chunk are under way meanwhile. Each
wave multiplies the chunk with queries of its own, which it holds in registers.

The matrix instructions get keys first and queries second, then values and shares. So a lane has
scores and sums of one query only, and its scores lie as the second product wants them. Rows of keys
are given to lanes in an order by which a lane has scores of 8 tokens side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compile.gpu.attention import DecodeAttention
from compile.gpu.attention_context import Context
from compile.gpu.attention_tiles import QUERIES, Queries, Sizes, Softmax
from compile.gpu.kernel import THREADS, Kernel, Kernels, ThreadBuilder
from compile.gpu.pages import Heads, Pages, Token
from compile.gpu.tiles import Instruction
from compile.gpu.unpack import CHUNK
from compile.mlir.builder import Dim, Tensor
from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar
from compile.target import Target

MAX_HEAD_DIM = {64: 256, 32: 128}  # by threads of a wave, for which registers have room


@dataclass(frozen=True)
class StoreTokens(Kernel):
    """Rotates keys, and stores keys and values in the cache; tokens of padding are not stored.

    Bindings: as `DecodeAttention`, up to the cache. Constants: N, B, the layer, S. Workgroups:
    those of a row's tokens, N.
    """

    heads: Heads

    @property
    def name(self) -> str:
        """By the sizes that differ within a module."""
        return f"store_tokens_{self.heads.name}"

    @property
    def result(self) -> tuple[str, str]:
        """The cache."""
        return self.heads.kv_dtype, self.heads.kv_dtype

    @property
    def piece(self) -> int:
        """Numbers that a thread stores."""
        return math.gcd(self.heads.head_dim // 2, CHUNK)

    @property
    def pieces(self) -> int:
        """Of a token"""
        return self.heads.token // self.piece

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does: a piece."""
        pages = Pages(k, self.heads, None, is_prefill=True)
        self._store(k, pages, k.workgroup(1), k.workgroup() * THREADS + k.thread())

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Piece by piece."""
        pages = Pages(k, self.heads, None, is_prefill=True)
        assert pages.num_tokens
        with (
            k.loop(0, pages.num_rows) as row,
            k.loop(0, pages.num_tokens * self.pieces) as number,
        ):
            self._store(k, pages, row, number)

    def _store(self, k: ExecutableBuilder, pages: Pages, row: Scalar, number: Scalar) -> None:
        """Store piece `number` of a row, if its token is there."""
        heads, piece = self.heads, self.piece
        token = Token(pages, row, number // self.pieces)
        of_head = heads.head_dim // piece
        which, start = number % self.pieces // of_head, number % of_head * piece
        with k.when(token.is_valid):
            x = token.rotated(which + heads.num_heads, start, piece)
            is_key = which.less(k.scalar(heads.num_kv_heads, "index"))
            x = is_key.select(x, token.numbers(which + heads.num_heads, start, piece))
            # Values lie behind keys, as heads
            pages.store(k.convert(x, heads.kv_dtype), token.place(which, start))


@dataclass(frozen=True)
class PrefillAttention(DecodeAttention):
    """Attends to tokens that are stored.

    Bindings and constants: as `DecodeAttention` in prefill. Workgroups: KH; those of a row's
    queries, from the last on, as they take longest; N.
    """

    is_prefill: bool = True

    @property
    def name(self) -> str:
        """By the sizes that differ within a module."""
        return f"{super().name}_tiled"

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        sizes, pages = Sizes.of(self.heads, k), Pages(k, self.heads, self.dtype, is_prefill=True)
        assert pages.num_tokens
        count = pages.num_tokens * self.heads.group
        first = (count + (QUERIES - 1)) // QUERIES * QUERIES - (k.workgroup(1) + 1) * QUERIES
        queries = Queries(k, sizes, pages, first)
        context = Context(k, sizes, pages, first)
        softmax = Softmax(k, sizes, self.heads.scale)

        def attend(position: Scalar, start: Scalar, *flat: Scalar) -> list[Scalar]:
            state = flat[context.num_pages :]
            loaded = context.load(position + sizes.chunk, flat[: context.num_pages])
            pages_of = context.pages_of(position + 2 * sizes.chunk)
            scores = queries.masked(context.scores(start, queries), position)
            shares, tops, sums = softmax.add(scores, state)
            sums = context.add_values(start, shares, sums)
            if sizes.buffers == 1:
                k.barrier()
            else:
                start = k.scalar(sizes.buffer, "index") - start
            k.schedule_barrier()
            context.store(loaded, start)
            k.barrier()
            return [start, *pages_of, *tops, *(x for of_block in sums for x in of_block)]

        zero = k.scalar(0, "i32")
        start = k.scalar(0, "index")
        context.store(context.load(zero, context.first_pages()), start)
        k.barrier()
        state = [start, *context.pages_of(zero + sizes.chunk), *softmax.first()]
        state = k.fold(zero, context.end, state, attend, step=sizes.chunk)
        queries.finish(softmax.finish(state[1 + context.num_pages :]))


def attend_prefill(
    kernels: Kernels, heads: Heads, dtype: str, num_tokens: Dim, inputs: Sequence[Tensor],
    cache: Tensor, layer: Dim,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What tokens attend to [N * S, H * D] in `dtype`, and the cache.

    num_tokens: S. inputs: queries, keys and values of N * S tokens, cosines and sines, first
    positions, lengths, page ids: as of `DecodeAttention`. layer: its number.
    """
    b, (num_rows, num_pages) = kernels.b, inputs[-1].shape
    constants = [num_rows, num_pages, layer, num_tokens]
    store = StoreTokens(heads)
    groups = kernels.tiles(b.product(num_tokens, store.pieces), THREADS)
    [cache] = kernels.call(store, (groups, num_rows, 1), constants, inputs, [cache])
    out = Tensor("", (b.product(num_rows, num_tokens), heads.num_heads * heads.head_dim), dtype)
    if is_tiled(kernels.target, heads):
        tiles = kernels.tiles(b.product(num_tokens, heads.group), QUERIES)
        kernel: DecodeAttention = PrefillAttention(heads, dtype)
        grid: tuple[Dim, ...] = (heads.num_kv_heads, tiles, num_rows)
    else:
        kernel = DecodeAttention(heads, dtype, is_prefill=True)
        grid = num_tokens, heads.num_heads // heads.queries, num_rows
    cache, out = kernels.call(kernel, grid, constants, inputs, [cache], [out])
    return out, cache


def is_tiled(target: Target, heads: Heads) -> bool:
    """Whether matrix instructions multiply these numbers, and registers hold them."""
    if not Instruction.takes(heads.kv_dtype, target.name):
        return False
    largest = MAX_HEAD_DIM[target.subgroup or 32]
    return heads.head_dim % CHUNK == 0 and heads.head_dim <= largest
