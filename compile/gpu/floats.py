"""Matrices of 16-bit floats on GPUs, row by row, which are read as quantized ones are."""

from __future__ import annotations

from collections.abc import Sequence

from compile.formats.blocks import GROUP
from compile.gpu.quantized import ROWS
from compile.gpu.unpack import CHUNK
from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar

DTYPES = ("f16", "bf16")


class FloatMatrix:
    """A matrix [N, K] of `dtype` in a kernel's next binding; K is a multiple of 8.

    is_gated: it has N / 2 gates, then as many ups, but its rows are numbered as eight gates and the
    eight ups that they are multiplied with in turn.
    """

    def __init__(
        self, k: ExecutableBuilder, dtype: str, rows: int, columns: int, *, is_gated: bool
    ) -> None:
        self._k, self._rows, self._columns, self._is_gated = k, rows, columns, is_gated
        self.num_groups = -(-columns // GROUP)
        self._numbers = k.view(k.binding(read_only=True), dtype)

    def load(self, row: Scalar, group: Scalar) -> list[Scalar]:
        """32 columns of a row: four vectors of 8."""
        return [self.load_chunk(row, group * GROUP + i) for i in range(0, GROUP, CHUNK)]

    def load_chunk(self, row: Scalar, column: Scalar) -> Scalar:
        """8 columns of a row from `column` on. Others stand in for those behind the last row or
        column."""
        half = ROWS // 2
        if self._is_gated:
            row = row // ROWS * half + row % half + row // half % 2 * (self._rows // 2)
        start = row.minimum(self._rows - 1) * self._columns
        return self._numbers.load_vector(start + column.minimum(self._columns - CHUNK), CHUNK)

    def unpack(self, packed: Sequence[Scalar], dtype: str) -> list[Scalar]:
        """What was loaded, in another type or its own."""
        return [self._k.convert(x, dtype) for x in packed]
