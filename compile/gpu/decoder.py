"""Llama with a paged KV cache, emitted as tensor operations: for GPUs, whose kernels IREE writes.

Matrices are row-major and products plain contractions, in which IREE finds what the chip
multiplies. Shapes: N rows of a batch, S tokens a row, T = N*S, B pages a row, P tokens a page,
L layers, G query heads per KV head (KH), D head_dim, C = B*P context positions. Prefill computes
whole tiles: there S and C are multiples of a tile's size, the rest padding that nothing reads. By
what divides a size, IREE chooses its tiles, and by these matrix instructions.

A page is [L, P, 2, KH, D]: one token of one layer is one contiguous row of keys, then values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compile.formats.layout import MASKED, SUMMARY, Parameter
from compile.gpu.linear import Weights, whole_subgroups
from compile.gpu.vision import VisionEmitter
from compile.mlir import abi
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import ModelOptions

SEARCHED_AT_ONCE = 128  # logits: four for each of 32 lanes


@dataclass(frozen=True)
class Batch:
    """The rows of one call: [N, S] tokens."""

    num_rows: int
    seq_len: Dim
    tokens: Tensor  # [N, S] i64
    start: Tensor  # [N] i64
    seq_lens: Tensor  # [N] i64
    page_ids: Tensor  # [N, B] i64
    embeds: Tensor | None  # [N, S, H] f32, of tokens that are negative


@dataclass(frozen=True)
class Tables:
    """Index tables, computed once a call and shared by all layers."""

    layers: Sequence[str]  # the number of each, as an index
    write_rows: Tensor  # [L, N*S] i32: row of the cache that each token's K and V go to
    read_pages: Tensor  # [L, N, B] i32: page of the cache, per layer
    rope: Tensor  # [N, S, 2, D/2] f32: cosines, then sines
    mask: Tensor  # [N, S, C]: what is added to scores


class LlamaEmitter:
    """Writes one module for `config` and `options`; `emit()` returns its text."""

    def __init__(
        self,
        config: LlamaConfig,
        options: ModelOptions,
        tile: int = 64,
        vision: VisionConfig | None = None,
    ) -> None:
        self.config, self.options, self.tile = config, options, tile
        self.context_tile = tile // 2  # of more, a gfx1100 runs out of registers
        self.b = Builder()
        self.weights = Weights(self.b, options.weight_dtype)
        self.kv_row = 2 * config.num_kv_heads * config.head_dim
        self.page_elements = config.num_layers * options.page_size * self.kv_row
        self._declare_parameters()
        self._vision = vision and VisionEmitter(vision, config.hidden_size, self.weights, tile)

    @property
    def parameters(self) -> dict[str, Parameter]:
        return self.weights.parameters

    def emit(self) -> str:
        self.weights.declare()
        for name, size in self.options.calls:
            self._function(name, size)
        if self._vision:
            for size in self.options.image_batch_sizes:
                with abi.image_function(self.b, size, self._vision.config.image_size) as pixels:
                    abi.return_results(self.b, [self._vision.encode(pixels)])
        return self.b.text("module")

    # Parameters

    def _declare_parameters(self) -> None:
        c = self.config
        hidden, inner = c.hidden_size, c.intermediate_size
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.weights.matrix("token_embd.weight", c.vocab_size, hidden)
        self.weights.vector("rope", self.options.max_seq_len, 2, c.head_dim // 2)
        for i in range(c.num_layers):
            self.weights.vector(f"blk.{i}.attn_norm.weight", hidden)
            self.weights.matrix(f"blk.{i}.attn_qkv.weight", qkv, hidden)
            self.weights.matrix(f"blk.{i}.attn_output.weight", hidden, c.num_heads * c.head_dim)
            self.weights.vector(f"blk.{i}.ffn_norm.weight", hidden)
            self.weights.matrix(f"blk.{i}.ffn_gate_up.weight", 2 * inner, hidden)
            self.weights.matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
        self.weights.vector("output_norm.weight", hidden)
        if not c.tied_embeddings:
            self.weights.matrix("output.weight", c.vocab_size, hidden)

    # Functions of the ABI

    def _function(self, name: str, n: int) -> None:
        """One that returns all logits, or the last ones of each row with what sums them up."""
        b = self.b
        size = self.options.page_size, self.config.hidden_size
        with abi.function(b, name, n, *size, num_summed=2) as (args, is_next):
            pages = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            slots = self.config.num_layers * self.options.page_size
            cache = b.collapse(b.expand(pages, 1, slots, self.kv_row), 0, 2)
            # Before all work, which they would cut in pieces
            self._layer_numbers = [b.hidden(i) for i in range(self.config.num_layers)]
            tokens, num_tokens = args["tokens"], args["tokens"].shape[1]
            if isinstance(num_tokens, str):
                tokens = b.pad(tokens, 1, self._whole(num_tokens, self._row_tile(n)), 0)
            batch = Batch(n, tokens.shape[1], tokens, args["start_pos"], args["seq_lens"],
                          args["seq_block_ids"], args.get("embeds"))  # fmt: skip
            x, cache = self._layers(batch, cache)
            if is_next:
                logits = self._logits(self._last_rows(x, batch))
                results = [b.expand(logits, 0, n, 1), self._sums(logits, args["scales"])]
            else:
                logits = b.expand(self._logits(x), 0, n, batch.seq_len)
                results = [b.slice(logits, 1, 0, num_tokens)]
            cache = b.collapse(b.expand(cache, 0, pages.shape[0], slots), 1, 2)
            abi.return_results(b, results, abi.store_cache(b, cache))

    # The model

    def _layers(self, batch: Batch, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream [T, H] after all layers."""
        tables = self._tables(batch)
        x = self._embed(batch)
        for i in range(self.config.num_layers):
            x, cache = self._attention(x, cache, batch, tables, i)
            x = self._mlp(x, i)
        return x, cache

    def _attention(
        self, x: Tensor, cache: Tensor, batch: Batch, tables: Tables, i: int
    ) -> tuple[Tensor, Tensor]:
        c, b = self.config, self.b
        qkv = self.weights.linear(
            self._norm(x, f"blk.{i}.attn_norm.weight"), f"blk.{i}.attn_qkv.weight"
        )
        heads = b.expand(qkv, 0, batch.num_rows, batch.seq_len)
        num_heads = c.num_heads + 2 * c.num_kv_heads
        heads = b.expand(heads, 2, num_heads, 2, c.head_dim // 2)  # [N, S, h, 2, D/2]
        cache = self._store(self._cache_rows(heads, tables), cache, tables, i)
        q = self._queries(heads, tables)
        out = self._attend(q, self._context(cache, tables, i), tables)  # [N, S, KH, G, D]
        out = b.collapse(b.collapse(out, 2, 3), 0, 2)
        return self.weights.linear(out, f"blk.{i}.attn_output.weight", x), cache

    def _mlp(self, x: Tensor, i: int) -> Tensor:
        """x + down(silu(gate(norm(x))) * up(norm(x)))"""
        c, b = self.config, self.b
        y = self._norm(x, f"blk.{i}.ffn_norm.weight")
        gate_up = self.weights.linear(y, f"blk.{i}.ffn_gate_up.weight")  # gate features, then up
        gate_up = b.expand(gate_up, 1, 2, c.intermediate_size)

        def silu_times() -> Scalar:
            gate, up = (
                b.extract(gate_up, b.position("t"), b.scalar(j, "index"), b.position("f"))
                for j in (0, 1)
            )
            return (gate / ((gate * -1.0).math("exp") + 1.0) * up).to(self.options.weight_dtype)

        shape = (x.shape[0], c.intermediate_size)
        hidden = b.generic("->tf", [], shape, self.options.weight_dtype, silu_times)
        return self.weights.linear(hidden, f"blk.{i}.ffn_down.weight", x)

    # Building blocks

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, H] f32: rows of the embedding, or those that were given."""
        b, table, embeds = self.b, self.weights.load("token_embd.weight"), batch.embeds

        def lookup(token: Scalar) -> Scalar:
            h, none = b.position("h"), b.scalar(0, "i64")
            row = token.to("index").clamp(0, b.scalar(self.config.vocab_size - 1, "index"))
            x = b.extract(table, row, h).to("f32")
            if embeds is None:
                return x
            is_given = token.less(none)
            s = is_given.select(b.position("s"), b.scalar(0, "index"))
            return is_given.select(b.extract(embeds, b.position("n"), s, h), x)

        shape = (*batch.tokens.shape, self.config.hidden_size)
        return b.collapse(b.generic("ns->nsh", [batch.tokens], shape, "f32", lookup), 0, 2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm of x [T, H], as the left operand of a product."""
        dtype = self.options.weight_dtype
        squares = self.b.generic(
            "th->t", [x], x.shape[:1], "f32", lambda v, acc: acc + v * v, init=0.0
        )

        def scale(v: Scalar, total: Scalar, w: Scalar) -> Scalar:
            mean = total * (1 / self.config.hidden_size) + self.config.rms_eps
            return (v * mean.math("rsqrt") * w).to(dtype)

        return self.b.generic(
            "th,t,h->th", [x, squares, self.weights.load(name)], x.shape, dtype, scale
        )

    def _last_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """[N, H]: the rows of x [T, H] that belong to each row's last valid token."""
        seq_len = self.b.index(batch.seq_len)

        def pick(start: Scalar, end: Scalar) -> Scalar:
            local = (end - start - 1).to("index").clamp(0, seq_len - 1)
            row = self.b.position("n") * seq_len + local
            return self.b.extract(x, row, self.b.position("h"))

        shape = (batch.num_rows, self.config.hidden_size)
        return self.b.generic("n,n->nh", [batch.start, batch.seq_lens], shape, "f32", pick)

    def _logits(self, x: Tensor) -> Tensor:
        """[T, V] f32"""
        head = "token_embd.weight" if self.config.tied_embeddings else "output.weight"
        return self.weights.linear(self._norm(x, "output_norm.weight"), head)

    def _sums(self, logits: Tensor, scales: Tensor) -> Tensor:
        """What sums up logits [N, V], in one small array that is copied to the host: the first of
        the likeliest tokens, then of each block the maximum, then the sum of
        exp((logit - maximum) * scale).
        """
        b, (n, vocab) = self.b, logits.shape
        assert isinstance(vocab, int)
        num_blocks = -(-vocab // SUMMARY)
        blocks = b.pad(logits, 1, num_blocks * SUMMARY, MASKED)
        blocks = b.expand(blocks, 1, num_blocks, SUMMARY)
        maxima = b.generic(
            "nbi->nb", [blocks], (n, num_blocks), "f32",
            lambda v, acc: acc.maximum(v), init=MASKED,
        )  # fmt: skip
        sums = b.generic(
            "nbi,nb,n->nb", [blocks, maxima, scales], maxima.shape, "f32",
            lambda v, top, scale, acc: acc + ((v - top) * scale).math("exp"), init=0.0,
        )  # fmt: skip
        best = self._first_largest(blocks, maxima, vocab)

        def entry() -> Scalar:
            place, row = b.position("k"), b.position("n")
            of_maximum = (place - 1).clamp(0, b.scalar(num_blocks - 1, "index"))
            of_sum = (place - 1 - num_blocks).clamp(0, b.scalar(num_blocks - 1, "index"))
            block = place.less(b.scalar(1 + num_blocks, "index")).select(
                b.extract(maxima, row, of_maximum), b.extract(sums, row, of_sum)
            )
            token = b.extract(best, row).to("f32")  # exact below 2^24
            return place.less(b.scalar(1, "index")).select(token, block)

        return b.generic("->nk", [], (n, 1 + 2 * num_blocks), "f32", entry)

    def _first_largest(self, blocks: Tensor, maxima: Tensor, vocab: int) -> Tensor:
        """[N] i32: of each part of the blocks [N, b, i] the first largest of the row, then the
        first of those.

        A part is what a subgroup of 32 reads at once, four numbers a lane: iree-compile 3.9.0
        numbers the elements of a reduction that takes longer as if all were in its first part.
        """
        b, (n, num_blocks, size) = self.b, blocks.shape
        none = b.scalar(vocab - 1, "i32")
        num_parts = int(size) // SEARCHED_AT_ONCE
        maxima = b.pad(maxima, 1, whole_subgroups(int(num_blocks)), MASKED)
        top = b.generic("nb->n", [maxima], (n,), "f32", lambda v, acc: acc.maximum(v), MASKED)

        def first_of_part(v: Scalar, top: Scalar, acc: Scalar) -> Scalar:
            part = b.position("b") * num_parts + b.position("p")
            token = part * SEARCHED_AT_ONCE + b.position("i")
            return acc.unsigned_minimum(v.is_below(top).select(none, token.to("i32")))

        parts = b.expand(blocks, 2, num_parts, SEARCHED_AT_ONCE)
        firsts = b.generic(
            "nbpi,n->nbp", [parts, top], parts.shape[:-1], "i32", first_of_part, vocab - 1
        )
        firsts = b.collapse(firsts, 1, 2)
        firsts = b.pad(firsts, 1, whole_subgroups(int(firsts.shape[1])), vocab - 1)
        return b.generic(
            "nk->n", [firsts], (n,), "i32", lambda v, acc: acc.unsigned_minimum(v), vocab - 1
        )

    # Building blocks of attention

    def _tables(self, batch: Batch) -> Tables:
        c, b = self.config, self.b
        n, s, page = batch.num_rows, batch.seq_len, self.options.page_size
        layers = c.num_layers
        last = b.scalar(self.options.max_seq_len - 1, "i64")
        positions = b.generic(
            "n->ns", [batch.start], (n, s), "i64",
            lambda start: (start + b.position("s").to("i64")).minimum(last),
        )  # fmt: skip
        num_pages = b.index(batch.page_ids.shape[1])
        width = batch.page_ids.shape[1]
        if s != 1:
            width = self._whole(width, max(1, self.context_tile // page))

        def write_row(start: Scalar, end: Scalar) -> Scalar:
            position = start + b.position("s").to("i64")
            slot = position.to("index")
            page_id = b.extract(
                batch.page_ids, b.position("n"), (slot // page).minimum(num_pages - 1)
            ).to("index")
            page_id = position.less(end).select(page_id, b.scalar(0, "index"))
            row = (page_id * layers + b.position("l")) * page + slot % page
            return row.to("i32")

        write_rows = b.generic(
            "n,n->lns", [batch.start, batch.seq_lens], (layers, n, s), "i32", write_row
        )

        def read_page() -> Scalar:
            """Page 0 beyond the table, all of which is masked."""
            i = b.position("b")
            page_id = b.extract(batch.page_ids, b.position("n"), i.minimum(num_pages - 1))
            page_id = i.less(num_pages).select(page_id.to("index"), b.scalar(0, "index"))
            return (page_id * layers + b.position("l")).to("i32")

        read_pages = b.generic("->lnb", [], (layers, n, width), "i32", read_page)
        table = self.weights.load("rope")
        rope = b.generic(
            "ns->nstd", [positions], (n, s, *table.shape[1:]), "f32",
            lambda p: b.extract(table, p.to("index"), b.position("t"), b.position("d")),
        )  # fmt: skip
        dtype = self.options.kv_dtype
        mask = b.generic(
            "ns->nsc", [positions], (n, s, b.product(width, page)), dtype,
            lambda position: position.less(b.position("c").to("i64")).select(
                b.scalar(-1e4, dtype), b.scalar(0.0, dtype)),
        )  # fmt: skip
        return Tables(self._layer_numbers, b.collapse(write_rows, 1, 2), read_pages, rope, mask)

    def _whole(self, size: Dim, unit: int) -> Dim:
        """A size, rounded up to a multiple of `unit`."""
        whole = (self.b.index(size) + (unit - 1)) // unit * unit
        return self.b.multiple(whole, unit, abi.MAX_ARGUMENT_SIZE).name

    def _halves(self, x: Tensor, axis: int) -> list[Tensor]:
        return [self.b.slice(x, axis, i, 1, drop=True) for i in (0, 1)]

    def _queries(self, heads: Tensor, tables: Tables) -> Tensor:
        """[N, S, KH, G, D]"""
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

    def _store(self, rows: Tensor, cache: Tensor, tables: Tables, i: int) -> Tensor:
        indices = self.b.slice(tables.write_rows, 0, tables.layers[i], 1, drop=True)
        return self.b.scatter(rows, self.b.expand(indices, 0, indices.shape[0], 1), cache)

    def _context(self, cache: Tensor, tables: Tables, i: int) -> Tensor:
        """[N, C, 2, KH, D]: keys and values of layer `i`, of all pages of each row."""
        c, b, page = self.config, self.b, self.options.page_size
        pages = b.index(cache.shape[0]) // page
        by_page = b.collapse(b.expand(cache, 0, pages.name, page), 1, 2)
        ids = b.slice(tables.read_pages, 0, tables.layers[i], 1, drop=True)
        context = b.expand(b.gather(by_page, ids), 2, page, 2, c.num_kv_heads, c.head_dim)
        return b.collapse(context, 1, 2)

    def _attend(self, q: Tensor, context: Tensor, tables: Tables) -> Tensor:
        """Causal attention of queries [N, S, KH, G, D], of the same shape.

        Matrix instructions need inner sizes that are known: prefill's S and C are split in tiles.
        """
        b, mask = self.b, tables.mask
        scale, dtype = 1 / math.sqrt(int(q.shape[-1])), self.options.weight_dtype
        if q.shape[1] == 1:
            keys, values = self._halves(context, 2)
            spec = "nshgd,nchd,nchv,nsc->nshgv"
            return b.attention("nhgsdcv", spec, q, keys, values, scale, mask, dtype)
        rows = self._row_tile(int(q.shape[0]))
        mask = self._tiled(self._tiled(mask, 2, self.context_tile), 1, rows)
        q, context = self._tiled(q, 1, rows), self._tiled(context, 1, self.context_tile)
        keys, values = self._halves(context, 3)
        spec = "noshgd,nbchd,nbchv,nosbc->noshgv"
        out = b.attention("nhgosdbcv", spec, q, keys, values, scale, mask, "f32")
        out = b.generic("noshgd->noshgd", [out], out.shape, dtype, lambda v: v.to(dtype))
        return b.collapse(out, 1, 2)

    def _row_tile(self, n: int) -> int:
        """Tokens of each of n rows that are computed together: T is a multiple of one tile.

        Of more, IREE would make tiles that local memory has no room for.
        """
        return max(1, self.tile // n)

    def _tiled(self, x: Tensor, axis: int, tile: int) -> Tensor:
        """Dimension `axis`, a multiple of a tile, as two."""
        return self.b.expand(x, axis, (self.b.index(x.shape[axis]) // tile).name, tile)
