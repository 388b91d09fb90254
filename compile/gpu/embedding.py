"""Rows of a quantized table on GPUs: the embedding of tokens.

Shapes: T tokens; a table of V rows and H columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.gpu.kernel import THREADS, Kernel, ThreadBuilder
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar


@dataclass(frozen=True)
class Embedding(Kernel):
    """Rows of a table [V, H] of a type of BLOCK_TYPES for tokens [T] i64: [T, H] f32, exact.

    Bindings: tokens, table, result. Constant: T. Workgroups: T. Tokens below 0 read the first row.
    """

    kind: str
    rows: int  # V
    columns: int  # H, a multiple of 8

    @property
    def name(self) -> str:
        """By its type and sizes."""
        return f"embedding_{self.kind}_{self.rows}x{self.columns}"

    @property
    def result(self) -> tuple[str, str]:
        """A weight is the same f32 number everywhere."""
        return "f32", ""

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        self._write(k, k.workgroup(), k.thread(), THREADS)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Row after row."""
        self._write(k, None, k.scalar(0, "index"), 1)

    def _write(
        self, k: ExecutableBuilder, token: Scalar | None, first: Scalar, step: int
    ) -> None:  # fmt: skip
        """Every `step`th group of columns from `first` on; of all tokens, if none is given."""
        tokens = k.view(k.binding(read_only=True), "i64")
        table = QuantizedMatrix(k, BLOCK_TYPES[self.kind], self.columns)
        result, count = k.view(k.binding(), "f32"), k.constant()
        start, end = (k.scalar(0, "index"), count) if token is None else (token, token + 1)
        last, width = k.scalar(self.rows - 1, "index"), k.scalar(self.columns, "index")
        with k.loop(start, end) as t:
            row = tokens.load(t).to("index").clamp(0, last)
            with k.loop(first, table.num_groups, step) as group:
                for i, weights in enumerate(table.unpack(table.load(row, group), "f32")):
                    column = group * GROUP + i * CHUNK
                    with k.when(column.less(width)):
                        result.store_vector(weights, t * self.columns + column)
