"""VisionKernel: a vision tower and the projector behind it, as one CPU kernel.

The tower turns the patches of image tiles into hidden features; the projector turns those into
embeddings of the language model. Rows are the positions of all tiles: patches, and the class token
if the tower has one. Attention is that of the language model; its KV cache is memory of the call's
own, with pages of PAGE positions. Shapes: N tiles of an image, each size * size pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from compile.cpu.activations import Activations
from compile.cpu.amx import COLUMNS, MAX_ROWS
from compile.cpu.attention import AttentionMemory
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import Use, padded
from compile.cpu.phases import PhaseTable
from compile.cpu.projector import AFTER_LAYERS, ProjectorPhases
from compile.cpu.transformer import TransformerKernel
from compile.formats.layout import Parameter
from compile.mlir.activations import activation
from compile.mlir.builder import Builder, Tensor
from compile.mlir.executable import Views
from compile.mlir.values import Scalar
from compile.models.spec import VisionConfig
from compile.models.tensors import ModelTensor, VisionTensors, matrix_sizes, vision_tensors

PAGE = 32  # positions
STORED = 16  # positions of a task that stores keys and values
LANES = 16  # of the widest vectors; hidden features of a tower must be a multiple
BEFORE_LAYERS = ("set_up", "unfold", "patch_embd", "class_token", "pre_ln")  # names of phases
LAYER = (
    "ln1", "attn_qkv", "store_kv", "attend", "attn_out", "ln2", "ffn_up", "ffn_down",
)  # fmt: skip


@dataclass(frozen=True)
class TowerHeads:
    """Heads as attention wants to know them: a tower has as many of queries as of keys and values.

    num_layers: 1, since each layer writes its keys and values over those of the last one.
    """

    num_heads: int
    head_dim: int
    num_layers: int = 1

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.num_heads


@dataclass(frozen=True)
class VisionShape:
    """A vision tower as its kernel sees it; features are padded to whole blocks.

    text_hidden: features of an embedding of the language model. offsets: of parameters, in bytes.
    """

    config: VisionConfig
    text_hidden: int
    layers: Format  # of matrices
    offsets: dict[str, int]

    @property
    def hidden(self) -> int:
        """Features of the residual."""
        return padded(self.config.hidden_size, self.layers.vectors.block)

    @property
    def inner(self) -> int:
        """Features inside the MLP."""
        return padded(self.config.intermediate_size, self.layers.vectors.block)

    @property
    def patch(self) -> int:
        """Elements of a patch."""
        return padded(self.config.patch_elements, COLUMNS)

    @property
    def projected(self) -> int:
        """Features of LLaVA's projector."""
        return padded(self.text_hidden, self.layers.vectors.block)

    @property
    def shuffled(self) -> int:
        """Features of a token before Idefics3's connector."""
        return self.config.hidden_size * self.config.scale_factor**2

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Sizes [out, in] by name; those of layers as in layer 0."""
        t = self._tensors
        return matrix_sizes([*t.patches, *t.layers[0], *t.connector])

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the archive."""
        t = self._tensors
        tensors = [*t.embeddings, *t.patches, *chain(*t.layers), *t.connector]
        return [self._parameter(tensor) for tensor in tensors]

    @property
    def _tensors(self) -> VisionTensors:
        return vision_tensors(
            self.config, self.text_hidden, hidden=self.hidden, intermediate=self.inner,
            patch=self.patch, projected=self.projected,
        )  # fmt: skip

    def _parameter(self, tensor: ModelTensor) -> Parameter:
        if tensor.is_matrix:
            return self.layers.parameter(tensor.name, *tensor.shape)
        *rows, size = tensor.shape
        shape = (*rows, padded(size, self.layers.vectors.block))
        return Parameter(tensor.name, shape, "f32")


