"""DecoderKernel: a Llama as one CPU kernel, phase after phase, over rows of tokens.

The valid tokens of all sequences of a call are the rows, M of them, without padding; prefill and
decode differ only in how many there are. Shapes: N sequences, S tokens of each at most, B pages of
each.
"""

from __future__ import annotations

from compile.cpu.activations import Activations
from compile.cpu.amx import MAX_ROWS
from compile.cpu.attention import AttentionMemory
from compile.cpu.attention_vector import VectorAttention
from compile.cpu.decoder_layout import DecoderLayout
from compile.cpu.kernel import CACHE_LINE
from compile.cpu.kv_layout import KVLayout
from compile.cpu.logits import AFTER_LAYERS, LogitsMemory, LogitsPhases
from compile.cpu.matrix_kernel import Use, padded
from compile.cpu.phases import PhaseTable
from compile.cpu.row_tables import (
    NUM_COLUMNS,
    NUM_GROUPS,
    NUM_ROWS,
    NUM_SPLITS,
    CallMemory,
    CallSizes,
    KernelKind,
    RowTables,
)
from compile.cpu.softmax import SPLIT, Splits
from compile.cpu.transformer import ROWS_PER_TASK, TransformerKernel
from compile.cpu.vector_builder import LOG2_E
from compile.formats.blocks import GROUP
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.executable import Views
from compile.mlir.values import Scalar

BEFORE_LAYERS = ("set_up", "embed")  # names of phases
LAYER = (
    "attn_norm", "attn_qkv", "store_kv", "attend", "combine", "attn_output",
    "ffn_norm", "ffn_gate_up", "quantize", "ffn_down",
)  # fmt: skip


