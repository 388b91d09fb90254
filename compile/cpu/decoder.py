"""Forward: a Llama as one CPU kernel, phase after phase, over rows of tokens.

The valid tokens of all sequences of a call are the rows, M of them, without padding; prefill and
decode differ only in how many there are. Shapes: N sequences, S tokens of each at most, B pages of
each, H hidden features, A activations (H, or those of all heads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compile.cpu import amx as tiles
from compile.cpu.amx import Tiles
from compile.cpu.attention import QUERY_ROWS, SPLIT, Attention, AttentionMemory, Splits
from compile.cpu.attention_amx import ROWS as TILED_ROWS
from compile.cpu.attention_amx import TiledAttention
from compile.cpu.kernel import LINE, Memory, Views, vector_type
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import WORKGROUPS, MatrixKernel, padded
from compile.formats.layout import MASKED, SUMMARY, Parameter
from compile.formats.quantize import GROUP
from compile.mlir.builder import Builder, Dim, Scalar, Tensor
from compile.models.spec import LlamaConfig
from compile.models.tensors import ModelTensor, decoder_tensors
from compile.options import ModelOptions
from compile.target import Vectors

SUMMARY_TASK = 16  # such blocks
PHASES = 10  # a layer

# Numbers in the header, then columns of the table: of rows, of groups of rows, of outputs.
ROWS, GROUPS, OUTPUTS, SPLITS = range(4)
SEQUENCE, POSITION, TOKEN, GROUP_ROW, GROUP_LEN, OUTPUT_ROW, OUTPUT_TO = range(7)


@dataclass(frozen=True)
class Kind:
    """What a kernel computes: all logits, or those after each sequence, summarized."""

    name: str
    all_logits: bool
    is_decode: bool


@dataclass(frozen=True)
class Shape:
    """What every kernel of a model needs to know; features are padded to whole blocks."""

    config: LlamaConfig
    options: ModelOptions
    vectors: Vectors
    layers: Format  # of matrices
    ends: Format  # of embedding and head
    hidden: int
    inner: int
    offsets: dict[str, int]  # of parameters, in bytes
    takes_embeds: bool = False  # for tokens that are negative

    @classmethod
    def of(cls, config: LlamaConfig, options: ModelOptions, vectors: Vectors) -> Shape:
        layers = Format(options.weight_dtype, vectors)
        # Four bits would cost the embedding, which is also the head, more than they save.
        ends = Format("int8", vectors) if options.weight_dtype == "int4" else layers
        group = GROUP if layers.is_quantized else 1
        hidden = padded(config.hidden_size, math.lcm(vectors.block, group))
        columns = tiles.COLUMNS if layers.is_tiled else 1
        inner = padded(config.intermediate_size, math.lcm(vectors.lanes, group, columns))
        return cls(config, options, vectors, layers, ends, hidden, inner, {})

    @property
    def heads_width(self) -> int:
        return self.config.num_heads * self.config.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.config.num_heads + 2 * self.config.num_kv_heads) * self.config.head_dim

    @property
    def num_summaries(self) -> int:
        return -(-self.config.vocab_size // SUMMARY)

    def parameters(self) -> list[Parameter]:
        """In the order of the archive."""
        table = decoder_tensors(
            self.config, context=self.options.max_seq_len, hidden=self.hidden,
            intermediate=self.inner,
        )  # fmt: skip
        ends = [self.ends.parameter(t.name, *t.shape) for t in (table.embedding, *table.head)]
        layers = [self._parameter(t) for layer in table.layers
                  for t in sorted(layer, key=lambda t: t.is_matrix)]  # fmt: skip
        return [self._parameter(table.rope), *ends, self._parameter(table.norm), *layers]

    def _parameter(self, tensor: ModelTensor) -> Parameter:
        if tensor.is_matrix:
            return self.layers.parameter(tensor.name, *tensor.shape)
        return Parameter(tensor.name, tensor.shape, "f32")


class Forward(MatrixKernel):
    """The kernel of one kind: `write` it into a module, `call` it from functions."""

    def __init__(self, shape: Shape, kind: Kind) -> None:
        super().__init__(kind.name, shape.layers)
        self.shape, self.kind, self.config = shape, kind, shape.config
        self._takes_embeds = shape.takes_embeds and not kind.is_decode
        self._bind()
        self._write()

    # Outside

    def call(
        self, b: Builder, args: dict[str, Tensor], weights: Tensor, cache: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Logits, best, maxima and sums of the blocks; and the cache."""
        n, seq_len = args["tokens"].shape
        num_pages = args["seq_block_ids"].shape[1]
        splits: Dim = 1
        if self.kind.is_decode:
            positions = b.index(num_pages) * self.shape.options.page_size
            splits = ((positions + (SPLIT - 1)) // SPLIT).name
        zero, num_counters = b.scalar(0, "i32"), (PHASES * self.config.num_layers + 8) * 2 * LINE
        counters = b.tensor(
            f"flow.tensor.splat {zero.name} : tensor<{num_counters}xi32>", (num_counters,), "i32"
        )
        inputs = [weights, args["tokens"], args["start_pos"], args["seq_lens"],
                  args["seq_block_ids"], args["scales"],
                  *([args["embeds"]] if self._takes_embeds else [])]  # fmt: skip
        rows = b.product(n, seq_len)
        tiled = (b.index(rows) + (tiles.MOST * tiles.LINES - 1)).name  # tiles reach beyond the rows
        sizes = {"n": n, "seq_len": seq_len, "rows": rows, "tiled": tiled, "splits": splits}
        constants = n, seq_len, num_pages, splits
        _, cache, *outputs = self.dispatch(b, constants, inputs, [counters, cache], sizes)
        return outputs[:4], cache

    # Memory

    def _bind(self) -> None:
        """Arguments in the order of `call`, results, and memory of the call's own."""
        k, s, c = self.k, self.shape, self.config
        types = {"f32", *s.layers.view_types, *s.ends.view_types}
        self.weights = Views(k, k.binding(read_only=True)).open(*sorted(types))
        self.tokens, self.start, self.seq_lens, self.page_ids = (
            k.view(k.binding(read_only=True), "i64") for _ in range(4)
        )
        self.scales = k.view(k.binding(read_only=True), "f32")
        if self._takes_embeds:
            self.embeds = k.view(k.binding(read_only=True), "f32")
        self.counters = k.view(k.binding(), "i32")
        kv = KVLayout(c, s.options.page_size, s.options.kv_dtype, self.vectors)
        op = kv.operand
        cache = Views(k, k.binding()).open(op.dtype, op.unit_dtype)
        self.logits = self._result(("n", "seq_len" if self.kind.all_logits else 1, c.vocab_size))
        self.best = self._result(("n",), "i64")
        self.maxima, self.sums = (self._result(("n", s.num_summaries)) for _ in range(2))
        self.header, self.table = self._result((LINE,), "i32"), self._result((7, "rows"), "i32")
        self.residual = self._result(("rows", s.hidden))
        self.act = self._activations(max(s.hidden, s.heads_width))
        self.hid = self._activations(s.inner)
        self.plain_hid = self._result(("rows" if s.layers.is_quantized else 1, s.inner))
        self.qkv_width = padded(s.qkv_width, self.vectors.block)
        qkv = self._result(("rows", self.qkv_width))
        q = self._output(("tiled", s.heads_width), op.other).open(op.other, "i32")
        splits = None
        if self.kind.is_decode:
            values = self._result(("rows", "splits", c.num_heads, c.head_dim))
            splits = values, self._result(("rows", "splits", c.num_heads, 2))
        scratch = None
        if s.layers.is_tiled:
            scratch = self._output((WORKGROUPS, tiles.MEMORY)).open("f32", "i32")
        local = Views(k, k.binding()).open("f32", op.other, "i32")
        self.n, self.seq_len, self.num_pages, self.most_splits = (k.constant() for _ in range(4))
        self.max_rows = self.n * self.seq_len
        self.workgroup = k.workgroup()
        self.tiles = Tiles(k, scratch, self.workgroup * tiles.MEMORY) if scratch else None
        memory = AttentionMemory(
            qkv, self.qkv_width, self.weights["f32"], self._at("rope") // 4, cache, q,
            s.heads_width, local, self.act,
            Splits(*splits, self.most_splits) if splits else None,
        )  # fmt: skip
        arguments = k, kv, self.vectors, memory, self._position, self._page
        self.tiled_attention = None
        if self.tiles and not self.kind.is_decode and TiledAttention.fits(kv):
            self.tiled_attention = TiledAttention(*arguments, tiles=self.tiles)
        self.attention = self.tiled_attention or Attention(*arguments)
        self._outputs.append(((WORKGROUPS, self.attention.local_size), "f32"))

    def _at(self, name: str, layer: Scalar | None = None) -> Scalar:
        """Where a parameter begins, in bytes; of a layer, given its name in layer 0."""
        offsets = self.shape.offsets
        start = self.k.scalar(offsets[name], "index")
        if layer is None or self.config.num_layers == 1:
            return start
        stride = offsets[name.replace("blk.0.", "blk.1.")] - offsets[name]
        return layer * stride + start

    def _number(self, index: int) -> Scalar:
        return self.header.load(index).to("index")

    def _table(self, column: int, row: Scalar) -> Scalar:
        return self.table.load(self.max_rows * column + row).to("index")

    def _position(self, row: Scalar) -> Scalar:
        return self._table(POSITION, row)

    def _page(self, row: Scalar, position: Scalar) -> Scalar:
        """The page of a row's sequence that holds a position, or its last one."""
        column = (position // self.shape.options.page_size).minimum(self.num_pages - 1)
        return self.page_ids.load(self._table(SEQUENCE, row) * self.num_pages + column).to("index")

    # The model

    def _write(self) -> None:
        k, end = self.k, PHASES * self.config.num_layers + 2
        is_open = self.counters.load((end + 5) * 2 * LINE + LINE).less(k.scalar(1, "i32"))
        with k.when(is_open):
            number = k.scalar(0, "index")
            with k.phase(self.counters, number, k.scalar(1, "index")):
                if self.tiles:
                    self.tiles.ask()
                self._set_up()
            if self.tiles:
                self.tiles.open()
            self.num_rows = self._number(ROWS)
            with k.phase(self.counters, number + 1, self.num_rows) as row:
                self._embed(row)
            with k.loop(0, self.config.num_layers) as layer:
                self._layer(layer, layer * PHASES + 2)
            self._finish(k.scalar(end, "index"))
            with k.phase(self.counters, number + (end + 5), k.scalar(1, "index")):
                pass
            if self.tiles:
                self.tiles.close()

    def _set_up(self) -> None:
        """Fill the tables."""
        k, zero = self.k, self.k.scalar(0, "i32")
        for i in (ROWS, GROUPS, OUTPUTS):
            self.header.store(zero, i)
        self.header.store(k.scalar(1, "i32"), SPLITS)
        with k.loop(0, self.n) as n:
            start, end = (x.load(n).to("index") for x in (self.start, self.seq_lens))
            count = (end - start).clamp(0, self.seq_len)
            first = self._number(ROWS)
            with k.loop(0, count) as s:
                self._set_row(first + s, n, start + s, self.tokens.load(n * self.seq_len + s))
            self._append_groups(first, count)
            self._append_outputs(first, count, n)
            self.header.store((first + count).to("i32"), ROWS)
            if self.kind.is_decode:
                splits = ((end + (SPLIT - 1)) // SPLIT).minimum(self.most_splits)
                self.header.store(splits.largest(self._number(SPLITS)).to("i32"), SPLITS)

    def _set_row(self, row: Scalar, sequence: Scalar, position: Scalar, token: Scalar) -> None:
        last = self.k.scalar(self.shape.options.max_seq_len - 1, "index")
        lowest = -1 if self._takes_embeds else 0
        token = token.to("index").clamp(lowest, self.k.scalar(self.config.vocab_size - 1, "index"))
        values = {SEQUENCE: sequence, POSITION: position.minimum(last), TOKEN: token}
        for column, value in values.items():
            self.table.store(value.to("i32"), self.max_rows * column + row)

    def _append_groups(self, first: Scalar, count: Scalar) -> None:
        k, groups = self.k, count // QUERY_ROWS
        if self.tiled_attention:
            with k.loop(0, count, TILED_ROWS) as i:
                length = (count - i).minimum(k.scalar(TILED_ROWS, "index"))
                self._append(GROUPS, GROUP_ROW, first + i, length)
            return
        with k.loop(0, groups) as i:
            self._append(GROUPS, GROUP_ROW, first + i * QUERY_ROWS, k.scalar(QUERY_ROWS, "index"))
        with k.loop(groups * QUERY_ROWS, count) as i:
            self._append(GROUPS, GROUP_ROW, first + i, k.scalar(1, "index"))

    def _append_outputs(self, first: Scalar, count: Scalar, n: Scalar) -> None:
        if self.kind.all_logits:
            with self.k.loop(0, count) as s:
                self._append(OUTPUTS, OUTPUT_ROW, first + s, n * self.seq_len + s)
        else:
            with self.k.when(self.k.scalar(0, "index").less(count)):
                self._append(OUTPUTS, OUTPUT_ROW, first + count - 1, n)

    def _append(self, counter: int, column: int, first: Scalar, second: Scalar) -> None:
        at = self._number(counter)
        for i, value in enumerate((first, second)):
            self.table.store(value.to("i32"), self.max_rows * (column + i) + at)
        self.header.store((at + 1).to("i32"), counter)

    def _embed(self, row: Scalar) -> None:
        """The residual [M, H] of a row: its token's row of the embedding, or what was given."""
        k, token = self.k, self._table(TOKEN, row)
        if not self._takes_embeds:
            self._look_up(token, row)
            return
        zero = k.scalar(0, "index")
        is_given = token.less(zero)
        with k.when(is_given):
            self._take_given(row)
        with k.when(zero.less(token + 1)):
            self._look_up(token, row)

    def _look_up(self, token: Scalar, row: Scalar) -> None:
        k, s, start = self.k, self.shape, self._at("token_embd.weight")
        with k.loop(0, s.hidden) as i:
            value = s.ends.element(k, self.weights, start, s.hidden, token, i)
            self.residual.store(value, row * s.hidden + i)

    def _take_given(self, row: Scalar) -> None:
        """Embeddings [N, S, H], without the padding of features that the residual has."""
        k, hidden, sequence = self.k, self.config.hidden_size, self._table(SEQUENCE, row)
        s = self._position(row) - self.start.load(sequence).to("index")
        start, zero = (sequence * self.seq_len + s) * hidden, k.scalar(0.0, "f32")
        with k.loop(0, hidden) as i:
            self.residual.store(self.embeds.load(start + i), row * self.shape.hidden + i)
        with k.loop(hidden, self.shape.hidden) as i:
            self.residual.store(zero, row * self.shape.hidden + i)

    def _layer(self, layer: Scalar, number: Scalar) -> None:
        k, s, c, rows = self.k, self.shape, self.config, self.num_rows

        def at(name: str) -> Scalar:
            return self._at(f"blk.0.{name}.weight", layer)

        with k.phase(self.counters, number, rows) as row:
            self._norm(row, at("attn_norm"), row)
        size = (s.qkv_width, s.hidden)
        self._matmul(number + 1, at("attn_qkv"), size, self.act, rows, self._store_qkv)
        with k.phase(self.counters, number + 2, rows * c.num_kv_heads) as task:
            self.attention.rotate_and_store(task // c.num_kv_heads, task % c.num_kv_heads, layer)
        self._attend(layer, number + 3)
        if self.kind.is_decode:
            with k.phase(self.counters, number + 4, rows) as row:
                self.attention.combine(row)
        size = (s.hidden, s.heads_width)
        self._matmul(number + 5, at("attn_output"), size, self.act, rows, self._add)
        with k.phase(self.counters, number + 6, rows) as row:
            self._norm(row, at("ffn_norm"), row)
        size = (2 * s.inner, s.hidden)
        self._matmul(number + 7, at("ffn_gate_up"), size, self.act, rows, self._silu)
        if s.layers.is_quantized:
            with k.phase(self.counters, number + 8, rows) as row:
                self._quantize_hidden(row)
        size = (s.hidden, s.inner)
        self._matmul(number + 9, at("ffn_down"), size, self.hid, rows, self._add)

    def _norm(self, row: Scalar, weight: Scalar, to: Scalar) -> None:
        """RMS norm of a row of the residual, as activations."""
        k, hidden, lanes = self.k, self.shape.hidden, self.vectors.lanes
        kind = vector_type(lanes, "f32")
        start, weight = row * hidden, weight // 4

        def square(i: Scalar, total: Scalar) -> list[Scalar]:
            x = self.residual.load_vector(start + i, lanes)
            return [k.fma(x, x, total)]

        [squares] = k.fold(0, hidden, [k.scalar(0.0, kind)], square, lanes)
        mean = k.sum(squares) / self.config.hidden_size + self.config.rms_eps
        inverse = k.broadcast(k.scalar(1.0, "f32") / mean.math("sqrt"), lanes)
        with k.loop(0, hidden, self.act.step) as i:
            values = []
            for j in range(0, self.act.step, lanes):
                x = self.residual.load_vector(start + i + j, lanes) * inverse
                values.append(x * self.weights["f32"].load_vector(weight + i + j, lanes))
            self.act.store(values, to, i)

    def _attend(self, layer: Scalar, number: Scalar) -> None:
        """Each group of rows, KV head and split of the context; with tiles, each query head."""
        k, heads = self.k, self.config.num_kv_heads
        splits, groups = self._number(SPLITS), self._number(GROUPS)
        tiled = self.tiled_attention
        num_tasks = groups * self.config.num_heads if tiled else groups * splits * heads
        with k.phase(self.counters, number, num_tasks) as task:
            if tiled:
                query, group = task % self.config.num_heads, task // self.config.num_heads
                row, length = self._table(GROUP_ROW, group), self._table(GROUP_LEN, group)
                tiled.attend_rows(self.workgroup, row, length, query, layer)
                return
            head, group = task % heads, task // heads // splits
            split = task // heads % splits if self.kind.is_decode else None
            row, length = self._table(GROUP_ROW, group), self._table(GROUP_LEN, group)
            for num_rows in (1,) if self.kind.is_decode else (1, QUERY_ROWS):
                with k.when(length.equals(num_rows)):
                    self.attention.attend(self.workgroup, row, num_rows, head, split, layer)

    # What becomes of products

    def _store_qkv(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        for value, r, feature in self._each(sums, row, block):
            self.attention.memory.qkv.store_vector(value, r * self.qkv_width + feature)

    def _add(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """To the residual."""
        for value, r, feature in self._each(sums, row, block):
            at = r * self.shape.hidden + feature
            before = self.residual.load_vector(at, self.vectors.lanes)
            self.residual.store_vector(before + value, at)

    def _silu(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """silu(gate) * up: of a block, one vector is gates and one is ups."""
        inner, feature = self.shape.inner, block * self.vectors.lanes
        for r in range(len(sums) // 2):
            gate, up = sums[2 * r : 2 * r + 2]
            value = gate / (self.k.exp(gate * -1.0) + 1.0) * up
            if self.shape.layers.is_quantized:
                self.plain_hid.store_vector(value, (row + r) * inner + feature)
            else:
                self.hid.store([value], row + r, feature)

    def _quantize_hidden(self, row: Scalar) -> None:
        inner, lanes = self.shape.inner, self.vectors.lanes
        with self.k.loop(0, inner, GROUP) as i:
            start = row * inner + i
            loaded = [self.plain_hid.load_vector(start + j, lanes) for j in range(0, GROUP, lanes)]
            self.hid.store(loaded, row, i)

    # Logits

    def _finish(self, number: Scalar) -> None:
        """Logits of the wanted rows, then what they sum up to."""
        k, s, c = self.k, self.shape, self.config
        outputs = self._number(OUTPUTS)
        with k.phase(self.counters, number, outputs) as i:
            self._norm(self._table(OUTPUT_ROW, i), self._at("output_norm.weight"), i)
        head = self._at("token_embd.weight" if c.tied_embeddings else "output.weight")
        size = (c.vocab_size, s.hidden)
        self._matmul(number + 1, head, size, self.act, outputs, self._store_logits, s.ends)
        if self.kind.all_logits:
            return
        num_tasks = -(-s.num_summaries // SUMMARY_TASK)
        with k.phase(self.counters, number + 2, outputs * num_tasks) as task:
            row, low = self._table(OUTPUT_TO, task // num_tasks), task % num_tasks * SUMMARY_TASK
            high = (low + SUMMARY_TASK).minimum(k.scalar(s.num_summaries, "index"))
            with k.loop(low, high) as block:
                self._summarize(row, block)
        with k.phase(self.counters, number + 3, outputs) as i:
            self._find_best(self._table(OUTPUT_TO, i))

    def _store_logits(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        k, lanes, vocab = self.k, self.vectors.lanes, self.config.vocab_size
        for value, r, token in self._each(sums, row, block):
            count = None
            if vocab % self.vectors.block:
                count = (k.scalar(vocab, "index") - token).clamp(0, k.scalar(lanes, "index"))
            self.logits.store_vector(value, self._table(OUTPUT_TO, r) * vocab + token, count)

    def _summarize(self, row: Scalar, block: Scalar) -> None:
        """The maximum of a block of logits, and the sum of exp((logit - maximum) * scale)."""
        k, vocab, lanes, logits = self.k, self.config.vocab_size, self.vectors.lanes, self.logits
        kind = vector_type(lanes, "f32")
        start = row * vocab + block * SUMMARY
        count = (k.scalar(vocab, "index") - block * SUMMARY).minimum(k.scalar(SUMMARY, "index"))
        whole = count // lanes * lanes

        def larger(i: Scalar, top: Scalar) -> list[Scalar]:
            return [top.maximum(logits.load_vector(start + i, lanes))]

        def larger_one(i: Scalar, top: Scalar) -> list[Scalar]:
            return [top.maximum(logits.load(start + i))]

        [tops] = k.fold(0, whole, [k.scalar(MASKED, kind)], larger, lanes)
        [top] = k.fold(whole, count, [k.maximum(tops)], larger_one)
        scale = self.scales.load(row)
        wide_top, wide_scale = k.broadcast(top, lanes), k.broadcast(scale, lanes)

        def add(i: Scalar, total: Scalar) -> list[Scalar]:
            x = (logits.load_vector(start + i, lanes) - wide_top) * wide_scale
            return [total + x.math("exp")]

        def add_one(i: Scalar, total: Scalar) -> list[Scalar]:
            return [total + ((logits.load(start + i) - top) * scale).math("exp")]

        [sums] = k.fold(0, whole, [k.scalar(0.0, kind)], add, lanes)
        [total] = k.fold(whole, count, [k.sum(sums)], add_one)
        self.maxima.store(top, row * self.shape.num_summaries + block)
        self.sums.store(total, row * self.shape.num_summaries + block)

    def _find_best(self, row: Scalar) -> None:
        """The first token with the largest logit."""
        k, vocab, num = self.k, self.config.vocab_size, self.shape.num_summaries
        state = [k.scalar(0, "index"), k.scalar(MASKED, "f32")]

        def better(memory: Memory, start: Scalar) -> Callable[..., Sequence[Scalar]]:
            def body(i: Scalar, best: Scalar, top: Scalar) -> Sequence[Scalar]:
                value = memory.load(start + i)
                is_more = top.is_below(value)
                return [is_more.select(i, best), is_more.select(value, top)]

            return body

        [block, _] = k.fold(0, num, state, better(self.maxima, row * num))
        first = block * SUMMARY
        count = (k.scalar(vocab, "index") - first).minimum(k.scalar(SUMMARY, "index"))
        [token, _] = k.fold(0, count, state, better(self.logits, row * vocab + first))
        self.best.store((first + token).to("i64"), row)
