"""Products of one row with a matrix of 16-bit floats on GPUs, by dot products.

Shapes: a row of activations [1, K]; a matrix [N, K], row by row, whose rows are output features.

A workgroup of 256 threads multiplies 16 rows of the matrix: 32 threads two of them, 16 bytes of
both at a time, which are a gate and its up if there are gates. The activations lie in local memory,
after their norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from compile.gpu.kernel import THREADS, ThreadBuilder, dot2
from compile.gpu.norm import scale_of_row
from compile.gpu.parts import PartTile
from compile.gpu.quantized import ROWS
from compile.gpu.rows_product import RowsProduct, Work
from compile.gpu.unpack import CHUNK
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

LANES = 32  # threads of two rows of the matrix
STEP = LANES * CHUNK
BEHIND = 0, ROWS // 2  # where a thread's rows are, from the first of them
MAX_DEPTH = 28672  # activations that local memory has room for


@dataclass(frozen=True)
class OneRow(RowsProduct):
    """Multiplies one row with a matrix of floats."""

    @property
    def name(self) -> str:
        """By everything that makes it differ."""
        return f"row_{super().name}"

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        work = Work(self, k)
        tile = PartTile(k, self.parts, work.floats, ROWS, k.workgroup())
        [matrix], steps = work.floats, -(-self.depth // STEP)
        x = self._activations(k, work, steps)
        n, lane = k.thread() // LANES, k.thread() % LANES
        unroll = next(i for i in (4, 3, 2, 1) if steps % i == 0)

        def multiply(start: Scalar, *sums: Scalar) -> list[Scalar]:
            columns = [start + (i * STEP) + lane * CHUNK for i in range(unroll)]
            loaded = [[matrix.load_chunk(tile.row + n + i, c) for i in BEHIND] for c in columns]
            for column, weights in zip(columns, loaded, strict=True):
                values = x.load_vector(column, CHUNK)
                sums = tuple(
                    self._add(k, total, values, w) for total, w in zip(sums, weights, strict=True)
                )
            return [*sums]

        zero = k.scalar(0.0, "f32")
        sums = k.fold(0, steps * STEP, [zero, zero], multiply, step=unroll * STEP)
        found = {i: k.reduce("add", total, LANES) for i, total in zip(BEHIND, sums, strict=True)}
        place, row = tile.place // self.share + n, k.scalar(0, "index")
        with k.when(lane.equals(0)):
            for i in BEHIND[:1] if self.epilogue == "silu" else BEHIND:

                def output(behind: int, i: int = i) -> Scalar:
                    return found[i + behind]

                self.store(k, work, tile, row, place + i, output)

    def _activations(self, k: ThreadBuilder, work: Work, steps: int) -> Memory:
        """The row in local memory, zeros behind its last column."""
        scale, first = None, k.scalar(0, "index")
        if self.epsilon is not None:
            scale = scale_of_row(k, work.x, self.depth, self.epsilon)
        x = k.shared(steps * STEP, self.dtype)
        for start in range(0, steps * LANES, THREADS):
            unit = k.thread() + start
            with k.when(unit.less(k.scalar(steps * LANES, "index"))):
                x.store_vector(work.activations(first, unit * CHUNK, scale), unit * CHUNK)
        k.barrier()
        return x

    def _add(self, k: ThreadBuilder, total: Scalar, x: Scalar, weights: Scalar) -> Scalar:
        """The total and the products of two vectors."""
        if self.dtype == "f16":
            for i in range(0, CHUNK, 2):
                a, b = (k.shuffle(v, v, [i, i + 1]) for v in (x, weights))
                total = dot2(k, a, b, total)
            return total
        x, weights = (k.convert(v, "f32") for v in (x, weights))
        for i in range(CHUNK):
            total = k.fma(k.element(x, i), k.element(weights, i), total)
        return total
