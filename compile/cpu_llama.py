"""Llama for CPUs: the whole model as one kernel, phase after phase, over rows of tokens.

The valid tokens of all sequences of a call are the rows, M of them, without padding; prefill and
decode differ only in how many there are. Shapes: N sequences, S tokens of each at most, B pages of
each, P tokens a page, H hidden features, G query heads per KV head (KH), D head_dim.

A layer of a page holds keys [KH, P/p, D/u, p, u], then values [KH, P/u, D, u]: vectors of p
positions or D features, in units of u (pairs of bf16, where the CPU multiplies them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compile import abi
from compile.config import LlamaConfig
from compile.kernel import LINE, KernelBuilder, Memory, vector_type
from compile.llama import MASKED, ModelOptions
from compile.parameter import Parameter
from compile.quantize import GROUP
from compile.matmul import (
    ITEM_BYTES,
    Activations,
    Format,
    Streams,
    Vectors,
    Views,
    operand,
    product,
)
from compile.mlir import Builder, Dim, Scalar, Tensor, tensor_type

WORKGROUPS = 64  # at least one a thread; those that find all done return at once
TASK_BYTES = 1 << 17  # of weights: one long stream is read faster than several short ones
MIN_TASKS = 16  # of a matrix, or some threads would wait for others
ROW_CHUNK = 128  # rows of a matrix product's task
QUERY_ROWS = 4  # rows of one sequence that attend together
CONTEXT_CHUNK = 256  # positions between two corrections of a softmax
SPLIT = 512  # positions of a task in decode, so that several threads share a long context
SUMMARY = 256  # tokens of a summarized block of logits
PHASES = 10  # a layer

_HEADER = 16  # i32 before the tables: numbers of rows, row groups, outputs, splits
_ROWS, _GROUPS, _OUTPUTS, _SPLITS = range(4)


def _powers(count: int, most: int) -> int:
    """The largest power of two that divides `count`, up to `most`."""
    return math.gcd(count, most)


@dataclass(frozen=True)
class Kind:
    """What a kernel computes: all logits or those after each sequence, with summaries; splits."""

    name: str
    all_logits: bool
    is_decode: bool


KINDS = (
    Kind("prefill", True, False), Kind("prefill_next", False, False),
    Kind("decode_next", False, True),
)  # fmt: skip


class CpuLlamaEmitter:
    """Writes one module for `config`, `options` and `vectors`; `emit()` returns its text."""

    def __init__(self, config: LlamaConfig, options: ModelOptions, vectors: Vectors) -> None:
        self.config, self.options, self.vectors = config, options, vectors
        self.layers = Format(options.weight_dtype, vectors)
        # Four bits would cost the embedding, which is also the head, more than they save.
        self.ends = Format("int8", vectors) if options.weight_dtype == "int4" else self.layers
        group = GROUP if self.layers.is_quantized else 1
        self.hidden = _padded(config.hidden_size, math.lcm(vectors.block, group))
        self.inner = _padded(config.intermediate_size, math.lcm(vectors.lanes, group))
        self.heads_width = config.num_heads * config.head_dim
        self.qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.page_elements = (
            config.num_layers * 2 * config.num_kv_heads * options.page_size * config.head_dim
        )
        self.num_summaries = -(-config.vocab_size // SUMMARY)
        self.parameters: dict[str, Parameter] = {}
        self._declare_parameters()

    @property
    def function_names(self) -> list[str]:
        prefill, decode = self.options.prefill_batch_sizes, self.options.decode_batch_sizes
        return [
            *(f"prefill{kind}_bs{size}" for size in prefill for kind in ("", "_next")),
            *(f"decode{kind}_bs{size}" for size in decode for kind in ("", "_next")),
        ]

    def emit(self) -> str:
        kernels = {kind.name: _Forward(self, kind) for kind in KINDS}
        b = Builder()
        b.emit(
            f'util.global private @weights = #flow.parameter.named<"model"::"model"> : '
            f"tensor<{self.num_weight_bytes}xi8>"
        )
        for kernel in kernels.values():
            kernel.write(b)
        for size in self.options.prefill_batch_sizes:
            self._function(b, f"prefill_bs{size}", size, kernels["prefill"])
            self._function(b, f"prefill_next_bs{size}", size, kernels["prefill_next"])
        for size in self.options.decode_batch_sizes:
            self._function(b, f"decode_bs{size}", size, kernels["decode_next"], is_abi=True)
            self._function(b, f"decode_next_bs{size}", size, kernels["decode_next"])
        layouts = [f"#{k.kind.name}_layout = {k.layout}" for k in kernels.values()]
        return "\n".join([*layouts, b.text("module")])

    # Parameters

    def _declare_parameters(self) -> None:
        c = self.config
        self._vector("rope", self.options.max_seq_len, 2, c.head_dim // 2)
        self._matrix("token_embd.weight", c.vocab_size, self.hidden, self.ends)
        if not c.tied_embeddings:
            self._matrix("output.weight", c.vocab_size, self.hidden, self.ends)
        self._vector("output_norm.weight", self.hidden)
        for i in range(c.num_layers):
            self._vector(f"blk.{i}.attn_norm.weight", self.hidden)
            self._matrix(f"blk.{i}.attn_qkv.weight", self.qkv_width, self.hidden)
            self._matrix(f"blk.{i}.attn_output.weight", self.hidden, self.heads_width)
            self._vector(f"blk.{i}.ffn_norm.weight", self.hidden)
            self._matrix(f"blk.{i}.ffn_gate_up.weight", 2 * self.inner, self.hidden)
            self._matrix(f"blk.{i}.ffn_down.weight", self.hidden, self.inner)

    def _matrix(self, name: str, rows: int, cols: int, format_: Format | None = None) -> None:
        self.parameters[name] = (format_ or self.layers).parameter(name, rows, cols)

    def _vector(self, name: str, *shape: int) -> None:
        self.parameters[name] = Parameter(name, shape, "f32")

    @property
    def offsets(self) -> dict[str, int]:
        """Where each parameter begins in the archive, in bytes."""
        offset, offsets = 0, {}
        for p in self.parameters.values():
            offsets[p.name] = offset
            offset += _padded(
                math.prod(p.shape) * (1 if p.is_quantized else ITEM_BYTES[p.dtype]), 64
            )
        return offsets | {"": offset}

    @property
    def num_weight_bytes(self) -> int:
        return self.offsets[""]

    # Functions of the ABI

    def _function(
        self, b: Builder, name: str, n: int, kernel: _Forward, *, is_abi: bool = False
    ) -> None:
        page, kind = self.options.page_size, kernel.kind
        tokens: tuple[Dim, ...] = (n, 1) if kind.is_decode else (n, f"%{page}")
        shapes: dict[str, tuple[tuple[Dim, ...], str]] = {"tokens": (tokens, "i64")}
        lens = ("seq_lens", "start_pos") if kind.is_decode else ("start_pos", "seq_lens")
        shapes |= {name: ((n,), "i64") for name in lens}
        shapes["seq_block_ids"] = ((n, "%1"), "i64")
        is_abi = is_abi or kind.all_logits
        if not is_abi:
            shapes["scales"] = ((n,), "f32")
        with abi.function(b, name, shapes, 1 if is_abi else 4) as args:
            cache = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            if "scales" not in args:
                args["scales"] = b.fill(1.0, (n,), "f32")
            results, cache = kernel.call(b, n, args, cache)
            abi.return_results(b, results[:1] if is_abi else results, cache)


class _Forward:
    """The kernel of one kind, and how it is called."""

    def __init__(self, model: CpuLlamaEmitter, kind: Kind) -> None:
        self.model, self.kind = model, kind
        self.config, self.options, self.vectors = model.config, model.options, model.vectors
        c, lanes = self.config, model.vectors.lanes
        self.page = self.options.page_size
        self.position_lanes = _powers(self.page, lanes)
        self.head_lanes = _powers(c.head_dim, lanes)
        self.kv = operand(
            self.options.kv_dtype if c.head_dim % 2 == 0 else "f32",
            self.vectors, self.position_lanes, self.head_lanes,
        )  # fmt: skip
        if self.options.kv_dtype != self.kv.dtype:
            self.kv = operand(self.options.kv_dtype, Vectors(lanes, 1))
        self.act_width = max(model.hidden, model.heads_width)
        self.num_queries = QUERY_ROWS * c.num_heads // c.num_kv_heads
        self.k = KernelBuilder()
        self.k._indent = 4
        self._write()

    # Outside

    @property
    def layout(self) -> str:
        return self.k.layout()

    def write(self, b: Builder) -> None:
        """The executable."""
        name = self.kind.name
        with b.block(f"hal.executable.source private @{name} {{"):
            with b.block(
                f"hal.executable.export public @{name} ordinal(0) layout(#{name}_layout) "
                "count(%device: !hal.device) -> (index, index, index) {"
            ):
                b.emit(f"%count = arith.constant {WORKGROUPS} : index")
                b.emit("%one = arith.constant 1 : index")
                b.emit("hal.return %count, %one, %one : index, index, index")
            with (
                b.block("builtin.module {"),
                b.block(
                    f"func.func @{name}() attributes {{translation_info = "
                    "#iree_codegen.translation_info<pipeline = None>} {"
                ),
            ):
                b.lines += [line.replace("#kernel_", f"#{name}_") for line in self.k.lines]
                b.emit("return")

    def call(
        self, b: Builder, n: int, args: dict[str, Tensor], cache: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Logits (best, maxima, sums of the blocks), and the cache."""
        c, m = self.config, self.model
        seq_len, num_pages = args["tokens"].shape[1], args["seq_block_ids"].shape[1]
        rows = b.product(n, seq_len)
        splits: Dim = 1
        if self.kind.is_decode:
            splits = ((b.index(num_pages) * self.page + (SPLIT - 1)) // SPLIT).name
        weights = b.tensor(
            f"util.global.load @weights : tensor<{m.num_weight_bytes}xi8>",
            (m.num_weight_bytes,), "i8",
        )  # fmt: skip
        zero = b.scalar(0, "i32")
        num_counters = (PHASES * c.num_layers + 8) * 2 * LINE
        counters = b.tensor(
            f"flow.tensor.splat {zero.name} : tensor<{num_counters}xi32>", (num_counters,), "i32"
        )
        inputs = [weights, args["tokens"], args["start_pos"], args["seq_lens"],
                  args["seq_block_ids"], args["scales"], counters, cache]  # fmt: skip
        constants = [b.index(d).to("i32") for d in (n, seq_len, num_pages, splits)]
        outputs = self._outputs(n, rows, splits, seq_len)
        name = b.fresh()
        operands = ", ".join([*(x.name for x in constants), *(x.name for x in inputs)])
        types = ", ".join(["i32"] * len(constants) + [_sized(x) for x in inputs])
        results = ", ".join(
            [counters.name, f"{cache.name}{{{cache.shape[0]}}}", *(_sized(t) for t in outputs)]
        )
        b.emit(
            f"{name}:{len(outputs) + 2} = flow.dispatch @{self.kind.name}::@{self.kind.name}"
            f"({operands}) : ({types}) -> ({results})"
        )
        returned = [Tensor(f"{name}#{i + 2}", t.shape, t.dtype) for i, t in enumerate(outputs[:4])]
        return returned, Tensor(f"{name}#1", cache.shape, cache.dtype)

    def _outputs(self, n: int, rows: Dim, splits: Dim, seq_len: Dim) -> list[Tensor]:
        """Results, then scratch memory, in the order of `_bind`."""
        c, m = self.config, self.model
        logits = (n, seq_len if self.kind.all_logits else 1, c.vocab_size)
        return [
            Tensor("", shape, dtype)
            for shape, dtype in (
                (logits, "f32"),
                ((n,), "i64"),
                ((n, m.num_summaries), "f32"),
                ((n, m.num_summaries), "f32"),
                ((_HEADER,), "i32"),
                ((7, rows), "i32"),
                ((rows, m.hidden), "f32"),
                ((rows, Activations.bytes_of_row(m.layers, self.act_width)), "i8"),
                ((rows, Activations.bytes_of_row(m.layers, m.inner)), "i8"),
                ((rows if m.layers.is_quantized else 1, m.inner), "f32"),
                ((rows, self._block_padded(m.qkv_width)), "f32"),
                ((rows, m.heads_width), self.kv.other),
                ((rows, splits, c.num_heads, c.head_dim), "f32"),
                ((rows, splits, c.num_heads, 2), "f32"),
                ((WORKGROUPS, self._local_size), "f32"),
            )
        ]

    def _block_padded(self, width: int) -> int:
        return -(-width // self.vectors.block) * self.vectors.block

    @property
    def _local_size(self) -> int:
        """f32 of a workgroup's own memory: scores, their weights, sums of values, maxima, totals."""
        q = self.num_queries
        return -(-q * (2 * CONTEXT_CHUNK + self.config.head_dim + 3) // LINE) * LINE

    # Inside

    def _bind(self) -> None:
        k, m = self.k, self.model
        types = {"f32", *m.layers.view_types, *m.ends.view_types}
        self.weights = Views(k, k.binding(read_only=True)).open(*sorted(types))
        self.floats = self.weights["f32"]
        self.tokens, self.start, self.seq_lens, self.page_ids = (
            k.view(k.binding(read_only=True), "i64") for _ in range(4)
        )
        self.scales = k.view(k.binding(read_only=True), "f32")
        self.counters = k.view(k.binding(), "i32")
        cache = k.binding()
        self.cache_units = k.view(cache, self.kv.unit_dtype)
        self.cache = k.view(cache, self.kv.dtype)
        self.logits = k.view(k.binding(), "f32")
        self.best = k.view(k.binding(), "i64")
        self.maxima, self.sums = (k.view(k.binding(), "f32") for _ in range(2))
        self.header, self.table = (k.view(k.binding(), "i32") for _ in range(2))
        self.residual = k.view(k.binding(), "f32")
        self.act = Activations(k, k.binding(), m.layers, self.act_width)
        self.hid = Activations(k, k.binding(), m.layers, m.inner)
        self.plain_hid = k.view(k.binding(), "f32")
        self.qkv = k.view(k.binding(), "f32")
        self.q, self.q_units = self._multiplicand(self.kv)
        self.partial = k.view(k.binding(), "f32")
        self.partial_totals = k.view(k.binding(), "f32")
        local = k.binding()
        self.local = k.view(local, "f32")
        self.local_x = k.view(local, self.kv.other)
        self.local_units = k.view(local, "i32" if self.kv.unit == 2 else "f32")
        self.n, self.seq_len, self.num_pages, self.splits = (k.constant() for _ in range(4))
        self.workgroup = k.workgroup()

    def _multiplicand(self, op) -> tuple[Memory, Memory]:
        """Memory that is written as elements and read as units."""
        binding = self.k.binding()
        other = self.k.view(binding, op.other)
        return other, self.k.view(binding, "i32") if op.unit == 2 else other

    def _write(self) -> None:
        k, c = self.k, self.config
        self._bind()
        self.max_rows = self.n * self.seq_len
        last = k.scalar(PHASES * c.num_layers + 7, "index") * (2 * LINE) + LINE
        open_ = self.counters.load(last).less(k.scalar(1, "i32"))
        with k.when(open_):
            self._model()

    def _model(self) -> None:
        k, c, m = self.k, self.config, self.model
        number = k.scalar(0, "index")
        with k.phase(self.counters, number, k.scalar(1, "index")):
            self._set_up()
        self.num_rows = self._number(_ROWS)
        with k.phase(self.counters, number + 1, self.num_rows) as row:
            self._embed(row)
        with k.loop(0, c.num_layers) as layer:
            self._layer(layer, layer * PHASES + 2)
        end = k.scalar(PHASES * c.num_layers + 2, "index")
        outputs = self._number(_OUTPUTS)
        with k.phase(self.counters, end, outputs) as i:
            self._norm(self._table(5, i), self._at("output_norm.weight"), i)
        name = "token_embd.weight" if c.tied_embeddings else "output.weight"
        self._matmul(
            end + 1, self._at(name), (c.vocab_size, m.hidden), self.act, outputs,
            self._store_logits, m.ends,
        )  # fmt: skip
        if not self.kind.all_logits:
            groups = -(-m.num_summaries // 16)
            with k.phase(self.counters, end + 2, outputs * groups) as task:
                row = self._table(6, task // groups)
                low = task % groups * 16
                high = (low + 16).minimum(k.scalar(m.num_summaries, "index"))
                with k.loop(low, high) as block:
                    self._summarize(row, block)
            with k.phase(self.counters, end + 3, outputs) as i:
                self._find_best(self._table(6, i))
        with k.phase(self.counters, end + 5, k.scalar(1, "index")):
            pass

    def _layer(self, layer: Scalar, number: Scalar) -> None:
        k, m, rows = self.k, self.model, self.num_rows
        c = self.config

        def at(name: str) -> Scalar:
            return self._at(f"blk.0.{name}.weight", layer)

        with k.phase(self.counters, number, rows) as row:
            self._norm(row, at("attn_norm"), row)
        qkv_width = self._block_padded(m.qkv_width)
        self._matmul(
            number + 1, at("attn_qkv"), (m.qkv_width, m.hidden), self.act, rows,
            lambda sums, row, count, block: self._store_rows(
                self.qkv, qkv_width, sums, row, count, block),
        )  # fmt: skip
        with k.phase(self.counters, number + 2, rows * c.num_kv_heads) as task:
            self._rotate_and_store(task // c.num_kv_heads, task % c.num_kv_heads, layer)
        self._attention(layer, number + 3)
        with k.phase(self.counters, number + 4, rows) as row:
            self._combine(row)
        self._matmul(
            number + 5, at("attn_output"), (m.hidden, m.heads_width), self.act, rows,
            self._add_rows,
        )  # fmt: skip
        with k.phase(self.counters, number + 6, rows) as row:
            self._norm(row, at("ffn_norm"), row)
        self._gate_up_down(at, number + 7)

    # Small phases

    def _number(self, index: int) -> Scalar:
        return self.header.load(index).to("index")

    def _table(self, column: int, row: Scalar) -> Scalar:
        """Of each row: sequence, position, token; of groups: row, length; of outputs: row, to."""
        return self.table.load(self.max_rows * column + row).to("index")

    def _at(self, name: str, layer: Scalar | None = None) -> Scalar:
        """Where a parameter begins, in bytes."""
        offsets = self.model.offsets
        start = self.k.scalar(offsets[name], "index")
        if layer is None:
            return start
        if self.config.num_layers == 1:
            return start
        stride = offsets[name.replace("blk.0.", "blk.1.")] - offsets[name]
        return layer * stride + start

    def _set_up(self) -> None:
        """Fill the tables."""
        k, c = self.k, self.config
        zero = k.scalar(0, "i32")
        for i in (_ROWS, _GROUPS, _OUTPUTS):
            self.header.store(zero, i)
        self.header.store(k.scalar(1, "i32"), _SPLITS)
        with k.loop(0, self.n) as n:
            start = self.start.load(n).to("index")
            end = self.seq_lens.load(n).to("index")
            count = (end - start).clamp(0, self.seq_len)
            first = self._number(_ROWS)
            with k.loop(0, count) as s:
                self._append_row(first + s, n, start + s, self.tokens.load(n * self.seq_len + s))
                if self.kind.all_logits:
                    self._append(_OUTPUTS, 5, first + s, n * self.seq_len + s)
            if not self.kind.all_logits:
                with k.when(k.scalar(0, "index").less(count)):
                    self._append(_OUTPUTS, 5, first + count - 1, n)
            groups = count // QUERY_ROWS
            with k.loop(0, groups) as group:
                self._append(_GROUPS, 3, first + group * QUERY_ROWS, k.scalar(QUERY_ROWS, "index"))
            with k.loop(groups * QUERY_ROWS, count) as s:
                self._append(_GROUPS, 3, first + s, k.scalar(1, "index"))
            self.header.store((first + count).to("i32"), _ROWS)
            if self.kind.is_decode:
                splits = ((end + (SPLIT - 1)) // SPLIT).minimum(self.splits)
                most = k.op(
                    f"arith.maxsi {splits.name}, {self._number(_SPLITS).name} : index", "index"
                )
                self.header.store(most.to("i32"), _SPLITS)

    def _append_row(self, row: Scalar, sequence: Scalar, position: Scalar, token: Scalar) -> None:
        last = self.k.scalar(self.options.max_seq_len - 1, "index")
        token = token.to("index").clamp(0, self.k.scalar(self.config.vocab_size - 1, "index"))
        for column, value in enumerate((sequence, position.minimum(last), token)):
            self.table.store(value.to("i32"), self.max_rows * column + row)

    def _append(self, counter: int, column: int, first: Scalar, second: Scalar) -> None:
        at = self._number(counter)
        self.table.store(first.to("i32"), self.max_rows * column + at)
        self.table.store(second.to("i32"), self.max_rows * (column + 1) + at)
        self.header.store((at + 1).to("i32"), counter)

    def _embed(self, row: Scalar) -> None:
        """The residual [M, H] of a row: its token's row of the embedding."""
        k, m = self.k, self.model
        token, start = self._table(2, row), self._at("token_embd.weight")
        with k.loop(0, m.hidden) as i:
            value = m.ends.element(k, self.weights, start, m.hidden, token, i)
            self.residual.store(value, row * m.hidden + i)

    def _norm(self, row: Scalar, weight: Scalar, to: Scalar) -> None:
        """RMS norm of a row of the residual, as activations [M, A]."""
        k, m, lanes = self.k, self.model, self.vectors.lanes
        kind = vector_type(lanes, "f32")
        start, weight = row * m.hidden, weight // 4

        def square(i: Scalar, total: Scalar) -> list[Scalar]:
            x = self.residual.load_vector(start + i, lanes)
            return [k.fma(x, x, total)]

        [squares] = k.fold(0, m.hidden, [k.scalar(0.0, kind)], square, lanes)
        mean = k.sum(squares) / self.config.hidden_size + self.config.rms_eps
        inverse = k.broadcast(k.scalar(1.0, "f32") / mean.math("sqrt"), lanes)
        with k.loop(0, m.hidden, self.act.step) as i:
            values = []
            for j in range(0, self.act.step, lanes):
                x = self.residual.load_vector(start + i + j, lanes) * inverse
                values.append(x * self.floats.load_vector(weight + i + j, lanes))
            self.act.store(values, to, i)

    def _store_as(self, memory: Memory, value: Scalar, at: Scalar) -> None:
        """Store f32 as the memory's type."""
        lanes = int(value.dtype.removeprefix("vector<").partition("x")[0])
        memory.store_vector(value.to(vector_type(lanes, memory.dtype)), at)

    # Matrix products

    def _matmul(
        self, number: Scalar, weight: Scalar, size: tuple[int, int], x: Activations,
        num_rows: Scalar, use: Callable[[list[Scalar], Scalar, int, Scalar], None],
        format_: Format | None = None,
    ) -> None:  # fmt: skip
        """Rows of x [M, K] times a matrix [N, K]: `use(sums, row, number of rows, block)`."""
        k, format_ = self.k, format_ or self.model.layers
        num_blocks = -(-size[0] // self.vectors.block)
        block_bytes = format_.block_bytes(size[1])
        run = max(1, min(TASK_BYTES // block_bytes, num_blocks // MIN_TASKS))
        num_runs = -(-num_blocks // run)
        chunks = (num_rows + (ROW_CHUNK - 1)) // ROW_CHUNK
        with k.phase(self.counters, number, chunks * num_runs) as task:
            first = task % num_runs * run
            low = task // num_runs * ROW_CHUNK
            high = (low + ROW_CHUNK).minimum(num_rows)
            last = (first + run).minimum(k.scalar(num_blocks, "index"))
            with k.loop(first, last) as block:

                def tile(row: Scalar, count: int, block: Scalar = block) -> None:
                    rows = [row + r for r in range(count)]
                    start = weight + block * block_bytes
                    sums = format_.product(k, self.weights, start, size[1], x, rows)
                    use(sums, row, count, block)

                self._by_rows(low, high, format_.max_rows, tile)

    def _by_rows(
        self, low: Scalar, high: Scalar, count: int, tile: Callable[[Scalar, int], None]
    ) -> None:
        """All rows, `count` at once, then fewer."""
        while count:
            num_tiles = (high - low) // count
            with self.k.loop(0, num_tiles) as i:
                tile(low + i * count, count)
            low = low + num_tiles * count
            count //= 2

    def _store_rows(
        self, memory: Memory, width: int, sums: list[Scalar], row: Scalar, count: int, block: Scalar
    ) -> None:
        lanes = self.vectors.lanes
        for i, value in enumerate(sums):
            at = (row + i // 2) * width + block * self.vectors.block + i % 2 * lanes
            memory.store_vector(value, at)

    def _add_rows(self, sums: list[Scalar], row: Scalar, count: int, block: Scalar) -> None:
        lanes = self.vectors.lanes
        for i, value in enumerate(sums):
            at = (row + i // 2) * self.model.hidden + block * self.vectors.block + i % 2 * lanes
            self.residual.store_vector(self.residual.load_vector(at, lanes) + value, at)

    def _gate_up_down(self, at: Callable[[str], Scalar], number: Scalar) -> None:
        """residual += down(silu(gate(x)) * up(x)); a block is a vector of gates, then one of ups."""
        k, m, lanes = self.k, self.model, self.vectors.lanes

        def silu(sums: list[Scalar], row: Scalar, count: int, block: Scalar) -> None:
            for r in range(count):
                gate, up = sums[2 * r : 2 * r + 2]
                value = gate / ((gate * -1.0).math("exp") + 1.0) * up
                if m.layers.is_quantized:
                    self.plain_hid.store_vector(value, (row + r) * m.inner + block * lanes)
                else:
                    self.hid.store([value], row + r, block * lanes)

        self._matmul(
            number, at("ffn_gate_up"), (2 * m.inner, m.hidden), self.act, self.num_rows, silu
        )
        if m.layers.is_quantized:
            with (
                k.phase(self.counters, number + 2, self.num_rows) as row,
                k.loop(0, m.inner, GROUP) as i,
            ):
                start = row * m.inner + i
                values = [
                    self.plain_hid.load_vector(start + j, lanes) for j in range(0, GROUP, lanes)
                ]
                self.hid.store(values, row, i)
        self._matmul(
            number + 1, at("ffn_down"), (m.hidden, m.inner), self.hid, self.num_rows,
            self._add_rows,
        )  # fmt: skip

    # Attention

    def _rotate_and_store(self, row: Scalar, head: Scalar, layer: Scalar) -> None:
        """Rotary embedding (Su et al. 2021, rotate-half form) of the queries and key of a KV head.

        Queries, scaled, go to [M, heads, D]; key and value to their page.
        """
        k, c, m = self.k, self.config, self.model
        groups, d = c.num_heads // c.num_kv_heads, c.head_dim
        half, lanes = d // 2, _powers(d // 2, self.vectors.lanes)
        position = self._table(1, row)
        from_ = row * self._block_padded(m.qkv_width)
        angles = self._at("rope") // 4 + position * d
        page, slot = self._page(row, position), position % self.page
        key_at, value_at = self._layer_of(page, layer, head)
        key = from_ + (head + c.num_heads) * d
        value = from_ + (head + c.num_heads + c.num_kv_heads) * d
        scale = 1 / math.sqrt(d)

        def rotated(start: Scalar, i: int) -> tuple[Scalar, Scalar]:
            x0, x1 = (self.qkv.load_vector(start + i + h, lanes) for h in (0, half))
            cos, sin = (self.floats.load_vector(angles + i + h, lanes) for h in (0, half))
            return x0 * cos - x1 * sin, x1 * cos + x0 * sin

        for g in range(groups):
            query = head * groups + g
            for i in range(0, half, lanes):
                for h, x in zip((0, half), rotated(from_ + query * d, i), strict=True):
                    self._store_as(self.q, x * scale, row * m.heads_width + query * d + (i + h))
        for i in range(0, half, lanes):
            for h, x in zip((0, half), rotated(key, i), strict=True):
                self._scatter(x, i + h, lanes, lambda f: self._key_at(key_at, slot, f))
        for i in range(0, d, lanes):
            x = self.qkv.load_vector(value + i, lanes)
            self._scatter(x, i, lanes, lambda f: self._value_at(value_at, slot, f))

    def _scatter(self, x: Scalar, first: int, lanes: int, at: Callable[[int], Scalar]) -> None:
        """Store the elements of a vector, features `first` and on, one by one."""
        x = x.to(vector_type(lanes, self.kv.dtype))
        for lane in range(lanes):
            self.cache.store(self.k.element(x, lane), at(first + lane))

    def _key_at(self, start: Scalar, slot: Scalar, feature: int) -> Scalar:
        p, u = self.position_lanes, self.kv.unit
        tile = start + slot // p * (self.config.head_dim * p)
        return tile + feature // u * (p * u) + slot % p * u + feature % u

    def _value_at(self, start: Scalar, slot: Scalar, feature: int) -> Scalar:
        u = self.kv.unit
        return start + slot // u * (self.config.head_dim * u) + feature * u + slot % u

    def _page(self, row: Scalar, position: Scalar) -> Scalar:
        column = (position // self.page).minimum(self.num_pages - 1)
        return self.page_ids.load(self._table(0, row) * self.num_pages + column).to("index")

    def _layer_of(self, page: Scalar, layer: Scalar, head: Scalar) -> tuple[Scalar, Scalar]:
        """Where keys and values of a KV head lie in a page, in elements."""
        c = self.config
        size = self.page * c.head_dim  # of one head
        start = page * self.model.page_elements + layer * (2 * c.num_kv_heads * size)
        return start + head * size, start + (head + c.num_kv_heads) * size

    def _attention(self, layer: Scalar, number: Scalar) -> None:
        """Partial attention of each group of rows, KV head and split of the context."""
        k, c = self.k, self.config
        splits, groups = self._number(_SPLITS), self._number(_GROUPS)
        with k.phase(self.counters, number, groups * splits * c.num_kv_heads) as task:
            head, split = task % c.num_kv_heads, task // c.num_kv_heads % splits
            group = task // c.num_kv_heads // splits
            row, is_one = self._table(3, group), self._table(4, group).less(k.scalar(2, "index"))
            with k.when(is_one):
                self._attend(row, 1, head, split, layer)
            if not self.kind.is_decode:
                with k.when(k.scalar(1, "index").less(self._table(4, group))):
                    self._attend(row, QUERY_ROWS, head, split, layer)

    def _attend(
        self, row: Scalar, num_rows: int, head: Scalar, split: Scalar, layer: Scalar
    ) -> None:
        """Softmax-weighted values of a split, corrected chunk by chunk (Milakov and Gimelshein
        2018): sums of values, maxima and totals of each query."""
        k, c = self.k, self.config
        groups, d = c.num_heads // c.num_kv_heads, c.head_dim
        queries = num_rows * groups
        base = self.workgroup * self._local_size
        self.scores_at, self.shares_at = base, base + queries * CONTEXT_CHUNK
        self.values_at = self.shares_at + queries * CONTEXT_CHUNK
        self.maxima_at = self.values_at + queries * d
        self.totals_at, self.factors_at = self.maxima_at + queries, self.maxima_at + 2 * queries
        zero, lowest = k.scalar(0.0, "f32"), k.scalar(MASKED, "f32")
        with k.loop(0, queries) as j:
            self.local.store(lowest, self.maxima_at + j)
            self.local.store(zero, self.totals_at + j)
        with k.loop(0, queries * d) as i:
            self.local.store(zero, self.values_at + i)
        end = self._table(1, row + (num_rows - 1)) + 1
        low, high = k.scalar(0, "index"), end
        if self.kind.is_decode:
            low = split * SPLIT
            high = (low + SPLIT).minimum(end)
        with k.loop(low, high, CONTEXT_CHUNK) as start:
            self._attend_chunk(row, num_rows, head, layer, start, high)
        self._store_partial(row, num_rows, head, split)

    def _attend_chunk(
        self, row: Scalar, num_rows: int, head: Scalar, layer: Scalar, start: Scalar, high: Scalar
    ) -> None:
        k, c = self.k, self.config
        groups, p = c.num_heads // c.num_kv_heads, self.position_lanes
        queries = num_rows * groups
        end = (start + CONTEXT_CHUNK).minimum(high)
        num_pages = (end - start + (self.page - 1)) // self.page
        pairs = (num_pages * (self.page // p) + 1) // 2
        with k.loop(0, pairs) as pair:
            self._score(row, queries, head, layer, start, pair)
        with k.loop(0, queries) as j:
            position = self._table(1, row + j // groups)
            self._soften(j, position, start, pairs * 2)
        for first in range(0, queries, self.vectors.max_rows):
            count = min(self.vectors.max_rows, queries - first)
            self._weigh(row, first, count, head, layer, start, num_pages)

    def _score(
        self, row: Scalar, queries: int, head: Scalar, layer: Scalar, start: Scalar, pair: Scalar
    ) -> None:
        """Scores [queries, 2 p] of two vectors of positions."""
        k, c, m, p, u = self.k, self.config, self.model, self.position_lanes, self.kv.unit
        groups, d = c.num_heads // c.num_kv_heads, c.head_dim
        starts = []
        for t in (0, 1):
            position = start + (pair * 2 + t) * p
            key_at, _ = self._layer_of(self._page(row, position), layer, head)
            starts.append((key_at + position % self.page // p * (d * p)) // u)
        keys = Streams(self.cache_units, self.kv, starts, p, p)
        zero = k.scalar(0.0, vector_type(p, "f32"))
        for first in range(0, queries, self.vectors.max_rows):
            count = min(self.vectors.max_rows, queries - first)
            rows = [
                ((row + j // groups) * m.heads_width + (head * groups + j % groups) * d) // u
                for j in range(first, first + count)
            ]
            sums = product(k, keys, self.q_units, rows, d // u, [zero] * (2 * count))
            for i, value in enumerate(sums):
                at = self.scores_at + (first + i // 2) * CONTEXT_CHUNK + (pair * 2 + i % 2) * p
                self.local.store_vector(value, at)

    def _soften(self, j: Scalar, position: Scalar, start: Scalar, num_tiles: Scalar) -> None:
        """Scores of a query to weights, relative to the largest one so far."""
        k, p = self.k, self.position_lanes
        kind = vector_type(p, "f32")
        scores = self.scores_at + j * CONTEXT_CHUNK
        last = k.broadcast((position - start).to("i32"), p)
        masked = k.scalar(MASKED, kind)

        def top(t: Scalar, top: Scalar) -> list[Scalar]:
            x = self.local.load_vector(scores + t * p, p)
            x = last.less(k.lanes_from((t * p).to("i32"), p)).select(masked, x)
            self.local.store_vector(x, scores + t * p)
            return [top.maximum(x)]

        [tops] = k.fold(0, num_tiles, [masked], top)
        before = self.local.load(self.maxima_at + j)
        now = before.maximum(k.maximum(tops))
        factor = (before - now).math("exp")
        wide = k.broadcast(now, p)

        def weigh(t: Scalar, total: Scalar) -> list[Scalar]:
            x = (self.local.load_vector(scores + t * p, p) - wide).math("exp")
            shares = self.shares_at * (4 // ITEM_BYTES[self.kv.other])
            self._store_as(self.local_x, x, shares + j * CONTEXT_CHUNK + t * p)
            return [total + x]

        [totals] = k.fold(0, num_tiles, [k.scalar(0.0, kind)], weigh)
        total = self.local.load(self.totals_at + j) * factor + k.sum(totals)
        self.local.store(now, self.maxima_at + j)
        self.local.store(total, self.totals_at + j)
        self.local.store(factor, self.factors_at + j)

    def _weigh(
        self, row: Scalar, first: int, count: int, head: Scalar, layer: Scalar, start: Scalar,
        num_pages: Scalar,
    ) -> None:  # fmt: skip
        """Add the weighted values of a chunk, to what is kept of the chunks before."""
        k, d, lanes, u = self.k, self.config.head_dim, self.head_lanes, self.kv.unit
        tiles = d // lanes
        width = 2 if tiles % 2 == 0 else 1
        with k.loop(0, tiles, width) as tile:
            at = [
                self.values_at + (first + r) * d + (tile + t) * lanes
                for r in range(count)
                for t in range(width)
            ]
            factors = [
                k.broadcast(self.local.load(self.factors_at + (first + r)), lanes)
                for r in range(count)
            ]
            sums = [
                self.local.load_vector(a, lanes) * factors[i // width] for i, a in enumerate(at)
            ]

            def add_page(page: Scalar, *sums: Scalar) -> list[Scalar]:
                position = start + page * self.page
                _, value_at = self._layer_of(self._page(row, position), layer, head)
                starts = [value_at // u + (tile + t) * lanes for t in range(width)]
                shares = self.shares_at * (4 // ITEM_BYTES[self.kv.other] // u)
                rows = [
                    shares + ((first + r) * CONTEXT_CHUNK // u) + page * (self.page // u)
                    for r in range(count)
                ]
                values = Streams(self.cache_units, self.kv, starts, d, lanes)
                return product(k, values, self.local_units, rows, self.page // u, sums)

            for value, a in zip(k.fold(0, num_pages, sums, add_page), at, strict=True):
                self.local.store_vector(value, a)

    def _store_partial(self, row: Scalar, num_rows: int, head: Scalar, split: Scalar) -> None:
        k, c, lanes = self.k, self.config, self.head_lanes
        groups, d = c.num_heads // c.num_kv_heads, c.head_dim
        with k.loop(0, num_rows * groups) as j:
            to = ((row + j // groups) * self.splits + split) * c.num_heads
            to = to + head * groups + j % groups
            self.partial_totals.store(self.local.load(self.maxima_at + j), to * 2)
            self.partial_totals.store(self.local.load(self.totals_at + j), to * 2 + 1)
            with k.loop(0, d, lanes) as i:
                value = self.local.load_vector(self.values_at + j * d + i, lanes)
                self.partial.store_vector(value, to * d + i)

    def _combine(self, row: Scalar) -> None:
        """The attention of a row, of all its splits, as activations [M, A]."""
        k, c, m, lanes = self.k, self.config, self.model, self.head_lanes
        d, splits = c.head_dim, k.scalar(1, "index")
        if self.kind.is_decode:
            splits = (self._table(1, row) + SPLIT) // SPLIT
        zero, lowest = k.scalar(0.0, "f32"), k.scalar(MASKED, "f32")
        with k.loop(0, c.num_heads) as head:

            def partial(split: Scalar, head: Scalar = head) -> Scalar:
                return (row * self.splits + split) * c.num_heads + head

            [top] = k.fold(0, splits, [lowest], lambda s, top: [
                top.maximum(self.partial_totals.load(partial(s) * 2))])  # fmt: skip

            def share(split: Scalar, top: Scalar = top) -> Scalar:
                return (self.partial_totals.load(partial(split) * 2) - top).math("exp")

            [total] = k.fold(0, splits, [zero], lambda s, total: [
                total + share(s) * self.partial_totals.load(partial(s) * 2 + 1)])  # fmt: skip
            inverse = k.scalar(1.0, "f32") / total
            step = GROUP if m.layers.is_quantized else lanes
            with k.loop(0, d, step) as i:
                starts = [i + j for j in range(0, step, lanes)]

                def add(split: Scalar, *values: Scalar, starts=starts) -> list[Scalar]:
                    weight = k.broadcast(share(split), lanes)
                    return [
                        k.fma(self.partial.load_vector(partial(split) * d + at, lanes), weight, v)
                        for at, v in zip(starts, values, strict=True)
                    ]

                none = k.scalar(0.0, vector_type(lanes, "f32"))
                values = k.fold(0, splits, [none] * len(starts), add)
                wide = k.broadcast(inverse, lanes)
                self.act.store([value * wide for value in values], row, head * d + i)

    # Logits

    def _store_logits(self, sums: list[Scalar], row: Scalar, count: int, block: Scalar) -> None:
        k, v, vocab = self.k, self.vectors, self.config.vocab_size
        for i, value in enumerate(sums):
            token = block * v.block + i % 2 * v.lanes
            at = self._table(6, row + i // 2) * vocab + token
            left = None if vocab % v.block == 0 else (k.scalar(vocab, "index") - token)
            self.logits.store_vector(value, at, left and left.clamp(0, k.scalar(v.lanes, "index")))

    def _summarize(self, row: Scalar, block: Scalar) -> None:
        """The maximum of a block of logits, and the sum of exp((logit - maximum) * scale)."""
        k, vocab, lanes = self.k, self.config.vocab_size, self.vectors.lanes
        kind = vector_type(lanes, "f32")
        start = row * vocab + block * SUMMARY
        count = (k.scalar(vocab, "index") - block * SUMMARY).minimum(k.scalar(SUMMARY, "index"))
        whole = count // lanes * lanes
        [tops] = k.fold(0, whole, [k.scalar(MASKED, kind)], lambda i, top: [
            top.maximum(self.logits.load_vector(start + i, lanes))], lanes)  # fmt: skip
        [top] = k.fold(whole, count, [k.maximum(tops)], lambda i, top: [
            top.maximum(self.logits.load(start + i))])  # fmt: skip
        scale = self.scales.load(row)
        tops, scales = k.broadcast(top, lanes), k.broadcast(scale, lanes)
        [sums] = k.fold(0, whole, [k.scalar(0.0, kind)], lambda i, total: [
            total + ((self.logits.load_vector(start + i, lanes) - tops) * scales).math("exp")
        ], lanes)  # fmt: skip
        [total] = k.fold(whole, count, [k.sum(sums)], lambda i, total: [
            total + ((self.logits.load(start + i) - top) * scale).math("exp")])  # fmt: skip
        self.maxima.store(top, row * self.model.num_summaries + block)
        self.sums.store(total, row * self.model.num_summaries + block)

    def _find_best(self, row: Scalar) -> None:
        """The first token with the largest logit."""
        k, m, vocab = self.k, self.model, self.config.vocab_size
        zero = k.scalar(0, "index")

        def better(memory: Memory, start: Scalar) -> Callable[..., Sequence[Scalar]]:
            def body(i: Scalar, best: Scalar, top: Scalar) -> Sequence[Scalar]:
                value = memory.load(start + i)
                is_more = k.op(f"arith.cmpf ogt, {value.name}, {top.name} : f32", "i1")
                return [is_more.select(i, best), is_more.select(value, top)]

            return body

        lowest = k.scalar(-3e38, "f32")
        summaries = better(self.maxima, row * m.num_summaries)
        [block, _] = k.fold(0, m.num_summaries, [zero, lowest], summaries)
        first = block * SUMMARY
        count = (k.scalar(vocab, "index") - first).minimum(k.scalar(SUMMARY, "index"))
        [token, _] = k.fold(0, count, [zero, lowest], better(self.logits, row * vocab + first))
        self.best.store((first + token).to("i64"), row)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _sized(x: Tensor) -> str:
    """Its type with the sizes of dynamic dimensions."""
    dynamic = ", ".join(d for d in x.shape if isinstance(d, str))
    return tensor_type(x.shape, x.dtype) + (f"{{{dynamic}}}" if dynamic else "")