class VisionKernel(TransformerKernel):
    """The kernel `encode_image`: `write` it into a module, `call` it from functions."""

    def __init__(self, shape: VisionShape) -> None:
        c = shape.config
        super().__init__(
            "encode_image", shape.layers, c.hidden_size, shape.hidden, c.norm_eps, shape.offsets,
            shape.matrices(),
            PhaseTable(BEFORE_LAYERS, LAYER, AFTER_LAYERS[c.family], c.num_layers),
        )  # fmt: skip
        self.shape, self.config = shape, c
        self._bind()
        self._write()

    def call(self, b: Builder, pixels: Tensor, weights: Tensor) -> Tensor:
        """Embeddings [N, tokens, text_hidden] of pixels [N, 3, size, size], both f32."""
        n, c = int(pixels.shape[0]), self.config
        counters, beyond = self.new_counters(b), MAX_ROWS - 1  # AMX tiles reach beyond the rows
        sizes = {
            "n": n, "rows": n * c.num_positions, "padded_rows": n * c.num_positions + beyond,
            "padded_patches": n * c.num_patches + beyond,
            "padded_tokens": n * c.tokens_per_tile + beyond,
        }  # fmt: skip
        return self.dispatch(b, [n], [weights, pixels], [counters], sizes)[1]

    # Memory

    def _bind(self) -> None:
        """Arguments in the order of `call`, the result, and memory of the call's own."""
        k, s, c = self.k, self.shape, self.config
        types = {"f32", *s.layers.view_types}
        self.weights = Views(k, k.binding(read_only=True)).open(*sorted(types))
        self.pixels = k.view(k.binding(read_only=True), "f32")
        self.counters = k.view(k.binding(), "i32")
        out = self.result(("n", c.tokens_per_tile, s.text_hidden))
        self.residual = self.result(("rows", s.hidden))
        self.patches = self.activations(s.patch, "padded_patches")
        self.act = self.activations(max(s.hidden, c.hidden_size))
        self.mlp_act = self.activations(s.inner)
        width = s.projected if c.family == "llava" else s.shuffled
        token_act = self.activations(max(width, s.hidden), "padded_tokens")
        self.projector = ProjectorPhases(self, c, token_act, out, s.text_hidden)
        self._bind_attention()

    def _bind_attention(self) -> None:
        k, c = self.k, self.config
        self.qkv_width = padded(3 * c.hidden_size, self.vectors.block)
        layout = KVLayout(
            TowerHeads(c.num_heads, c.head_dim), PAGE, self.layers.dtype, self.vectors
        )
        op = layout.operand
        self.num_pages = -(-c.num_positions // PAGE)
        qkv = self.output(("padded_rows", self.qkv_width), op.other).open(op.other, "i32")
        cache = self.output(("n", self.num_pages, layout.page_elements), op.dtype)
        cache.open(op.dtype, op.unit_dtype)
        self.n = k.constant()
        self.qkv, rope = qkv[op.other], k.scalar(0, "index")  # no rotary embedding
        memory = AttentionMemory(
            self.qkv, self.qkv_width, self.weights["f32"], rope, cache, qkv, self.qkv_width,
            self.act, amx=self.bind_amx(),
        )  # fmt: skip
        self.bind_attention(layout, memory, self._last_position, self._page)

    def _last_position(self, row: Scalar) -> Scalar:
        """The last position that a row attends to: a tile's last one, whatever the row."""
        return self.k.scalar(self.config.num_positions - 1, "index")

    def _page(self, row: Scalar, position: Scalar) -> Scalar:
        last = self.k.scalar(self.num_pages - 1, "index")
        tile = row // self.config.num_positions
        return tile * self.num_pages + (position // PAGE).minimum(last)

    # Phases

    def _write(self) -> None:
        k, c = self.k, self.config
        with self.unless_done():
            if self.amx:
                with self.phase(self.phases.before(k)["set_up"], k.scalar(1, "index")):
                    self.amx.request_permission()
                self.amx.configure()
            self.num_rows = self.n * c.num_positions
            before = self.phases.before(k)
            with self.rows_phase(before["unfold"], self.n * c.num_patches) as patch:
                self._unfold(patch)
            self.linear(before["patch_embd"], "v.patch_embd", self.patches, self.n * c.num_patches,
                        self._store_patch)  # fmt: skip
            if c.has_class_token:
                with self.rows_phase(before["class_token"], self.n) as tile:
                    self._store_class(tile * c.num_positions)
                with self.rows_phase(before["pre_ln"], self.num_rows) as row:
                    self.layer_norm(row, "v.pre_ln", None, self._to_residual(row))
            with k.loop(0, c.num_layers) as layer:
                self._layer(layer)
            self.projector.write(self.n, self.num_rows)
            self.exit(before)

    def _layer(self, layer: Scalar) -> None:
        numbers, rows = self.phases.layer(layer), self.num_rows

        def linear(name: str, x: Activations, use: Use) -> None:
            self.linear(numbers[name], f"v.blk.0.{name}", x, rows, use, layer)

        def norm(name: str) -> None:
            with self.rows_phase(numbers[name], rows) as row:
                self.layer_norm(row, f"v.blk.0.{name}", layer, self._to_act(row))

        norm("ln1")
        linear("attn_qkv", self.act, self._store_qkv)
        self._store_keys_and_values(numbers["store_kv"])
        self._attend(numbers["attend"])
        linear("attn_out", self.act, self.add_to_residual)
        norm("ln2")
        linear("ffn_up", self.act, self._activate)
        linear("ffn_down", self.mlp_act, self.add_to_residual)

    # Before the layers

    def _unfold(self, row: Scalar) -> None:
        """Store a patch [3, p, p] as activations."""
        k, c, size = self.k, self.config, self.config.patch_size
        tile, patch = row // c.num_patches, row % c.num_patches
        y, x = patch // c.patches_across * size, patch % c.patches_across * size
        memory, width = self.patches.elements, self.shape.patch
        with k.loop(0, 3 * size) as line:  # of a channel
            source = (tile * 3 + line // size) * c.image_size + y + line % size
            with k.loop(0, size) as i:
                value = self.pixels.load(source * c.image_size + x + i)
                memory.store(value.to(memory.dtype), row * width + line * size + i)
        with k.loop(c.patch_elements, width) as i:
            memory.store(k.scalar(0.0, memory.dtype), row * width + i)

    def _store_patch(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """Store patch embeddings plus position embeddings as the residual."""
        c, lanes = self.config, self.vectors.lanes
        for value, r, feature in self.each(sums, row, block):
            position = r % c.num_patches + int(c.has_class_token)
            at = position * self.hidden + feature
            place = self.weights["f32"].load_vector(self._positions + at, lanes)
            to = (r // c.num_patches * c.num_positions + position) * self.hidden + feature
            self.residual.store_vector(value + place, to)

    @property
    def _positions(self) -> Scalar:
        return self.weight_at("v.position_embd.weight") // 4

    def _store_class(self, row: Scalar) -> None:
        """Store the class token's embedding plus that of position 0."""
        lanes, start = self.vectors.lanes, self.weight_at("v.class_embd") // 4
        floats = self.weights["f32"]
        with self.k.loop(0, self.hidden, lanes) as i:
            value = floats.load_vector(start + i, lanes)
            value = value + floats.load_vector(self._positions + i, lanes)
            self.residual.store_vector(value, row * self.hidden + i)

    # Layers

    def _to_residual(self, row: Scalar) -> Callable[[Scalar, Scalar], None]:
        return lambda x, i: self.residual.store_vector(x, row * self.hidden + i)

    def _to_act(self, row: Scalar) -> Callable[[Scalar, Scalar], None]:
        return lambda x, i: self.act.store([x], row, i)

    def _store_qkv(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """Store queries, keys and values in the type that attention reads; scale the queries."""
        k, lanes = self.k, self.vectors.lanes
        scale, one = k.scalar(self.config.head_dim**-0.5, "f32"), k.scalar(1.0, "f32")
        for value, r, feature in self.each(sums, row, block):
            is_query = feature.less(k.scalar(self.config.hidden_size, "index"))
            value = value * k.broadcast(is_query.select(scale, one), lanes)
            self.qkv.store_as(value, r * self.qkv_width + feature)

    def _store_keys_and_values(self, number: Scalar) -> None:
        """Store those of all tiles to the cache; a task is STORED positions of one tile."""
        k, c = self.k, self.config
        num_groups = self.num_pages * (PAGE // STORED)
        with self.phase(number, self.n * num_groups) as group:
            most = k.scalar(STORED, "index")
            first = group % num_groups * STORED
            start = group // num_groups * c.num_positions
            count = (k.scalar(c.num_positions, "index") - first).clamp(0, most)
            with k.loop(0, c.num_heads) as head:
                self.attention.store(start, first, count, STORED, head)

    def _attend(self, number: Scalar) -> None:
        """Attention of all heads of groups of rows of a tile."""
        k, c, attention, most = self.k, self.config, self.attention, self.attention.rows_per_task
        layer, zero = k.scalar(0, "index"), k.scalar(0, "index")
        groups = -(-c.num_positions // most)
        with self.phase(number, self.n * (groups * c.num_heads)) as task:
            # All groups of one head follow one another: keys and values stay in a core's cache.
            first, tile_and_head = task % groups * most, task // groups
            head = tile_and_head % c.num_heads
            row = tile_and_head // c.num_heads * c.num_positions + first
            count = (k.scalar(c.num_positions, "index") - first).minimum(k.scalar(most, "index"))
            if attention.takes_any_count:
                attention.attend(row, count, head, layer)
                return
            with k.when(count.equals(most)):
                attention.attend(row, most, head, layer)
            with k.when(count.less(k.scalar(most, "index"))), k.loop(zero, count) as i:
                attention.attend(row + i, 1, head, layer)

    def _activate(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """Store the MLP's activation function of outputs."""
        for value, r, feature in self.each(sums, row, block):
            self.mlp_act.store([activation(value, self.config.activation, self.k.exp)], r, feature)
