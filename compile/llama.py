"""Llama with a paged KV cache, emitted as tensor operations: for GPUs, whose kernels IREE writes.

Matrices are row-major and products plain contractions, in which IREE finds what the chip
multiplies. Shapes: N rows of a batch, S tokens a row, T = N*S, B pages a row, P tokens a page,
L layers, G query heads per KV head (KH), D head_dim, C = B*P context positions.

A page is [L, P, 2, KH, D]: one token of one layer is one contiguous row of keys, then values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compile import abi
from compile.config import LlamaConfig
from compile.mlir import Builder, Dim, Scalar, Tensor, tensor_type
from compile.model import MASKED, SUMMARY, ModelOptions, Parameter


@dataclass(frozen=True)
class Batch:
    """The rows of one call: [N, S] tokens."""

    num_rows: int
    seq_len: Dim
    tokens: Tensor  # [N, S] i64
    start: Tensor  # [N] i64
    seq_lens: Tensor  # [N] i64
    page_ids: Tensor  # [N, B] i64


@dataclass(frozen=True)
class Tables:
    """Index tables, computed once a call and shared by all layers."""

    positions: Tensor  # [N, S] i32: of each token; padding may lie behind the context
    write_rows: Tensor  # [L, N*S] i32: row of the cache that each token's K and V go to
    read_pages: Tensor  # [L, N, B] i32: page of the cache, per layer
    rope: Tensor  # [N, S, 2, D/2] f32: cosines, then sines


class LlamaEmitter:
    """Writes one module for `config` and `options`; `emit()` returns its text."""

    def __init__(self, config: LlamaConfig, options: ModelOptions) -> None:
        self.config, self.options = config, options
        self.b = Builder()
        self.parameters: dict[str, Parameter] = {}
        self.kv_row = 2 * config.num_kv_heads * config.head_dim
        self.page_elements = config.num_layers * options.page_size * self.kv_row
        self._declare_parameters()

    def emit(self) -> str:
        for parameter in self.parameters.values():
            self.b.emit(
                f'util.global private @"{parameter.name}" = #flow.parameter.named<"model"::'
                f'"{parameter.name}"> : {tensor_type(parameter.shape, parameter.dtype)}'
            )
        for kind in ("", "_next"):
            for size in self.options.prefill_batch_sizes:
                self._function(f"prefill{kind}", size)
            for size in self.options.decode_batch_sizes:
                self._function(f"decode{kind}", size)
        return self.b.text("module")

    # Parameters

    def _declare_parameters(self) -> None:
        c = self.config
        hidden, inner = c.hidden_size, c.intermediate_size
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self._matrix("token_embd.weight", c.vocab_size, hidden)
        self._vector("rope", self.options.max_seq_len, 2, c.head_dim // 2)
        for i in range(c.num_layers):
            self._vector(f"blk.{i}.attn_norm.weight", hidden)
            self._matrix(f"blk.{i}.attn_qkv.weight", qkv, hidden)
            self._matrix(f"blk.{i}.attn_output.weight", hidden, c.num_heads * c.head_dim)
            self._vector(f"blk.{i}.ffn_norm.weight", hidden)
            self._matrix(f"blk.{i}.ffn_gate_up.weight", 2 * inner, hidden)
            self._matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
        self._vector("output_norm.weight", hidden)
        if not c.tied_embeddings:
            self._matrix("output.weight", c.vocab_size, hidden)

    def _matrix(self, name: str, rows: int, cols: int) -> None:
        self.parameters[name] = Parameter(name, (rows, cols), self.options.weight_dtype)

    def _vector(self, name: str, *shape: int) -> None:
        self.parameters[name] = Parameter(name, shape, "f32")

    def _load(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        kind = tensor_type(parameter.shape, parameter.dtype)
        return self.b.tensor(
            f'util.global.load @"{name}" : {kind}', parameter.shape, parameter.dtype
        )

    # Functions of the ABI

    def _function(self, name: str, n: int) -> None:
        """One that returns all logits, or the last ones of each row with what sums them up."""
        b = self.b
        with abi.function(b, name, n, self.options.page_size, num_summed=2) as (args, is_next):
            pages = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            slots = self.config.num_layers * self.options.page_size
            cache = b.collapse(b.expand(pages, 1, slots, self.kv_row), 0, 2)
            tokens = args["tokens"]
            batch = Batch(n, tokens.shape[1], tokens, args["start_pos"], args["seq_lens"],
                          args["seq_block_ids"])  # fmt: skip
            x, cache = self._layers(batch, cache)
            if is_next:
                logits = self._logits(self._last_rows(x, batch))
                results = [b.expand(logits, 0, n, 1), self._sums(logits, args["scales"])]
            else:
                results = [b.expand(self._logits(x), 0, n, batch.seq_len)]
            cache = b.collapse(b.expand(cache, 0, pages.shape[0], slots), 1, 2)
            abi.return_results(b, results, cache)

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
        qkv = self._linear(self._norm(x, f"blk.{i}.attn_norm.weight"), f"blk.{i}.attn_qkv.weight")
        heads = b.expand(qkv, 0, batch.num_rows, batch.seq_len)
        heads = b.expand(heads, 2, c.num_heads + 2 * c.num_kv_heads, c.head_dim)  # [N, S, h, D]
        cache = self._store(self._cache_rows(heads, tables), cache, tables, i)
        q = self._rope(b.slice(heads, 2, 0, c.num_heads), tables)
        groups = c.num_heads // c.num_kv_heads
        q = b.expand(q, 2, c.num_kv_heads, groups)  # [N, S, KH, G, D]
        keys, values = self._context(cache, tables, i)
        out = self._attend(q, keys, values, tables)  # [N, S, KH, G, D]
        out = b.collapse(b.collapse(out, 2, 3), 0, 2)
        return self._linear(self._operand(out), f"blk.{i}.attn_output.weight", x), cache

    def _mlp(self, x: Tensor, i: int) -> Tensor:
        """x + down(silu(gate(norm(x))) * up(norm(x)))"""
        y = self._norm(x, f"blk.{i}.ffn_norm.weight")
        gate_up = self._linear(y, f"blk.{i}.ffn_gate_up.weight")  # gate features, then up
        inner = self.config.intermediate_size
        gate, up = (self.b.slice(gate_up, 1, j * inner, inner) for j in (0, 1))
        dtype = self.options.weight_dtype
        hidden = self.b.generic(
            "tf,tf->tf", [gate, up], gate.shape, dtype,
            lambda g, u: (g / ((g * -1.0).math("exp") + 1.0) * u).to(dtype),
        )  # fmt: skip
        return self._linear(hidden, f"blk.{i}.ffn_down.weight", x)

    # Building blocks

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, H] f32, read from the rows of the embedding."""
        table, tokens = self._load("token_embd.weight"), self.b.collapse(batch.tokens, 0, 2)

        def lookup(token: Scalar) -> Scalar:
            return self.b.extract(table, token.to("index"), self.b.position("h")).to("f32")

        shape = (tokens.shape[0], self.config.hidden_size)
        return self.b.generic("t->th", [tokens], shape, "f32", lookup)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm of x [T, H], as the left operand of a product."""
        dtype = self.options.weight_dtype
        squares = self.b.generic(
            "th->t", [x], x.shape[:1], "f32", lambda v, acc: acc + v * v, init=0.0
        )

        def scale(v: Scalar, total: Scalar, w: Scalar) -> Scalar:
            mean = total / self.config.hidden_size + self.config.rms_eps
            return (v / mean.math("sqrt") * w).to(dtype)

        return self.b.generic("th,t,h->th", [x, squares, self._load(name)], x.shape, dtype, scale)

    def _operand(self, x: Tensor) -> Tensor:
        """x [T, F] f32 as the left operand of a product."""
        dtype = self.options.weight_dtype
        return self.b.generic("tf->tf", [x], x.shape, dtype, lambda v: v.to(dtype))

    def _linear(self, lhs: Tensor, name: str, acc: Tensor | float = 0.0) -> Tensor:
        """lhs [T, K] times a matrix [N, K], plus `acc`: [T, N] f32."""
        weight = self._load(name)
        return self.b.contract("tk,nk->tn", lhs, weight, (lhs.shape[0], weight.shape[0]), acc)

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
        return self._linear(self._norm(x, "output_norm.weight"), head)

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
        top = b.generic("nb->n", [maxima], (n,), "f32", lambda v, acc: acc.maximum(v), init=MASKED)

        def first(v: Scalar, top: Scalar, acc: Scalar) -> Scalar:
            is_best = b.op(f"arith.cmpf oge, {v.name}, {top.name} : f32", "i1")
            return is_best.select(acc.minimum(b.position("v").to("i32")), acc)

        best = b.generic("nv,n->n", [logits, top], (n,), "i32", first, init=vocab - 1)

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

    # Building blocks of attention

    def _tables(self, batch: Batch) -> Tables:
        c, b = self.config, self.b
        n, s, page = batch.num_rows, batch.seq_len, self.options.page_size
        layers = c.num_layers
        positions = b.generic(
            "n->ns", [batch.start], (n, s), "i32",
            lambda start: (start + b.position("s").to("i64")).to("i32"),
        )  # fmt: skip
        read_pages = b.generic(
            "nb->lnb", [batch.page_ids], (layers, *batch.page_ids.shape), "i32",
            lambda page_id: (page_id.to("index") * layers + b.position("l")).to("i32"),
        )  # fmt: skip
        num_pages, last = b.index(batch.page_ids.shape[1]), b.index(self.options.max_seq_len - 1)

        def write_row(position: Scalar, end: Scalar) -> Scalar:
            slot, layer = position.to("index"), b.position("l")
            place = (slot // page).minimum(num_pages - 1)
            page_id = b.extract(read_pages, layer, b.position("n"), place).to("index")
            page_id = position.to("i64").less(end).select(page_id, layer)  # else page 0
            return (page_id * page + slot % page).to("i32")

        write_rows = b.generic(
            "ns,n->lns", [positions, batch.seq_lens], (layers, n, s), "i32", write_row
        )
        table = self._load("rope")

        def angle(position: Scalar) -> Scalar:
            row = position.to("index").minimum(last)
            return b.extract(table, row, b.position("t"), b.position("d"))

        rope = b.generic("ns->nstd", [positions], (n, s, *table.shape[1:]), "f32", angle)
        return Tables(positions, b.collapse(write_rows, 1, 2), read_pages, rope)

    def _halves(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        split = self.b.expand(x, axis, 2, int(x.shape[axis]) // 2)
        return self.b.slice(split, axis, 0, 1, drop=True), self.b.slice(
            split, axis, 1, 1, drop=True
        )

    def _angles(self, tables: Tables) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [N, S, D/2]."""
        return (
            self.b.slice(tables.rope, 2, 0, 1, drop=True),
            self.b.slice(tables.rope, 2, 1, 1, drop=True),
        )

    def _rotate(self, x0: Scalar, x1: Scalar, cos: Scalar, sin: Scalar) -> Scalar:
        """One half of a rotated pair; the dimension `t` says which."""
        first = self.b.position("t").less(self.b.scalar(1, "index"))
        return first.select(x0 * cos - x1 * sin, x1 * cos + x0 * sin)

    def _rope(self, x: Tensor, tables: Tables) -> Tensor:
        """Rotary embedding (Su et al. 2021, rotate-half form) of heads [N, S, h, D] f32."""
        n, s, h, d = x.shape
        out = self.b.generic(
            "nshd,nshd,nsd,nsd->nshtd",
            [*self._halves(x, 3), *self._angles(tables)],
            (n, s, h, 2, int(d) // 2),
            "f32",
            self._rotate,
        )
        return self.b.collapse(out, 3, 2)

    def _cache_rows(self, heads: Tensor, tables: Tables) -> Tensor:
        """Rotated keys, then values, as rows [N*S, 2*KH*D] of the cache."""
        c, b = self.config, self.b
        n, s, _, d = heads.shape
        keys = b.slice(heads, 2, c.num_heads, c.num_kv_heads)
        values = b.slice(heads, 2, c.num_heads + c.num_kv_heads, c.num_kv_heads)
        values = b.expand(values, 3, 2, int(d) // 2)

        def key_or_value(x0: Scalar, x1: Scalar, cos: Scalar, sin: Scalar, v: Scalar) -> Scalar:
            is_key = b.position("v").less(b.scalar(1, "index"))
            return is_key.select(self._rotate(x0, x1, cos, sin), v).to(self.options.kv_dtype)

        rows = b.generic(
            "nshd,nshd,nsd,nsd,nshtd->nsvhtd",
            [*self._halves(keys, 3), *self._angles(tables), values],
            (n, s, 2, c.num_kv_heads, 2, int(d) // 2),
            self.options.kv_dtype,
            key_or_value,
        )
        return b.collapse(b.collapse(rows, 2, 4), 0, 2)

    def _store(self, rows: Tensor, cache: Tensor, tables: Tables, i: int) -> Tensor:
        indices = self.b.slice(tables.write_rows, 0, i, 1, drop=True)
        return self.b.scatter(rows, self.b.expand(indices, 0, indices.shape[0], 1), cache)

    def _context(self, cache: Tensor, tables: Tables, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, C, KH, D] of layer `i`, of all pages of each row."""
        c, b, page = self.config, self.b, self.options.page_size
        pages = b.index(cache.shape[0]) // page
        by_page = b.collapse(b.expand(cache, 0, pages.name, page), 1, 2)
        ids = b.slice(tables.read_pages, 0, i, 1, drop=True)
        context = b.expand(b.gather(by_page, ids), 2, page, 2, c.num_kv_heads, c.head_dim)
        context = b.collapse(context, 1, 2)  # [N, C, 2, KH, D]
        return b.slice(context, 2, 0, 1, drop=True), b.slice(context, 2, 1, 1, drop=True)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, tables: Tables) -> Tensor:
        """Causal attention: [N, S, KH, G, D]."""
        b, dtype = self.b, self.options.kv_dtype
        n, s, _, _, d = q.shape
        visible = b.generic(
            "ns->nsc", [tables.positions], (n, s, keys.shape[1]), dtype,
            lambda position: position.less(b.position("c").to("i32")).select(
                b.scalar(-1e4, dtype), b.scalar(0.0, dtype)),
        )  # fmt: skip
        q = b.generic("nshgd->nhgsd", [q], (n, *q.shape[2:4], s, d), dtype, lambda v: v.to(dtype))
        keys, values = (
            b.generic("nchd->nhcd", [x], (n, x.shape[2], x.shape[1], d), dtype, lambda v: v)
            for x in (keys, values)
        )
        out = b.attention(
            "nhgsd,nhcd,nhcv,nsc->nhgsv", q, keys, values, 1 / math.sqrt(int(d)), visible
        )
        return b.generic("nhgsd->nshgd", [out], (n, s, *out.shape[1:3], d), "f32", lambda v: v)
