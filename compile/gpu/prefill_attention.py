"""Attention of prefill on GPUs, as tensor operations of which IREE makes kernels.

Shapes: N rows of a batch, S tokens a row, B pages a row, P tokens a page, L layers, KH KV heads, G
query heads per KV head, D head_dim, C = B*P context positions. S and C are multiples of a tile's
size, the rest being padding that nothing reads. IREE chooses the tiles of its kernels by what
divides a size, and by them the chip's matrix instructions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compile.gpu.batch import Batch, tokens_of_row, whole_tiles
from compile.gpu.linear import Weights
from compile.mlir.builder import Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from compile.options import ModelOptions


@dataclass(frozen=True)
class Tables:
    """Index tables of prefill, computed once a call and shared by all layers."""

    write_rows: Tensor  # [L, N*S] i32: row of the cache that each token's K and V go to
    read_pages: Tensor  # [L, N, B] i32: page of the cache, per layer
    rope: Tensor  # [N, S, 2, D/2] f32: cosines, then sines
    mask: Tensor  # [N, S, C], in the KV dtype: what is added to scores


class PrefillAttention:
    """Writes the attention of prefill, which stores keys and values in the cache and reads them."""

    def __init__(
        self, config: LlamaConfig, options: ModelOptions, weights: Weights, tile: int
    ) -> None:
        self.config, self.options = config, options
        self.weights, self.b, self.tile = weights, weights.b, tile
        self.context_tile = tile // 2  # of more, a gfx1100 runs out of registers

    def tables(self, batch: Batch) -> Tables:
        """What all layers of a call need to know of its rows."""
        b = self.b
        last = b.scalar(self.options.max_seq_len - 1, "i64")
        positions = b.generic(
            "n->ns", [batch.start], batch.tokens.shape, "i64",
            lambda start: (start + b.position("s").to("i64")).minimum(last),
        )  # fmt: skip
        pages_of_tile = max(1, self.context_tile // self.options.page_size)
        width = whole_tiles(b, batch.page_ids.shape[1], pages_of_tile)
        write_rows = self._write_rows(batch)
        read_pages = self._read_pages(batch, width)
        rope, mask = self._rope(positions), self._mask(positions, width)
        return Tables(b.collapse(write_rows, 1, 2), read_pages, rope, mask)

    def attend(
        self, qkv: Tensor, cache: Tensor, batch: Batch, tables: Tables, layer: Dim
    ) -> tuple[Tensor, Tensor]:
        """What a layer attends to, [T, heads * D] in the weights' dtype, and the cache.

        qkv: queries, keys and values of all heads, [T, heads * D] f32.
        """
        c, b = self.config, self.b
        heads = b.expand(qkv, 0, batch.num_rows, batch.seq_len)
        num_heads = c.num_heads + 2 * c.num_kv_heads
        heads = b.expand(heads, 2, num_heads, 2, c.head_dim // 2)  # [N, S, h, 2, D/2]
        cache = self._store(self._cache_rows(heads, tables), cache, tables, layer)
        q = self._queries(heads, tables)
        out = self._attend(q, self._context(cache, tables, layer), tables)  # [N, S, KH, G, D]
        return b.collapse(b.collapse(out, 2, 3), 0, 2), cache

    # Tables

    def _write_rows(self, batch: Batch) -> Tensor:
        """[L, N, S] i32; tokens of padding go to page 0."""
        b, layers, page = self.b, self.config.num_layers, self.options.page_size
        num_pages = b.index(batch.page_ids.shape[1])

        def write_row(start: Scalar, end: Scalar) -> Scalar:
            position = start + b.position("s").to("i64")
            slot = position.to("index")
            page_id = b.extract(
                batch.page_ids, b.position("n"), (slot // page).minimum(num_pages - 1)
            ).to("index")
            page_id = position.less(end).select(page_id, b.scalar(0, "index"))
            row = (page_id * layers + b.position("l")) * page + slot % page
            return row.to("i32")

        shape = (layers, *batch.tokens.shape)
        return b.generic("n,n->lns", [batch.start, batch.seq_lens], shape, "i32", write_row)

    def _read_pages(self, batch: Batch, width: Dim) -> Tensor:
        """[L, N, width] i32: page 0 beyond the page table, all of which is masked."""
        b, layers = self.b, self.config.num_layers
        num_pages = b.index(batch.page_ids.shape[1])

        def read_page() -> Scalar:
            i = b.position("b")
            page_id = b.extract(batch.page_ids, b.position("n"), i.minimum(num_pages - 1))
            page_id = i.less(num_pages).select(page_id.to("index"), b.scalar(0, "index"))
            return (page_id * layers + b.position("l")).to("i32")

        return b.generic("->lnb", [], (layers, batch.num_rows, width), "i32", read_page)

    def _rope(self, positions: Tensor) -> Tensor:
        """Cosines and sines at positions [N, S] i64: [N, S, 2, D/2] f32."""
        b, table = self.b, self.weights.load("rope")
        return b.generic(
            "ns->nstd", [positions], (*positions.shape, *table.shape[1:]), "f32",
            lambda p: b.extract(table, p.to("index"), b.position("t"), b.position("d")),
        )  # fmt: skip

    def _mask(self, positions: Tensor, width: Dim) -> Tensor:
        """[N, S, C]: hides what follows each of the positions [N, S]."""
        b, dtype = self.b, self.options.kv_dtype
        shape = (*positions.shape, b.product(width, self.options.page_size))
        return b.generic(
            "ns->nsc", [positions], shape, dtype,
            lambda position: position.less(b.position("c").to("i64")).select(
                b.scalar(-1e4, dtype), b.scalar(0.0, dtype)),
        )  # fmt: skip

    # Queries, keys and values

    def _queries(self, heads: Tensor, tables: Tables) -> Tensor:
        """Rotated queries [N, S, KH, G, D]."""
        c, b, dtype = self.config, self.b, self.options.kv_dtype
        n, s, _, _, half = heads.shape
        q = b.generic(
            "->nshtd", [], (n, s, c.num_heads, 2, half), dtype,
            lambda: self._rotated(heads, b.position("h"), tables).to(dtype),
        )  # fmt: skip
        return b.expand(b.collapse(q, 3, 2), 2, c.num_kv_heads, c.num_heads // c.num_kv_heads)

    def _cache_rows(self, heads: Tensor, tables: Tables) -> Tensor:
        """Rotated keys, then values, as rows [N*S, 2*KH*D] of the cache.

        Zeros for padding, which goes to page 0: all sequences read that page, under a mask, and a
        NaN of one would be NaN in all.
        """
        c, b, dtype = self.config, self.b, self.options.kv_dtype
        n, s, _, _, half = heads.shape

        def key_or_value() -> Scalar:
            is_value = b.position("v")
            head = is_value * c.num_kv_heads + b.position("h") + c.num_heads
            key = self._rotated(heads, head, tables)
            value = self._at_token(heads, head, b.position("t"))
            x = is_value.less(b.scalar(1, "index")).select(key, value)
            token = b.position("n") * b.index(s) + b.position("s")
            is_padding = b.extract(tables.write_rows, b.scalar(0, "index"), token).less(
                end_of_page_0
            )
            return is_padding.select(b.scalar(0.0, x.dtype), x).to(dtype)

        shape = (n, s, 2, c.num_kv_heads, 2, half)
        end_of_page_0 = b.scalar(c.num_layers * self.options.page_size, "i32")
        rows = b.generic("->nsvhtd", [], shape, dtype, key_or_value)
        return b.collapse(b.collapse(rows, 2, 4), 0, 2)

    def _rotated(self, heads: Tensor, head: Scalar, tables: Tables) -> Scalar:
        """An element of a head of [N, S, h, 2, D/2], rotated (Su et al. 2021, rotate-half form)."""
        halves = [self.b.scalar(t, "index") for t in (0, 1)]
        x0, x1 = (self._at_token(heads, head, half) for half in halves)
        cos, sin = (self._at_token(tables.rope, half) for half in halves)
        is_first = self.b.position("t").less(halves[1])
        return is_first.select(x0 * cos - x1 * sin, x1 * cos + x0 * sin)

    def _at_token(self, x: Tensor, *indices: Scalar) -> Scalar:
        """An element of x [N, S, .., D/2], inside a `generic` body over n, s and d."""
        n, s, d = (self.b.position(letter) for letter in "nsd")
        return self.b.extract(x, n, s, *indices, d)

    # The cache

    def _store(self, rows: Tensor, cache: Tensor, tables: Tables, layer: Dim) -> Tensor:
        """The cache with the rows [N*S, 2*KH*D] of a layer."""
        indices = self.b.slice(tables.write_rows, 0, layer, 1, drop=True)
        return self.b.scatter(rows, self.b.expand(indices, 0, indices.shape[0], 1), cache)

    def _context(self, cache: Tensor, tables: Tables, layer: Dim) -> Tensor:
        """[N, C, 2, KH, D]: keys and values of a layer, of all pages of each row."""
        c, b, page = self.config, self.b, self.options.page_size
        pages = b.index(cache.shape[0]) // page
        by_page = b.collapse(b.expand(cache, 0, pages.name, page), 1, 2)
        ids = b.slice(tables.read_pages, 0, layer, 1, drop=True)
        context = b.expand(b.gather(by_page, ids), 2, page, 2, c.num_kv_heads, c.head_dim)
        return b.collapse(context, 1, 2)

    # Attention

    def _attend(self, q: Tensor, context: Tensor, tables: Tables) -> Tensor:
        """Causal attention of queries [N, S, KH, G, D] to a context: of the queries' shape.

        Matrix instructions need inner sizes that are known: S and C are split in tiles.
        """
        b, mask = self.b, tables.mask
        scale, dtype = 1 / math.sqrt(int(q.shape[-1])), self.weights.dtype
        rows = tokens_of_row(self.tile, int(q.shape[0]))
        mask = self._tiled(self._tiled(mask, 2, self.context_tile), 1, rows)
        q, context = self._tiled(q, 1, rows), self._tiled(context, 1, self.context_tile)
        keys, values = self._halves(context, 3)
        spec = "noshgd,nbchd,nbchv,nosbc->noshgv"
        out = b.attention("nhgosdbcv", spec, q, keys, values, scale, mask, "f32")
        out = b.generic("noshgd->noshgd", [out], out.shape, dtype, lambda v: v.to(dtype))
        return b.collapse(out, 1, 2)

    def _halves(self, x: Tensor, axis: int) -> list[Tensor]:
        return [self.b.slice(x, axis, i, 1, drop=True) for i in (0, 1)]

    def _tiled(self, x: Tensor, axis: int, tile: int) -> Tensor:
        """Dimension `axis`, a multiple of a tile, as two."""
        return self.b.expand(x, axis, (self.b.index(x.shape[axis]) // tile).name, tile)
