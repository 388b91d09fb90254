"""Vision: a tower and what makes its patches embeddings, as one CPU kernel, phase after phase.

Names and shapes as in `vision`; M rows are the positions of all tiles. Attention is that of
`cpu_attention`, to a "cache" of the call's own with pages of PAGE positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

from compile.cpu import amx as tiles
from compile.cpu.amx import Tiles
from compile.cpu.attention import QUERY_ROWS, Attention, AttentionMemory
from compile.cpu.attention_amx import ROWS as TILED_ROWS
from compile.cpu.attention_amx import TiledAttention
from compile.cpu.kernel import LINE, Views, vector_type
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Activations, Format
from compile.cpu.matrix_kernel import WORKGROUPS, MatrixKernel, padded
from compile.formats.layout import Parameter
from compile.mlir.activations import activation, gelu
from compile.mlir.builder import Builder, Scalar, Tensor
from compile.models.spec import VisionConfig
from compile.models.tensors import ModelTensor, VisionTensors, vision_tensors

PAGE = 32  # positions; those of a task that stores them:
STORED = 16
ROWS = 8  # of a task that multiplies nothing
PHASES = 8  # a layer
LANES = 16  # of the widest vectors, of which a row must be whole ones


@dataclass(frozen=True)
class Heads:
    """A layer's, as attention wants to know them: queries, keys and values have as many."""

    num_heads: int
    head_dim: int
    num_layers: int = 1

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads


@dataclass(frozen=True)
class VisionShape:
    """What the kernel needs to know; features are padded to whole blocks."""

    config: VisionConfig
    text_hidden: int
    layers: Format  # of matrices
    offsets: dict[str, int]  # of parameters, in bytes

    @property
    def hidden(self) -> int:
        return padded(self.config.hidden_size, self.layers.vectors.block)

    @property
    def inner(self) -> int:
        return padded(self.config.intermediate_size, self.layers.vectors.block)

    @property
    def patch(self) -> int:
        """Elements of a patch."""
        return padded(self.config.patch_elements, tiles.COLUMNS)

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
        tensors = [*t.patches, *t.layers[0], *t.connector]
        return {x.name.removesuffix(".weight"): (x.shape[0], x.shape[1])
                for x in tensors if x.is_matrix}  # fmt: skip

    def parameters(self) -> list[Parameter]:
        """In the order of the archive."""
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


