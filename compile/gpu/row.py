"""Products of one row with a matrix of 16-bit floats on GPUs.

Shapes: a row of activations [1, K]; a matrix [N, K], row by row, whose rows are output features.

A workgroup of 256 threads multiplies 16 rows of the matrix: 32 threads two rows each, 16 bytes of
both at a time. The activations lie in local memory, after their norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.gpu.kernel import THREADS, Kernel, Kernels, ThreadBuilder, dot2
from compile.gpu.norm import scale_of, scale_of_row
from compile.mlir.activations import gated
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar

LANES = 32  # threads of two rows of the matrix
PIECE = 8  # numbers that are loaded at once: K is a multiple
STEP = LANES * PIECE
MAX_DEPTH = 28672  # activations that local memory has room for


@dataclass(frozen=True)
class OneRow(Kernel):
    """Activations [1, K] times a matrix [N, K] of `dtype`: [1, N].

    Bindings: activations, the norm's weight [K] f32 if there is one, matrix, residual [1, N] f32 if
    there is one, result. Workgroups: outputs / 16, or with "silu" / 8.

    epsilon: of an RMS norm of the activations, which are f32 then and `dtype` else. epilogue: ""
    for f32 results, "add" for the residual added, "silu" for silu(gate) * up of a matrix of N / 2
    gates, then as many ups: [1, N / 2] of `dtype`.
    """

    dtype: str
    columns: int  # N
    depth: int  # K
    epsilon: float | None = None
    epilogue: str = ""

    @property
    def name(self) -> str:
        """By everything that makes it differ."""
        norm = "_norm" if self.epsilon is not None else ""
        return f"row_{self.dtype}{norm}_{self.columns}x{self.depth}_{self.epilogue}"

    @property
    def result(self) -> tuple[str, str]:
        """Activations are rounded to the matrix's type."""
        return self.dtype if self.epilogue == "silu" else "f32", self.dtype

    @property
    def features(self) -> int:
        """Of the result."""
        return self.columns // 2 if self.epilogue == "silu" else self.columns

    @property
    def pairs(self) -> int:
        """Of rows of the matrix that the same threads multiply."""
        return -(-self.columns // 2)

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        work, steps = _Work(self, k), -(-self.depth // STEP)
        lane, scale = k.thread() % LANES, None
        if self.epsilon is not None:
            scale = scale_of_row(k, work.x, self.depth, self.epsilon)
        x = k.shared(steps * STEP, self.dtype)
        for first in range(0, steps * LANES, THREADS):
            unit = k.thread() + first
            with k.when(unit.less(k.scalar(steps * LANES, "index"))):
                x.store_vector(work.activations(unit * PIECE, scale), unit * PIECE)
        k.barrier()
        pair = k.workgroup() * (THREADS // LANES) + k.thread() // LANES
        last = k.scalar(self.columns - 1, "index")
        rows = [row.minimum(last) for row in work.rows(pair)]
        unroll = next(n for n in (4, 3, 2, 1) if steps % n == 0)

        def multiply(start: Scalar, *sums: Scalar) -> list[Scalar]:
            columns = [start + (i * STEP) + lane * PIECE for i in range(unroll)]
            loaded = [[work.weights(row, column) for row in rows] for column in columns]
            for column, weights in zip(columns, loaded, strict=True):
                values = x.load_vector(column, PIECE)
                sums = tuple(
                    self._add(k, total, values, w) for total, w in zip(sums, weights, strict=True)
                )
            return [*sums]

        zero = k.scalar(0.0, "f32")
        sums = k.fold(0, steps * STEP, [zero, zero], multiply, step=unroll * STEP)
        sums = [k.reduce("add", total, LANES) for total in sums]
        with k.when(lane.equals(0)):
            work.finish(pair, sums)

    def _add(self, k: ThreadBuilder, total: Scalar, x: Scalar, weights: Scalar) -> Scalar:
        """The total and the products of two vectors."""
        if self.dtype == "f16":
            for i in range(0, PIECE, 2):
                a, b = (k.shuffle(v, v, [i, i + 1]) for v in (x, weights))
                total = dot2(k, a, b, total)
            return total
        x, weights = (k.convert(v, "f32") for v in (x, weights))
        for i in range(PIECE):
            total = k.fma(k.element(x, i), k.element(weights, i), total)
        return total

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Each pair of outputs, one after the other."""
        work, zero = _Work(self, k), k.scalar(0.0, "f32")
        scale = None
        if self.epsilon is not None:
            [squares] = k.fold(
                0, self.depth, [zero],
                lambda column, total: [k.fma(x := work.x.load(column), x, total)],
            )  # fmt: skip
            scale = scale_of(squares, self.depth, self.epsilon)
        last = k.scalar(self.columns - 1, "index")
        with k.loop(0, self.pairs) as pair:
            rows = [row.minimum(last) for row in work.rows(pair)]

            def multiply(column: Scalar, *sums: Scalar) -> list[Scalar]:
                x = k.convert(work.activations(column, scale), "f32")
                return [
                    k.sum(x * k.convert(work.weights(row, column), "f32"), total)
                    for row, total in zip(rows, sums, strict=True)
                ]

            work.finish(pair, k.fold(0, self.depth, [zero, zero], multiply, step=PIECE))


class _Work:
    """What both forms of a product read and write."""

    def __init__(self, product: OneRow, k: ExecutableBuilder) -> None:
        self._product, self._k = product, k
        has_norm = product.epsilon is not None
        self.x = k.view(k.binding(read_only=True), "f32" if has_norm else product.dtype)
        self._norm = k.view(k.binding(read_only=True), "f32") if has_norm else None
        self._matrix = k.view(k.binding(read_only=True), product.dtype)
        has_residual = product.epilogue == "add"
        self._residual = k.view(k.binding(read_only=True), "f32") if has_residual else None
        self._out = k.view(k.binding(), product.result[0])

    def activations(self, column: Scalar, scale: Scalar | None) -> Scalar:
        """PIECE activations from a column on, after the norm, which multiplies the row with `scale`
        and its weight; beyond the last column zeros."""
        k, product = self._k, self._product
        inside = column.less(k.scalar(product.depth, "index"))
        column = column.minimum(product.depth - PIECE)
        x = self.x.load_vector(column, PIECE)
        x = inside.select(x, k.scalar(0.0, x.dtype))
        if self._norm is None or scale is None:
            return x
        x = x * k.broadcast(scale, PIECE) * self._norm.load_vector(column, PIECE)
        return k.convert(x, product.dtype)

    def rows(self, pair: Scalar) -> tuple[Scalar, Scalar]:
        """The rows of the matrix of a pair."""
        if self._product.epilogue == "silu":
            return pair, pair + self._product.features
        return pair * 2, pair * 2 + 1

    def weights(self, row: Scalar, column: Scalar) -> Scalar:
        """PIECE weights of a row, which beyond the last column are any."""
        depth = self._product.depth
        return self._matrix.load_vector(row * depth + column.minimum(depth - PIECE), PIECE)

    def finish(self, pair: Scalar, sums: Sequence[Scalar]) -> None:
        """Store what a pair gives, as far as there are such outputs."""
        k, out, features = self._k, self._out, self._k.scalar(self._product.features, "index")
        if self._product.epilogue == "silu":
            gate, up = sums
            with k.when(pair.less(features)):
                out.store(gated(gate, up).to(out.dtype), pair)
            return
        for row, total in zip(self.rows(pair), sums, strict=True):
            with k.when(row.less(features)):
                value = total + self._residual.load(row) if self._residual else total
                out.store(value, row)


def multiply(
    kernels: Kernels, product: OneRow, activations: Sequence[Tensor], matrix: Tensor,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of activations, after which comes their norm's weight if there is one."""
    result = Tensor("", (1, product.features), product.result[0])
    inputs = [*activations, matrix, *([residual] if residual else [])]
    workgroups = -(-product.pairs // (THREADS // LANES)), 1, 1
    return kernels.call(product, workgroups, [], inputs, outputs=[result])[0]
