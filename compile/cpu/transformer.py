"""TransformerKernel: what the kernels of a language model and of a vision tower share.

That is the phases of a layer (norms, products with a layer's matrices, residual additions), memory
for attention, and how a kernel begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, pairwise, takewhile

from compile.cpu.activations import Activations
from compile.cpu.amx import LINES, PANEL, Scratch, TileRegisters
from compile.cpu.attention import Attention, AttentionMemory
from compile.cpu.attention_amx import AmxAttention
from compile.cpu.attention_vector import VectorAttention
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import Matrix, MatrixKernel, Part, Use, padded
from compile.cpu.phases import Phases, PhaseTable
from compile.mlir.builder import Builder, Tensor
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type

ROWS_PER_TASK = 8  # of phases that multiply no matrix


class TransformerKernel(MatrixKernel):
    """A kernel of layers; a subclass binds the memory that is declared here.

    residual: f32 [rows, hidden]. act: activations of the hidden features, or of all heads. mlp_act:
    activations inside the MLP.

    layers: the format of most matrices. features, hidden: of a row of the residual, without and
    with padding. eps: of norms. offsets: of parameters in `weights`, in bytes. matrices: sizes
    [out, in] by name; matrices of layers have the names of those in layer 0. layer_parts: how
    those of each layer are stored; others are whole, in the format of most.
    """

    residual: Memory
    act: Activations
    mlp_act: Activations
    attention: Attention

    def __init__(
        self, name: str, layers: Format, features: int, hidden: int, eps: float,
        offsets: Mapping[str, int], matrices: Mapping[str, tuple[int, int]], phases: PhaseTable,
        layer_parts: Mapping[str, Sequence[Sequence[Part]]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, layers)
        self._layer_parts = layer_parts or {}
        self.features, self.hidden, self.eps = features, hidden, eps
        self.offsets, self.matrices, self.phases = offsets, matrices, phases

    def new_counters(self, b: Builder) -> Tensor:
        """Counters of the phases for one call, all zero."""
        zero, size = b.scalar(0, "i32"), self.phases.num_counters
        text = f"flow.tensor.splat {zero.name} : tensor<{size}xi32>"
        return b.tensor(text, (size,), "i32")

    # Memory

    def bind_amx(self) -> TileRegisters | None:
        """Set `amx` if it is used, and return it."""
        if self.layers.uses_amx:
            self.amx = TileRegisters(self.k, self._scratch)
        return self.amx

    @property
    def _scratch(self) -> Scratch:
        if not self.layers.expands:
            return Scratch()
        widest = max(cols for _, cols in self.matrices.values())
        return Scratch(padded(self.vectors.tuning.row_chunk, LINES), min(PANEL, widest))

    def bind_attention(
        self, layout: KVLayout, memory: AttentionMemory, position: Callable[[Scalar], Scalar],
        page: Callable[[Scalar, Scalar], Scalar],
    ) -> None:  # fmt: skip
        """Set `attention`: with AMX where the layout fits, except in decode, of single rows."""
        uses_amx = memory.amx and not memory.splits and AmxAttention.fits(layout)
        kind = AmxAttention if uses_amx else VectorAttention
        self.attention = kind(self.k, layout, self.vectors, memory, position, page)

    def weight_at(self, name: str, layer: Scalar | None = None) -> Scalar:
        """The byte where a parameter begins: of `layer`, given its name in layer 0."""
        if layer is None or "blk.0." not in name:
            return self.k.scalar(self.offsets[name], "index")
        names = (name.replace("blk.0.", f"blk.{i}.") for i in count())
        offsets = [self.offsets[n] for n in takewhile(self.offsets.__contains__, names)]
        steps = {after - before for before, after in pairwise(offsets)}
        if len(steps) > 1:  # as layers differ in size
            return self.k.table(offsets).load(layer).to("index")
        start = self.k.scalar(self.offsets[name], "index")
        return layer * steps.pop() + start if steps else start

    # Phases

    @contextmanager
    def unless_done(self) -> Iterator[None]:
        """The kernel's body, which a workgroup skips that starts after the others have finished."""
        num_exits = self.counters.load(self.phases.exit_counter)
        with self.k.when(num_exits.less(self.k.scalar(1, "i32"))):
            yield

    def exit(self, phases: Phases) -> None:
        """The end of the body: a phase that tells later workgroups that all is done."""
        with self.phase(phases["exit"], self.k.scalar(1, "index")):
            pass
        if self.amx:
            self.amx.release()

    @contextmanager
    def rows_phase(
        self, number: Scalar, count: Scalar, rows: int = ROWS_PER_TASK
    ) -> Iterator[Scalar]:
        """Phase `number`, whose tasks are `rows` of `count` rows each; yields each row."""
        with self.phase(number, (count + (rows - 1)) // rows) as task:
            low = task * rows
            with self.k.loop(low, (low + rows).minimum(count)) as row:
                yield row

    def linear(
        self, number: Scalar, name: str, x: Activations, rows: Scalar, use: Use,
        layer: Scalar | None = None,
    ) -> None:  # fmt: skip
        """Phase `number`: rows of x times the matrix `name`, plus its bias if it has one."""
        has_bias = f"{name}.bias" in self.offsets
        lanes = self.vectors.lanes
        bias_at = self.weight_at(f"{name}.bias", layer) // 4 if has_bias else None

        def use_biased(sums: list[Scalar], row: Scalar, block: Scalar) -> None:
            if bias_at is not None:
                at = bias_at + block * self.vectors.block
                bias = [self.weights["f32"].load_vector(at + t * lanes, lanes) for t in (0, 1)]
                sums = [value + bias[i % 2] for i, value in enumerate(sums)]
            use(sums, row, block)

        self.matmul(number, self._matrix(name, layer), x, rows, use_biased)

    def _matrix(self, name: str, layer: Scalar | None) -> Matrix:
        size = self.matrices[name]
        layers = self._layer_parts.get(name, [[Part(f"{name}.weight", self.layers, 0)]])
        formats = list(dict.fromkeys(part.format for parts in layers for part in parts))
        if layer is None or len(formats) == 1:
            return Matrix.whole(size, formats[0], self.weight_at(layers[0][0].name, layer))
        stored = [part for parts in layers for part in parts]
        starts = [self.offsets[p.name] - p.first * p.format.block_bytes(size[1]) for p in stored]
        bounds = [part.first for part in layers[0][1:]]

        def find(block: Scalar) -> tuple[Scalar, Scalar]:
            part = layer * len(layers[0])
            for bound in bounds:
                part = part + (block // bound).minimum(1)
            which = self.k.table([formats.index(p.format) for p in stored]).load(part)
            return self.k.table(starts).load(part).to("index"), which

        return Matrix(size, formats, find, bounds)

    # Of rows of the residual

    def rms_norm(self, row: Scalar, weight: Scalar, act: Activations, to: Scalar) -> None:
        """RMS norm of a row of the residual, into row `to` of `act`; weight: its first byte."""
        k, lanes = self.k, self.vectors.lanes
        start, weight = row * self.hidden, weight // 4

        def square(i: Scalar, total: Scalar) -> list[Scalar]:
            x = self.residual.load_vector(start + i, lanes)
            return [k.fma(x, x, total)]

        zero = k.scalar(0.0, vector_type(lanes, "f32"))
        [squares] = k.fold(0, self.hidden, [zero], square, lanes)
        mean = k.sum(squares) / self.features + self.eps
        inverse = k.broadcast(k.scalar(1.0, "f32") / mean.math("sqrt"), lanes)
        with k.loop(0, self.hidden, act.step) as i:
            values = []
            for j in range(0, act.step, lanes):
                x = self.residual.load_vector(start + i + j, lanes) * inverse
                values.append(x * self.weights["f32"].load_vector(weight + i + j, lanes))
            act.store(values, to, i)

    def layer_norm(
        self, row: Scalar, name: str, layer: Scalar | None, use: Callable[[Scalar, Scalar], None]
    ) -> None:
        """Layer norm `name` of a row of the residual: use(vector, first feature)."""
        k, size, lanes = self.k, self.features, self.vectors.lanes
        start, kind = row * self.hidden, vector_type(lanes, "f32")
        weight, bias = (self.weight_at(f"{name}.{part}", layer) // 4 for part in ("weight", "bias"))

        def add(i: Scalar, total: Scalar) -> list[Scalar]:
            return [total + self.residual.load_vector(start + i, lanes)]

        [totals] = k.fold(0, size, [k.scalar(0.0, kind)], add, lanes)
        mean = k.broadcast(k.sum(totals) / float(size), lanes)

        def square(i: Scalar, total: Scalar) -> list[Scalar]:
            x = self.residual.load_vector(start + i, lanes) - mean
            return [k.fma(x, x, total)]

        [squares] = k.fold(0, size, [k.scalar(0.0, kind)], square, lanes)
        variance = k.sum(squares) / float(size) + self.eps
        inverse = k.broadcast(k.scalar(1.0, "f32") / variance.math("sqrt"), lanes)
        with k.loop(0, size, lanes) as i:
            x = (self.residual.load_vector(start + i, lanes) - mean) * inverse
            w, b = (self.weights["f32"].load_vector(at + i, lanes) for at in (weight, bias))
            use(k.fma(x, w, b), i)

    # What becomes of products

    def add_to_residual(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        """Add outputs of hidden features to the residual."""
        for value, r, feature in self.each(sums, row, block):
            at = r * self.hidden + feature
            before = self.residual.load_vector(at, self.vectors.lanes)
            self.residual.store_vector(before + value, at)

    def num_valid(self, feature: Scalar, width: int) -> Scalar | None:
        """Lanes of a vector from `feature` on that lie below `width`; None if all always do."""
        if width % self.vectors.block == 0:
            return None
        k, lanes = self.k, self.vectors.lanes
        return (k.scalar(width, "index") - feature).clamp(0, k.scalar(lanes, "index"))