class Vision(MatrixKernel):
    """The kernel `encode_image`: `call` it from functions."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__("encode_image", shape.layers)
        self.shape, self.config = shape, shape.config
        self._bind()
        self._write()

    def call(self, b: Builder, pixels: Tensor, weights: Tensor) -> Tensor:
        """Embeddings [N, tokens, E] of pixels [N, 3, size, size]."""
        n, c = int(pixels.shape[0]), self.config
        zero, num_counters = b.scalar(0, "i32"), (self._end + 6) * 2 * LINE
        counters = b.tensor(
            f"flow.tensor.splat {zero.name} : tensor<{num_counters}xi32>", (num_counters,), "i32"
        )
        beyond = tiles.MOST * tiles.LINES - 1  # tiles reach beyond the rows
        sizes = {
            "n": n, "rows": n * c.num_positions, "tiled": n * c.num_positions + beyond,
            "tiled_patches": n * c.num_patches + beyond,
            "tiled_tokens": n * c.tokens_per_tile + beyond,
        }  # fmt: skip
        return self.dispatch(b, [n], [weights, pixels], [counters], sizes)[1]

    # Memory

    @property
    def _end(self) -> int:
        """The number of the first phase after all layers."""
        return 5 + PHASES * self.config.num_layers

    def _bind(self) -> None:
        k, s, c = self.k, self.shape, self.config
        types = {"f32", *s.layers.view_types}
        self.weights = Views(k, k.binding(read_only=True)).open(*sorted(types))
        self.pixels = k.view(k.binding(read_only=True), "f32")
        self.counters = k.view(k.binding(), "i32")
        self.out = self._result(("n", c.tokens_per_tile, s.text_hidden))
        self.residual = self._result(("rows", s.hidden))
        self.patches = self._activations_of("tiled_patches", s.patch)
        self.act = self._activations(max(s.hidden, c.hidden_size))
        self.hid = self._activations(s.inner)
        width = s.projected if c.family == "llava" else s.shuffled
        self.last = self._activations_of("tiled_tokens", max(width, s.hidden))
        self.qkv_width = padded(3 * c.hidden_size, self.vectors.block)
        heads = Heads(c.num_heads, c.head_dim)
        layout = KVLayout(heads, PAGE, s.layers.dtype, self.vectors)
        op = layout.operand
        self.num_pages = -(-c.num_positions // PAGE)
        self.num_groups = self.num_pages * (PAGE // STORED)
        qkv = self._output(("tiled", self.qkv_width), op.other).open(op.other, "i32")
        cache = self._output(("n", self.num_pages, layout.page_elements), op.dtype)
        cache.open(op.dtype, op.unit_dtype)
        scratch = None
        if s.layers.is_tiled:
            scratch = self._output((WORKGROUPS, tiles.MEMORY)).open("f32", "i32")
        local = Views(k, k.binding()).open("f32", op.other, "i32")
        self.n = k.constant()
        self.workgroup = k.workgroup()
        self.tiles = Tiles(k, scratch, self.workgroup * tiles.MEMORY) if scratch else None
        memory = AttentionMemory(
            qkv[op.other],
            self.qkv_width,
            self.weights["f32"],
            k.scalar(0, "index"),
            cache,
            qkv,
            self.qkv_width,
            local,
            self.act,
        )
        arguments = k, layout, self.vectors, memory, self._last_position, self._page
        self.tiled_attention = None
        if self.tiles and TiledAttention.fits(layout):
            self.tiled_attention = TiledAttention(*arguments, tiles=self.tiles)
        self.attention = self.tiled_attention or Attention(*arguments)
        self._outputs.append(((WORKGROUPS, self.attention.local_size), "f32"))

    def _at(self, name: str, layer: Scalar | None = None) -> Scalar:
        """Where a parameter begins, in bytes; of a layer, given its name in layer 0."""
        offsets, start = self.shape.offsets, self.k.scalar(self.shape.offsets[name], "index")
        if layer is None or self.config.num_layers == 1:
            return start
        return layer * (offsets[name.replace("blk.0.", "blk.1.")] - offsets[name]) + start

    def _last_position(self, row: Scalar) -> Scalar:
        """That a row attends to."""
        return self.k.scalar(self.config.num_positions - 1, "index")

    def _page(self, row: Scalar, position: Scalar) -> Scalar:
        last = self.k.scalar(self.num_pages - 1, "index")
        tile = row // self.config.num_positions
        return tile * self.num_pages + (position // PAGE).minimum(last)

    # The model

    def _write(self) -> None:
        k, c = self.k, self.config
        is_open = self.counters.load((self._end + 5) * 2 * LINE + LINE).less(k.scalar(1, "i32"))
        with k.when(is_open):
            self._open()
            self.num_rows = self.n * c.num_positions
            number = k.scalar(0, "index")
            with self._rows(number + 1, self.n * c.num_patches) as patch:
                self._unfold(patch)
            self._product(number + 2, "v.patch_embd", self.patches, self.n * c.num_patches,
                          self._store_patch)  # fmt: skip
            if c.has_class_token:
                with self._rows(number + 3, self.n) as tile:
                    self._store_class(tile * c.num_positions)
                with self._rows(number + 4, self.num_rows) as row:
                    self._norm(row, "v.pre_ln", None, self._keep(row))
            with k.loop(0, c.num_layers) as layer:
                self._layer(layer, layer * PHASES + 5)
            self._project(k.scalar(self._end, "index"))
            with k.phase(self.counters, number + (self._end + 5), k.scalar(1, "index")):
                pass
            if self.tiles:
                self.tiles.close()

    def _open(self) -> None:
        if self.tiles:
            with self.k.phase(self.counters, self.k.scalar(0, "index"), self.k.scalar(1, "index")):
                self.tiles.ask()
            self.tiles.open()

    def _layer(self, layer: Scalar, number: Scalar) -> None:
        rows = self.num_rows
        with self._rows(number, rows) as row:
            self._norm(row, "v.blk.0.ln1", layer, self._as_activations(row))
        self._product(number + 1, "v.blk.0.attn_qkv", self.act, rows, self._store_qkv, layer)
        with self.k.phase(self.counters, number + 2, self.n * self.num_groups) as group:
            self._store_heads(group)
        self._attend(number + 3)
        self._product(number + 4, "v.blk.0.attn_out", self.act, rows, self._add, layer)
        with self._rows(number + 5, rows) as row:
            self._norm(row, "v.blk.0.ln2", layer, self._as_activations(row))
        self._product(number + 6, "v.blk.0.ffn_up", self.act, rows, self._activate, layer)
        self._product(number + 7, "v.blk.0.ffn_down", self.hid, rows, self._add, layer)

    def _project(self, number: Scalar) -> None:
        c, s, tokens = self.config, self.shape, self.n * self.config.tokens_per_tile
        if c.family == "llava":
            with self._rows(number, tokens) as token:
                self._take_patch(token)
            self._product(number + 1, "mm.1", self.act, tokens, self._gelu)
            self._product(number + 2, "mm.2", self.last, tokens, self._store_embedding)
            return
        with self._rows(number, self.num_rows) as row:
            self._norm(row, "v.post_ln", None, self._shuffled(row))
        self._product(number + 1, "mm.fc", self.last, tokens, self._store_embedding)
        assert s.shuffled % LANES == 0

    @contextmanager
    def _rows(self, number: Scalar, count: Scalar) -> Iterator[Scalar]:
        """A phase that does something with each of `count` rows."""
        k = self.k
        with (
            k.phase(self.counters, number, (count + (ROWS - 1)) // ROWS) as task,
            k.loop(task * ROWS, (task * ROWS + ROWS).minimum(count)) as row,
        ):
            yield row

    def _product(
        self, number: Scalar, name: str, x: Activations, rows: Scalar,
        use: Callable[[list[Scalar], Scalar, Scalar], None], layer: Scalar | None = None,
    ) -> None:  # fmt: skip
        """A matrix product; `use` gets sums to which the bias is added, where there is one."""
        has_bias = f"{name}.bias" in self.shape.offsets
        lanes, size = self.vectors.lanes, self.shape.matrices()[name]
        bias_at = self._at(f"{name}.bias", layer) // 4 if has_bias else None

        def use_biased(sums: list[Scalar], row: Scalar, block: Scalar) -> None:
            if bias_at is not None:
                at = bias_at + block * self.vectors.block
                bias = [self.weights["f32"].load_vector(at + t * lanes, lanes) for t in (0, 1)]
                sums = [value + bias[i % 2] for i, value in enumerate(sums)]
            use(sums, row, block)

        self._matmul(number, self._at(f"{name}.weight", layer), size, x, rows, use_biased)

    # Before the layers

    def _unfold(self, row: Scalar) -> None:
        """A patch's elements [3, p, p], as activations."""
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
        """Patches with their positions, as the residual."""
        c, lanes = self.config, self.vectors.lanes
        for value, r, feature in self._each(sums, row, block):
            position = r % c.num_patches + int(c.has_class_token)
            at = position * self.shape.hidden + feature
            place = self.weights["f32"].load_vector(self._positions + at, lanes)
            to = (r // c.num_patches * c.num_positions + position) * self.shape.hidden + feature
            self.residual.store_vector(value + place, to)

    @property
    def _positions(self) -> Scalar:
        return self._at("v.position_embd.weight") // 4

    def _store_class(self, row: Scalar) -> None:
        lanes, start = self.vectors.lanes, self._at("v.class_embd") // 4
        floats = self.weights["f32"]
        with self.k.loop(0, self.shape.hidden, lanes) as i:
            value = floats.load_vector(start + i, lanes)
            value = value + floats.load_vector(self._positions + i, lanes)
            self.residual.store_vector(value, row * self.shape.hidden + i)

    # Layers

    def _norm(
        self, row: Scalar, name: str, layer: Scalar | None, use: Callable[[Scalar, Scalar], None]
    ) -> None:
        """Layer norm of a row of the residual: use(vector, feature)."""
        k, hidden, lanes = self.k, self.config.hidden_size, self.vectors.lanes
        start, kind = row * self.shape.hidden, vector_type(lanes, "f32")
        weight, bias = (self._at(f"{name}.{part}", layer) // 4 for part in ("weight", "bias"))

        def add(i: Scalar, total: Scalar) -> list[Scalar]:
            return [total + self.residual.load_vector(start + i, lanes)]

        [totals] = k.fold(0, hidden, [k.scalar(0.0, kind)], add, lanes)
        mean = k.broadcast(k.sum(totals) / float(hidden), lanes)

        def square(i: Scalar, total: Scalar) -> list[Scalar]:
            x = self.residual.load_vector(start + i, lanes) - mean
            return [k.fma(x, x, total)]

        [squares] = k.fold(0, hidden, [k.scalar(0.0, kind)], square, lanes)
        variance = k.sum(squares) / float(hidden) + self.config.norm_eps
        inverse = k.broadcast(k.scalar(1.0, "f32") / variance.math("sqrt"), lanes)
        with k.loop(0, hidden, lanes) as i:
            x = (self.residual.load_vector(start + i, lanes) - mean) * inverse
            w, b = (self.weights["f32"].load_vector(at + i, lanes) for at in (weight, bias))
            use(k.fma(x, w, b), i)

    def _keep(self, row: Scalar) -> Callable[[Scalar, Scalar], None]:
        return lambda x, i: self.residual.store_vector(x, row * self.shape.hidden + i)

    def _as_activations(self, row: Scalar) -> Callable[[Scalar, Scalar], None]:
        return lambda x, i: self.act.store([x], row, i)

    def _store_qkv(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """As attention reads queries, which are scaled."""
        k, lanes, qkv = self.k, self.vectors.lanes, self.attention.memory.qkv
        scale, one = k.scalar(self.config.head_dim**-0.5, "f32"), k.scalar(1.0, "f32")
        for value, r, feature in self._each(sums, row, block):
            is_query = feature.less(k.scalar(self.config.hidden_size, "index"))
            value = value * k.broadcast(is_query.select(scale, one), lanes)
            qkv.store_as(value, r * self.qkv_width + feature)

    def _store_heads(self, group: Scalar) -> None:
        """Keys and values of STORED positions to their page; what is behind must not be NaN."""
        k, c = self.k, self.config
        most = k.scalar(STORED, "index")
        first = group % self.num_groups * STORED
        tile = group // self.num_groups * c.num_positions
        count = (k.scalar(c.num_positions, "index") - first).clamp(0, most)
        with k.loop(0, c.num_heads) as head:
            if self.tiled_attention:
                with k.when(count.equals(STORED)):
                    self.tiled_attention.store_tile(tile + first, first, head)
            with k.when(count.less(most)) if self.tiled_attention else nullcontext():
                with k.loop(0, count) as i:
                    self.attention.store_key_value(tile + first + i, first + i, head)
                with k.loop(count, STORED) as i:
                    self.attention.store_zero_value(tile, first + i, head)

    def _attend(self, number: Scalar) -> None:
        """Each head of some rows of a tile."""
        k, c, most = self.k, self.config, TILED_ROWS if self.tiled_attention else QUERY_ROWS
        layer, zero = k.scalar(0, "index"), k.scalar(0, "index")
        groups = -(-c.num_positions // most)
        with k.phase(self.counters, number, self.n * (groups * c.num_heads)) as task:
            # One head after the other: its keys and values stay in a core's cache
            first, tile_and_head = task % groups * most, task // groups
            head = tile_and_head % c.num_heads
            row = tile_and_head // c.num_heads * c.num_positions + first
            count = (k.scalar(c.num_positions, "index") - first).minimum(k.scalar(most, "index"))
            if self.tiled_attention:
                self.tiled_attention.attend_rows(self.workgroup, row, count, head, layer)
                return
            with k.when(count.equals(most)):
                self.attention.attend(self.workgroup, row, most, head, None, layer)
            with k.when(count.less(k.scalar(most, "index"))), k.loop(zero, count) as i:
                self.attention.attend(self.workgroup, row + i, 1, head, None, layer)

    def _add(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """To the residual."""
        for value, r, feature in self._each(sums, row, block):
            at = r * self.shape.hidden + feature
            before = self.residual.load_vector(at, self.vectors.lanes)
            self.residual.store_vector(before + value, at)

    def _activate(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        for value, r, feature in self._each(sums, row, block):
            self.hid.store([activation(value, self.config.activation, self.k.exp)], r, feature)

    # After the layers

    def _shuffled(self, row: Scalar) -> Callable[[Scalar, Scalar], None]:
        """As activations of the token that a patch becomes a part of (pixel shuffle)."""
        c = self.config
        s, across = c.scale_factor, c.patches_across
        tile, patch = row // c.num_patches, row % c.num_patches
        y, x = patch // across, patch % across
        token = tile * c.tokens_per_tile + y // s * (across // s) + x // s
        first = (y % s * s + x % s) * c.hidden_size
        return lambda value, i: self.last.store([value], token, first + i)

    def _take_patch(self, token: Scalar) -> None:
        """A patch of the residual, without the class tokens, as activations."""
        c, lanes = self.config, self.vectors.lanes
        row = token // c.num_patches * c.num_positions + token % c.num_patches + 1
        with self.k.loop(0, self.shape.hidden, lanes) as i:
            value = self.residual.load_vector(row * self.shape.hidden + i, lanes)
            self.act.store([value], token, i)

    def _gelu(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        for value, r, feature in self._each(sums, row, block):
            self.last.store([gelu(value)], r, feature)

    def _store_embedding(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        k, lanes, width = self.k, self.vectors.lanes, self.shape.text_hidden
        for value, r, feature in self._each(sums, row, block):
            count = None
            if width % self.vectors.block:
                count = (k.scalar(width, "index") - feature).clamp(0, k.scalar(lanes, "index"))
            self.out.store_vector(value, r * width + feature, count)
