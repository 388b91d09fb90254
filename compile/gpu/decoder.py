"""The layers of a Llama over a paged KV cache, as tensor operations for GPUs.

Shapes: N rows of a batch, S tokens a row, T = N*S, B pages a row, P tokens a page, L layers,
H hidden features, KH KV heads, G query heads per KV head, D head_dim, C = B*P context positions.
Prefill computes whole tiles of tokens: there S and C are multiples of a tile's size, the rest being
padding that nothing reads. IREE chooses the tiles of its kernels by what divides a size, and by
them the chip's matrix instructions.

A page of the cache is [L, P, 2, KH, D]: one token of one layer is one contiguous row of keys, then
values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compile.gpu.linear import Weights
from compile.mlir import abi
from compile.mlir.activations import gated
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from compile.options import ModelOptions


@dataclass(frozen=True)
class Batch:
    """The rows of one call."""

    layers: Sequence[str]  # the number of each, as an index
    tokens: Tensor  # [N, S] i64
    start: Tensor  # [N] i64, the first position of each row
    seq_lens: Tensor  # [N] i64, the position after each row's last token
    page_ids: Tensor  # [N, B] i64
    embeds: Tensor | None  # [N, S, H] f32, which stand in where tokens are negative

    @property
    def num_rows(self) -> int:
        """N"""
        return int(self.tokens.shape[0])

    @property
    def seq_len(self) -> Dim:
        """S, padding included"""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Tables:
    """Index tables, computed once a call and shared by all layers."""

    write_rows: Tensor  # [L, N*S] i32: row of the cache that each token's K and V go to
    read_pages: Tensor  # [L, N, B] i32: page of the cache, per layer
    rope: Tensor  # [N, S, 2, D/2] f32: cosines, then sines
    mask: Tensor  # [N, S, C], in the KV dtype: what is added to scores


class Decoder:
    """Writes all layers of a model into a function, for rows of tokens."""

    def __init__(
        self, config: LlamaConfig, options: ModelOptions, weights: Weights, tile: int
    ) -> None:
        self.config, self.options = config, options
        self.weights, self.b, self.tile = weights, weights.b, tile
        self.attention = Attention(config, options, weights, tile)

    def batch(self, args: Mapping[str, Tensor]) -> Batch:
        """The rows of a call whose arguments are those of `abi.function`; tokens are padded to
        whole tiles."""
        b, tokens = self.b, args["tokens"]
        # Before all work, which they would cut in pieces
        layers = [b.hidden(i) for i in range(self.config.num_layers)]
        n, num_tokens = tokens.shape
        if isinstance(num_tokens, str):
            size = _whole(b, num_tokens, _tokens_of_row(self.tile, int(n)))
            tokens = b.pad(tokens, 1, size, 0)
        return Batch(layers, tokens, args["start_pos"], args["seq_lens"], args["seq_block_ids"],
                     args.get("embeds"))  # fmt: skip

    def run(self, batch: Batch, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream [T, H] f32 after all layers, and the cache [rows, 2*KH*D]."""
        tables = self.attention.tables(batch)
        x = self._embed(batch)
        for i in range(self.config.num_layers):
            heads = self.weights.norm_linear(
                x, f"blk.{i}.attn_norm.weight", f"blk.{i}.attn_qkv.weight", self.config.rms_eps
            )
            out, cache = self.attention.attend(heads, cache, batch, tables, i)
            x = self.weights.linear(out, f"blk.{i}.attn_output.weight", x)
            x = self._mlp(x, i)
        return x, cache

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, H] f32: rows of the embedding, or those that were given."""
        b, name, embeds = self.b, "token_embd.weight", batch.embeds
        shape = (*batch.tokens.shape, self.config.hidden_size)
        rows = None
        if self.weights.is_quantized(name):
            rows = self.weights.rows_of(name, b.collapse(batch.tokens, 0, 2))
            if embeds is None:
                return rows
        table = self.weights.load(name)

        def lookup(token: Scalar) -> Scalar:
            h, none = b.position("h"), b.scalar(0, "i64")
            row = token.to("index").clamp(0, b.scalar(self.config.vocab_size - 1, "index"))
            if rows is None:
                x = b.extract(table, row, h).to("f32")
            else:
                at = b.position("n") * b.index(shape[1]) + b.position("s")
                x = b.extract(rows, at, h)
            if embeds is None:
                return x
            is_given = token.less(none)
            s = is_given.select(b.position("s"), b.scalar(0, "index"))
            return is_given.select(b.extract(embeds, b.position("n"), s, h), x)

        return b.collapse(b.generic("ns->nsh", [batch.tokens], shape, "f32", lookup), 0, 2)

    def _mlp(self, x: Tensor, i: int) -> Tensor:
        """x + down(silu(gate(norm(x))) * up(norm(x)))"""
        c, b, matrix = self.config, self.b, f"blk.{i}.ffn_gate_up.weight"
        gate_up = self.weights.norm_linear(
            x, f"blk.{i}.ffn_norm.weight", matrix, c.rms_eps, is_gated=True
        )
        if self.weights.is_quantized(matrix):
            return self.weights.linear(gate_up, f"blk.{i}.ffn_down.weight", x)
        gate_up = b.expand(gate_up, 1, 2, c.intermediate_size)  # gate features, then up

        def silu_times() -> Scalar:
            gate, up = (
                b.extract(gate_up, b.position("t"), b.scalar(j, "index"), b.position("f"))
                for j in (0, 1)
            )
            return gated(gate, up).to(self.weights.dtype)

        shape = (x.shape[0], c.intermediate_size)
        hidden = b.generic("->tf", [], shape, self.weights.dtype, silu_times)
        return self.weights.linear(hidden, f"blk.{i}.ffn_down.weight", x)


class Attention:
    """Writes the attention of a layer, which stores keys and values in the cache and reads them."""

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
        width = batch.page_ids.shape[1]
        if batch.seq_len != 1:
            width = _whole(b, width, max(1, self.context_tile // self.options.page_size))
        write_rows = self._write_rows(batch)
        read_pages = self._read_pages(batch, width)
        rope, mask = self._rope(positions), self._mask(positions, width)
        return Tables(b.collapse(write_rows, 1, 2), read_pages, rope, mask)

    def attend(
        self, qkv: Tensor, cache: Tensor, batch: Batch, tables: Tables, i: int
    ) -> tuple[Tensor, Tensor]:
        """What layer `i` attends to, [T, heads * D] in the weights' dtype, and the cache.

        qkv: queries, keys and values of all heads, [T, heads * D] f32.
        """
        c, b = self.config, self.b
        heads = b.expand(qkv, 0, batch.num_rows, batch.seq_len)
        num_heads = c.num_heads + 2 * c.num_kv_heads
        heads = b.expand(heads, 2, num_heads, 2, c.head_dim // 2)  # [N, S, h, 2, D/2]
        layer = batch.layers[i]
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

    def _store(self, rows: Tensor, cache: Tensor, tables: Tables, layer: str) -> Tensor:
        """The cache with the rows [N*S, 2*KH*D] of a layer."""
        indices = self.b.slice(tables.write_rows, 0, layer, 1, drop=True)
        return self.b.scatter(rows, self.b.expand(indices, 0, indices.shape[0], 1), cache)

    def _context(self, cache: Tensor, tables: Tables, layer: str) -> Tensor:
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

        Matrix instructions need inner sizes that are known: prefill's S and C are split in tiles.
        """
        b, mask = self.b, tables.mask
        scale, dtype = 1 / math.sqrt(int(q.shape[-1])), self.weights.dtype
        if q.shape[1] == 1:
            keys, values = self._halves(context, 2)
            spec = "nshgd,nchd,nchv,nsc->nshgv"
            return b.attention("nhgsdcv", spec, q, keys, values, scale, mask, dtype)
        rows = _tokens_of_row(self.tile, int(q.shape[0]))
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


def _tokens_of_row(tile: int, n: int) -> int:
    """Tokens of each of n rows that are computed together: T is a multiple of one tile.

    Of more, IREE would make tiles that local memory has no room for.
    """
    return max(1, tile // n)


def _whole(b: Builder, size: Dim, unit: int) -> Dim:
    """A size, rounded up to a multiple of `unit`."""
    whole = (b.index(size) + (unit - 1)) // unit * unit
    return b.multiple(whole, unit, abi.MAX_ARGUMENT_SIZE).name
