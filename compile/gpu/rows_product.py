"""Products of few rows of activations with a matrix on GPUs: what their kernels have in common.

Shapes: T rows of activations [T, K]; N rows of a matrix [N, K], which are output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.gpu.floats import DTYPES, FloatMatrix
from compile.gpu.kernel import Kernel, Kernels, ThreadBuilder
from compile.gpu.norm import scale_of
from compile.gpu.parts import Part, Parts, PartTile, first_rows, name_of, num_tiles, total_rows
from compile.gpu.quantized import ROWS
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.activations import gated
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar


class Matrix(Protocol):
    """A matrix of which 32 columns of a row are loaded at once."""

    num_groups: int

    def load(self, row: Scalar, group: Scalar) -> Any:
        """32 columns of a row, as they lie in memory."""

    def unpack(self, packed: Any, dtype: str) -> list[Scalar]:
        """Four vectors of 8 numbers."""


@dataclass(frozen=True)
class RowsProduct(Kernel):
    """Activations [T, K] times a matrix: [T, N].

    Bindings: activations, the norm's weight [K] f32 if there is one, matrix, residual [T, N] f32 if
    there is one, result. Constant: T. Workgroups: N / `tile` of each part, T / rows.

    parts: of the matrix, of types of BLOCK_TYPES, each of them in a binding; or a single one of
    DTYPES, row by row. rows: of activations that a workgroup multiplies. epsilon: of an RMS norm of
    the activations, which are f32 then and `dtype` else. epilogue: "" for f32 results, "add" for
    the residual added, "silu" for silu(gate) * up of a matrix of one part: [T, N / 2] `dtype`. It
    has eight gates and eight ups in turn, or, of floats, all gates before all ups.
    """

    parts: Parts
    depth: int  # K, a multiple of 8
    rows: int = 1
    epsilon: float | None = None
    epilogue: str = ""

    @property
    def name(self) -> str:
        """By everything that makes it differ."""
        norm = "_norm" if self.epsilon is not None else ""
        return f"{name_of(self.parts)}x{self.depth}{norm}_{self.epilogue}_{self.rows}_rows"

    @property
    def columns(self) -> int:
        """N"""
        return total_rows(self.parts)

    @property
    def dtype(self) -> str:
        """Of activations, which are rounded, and of what the next product reads."""
        kind = self.parts[0].kind
        return kind if kind in DTYPES else "f16"

    @property
    def result(self) -> tuple[str, str]:
        """The result's dtype, and that of activations."""
        return self.dtype if self.epilogue == "silu" else "f32", self.dtype

    @property
    def features(self) -> int:
        """Of a row of the result."""
        return self.columns // self.share

    @property
    def share(self) -> int:
        """Rows of the matrix that make a feature."""
        return 2 if self.epilogue == "silu" else 1

    @property
    def tile(self) -> int:
        """Rows of the matrix of a workgroup."""
        return ROWS

    def store(
        self, k: ThreadBuilder, work: Work, tile: PartTile[Any], row: Scalar,
        place: Scalar, output: Callable[[int], Scalar],
    ) -> None:  # fmt: skip
        """Store the feature `place` of one of the workgroup's rows; output: the sum of the row of
        the matrix that is so many behind the feature's first."""
        token = k.workgroup(1) * self.rows + row
        with k.when(token.less(work.num_rows)), k.when(place.less(tile.end // self.share)):
            value = output(0)
            if self.epilogue == "silu":
                value = gated(value, output(ROWS // 2))
            work.store(value, token, place)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Each output, one after the other."""
        work = Work(self, k)
        zero = k.scalar(0.0, "f32")
        with k.loop(0, work.num_rows) as token:
            scale = None
            if self.epsilon is not None:
                [squares] = k.fold(
                    0, self.depth, [zero],
                    lambda c, total: [k.fma(x := work.x.load(token * self.depth + c), x, total)],
                )  # fmt: skip
                scale = scale_of(squares, self.depth, self.epsilon)

            def output(
                matrix: Matrix, token: Scalar, n: Scalar, scale: Scalar | None = scale
            ) -> Scalar:
                def add(group: Scalar, total: Scalar) -> list[Scalar]:
                    weights = matrix.unpack(matrix.load(n, group), "f32")
                    for i, weight in enumerate(weights):
                        x = work.activations(token, group * GROUP + i * CHUNK, scale)
                        total = k.fma(k.convert(x, "f32"), weight, total)
                    return [total]

                zeros = k.scalar(0.0, f"vector<{CHUNK}xf32>")
                return k.sum(k.fold(0, -(-self.depth // GROUP), [zeros], add)[0])

            for matrix, part, at in zip(
                work.matrices, self.parts, first_rows(self.parts), strict=True
            ):
                with k.loop(0, part.rows // self.share) as n:
                    if self.epilogue == "silu":
                        gate = n // CHUNK * ROWS + n % CHUNK
                        pair = [output(matrix, token, gate + i) for i in (0, CHUNK)]
                        work.store(gated(*pair), token, n)
                    else:
                        work.store(output(matrix, token, n), token, n + at)


def multiply(
    kernels: Kernels, product: RowsProduct, activations: Sequence[Tensor],
    matrices: Sequence[Tensor], residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of activations, after which comes their norm's weight if there is one, with a
    matrix, each part of which is a tensor."""
    num_rows = activations[0].shape[0]
    result = Tensor("", (num_rows, product.features), product.result[0])
    inputs = [*activations, *matrices, *([residual] if residual else [])]
    workgroups = num_tiles(product.parts, product.tile), kernels.tiles(num_rows, product.rows), 1
    return kernels.call(product, workgroups, [num_rows], inputs, outputs=[result])[0]


class Work:
    """What both forms of a product read and write."""

    def __init__(self, product: RowsProduct, k: ExecutableBuilder) -> None:
        self.product, self._k = product, k
        has_norm = product.epsilon is not None
        self.x = k.view(k.binding(read_only=True), "f32" if has_norm else product.dtype)
        self.norm = k.view(k.binding(read_only=True), "f32") if has_norm else None
        self.matrices: list[Matrix] = [self._matrix(k, part) for part in product.parts]
        self.quantized = [m for m in self.matrices if isinstance(m, QuantizedMatrix)]
        self.floats = [m for m in self.matrices if isinstance(m, FloatMatrix)]
        self.num_groups = max(matrix.num_groups for matrix in self.matrices)
        self.has_minima = any(matrix.kind.has_minima for matrix in self.quantized)
        has_residual = product.epilogue == "add"
        self._residual = k.view(k.binding(read_only=True), "f32") if has_residual else None
        self._out = k.view(k.binding(), product.result[0])
        self.num_rows = k.constant()

    def _matrix(self, k: ExecutableBuilder, part: Part) -> Matrix:
        depth, is_gated = self.product.depth, self.product.epilogue == "silu"
        if part.kind in DTYPES:
            return FloatMatrix(k, part.kind, part.rows, depth, is_gated=is_gated)
        return QuantizedMatrix(k, BLOCK_TYPES[part.kind], depth)

    def token(self, row: Scalar) -> Scalar:
        """The row of all that a workgroup's row is, or the last."""
        k = self._k
        return (k.workgroup(1) * self.product.rows + row).minimum(self.num_rows - 1)

    def activations(self, token: Scalar, column: Scalar, scale: Scalar | None) -> Scalar:
        """A vector of CHUNK activations, after the norm, which multiplies the row with `scale` and
        its weight; columns beyond the last are 0."""
        k, depth = self._k, self.product.depth
        inside = column.less(k.scalar(depth, "index"))
        column = column.minimum(k.scalar(depth - CHUNK, "index"))
        x = self.x.load_vector(token * depth + column, CHUNK)
        x = inside.select(x, k.scalar(0.0, x.dtype))
        if self.norm is None or scale is None:
            return x
        x = x * k.broadcast(scale, CHUNK) * self.norm.load_vector(column, CHUNK)
        return k.convert(x, self.product.dtype)

    def store(self, value: Scalar, token: Scalar, feature: Scalar) -> None:
        """Store an output, with the residual."""
        at = token * self.product.features + feature
        if self._residual:
            value = value + self._residual.load(at)
        self._out.store(value.to(self._out.dtype), at)
