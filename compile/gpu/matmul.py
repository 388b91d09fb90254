"""Products of many rows with a matrix on GPUs, by matrix instructions: the kernel of prefill.

Shapes: T rows of activations [T, K] f16, which are tokens; N rows of a matrix [N, K], which are
output features. `compile.gpu.tiles` computes the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.gpu.kernel import Kernel, Kernels, ThreadBuilder
from compile.gpu.parts import Parts, PartTile, first_rows, name_of, num_tiles, total_rows
from compile.gpu.tiles import (
    BLOCKS,
    SIDE,
    TILE,
    Floats,
    Instruction,
    Multiplication,
    Source,
    Tile,
    Weights,
    part,
)
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.activations import gated
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder, Memory
from compile.mlir.values import Scalar

CHUNKS = range(0, GROUP, CHUNK)  # where chunks of a group begin
Matrix = Memory | QuantizedMatrix


@dataclass(frozen=True)
class Product(Kernel):
    """Activations [T, K] f16 times a matrix [N, K], and what follows it.

    Bindings: activations, each part of the matrix, residual if there is one, result. Constants: T,
    and the columns of the activations, which LLVM must not know: it would unroll loops of three or
    four steps, and not end. Workgroups: those of T, those of N of each part.
    """

    tile: Tile
    parts: Parts  # of the matrix: one "f16" of rows of numbers, or types of BLOCK_TYPES
    depth: int  # K, a multiple of 32
    ending: str = ""  # "add" a residual [T, N] f32, or "gate": the result is [T, N / 2] f16

    @property
    def name(self) -> str:
        """By all that it is, but for the chip."""
        return "_".join(
            filter(None, ["multiply", f"{name_of(self.parts)}x{self.depth}", self.ending])
        )

    @property
    def columns(self) -> int:
        """N"""
        return total_rows(self.parts)

    @property
    def threads(self) -> int:
        """Of a workgroup: those of four waves."""
        return self.tile.threads

    @property
    def width(self) -> int:
        """Columns of the activations: K, and as many zeros as fill the last step."""
        return -(-self.depth // self.tile.depth) * self.tile.depth

    @property
    def is_gated(self) -> bool:
        """Whether each row of gates, in eights, is followed by one of ups."""
        return self.ending == "gate"

    @property
    def result(self) -> tuple[str, str]:
        """f32; quantized weights are rounded to f16, and so is what is gated."""
        return ("f16" if self.is_gated else "f32"), ("f32" if self._is_exact else "f16")

    @property
    def _is_exact(self) -> bool:
        return self.parts[0].kind == "f16" and not self.is_gated

    def _views(self, k: ExecutableBuilder) -> tuple[Memory, list[Matrix], Memory | None, Memory]:
        """Activations, matrices, residual and result."""
        lhs = k.view(k.binding(read_only=True), "f16")
        matrices = [self._matrix(k, part.kind) for part in self.parts]
        residual = k.view(k.binding(read_only=True), "f32") if self.ending == "add" else None
        return lhs, matrices, residual, k.view(k.binding(), self.result[0])

    def _matrix(self, k: ExecutableBuilder, kind: str) -> Matrix:
        if kind == "f16":
            return k.view(k.binding(read_only=True), "f16")
        return QuantizedMatrix(k, BLOCK_TYPES[kind], self.depth)

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        lhs, matrices, residual, result = self._views(k)
        num_rows, width = k.constant(), k.constant()
        row = k.workgroup() * TILE
        tile = PartTile(k, self.parts, matrices, TILE, k.workgroup(1))
        activations = Floats(k, self.tile, lhs, self.width, row, num_rows - 1)
        multiplication = Multiplication(k, self.tile)
        sums = tile.choose(
            lambda matrix: multiplication.run((activations, self._weights(k, matrix, tile)), width),
            multiplication.dtypes,
        )
        outputs = Outputs(k, sums, row, tile, num_rows, self.parts)
        if self.is_gated:
            outputs.store_gated(result)
        else:
            outputs.store(residual, result)

    def _weights(self, k: ThreadBuilder, matrix: Matrix, tile: PartTile[Matrix]) -> Source:
        if isinstance(matrix, Memory):
            assert self.width == self.depth and not self.is_gated
            return Floats(k, self.tile, matrix, self.depth, tile.row, tile.last)
        sizes = self.depth, self.width
        return Weights(k, self.tile, matrix, tile.row, tile.last, sizes, self.is_gated)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Each output, one after the other."""
        lhs, matrices, residual, result = self._views(k)
        share = 2 if self.is_gated else 1
        width = self.columns // share
        num_rows, _ = k.constant(), k.constant()
        for rows, matrix, first in zip(self.parts, matrices, first_rows(self.parts), strict=True):
            with k.loop(0, num_rows) as row, k.loop(0, rows.rows // share) as column:
                at = row * width + (column + first)
                if self.is_gated:
                    gate_row = column // 8 * 16 + column % 8
                    gate, up = (self._output(k, lhs, matrix, row, gate_row + i) for i in (0, 8))
                    result.store(gated(gate, up).to("f16"), at)
                else:
                    total = self._output(k, lhs, matrix, row, column)
                    result.store(total + residual.load(at) if residual else total, at)

    def _output(
        self, k: ExecutableBuilder, lhs: Memory, matrix: Matrix, row: Scalar, column: Scalar
    ) -> Scalar:
        """One output, in plain loops."""

        def add(i: Scalar, sums: Scalar) -> list[Scalar]:
            if isinstance(matrix, Memory):
                start = column * self.depth + i
                weights = [matrix.load_vector(start + j, CHUNK) for j in CHUNKS]
            else:
                weights = matrix.unpack(matrix.load(column, i // GROUP))
            for j, weight in zip(CHUNKS, weights, strict=True):
                x = k.convert(lhs.load_vector(row * self.width + i + j, CHUNK), "f32")
                sums = k.fma(x, k.convert(weight, "f32"), sums)
            return [sums]

        zero = k.scalar(0.0, f"vector<{CHUNK}xf32>")
        return k.sum(k.fold(0, self.depth, [zero], add, step=GROUP)[0])


class Outputs:
    """What becomes of a tile's sums. Rows and columns beyond the last are not stored."""

    def __init__(
        self, k: ThreadBuilder, sums: Sequence[Scalar], row: Scalar, tile: PartTile[Matrix],
        num_rows: Scalar, parts: Parts,
    ) -> None:  # fmt: skip
        self._k, self._sums, column, self._end = k, sums, tile.place, tile.end
        self._is_whole = all(part.rows % TILE == 0 for part in parts)
        self._num_rows, self._num_columns = num_rows, total_rows(parts)
        self._count = Instruction.of(k.chip).sums
        part_row, part_column, lane = part(k)
        row, self._first, self._lane = row + part_row, column + part_column, lane % SIDE
        self._rows = [row + Instruction.of(k.chip).row(lane, n) for n in range(self._count)]

    def store(self, residual: Memory | None, result: Memory) -> None:
        """The sums, plus a residual. It is loaded without a branch, so that loads do not wait for
        each other: beyond the last row and column, these stand in."""
        columns = [self._first + self._lane + j * SIDE for j in range(BLOCKS)]
        for i in range(BLOCKS):
            values = [[self._sum(i, j, n) for j in range(BLOCKS)] for n in range(self._count)]
            if residual:
                inside = [column.minimum(self._num_columns - 1) for column in columns]
                for row, of_row in zip(self._rows, values, strict=True):
                    at = (row + i * SIDE).minimum(self._num_rows - 1) * self._num_columns
                    of_row[:] = [
                        v + residual.load(at + c) for v, c in zip(of_row, inside, strict=True)
                    ]
            self._put(i, values, columns, 1, result)

    def store_gated(self, result: Memory) -> None:
        """silu(gate) * up, as f16: of two neighbouring blocks of columns, gates and ups."""
        first = self._first // 2 + self._lane
        columns = [first + j * SIDE for j in range(BLOCKS // 2)]
        for i in range(BLOCKS):
            values = [
                [
                    gated(self._sum(i, j, n), self._sum(i, j + 1, n)).to("f16")
                    for j in range(0, BLOCKS, 2)
                ]
                for n in range(self._count)
            ]
            self._put(i, values, columns, 2, result)

    def _sum(self, i: int, j: int, n: int) -> Scalar:
        return self._k.element(self._sums[i * BLOCKS + j], n)

    def _put(
        self, i: int, values: Sequence[Sequence[Scalar]], columns: Sequence[Scalar], share: int,
        result: Memory,
    ) -> None:  # fmt: skip
        """Store what a lane has of rows of instructions: of each row, in these columns.

        share: how many rows of the matrix make a column of the result.
        """
        k, width, end = self._k, self._num_columns // share, self._end // share
        for row, of_row in zip(self._rows, values, strict=True):
            at_row = row + i * SIDE
            with k.when(at_row.less(self._num_rows)):
                for column, value in zip(columns, of_row, strict=True):
                    with nullcontext() if self._is_whole else k.when(column.less(end)):
                        result.store(value, at_row * width + column)


def multiply(
    kernels: Kernels, product: Product, lhs: Tensor, matrices: Sequence[Tensor],
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run a product: [T, N] f32, or gated [T, N / 2] f16, of lhs [T, width] f16 and the parts of a
    matrix [N, K] f16, or of any shape if packed; residual: [T, N] f32, to be added."""
    tiles = kernels.tiles(lhs.shape[0], TILE), num_tiles(product.parts, TILE), 1
    inputs = [lhs, *matrices, *([residual] if residual else [])]
    width = product.columns // (2 if product.is_gated else 1)
    result = Tensor("", (lhs.shape[0], width), product.result[0])
    return kernels.call(product, tiles, [lhs.shape[0], product.width], inputs, outputs=[result])[0]
