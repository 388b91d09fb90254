"""Llama with a paged KV cache, emitted as MLIR: prefill, prefill_last and decode.

Activations between the matrices live in `mmt4d` tiles: [T, F/n, m, n] holds feature f = fo*n + fi
of row r = t*m + ri. A row-major layout is the same with one tile per row (m = 1, n = F), so every
layer is written once. Shapes: N rows of a batch, S tokens a row, B pages a row, P tokens a page,
L layers, G query heads per KV head (KH), D head_dim, C = B*P context positions.

A page is [L, P, 2, KH, D]: one token of one layer is one contiguous row of keys, then values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from compile.config import LlamaConfig
from compile.mlir import Builder, Dim, Scalar, Tensor, tensor_type
from compile.parameter import Parameter
from compile.target import ROW_MAJOR, Layout

MAX_ARGUMENT_SIZE = 1 << 22
MASKED = -1e30  # finite: a row without any valid position must not become NaN


@dataclass(frozen=True)
class ModelOptions:
    """What is compiled: dtypes ("f32" | "f16" | "bf16"), tokens a page, batch sizes, context."""

    weight_dtype: str
    kv_dtype: str
    page_size: int
    prefill_batch_sizes: tuple[int, ...]
    decode_batch_sizes: tuple[int, ...]
    max_seq_len: int


@dataclass(frozen=True)
class Batch:
    """The rows of one call: [N, S] tokens, in T tiles of `tile` rows."""

    num_rows: int
    seq_len: Dim
    tiles: Dim
    tile: int
    tokens: Tensor  # [N, S] i64
    start: Tensor  # [N] i64
    seq_lens: Tensor  # [N] i64
    page_ids: Tensor  # [N, B] i64


@dataclass(frozen=True)
class Tables:
    """Index tables, computed once a call and shared by all layers."""

    positions: Tensor  # [N, S] index of each token, clamped to the context
    write_rows: Tensor  # [L, N*S] i32: row of the cache that each token's K and V go to
    read_pages: Tensor  # [L, N, B] i32: page of the cache, per layer
    rope: Tensor  # [N, S, 2, D/2] f32: cosines, then sines


class LlamaEmitter:
    """Writes one module for `config`, `options` and `layout`; `emit()` returns its text."""

    def __init__(
        self, config: LlamaConfig, options: ModelOptions, layout: Layout = ROW_MAJOR
    ) -> None:
        self.config, self.options, self.layout = config, options, layout
        self.b = Builder()
        self.parameters: dict[str, Parameter] = {}
        self.kv_row = 2 * config.num_kv_heads * config.head_dim
        self.page_elements = config.num_layers * options.page_size * self.kv_row
        self.hidden = layout.pad(config.hidden_size)
        self.inner = layout.pad(config.intermediate_size)
        self._declare_parameters()

    @property
    def function_names(self) -> list[str]:
        prefill, decode = self.options.prefill_batch_sizes, self.options.decode_batch_sizes
        return [
            *(f"{name}_bs{size}" for size in prefill for name in ("prefill", "prefill_last")),
            *(f"decode_bs{size}" for size in decode),
        ]

    def emit(self) -> str:
        for parameter in self.parameters.values():
            self.b.emit(
                f'util.global private @"{parameter.name}" = #flow.parameter.named<"model"::'
                f'"{parameter.name}"> : {tensor_type(parameter.shape, parameter.dtype)}'
            )
        for size in self.options.prefill_batch_sizes:
            self._prefill(f"prefill_bs{size}", size, last_only=False)
            self._prefill(f"prefill_last_bs{size}", size, last_only=True)
        for size in self.options.decode_batch_sizes:
            self._decode(f"decode_bs{size}", size)
        return self.b.text("module")

    # Parameters

    def _declare_parameters(self) -> None:
        c = self.config
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self._matrix("token_embd.weight", c.vocab_size, self.hidden)
        self._vector("rope", self.options.max_seq_len, 2, c.head_dim // 2)
        for i in range(c.num_layers):
            self._vector(f"blk.{i}.attn_norm.weight", self.hidden)
            self._matrix(f"blk.{i}.attn_qkv.weight", qkv, self.hidden)
            self._matrix(f"blk.{i}.attn_output.weight", self.hidden, c.num_heads * c.head_dim)
            self._vector(f"blk.{i}.ffn_norm.weight", self.hidden)
            self._matrix(f"blk.{i}.ffn_gate_up.weight", 2 * self.inner, self.hidden)
            self._matrix(f"blk.{i}.ffn_down.weight", self.hidden, self.inner)
        self._vector("output_norm.weight", self.hidden)
        if not c.tied_embeddings:
            self._matrix("output.weight", c.vocab_size, self.hidden)

    def _matrix(self, name: str, rows: int, cols: int) -> None:
        shape = self.layout.shape(rows, cols)
        self.parameters[name] = Parameter(name, shape, self.options.weight_dtype)

    def _vector(self, name: str, *shape: int) -> None:
        self.parameters[name] = Parameter(name, shape, "f32")

    def _load(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        kind = tensor_type(parameter.shape, parameter.dtype)
        return self.b.tensor(
            f'util.global.load @"{name}" : {kind}', parameter.shape, parameter.dtype
        )

    def _load_matrix(self, name: str) -> Tensor:
        """A matrix as tiles [N/n, K/k, n, k]."""
        weight = self._load(name)
        if len(weight.shape) == 4:
            return weight
        return self.b.expand(weight, 0, 1, 1, weight.shape[0])

    # Functions of the ABI

    @contextmanager
    def _function(
        self, name: str, shapes: dict[str, tuple[Dim, ...]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """A coarse-fences function over i64 tensors and the cache; "?" marks a dynamic size."""
        arguments = [*shapes, "cache"]
        signature = ", ".join(f"%{a}: !hal.buffer_view" for a in arguments)
        with self.b.block(
            f'util.func public @"{name}$async"({signature}, %wait: !hal.fence, '
            f"%signal: !hal.fence) -> !hal.buffer_view attributes "
            f'{{inlining_policy = #util.inline.never, iree.abi.model = "coarse-fences", '
            f"iree.abi.stub}} {{"
        ):
            yield {a: self._import(a, s) for a, s in shapes.items()}, self._import_cache()

    def _import(self, name: str, shape: tuple[Dim, ...]) -> Tensor:
        sizes = tuple(
            self._dynamic_size(name, axis, int(d[1:])) if isinstance(d, str) else d
            for axis, d in enumerate(shape)
        )
        kind = tensor_type(sizes, "i64")
        dynamic = ", ".join(d for d in sizes if isinstance(d, str))
        return self.b.tensor(
            f"hal.tensor.import wait(%wait) => %{name} : !hal.buffer_view -> {kind}"
            + (f"{{{dynamic}}}" if dynamic else ""),
            sizes,
            "i64",
        )

    def _dynamic_size(self, name: str, axis: int, multiple: int) -> str:
        """The size of one dimension of an argument, promised to be a multiple of `multiple`."""
        size = self.b.op(
            f"hal.buffer_view.dim<%{name} : !hal.buffer_view>[{axis}] : index", "index"
        )
        limit = MAX_ARGUMENT_SIZE
        return self.b.op(
            f"util.assume.int {size.name}<umin = {multiple}, umax = {limit - limit % multiple}"
            f"{f', udiv = {multiple}' if multiple > 1 else ''}> : index",
            "index",
        ).name

    def _import_cache(self) -> Tensor:
        """The cache as rows [pages*L*P, 2*KH*D]; consumed, so that updates happen in place."""
        pages = self.b.op("hal.buffer_view.dim<%cache : !hal.buffer_view>[0] : index", "index")
        kind = tensor_type(("?", self.page_elements), self.options.kv_dtype)
        cache = self.b.tensor(
            f"hal.tensor.import wait(%wait) => consume %cache : !hal.buffer_view -> "
            f"{kind}{{{pages.name}}}",
            (pages.name, self.page_elements),
            self.options.kv_dtype,
        )
        slots = self.config.num_layers * self.options.page_size
        return self.b.collapse(self.b.expand(cache, 1, slots, self.kv_row), 0, 2)

    def _return(self, logits: Tensor, cache: Tensor) -> None:
        """Store the cache back into its argument and return the logits when both are ready."""
        slots = self.config.num_layers * self.options.page_size
        pages = Scalar(self.b, str(cache.shape[0]), "index") // slots
        cache = self.b.collapse(self.b.expand(cache, 0, pages.name, slots), 1, 2)
        alias, ready, stored, view = (self.b.fresh() for _ in range(4))
        self.b.emit(
            f"{alias} = hal.tensor.alias wait(%wait) => {cache.name} : {cache.type}"
            f"{{{cache.shape[0]}}} to %cache : !hal.buffer_view"
        )
        self.b.emit(
            f"{ready}, {stored} = hal.tensor.barrier join({logits.name}, {alias} : "
            f"{logits.type}, {cache.type}) => %signal : !hal.fence"
        )
        dynamic = ", ".join(d for d in logits.shape if isinstance(d, str))
        self.b.emit(
            f"{view} = hal.tensor.export {ready} : {logits.type}"
            f"{f'{{{dynamic}}}' if dynamic else ''} -> !hal.buffer_view"
        )
        self.b.emit(f"util.return {view} : !hal.buffer_view")

    def _prefill(self, name: str, num_rows: int, *, last_only: bool) -> None:
        n, page = num_rows, self.options.page_size
        shapes: dict[str, tuple[Dim, ...]] = {
            "tokens": (n, f"%{page}"),
            "start_pos": (n,),
            "seq_lens": (n,),
            "seq_block_ids": (n, "%1"),
        }
        with self._function(name, shapes) as (args, cache):
            tokens = args["tokens"]
            tile = self.layout.row_tile(page)
            seq_len = tokens.shape[1]
            tiles = (self.b.index(self.b.product(n, seq_len)) // tile).name
            batch = Batch(n, seq_len, tiles, tile, tokens, args["start_pos"], args["seq_lens"],
                          args["seq_block_ids"])  # fmt: skip
            x, cache = self._layers(batch, cache)
            if last_only:
                x, batch = self._last_rows(x, batch)
            self._return(self._logits(x, batch), cache)

    def _decode(self, name: str, num_rows: int) -> None:
        n = num_rows
        shapes: dict[str, tuple[Dim, ...]] = {
            "tokens": (n, 1),
            "seq_lens": (n,),
            "start_positions": (n,),
            "seq_block_ids": (n, "%1"),
        }
        with self._function(name, shapes) as (args, cache):
            batch = self._single_token_batch(
                args["tokens"], args["start_positions"], args["seq_lens"], args["seq_block_ids"]
            )
            x, cache = self._layers(batch, cache)
            self._return(self._logits(x, batch), cache)

    def _single_token_batch(
        self, tokens: Tensor, start: Tensor, seq_lens: Tensor, page_ids: Tensor
    ) -> Batch:
        n = tokens.shape[0]
        assert isinstance(n, int)
        tile = math.gcd(n, self.layout.m_tile) if self.layout.packed else 1
        return Batch(n, 1, n // tile, tile, tokens, start, seq_lens, page_ids)

    # The model

    def _layers(self, batch: Batch, cache: Tensor) -> tuple[Tensor, Tensor]:
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
        heads = self._rows(qkv, batch, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        heads = b.expand(heads, 2, c.num_heads + 2 * c.num_kv_heads, c.head_dim)  # [N, S, h, D]
        cache = self._store(self._cache_rows(heads, tables), cache, tables, i)
        q = self._rope(b.slice(heads, 2, 0, c.num_heads), tables)
        groups = c.num_heads // c.num_kv_heads
        q = b.expand(q, 2, c.num_kv_heads, groups)  # [N, S, KH, G, D]
        keys, values = self._context(cache, tables, i)
        attend = self._attend if self.layout.packed else self._attend_fused
        out = attend(q, keys, values, tables)  # [N, S, KH, G, D]
        out = b.collapse(out, 2, 3)
        return self._linear(self._tiles(out, batch), f"blk.{i}.attn_output.weight", x), cache

    def _mlp(self, x: Tensor, i: int) -> Tensor:
        """x + down(silu(gate(norm(x))) * up(norm(x)))"""
        y = self._norm(x, f"blk.{i}.ffn_norm.weight")
        gate_up = self._linear(y, f"blk.{i}.ffn_gate_up.weight")  # gate features, then up
        axis = 1 if self.layout.packed else 3
        half = int(gate_up.shape[axis]) // 2
        k = self._depth(self.inner)
        halves = [self.b.slice(gate_up, axis, j * half, half) for j in (0, 1)]
        split = [self.b.expand(h, 3, int(h.shape[3]) // k, k) for h in halves]
        hidden = self._to_lhs(
            "tfijk,tfijk", split, lambda g, u: g / ((g * -1.0).math("exp") + 1.0) * u
        )
        return self._linear(hidden, f"blk.{i}.ffn_down.weight", x)

    # Building blocks on tiles

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, H/n, m, n] f32, read from the rows of the embedding."""
        table = self._load_matrix("token_embd.weight")  # [V/v, H/k, v, k]
        rows, depth = (int(table.shape[2]), int(table.shape[3]))
        n_tile = self.layout.n_tile if self.layout.packed else self.hidden
        tokens = self._token_tiles(batch)

        def lookup(token: Scalar) -> Scalar:
            row = token.to("index")
            feature = self.b.position("f") * n_tile + self.b.position("j")
            element = self.b.extract(table, row // rows, feature // depth, row % rows,
                                     feature % depth)  # fmt: skip
            return element.to("f32")

        shape = (batch.tiles, self.hidden // n_tile, batch.tile, n_tile)
        return self.b.generic("ti->tfij", [tokens], shape, "f32", lookup)

    def _token_tiles(self, batch: Batch) -> Tensor:
        flat = self.b.collapse(batch.tokens, 0, 2)
        return self.b.expand(flat, 0, batch.tiles, batch.tile)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm of x [T, H/n, m, n], as the left operand [T, H/k, m, k] of a product."""
        t, f, m, n = x.shape
        # In two steps: in one, a single row would add up in another order than several do.
        partial = self.b.generic(
            "tfij->tij", [x], (t, m, n), "f32", lambda v, acc: acc + v * v, init=0.0
        )
        squares = self.b.generic(
            "tij->ti", [partial], (t, m), "f32", lambda v, acc: acc + v, init=0.0
        )
        k = self._depth(n)
        weight = self.b.expand(self._load(name), 0, f, int(n) // k, k)

        def scale(v: Scalar, total: Scalar, w: Scalar) -> Scalar:
            mean = total / self.config.hidden_size + self.config.rms_eps
            return v / mean.math("sqrt") * w

        return self._to_lhs(
            "tfijk,ti,fjk", [self.b.expand(x, 3, int(n) // k, k), squares, weight], scale
        )

    def _depth(self, n: Dim) -> int:
        """The depth k of a product's tiles whose left operand comes in tiles of n features."""
        return self.layout.k_tile if self.layout.packed else int(n)

    def _to_lhs(self, spec: str, inputs: list[Tensor], body: Callable[..., Scalar]) -> Tensor:
        """An elementwise function of tiles [T, F/n, m, n/k, k], written as tiles [T, F/k, m, k]."""
        t, f, m, j, k = inputs[0].shape
        dtype = self.options.weight_dtype
        out = self.b.generic(
            spec + "->tfjik", inputs, (t, f, j, m, k), dtype, lambda *args: body(*args).to(dtype)
        )
        return self.b.collapse(out, 1, 2)

    def _linear(self, lhs: Tensor, name: str, acc: Tensor | None = None) -> Tensor:
        """lhs [T, K/k, m, k] times a matrix, plus `acc`: tiles [T, N/n, m, n] f32."""
        weight = self._load(name)
        if self.layout.packed:
            shape = (lhs.shape[0], weight.shape[0], lhs.shape[2], weight.shape[2])
            return self.b.mmt4d(lhs, weight, acc or self.b.fill(0.0, shape, "f32"))
        x = self.b.collapse(lhs, 1, 3)
        init = self.b.collapse(acc, 1, 3) if acc else 0.0
        out = self.b.contract("tk,nk->tn", x, weight, (x.shape[0], weight.shape[0]), init)
        return self.b.expand(out, 1, 1, 1, weight.shape[0])

    def _rows(self, tiles: Tensor, batch: Batch, width: int) -> Tensor:
        """Tiles [T, F/n, m, n] as rows [N, S, width], without the padding of F."""
        t, f, m, n = tiles.shape
        rows = self.b.generic("tfij->tifj", [tiles], (t, m, f, n), "f32", lambda v: v)
        rows = self.b.collapse(self.b.collapse(rows, 2, 2), 0, 2)
        return self.b.slice(self.b.expand(rows, 0, batch.num_rows, batch.seq_len), 2, 0, width)

    def _tiles(self, rows: Tensor, batch: Batch) -> Tensor:
        """Rows [N, S, F] as the left operand [T, F/k, m, k] of a product."""
        width = int(rows.shape[2])
        k = self._depth(width)
        x = self.b.expand(self.b.collapse(rows, 0, 2), 0, batch.tiles, batch.tile)
        x = self.b.expand(x, 2, width // k, k)
        shape = (batch.tiles, width // k, batch.tile, k)
        dtype = self.options.weight_dtype
        return self.b.generic("tifk->tfik", [x], shape, dtype, lambda v: v.to(dtype))

    def _last_rows(self, x: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        """The tile rows of each row's last valid token, as a batch of single tokens."""
        last = self._single_token_batch(batch.tokens, batch.start, batch.seq_lens, batch.page_ids)
        seq_len = self.b.index(batch.seq_len)

        def flat_row(start: Scalar, end: Scalar) -> Scalar:
            local = (end - start - 1).to("index")
            row = self.b.position("n") * seq_len + local.clamp(0, seq_len - 1)
            return row.to("i64")

        rows = self.b.generic(
            "n,n->n", [batch.start, batch.seq_lens], (batch.num_rows,), "i64", flat_row
        )
        rows = self.b.expand(rows, 0, last.tiles, last.tile)
        shape = (last.tiles, x.shape[1], last.tile, x.shape[3])

        def pick(row: Scalar) -> Scalar:
            row = row.to("index")
            return self.b.extract(
                x, row // batch.tile, self.b.position("f"), row % batch.tile, self.b.position("j")
            )

        return self.b.generic("ti->tfij", [rows], shape, "f32", pick), last

    def _logits(self, x: Tensor, batch: Batch) -> Tensor:
        """[N, S, V] f32"""
        head = "token_embd.weight" if self.config.tied_embeddings else "output.weight"
        logits = self._linear(self._norm(x, "output_norm.weight"), head)
        return self._rows(logits, batch, self.config.vocab_size)

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
        read_pages = b.generic(
            "nb->lnb", [batch.page_ids], (layers, *batch.page_ids.shape), "i32",
            lambda page_id: (page_id.to("index") * layers + b.position("l")).to("i32"),
        )  # fmt: skip
        table = self._load("rope")
        rope = b.generic(
            "ns->nstd", [positions], (n, s, *table.shape[1:]), "f32",
            lambda p: b.extract(table, p.to("index"), b.position("t"), b.position("d")),
        )  # fmt: skip
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
        """Causal attention as two contractions and a softmax: [N, S, KH, G, D]."""
        b = self.b
        n, s, h, g, d = q.shape
        scores_shape = (n, h, g, s, keys.shape[1])
        scores = b.contract("nshgd,nchd->nhgsc", q, keys, scores_shape)
        scale = 1 / math.sqrt(int(d))

        def masked(score: Scalar, position: Scalar) -> Scalar:
            hidden = position.less(b.position("c").to("i64"))
            return hidden.select(b.scalar(MASKED, "f32"), score * scale)

        top = b.generic(
            "nhgsc,ns->nhgs", [scores, tables.positions], (n, h, g, s), "f32",
            lambda score, position, acc: acc.maximum(masked(score, position)), init=MASKED,
        )  # fmt: skip
        weights = b.generic(
            "nhgsc,ns,nhgs->nhgsc", [scores, tables.positions, top], scores_shape, "f32",
            lambda score, position, m: (masked(score, position) - m).math("exp"),
        )  # fmt: skip
        total = b.generic(
            "nhgsc->nhgs", [weights], (n, h, g, s), "f32", lambda w, acc: acc + w, init=0.0
        )
        out = b.contract("nhgsc,nchd->nshgd", weights, values, q.shape)
        return b.generic(
            "nshgd,nhgs->nshgd",
            [out, total],
            q.shape,
            "f32",
            lambda v, denominator: v / denominator,
        )

    def _attend_fused(self, q: Tensor, keys: Tensor, values: Tensor, tables: Tables) -> Tensor:
        """Causal attention as one operation, for GPUs: [N, S, KH, G, D]."""
        b, dtype = self.b, self.options.kv_dtype
        n, s, _, _, d = q.shape
        visible = b.generic(
            "ns->nsc", [tables.positions], (n, s, keys.shape[1]), dtype,
            lambda position: position.less(b.position("c").to("i64")).select(
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