class DecoderKernel(TransformerKernel):
    """The kernel of one kind: `write` it into a module, `call` it from functions."""

    def __init__(self, model: DecoderLayout, kind: KernelKind) -> None:
        c = model.config
        super().__init__(
            kind.name, model.layers_of(kind), c.hidden_size, model.hidden, c.rms_eps, model.offsets,
            model.matrices(), PhaseTable(BEFORE_LAYERS, LAYER, AFTER_LAYERS, c.num_layers),
            model.layer_parts(kind),
        )  # fmt: skip
        self.model, self.kind, self.config = model, kind, c
        self.takes_embeds = model.takes_embeds and not kind.is_decode
        self._bind()
        self._write()

    def call(
        self, b: Builder, args: dict[str, Tensor], weights: Tensor, cache: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Call the kernel with the arguments of a function: logits and summaries, and the cache.

        args: tokens [N, S], start_pos [N], seq_lens [N], seq_block_ids [N, B], scales [N], and
        embeds [N, S, hidden] if the kernel takes them. Returns logits, best, maxima and sums as
        `LogitsMemory` describes them.
        """
        n, seq_len = args["tokens"].shape
        num_pages = args["seq_block_ids"].shape[1]
        splits: Dim = 1
        if self.kind.is_decode:
            positions = b.index(num_pages) * self.model.options.page_size
            splits = ((positions + (SPLIT - 1)) // SPLIT).name
        counters = self.new_counters(b)
        inputs = [weights, args["tokens"], args["start_pos"], args["seq_lens"],
                  args["seq_block_ids"], args["scales"],
                  *([args["embeds"]] if self.takes_embeds else [])]  # fmt: skip
        rows = b.product(n, seq_len)
        padded_rows = (b.index(rows) + (MAX_ROWS - 1)).name  # AMX tiles reach beyond the rows
        sizes = {"n": n, "seq_len": seq_len, "rows": rows, "padded_rows": padded_rows,
                 "splits": splits}  # fmt: skip
        constants = n, seq_len, num_pages, splits
        _, cache, *outputs = self.dispatch(b, constants, inputs, [counters, cache], sizes)
        return outputs[:4], cache

    # Memory

    def _bind(self) -> None:
        """Arguments in the order of `call`, results, and memory of the call's own."""
        k, m, c = self.k, self.model, self.config
        types = {"f32", *m.layers.view_types, *m.embedding_format.view_types}
        self.weights = Views(k, k.binding(read_only=True)).open(*sorted(types))
        tokens, start_pos, seq_lens, page_ids = (
            k.view(k.binding(read_only=True), "i64") for _ in range(4)
        )
        inv_temperatures = k.view(k.binding(read_only=True), "f32")
        if self.takes_embeds:
            self.embeds = k.view(k.binding(read_only=True), "f32")
        self.counters = k.view(k.binding(), "i32")
        kv = KVLayout(c, m.options.page_size, m.options.kv_dtype, self.vectors)
        cache = Views(k, k.binding()).open(kv.operand.dtype, kv.operand.unit_dtype)
        logits = LogitsMemory(
            self.result(("n", "seq_len" if self.kind.all_logits else 1, c.vocab_size)),
            self.result(("n",), "i64"),
            self.result(("n", m.num_summaries)),
            self.result(("n", m.num_summaries)),
            inv_temperatures,
        )
        header, table = self.result((CACHE_LINE,), "i32"), self.result((NUM_COLUMNS, "rows"), "i32")
        self.residual = self.result(("rows", m.hidden))
        self.act = self.activations(max(m.hidden, m.heads_width))
        self.mlp_act = self.activations(m.inner)
        self.mlp_floats = self.result(("rows" if self.layers.takes_integers else 1, m.inner))
        head_act = self._head_act()
        call = CallMemory(tokens, start_pos, seq_lens, page_ids, header, table)
        self._bind_tables_and_attention(call, kv, cache)
        head = "token_embd" if c.tied_embeddings else "output"
        self.logits = LogitsPhases(self, self.tables, logits, head, m.head_format, head_act)

    def _head_act(self) -> Activations:
        """What the head is multiplied with: integers of two bytes if it is quantized."""
        format_, width = self.model.head_format, self.model.hidden
        if format_.activation_bytes(width) == self.layers.activation_bytes(width):
            return self.act
        views = self.output(("padded_rows", format_.activation_bytes(width)), "i8")
        return format_.activations(self.k, views, width)

    def _bind_tables_and_attention(self, call: CallMemory, kv: KVLayout, cache: Views) -> None:
        k, m, c, op = self.k, self.model, self.config, kv.operand
        self.qkv_width = padded(m.qkv_width, self.vectors.block)
        self.qkv = self.result(("rows", self.qkv_width))
        q = self.output(("padded_rows", m.heads_width), op.other).open(op.other, "i32")
        if self.kind.is_decode:
            values = self.result(("rows", "splits", c.num_heads, c.head_dim))
            totals = self.result(("rows", "splits", c.num_heads, 2))
        sizes = CallSizes(*(k.constant() for _ in range(4)))
        self.tables = RowTables(
            k, c, m.options, self.kind, call, sizes, takes_embeds=self.takes_embeds
        )
        splits = Splits(values, totals, sizes.most_splits) if self.kind.is_decode else None
        memory = AttentionMemory(
            self.qkv, self.qkv_width, self.weights["f32"], self.weight_at("rope") // 4, cache, q,
            m.heads_width, self.act, splits, self.bind_amx(),
        )  # fmt: skip
        self.bind_attention(kv, memory, self.tables.position, self.tables.page)

    # Phases

    def _write(self) -> None:
        k, tables = self.k, self.tables
        with self.unless_done():
            before = self.phases.before(k)
            with self.phase(before["set_up"], k.scalar(1, "index")):
                if self.amx:
                    self.amx.request_permission()
                tables.fill(self.attention)
            if self.amx:
                self.amx.configure()
            rows = tables.number(NUM_ROWS)
            with self.phase(before["embed"], rows) as row:
                self._embed(row)
            with k.loop(0, self.config.num_layers) as layer:
                self._layer(layer, rows)
            self.logits.write(all_logits=self.kind.all_logits)
            self.exit(before)

    def _embed(self, row: Scalar) -> None:
        """Set a row of the residual: the embedding of its token, or the one that was given."""
        k, token = self.k, self.tables.token(row)
        if not self.takes_embeds:
            self._look_up(token, row)
            return
        zero = k.scalar(0, "index")
        is_given = token.less(zero)
        with k.when(is_given):
            self._take_given(row)
        with k.when(zero.less(token + 1)):
            self._look_up(token, row)

    def _look_up(self, token: Scalar, row: Scalar) -> None:
        k, hidden, start = self.k, self.hidden, self.weight_at("token_embd.weight")
        with k.loop(0, hidden) as i:
            value = self.model.embedding_format.element(k, self.weights, start, hidden, token, i)
            self.residual.store(value, row * hidden + i)

    def _take_given(self, row: Scalar) -> None:
        """Copy from embeddings [N, S, features], which lack the padding of the residual."""
        k, tables, sequence = self.k, self.tables, self.tables.sequence(row)
        s = tables.position(row) - tables.memory.start_pos.load(sequence).to("index")
        start, zero = (sequence * tables.sizes.seq_len + s) * self.features, k.scalar(0.0, "f32")
        with k.loop(0, self.features) as i:
            self.residual.store(self.embeds.load(start + i), row * self.hidden + i)
        with k.loop(self.features, self.hidden) as i:
            self.residual.store(zero, row * self.hidden + i)

    def _layer(self, layer: Scalar, rows: Scalar) -> None:
        numbers = self.phases.layer(layer)

        def linear(name: str, x: Activations, use: Use) -> None:
            self.linear(numbers[name], f"blk.0.{name}", x, rows, use, layer)

        def norm(name: str) -> None:
            with self.rows_phase(numbers[name], rows, self._rows_per_task) as row:
                self.rms_norm(row, self.weight_at(f"blk.0.{name}.weight", layer), self.act, row)

        norm("attn_norm")
        linear("attn_qkv", self.act, self._store_qkv)
        self._store_kv(numbers["store_kv"], layer, rows)
        self._attend(numbers["attend"], layer)
        if self.kind.is_decode:
            assert isinstance(self.attention, VectorAttention)
            with self.phase(numbers["combine"], rows) as row:
                self.attention.softmax.combine(row)
        linear("attn_output", self.act, self.add_to_residual)
        norm("ffn_norm")
        linear("ffn_gate_up", self.act, self._silu)
        if self.layers.takes_integers:
            with self.phase(numbers["quantize"], rows) as row:
                self._quantize_mlp(row)
        linear("ffn_down", self.mlp_act, self.add_to_residual)

    @property
    def _rows_per_task(self) -> int:
        """Rows of a task of phases that multiply no matrix: in decode there are few."""
        return 1 if self.kind.is_decode else ROWS_PER_TASK

    def _store_kv(self, number: Scalar, layer: Scalar, rows: Scalar) -> None:
        """Rotate and store queries, keys and values; a task is one KV head of some rows, whose
        keys share cache lines."""
        heads, most = self.config.num_kv_heads, self._rows_per_task
        with self.phase(number, (rows + (most - 1)) // most * heads) as task:
            low = task // heads * most
            with self.k.loop(low, (low + most).minimum(rows)) as row:
                self.attention.rotate_and_store(row, task % heads, layer)

    def _attend(self, number: Scalar, layer: Scalar) -> None:
        """Attention of all groups of rows, heads and splits of the context."""
        k, attention, tables = self.k, self.attention, self.tables
        splits, groups = tables.number(NUM_SPLITS), tables.number(NUM_GROUPS)
        with self.phase(number, attention.num_tasks(groups, splits)) as task:
            group, head, split = attention.task(task, groups, splits)
            row, length = tables.group(group)
            if attention.takes_any_count:
                attention.attend(row, length, head, layer, split)
                return
            for num_rows in (1,) if self.kind.is_decode else (1, attention.rows_per_task):
                with k.when(length.equals(num_rows)):
                    attention.attend(row, num_rows, head, layer, split)

    # What becomes of products

    def _store_qkv(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        for value, r, feature in self.each(sums, row, block):
            self.qkv.store_vector(value, r * self.qkv_width + feature)

    def _silu(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """silu(gate) * up: of a block's two vectors, one holds gates and one ups."""
        k, inner, feature = self.k, self.model.inner, block * self.vectors.lanes
        for r in range(len(sums) // 2):
            gate, up = sums[2 * r : 2 * r + 2]
            if self._rounds_coarsely:
                decay = k.exp2(gate * -LOG2_E)
                value = gate * k.reciprocal(decay + 1.0) * up
            else:
                value = gate / (k.exp(gate * -1.0) + 1.0) * up
            if self.layers.takes_integers:  # in groups, which are larger than a vector
                self.mlp_floats.store_vector(value, (row + r) * inner + feature)
            else:
                self.mlp_act.store([value], row + r, feature)

    @property
    def _rounds_coarsely(self) -> bool:
        """Whether activations become bf16 or one byte, by AVX-512."""
        if self.layers.takes_integers:
            return self.layers.activation_dtype == "int8" and self.vectors.lanes == 16
        return self.layers.operand.other == "bf16"

    def _quantize_mlp(self, row: Scalar) -> None:
        inner, lanes = self.model.inner, self.vectors.lanes
        with self.k.loop(0, inner, GROUP) as i:
            start = row * inner + i
            loaded = [self.mlp_floats.load_vector(start + j, lanes) for j in range(0, GROUP, lanes)]
            self.mlp_act.store(loaded, row, i)
