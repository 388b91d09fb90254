"""Products of few rows with quantized matrices on GPUs, by dot products.

Shapes: T rows of activations [T, K]; N rows of a matrix [N, K], which are output features.

A workgroup of 256 threads multiplies a block of 16 rows of the matrix: thread t has row t % 16, and
every 16th group of 32 columns, from group t / 16 on. It unpacks a group once for all rows of
activations, which lie in local memory as f16, with the sum of each group for types with minima. At
the end 16 sums an output are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

from compile.formats.blocks import GROUP
from compile.gpu.kernel import THREADS, ThreadBuilder, dot2
from compile.gpu.norm import scale_of_row
from compile.gpu.parts import PartTile
from compile.gpu.quantized import ROWS
from compile.gpu.rows_product import RowsProduct, Work
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

SLOTS = THREADS // ROWS  # groups of columns that a workgroup multiplies at once
CHUNKS = GROUP // CHUNK  # of a group
STEPS = 28  # times SLOTS groups: columns in local memory, of all rows together


@dataclass(frozen=True)
class FewRows(RowsProduct):
    """Multiplies a quantized matrix by dot products. With a norm, `rows` is 1."""

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        work = Work(self, k)
        steps = -(-work.num_groups // SLOTS)
        chunk = min(steps, max(1, STEPS // self.rows))
        scale = None
        if self.epsilon is not None:
            scale = scale_of_row(k, work.x, self.depth, self.epsilon)
        stage = _Stage(work, k, chunk, scale)
        tile = PartTile(k, self.parts, work.quantized, ROWS, k.workgroup())

        def multiply(first: Scalar, *totals: Scalar) -> Sequence[Scalar]:
            k.barrier()
            stage.fill(first)
            k.barrier()
            unroll = next(n for n in (4, 3, 2, 1) if chunk % n == 0)

            def steps_of(matrix: QuantizedMatrix) -> list[Scalar]:
                row = tile.row + k.thread() % ROWS
                return k.fold(
                    0, chunk, totals,
                    lambda step, *sums: self._steps(
                        k, stage, (matrix, row), first, step, unroll, sums
                    ),
                    step=unroll,
                )  # fmt: skip

            return tile.choose(steps_of, ["f32"] * self.rows)

        totals = [k.scalar(0.0, "f32")] * self.rows
        totals = k.fold(0, -(-steps // chunk) * chunk * SLOTS, totals, multiply, chunk * SLOTS)
        self._finish(k, work, tile, totals)

    def _steps(
        self, k: ThreadBuilder, stage: _Stage, of: tuple[QuantizedMatrix, Scalar], first: Scalar,
        step: Scalar, unroll: int, sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """The sums, with `unroll` groups more of the thread's row of a matrix."""
        thread, sums, (matrix, row) = k.thread(), [*sums], of
        last = k.scalar(matrix.num_groups - 1, "index")
        places = [(step + i) * SLOTS + thread // ROWS for i in range(unroll)]
        loaded = [matrix.load(row, (first + place).minimum(last)) for place in places]
        for place, packed in zip(places, loaded, strict=True):
            pairs = [
                k.shuffle(codes, codes, [j, j + 1])
                for codes in matrix.codes(packed) for j in range(0, CHUNK, 2)
            ]  # fmt: skip
            numbers = matrix.numbers(packed)
            for i in range(self.rows):
                sums[i] = stage.add_products(sums[i], pairs, numbers, place, i)
        return sums

    def _finish(
        self, k: ThreadBuilder, work: Work, tile: PartTile[QuantizedMatrix],
        totals: Sequence[Scalar],
    ) -> None:  # fmt: skip
        """Add up what the threads have, and store it."""
        thread, parts = k.thread(), k.shared(self.rows * THREADS, "f32")
        for i, total in enumerate(totals):
            parts.store(total, thread + i * THREADS)
        k.barrier()
        outputs = ROWS // self.share
        row, feature = thread // outputs, thread % outputs

        def output(behind: int) -> Scalar:
            start = row * THREADS + feature + behind
            return reduce(add, [parts.load(start + i * ROWS) for i in range(SLOTS)])

        with k.when(row.less(k.scalar(self.rows, "index"))):
            self.store(k, work, tile, row, tile.place // self.share + feature, output)


class _Stage:
    """Activations of a chunk of columns in local memory, f16, with the sum of each group."""

    def __init__(
        self, work: Work, k: ThreadBuilder, chunk: int, scale: Scalar | None
    ) -> None:  # fmt: skip
        self._work, self._k, self._scale = work, k, scale
        self._groups, self._rows = chunk * SLOTS, work.product.rows
        self._x = k.shared(self._rows * self._groups * GROUP, "f16")
        self._sums: Memory | None = (
            k.shared(self._rows * self._groups, "f32") if work.has_minima else None
        )

    def fill(self, first: Scalar) -> None:
        """Load groups of all rows from `first` on, 8 columns a thread at a time. Columns beyond the
        last are 0."""
        k, end = self._k, self._rows * self._groups * CHUNKS
        for start in range(0, end, THREADS):
            unit, inside = k.thread() + start, None
            if start + THREADS > end:
                inside = unit.less(k.scalar(end, "index"))
            row, chunk = unit // (self._groups * CHUNKS), unit % (self._groups * CHUNKS)
            column = first * GROUP + chunk * CHUNK
            x = self._work.activations(self._work.token(row), column, self._scale)
            total = self._sum_of_group(x) if self._sums else None  # by all threads
            with k.when(inside) if inside else nullcontext():
                self._x.store_vector(x, unit * CHUNK)
                if self._sums and total:
                    self._sums.store(total, unit // CHUNKS)

    def _sum_of_group(self, x: Scalar) -> Scalar:
        """The sum of a group, of which four neighbours have 8 columns each."""
        k, total = self._k, self._k.scalar(0.0, "f32")
        ones = k.scalar(1.0, "vector<2xf16>")
        for j in range(0, CHUNK, 2):
            total = dot2(k, k.shuffle(x, x, [j, j + 1]), ones, total)
        return k.reduce("add", total, CHUNKS)

    def add_products(
        self, total: Scalar, pairs: Sequence[Scalar],
        numbers: tuple[Sequence[Scalar], Scalar | None], place: Scalar, row: int,
    ) -> Scalar:  # fmt: skip
        """The total plus the products of a group's weights with a row's activations.

        pairs, numbers: of the weights, see QuantizedMatrix. place: of the group in the chunk.
        """
        k, unit, (scales, minimum) = self._k, place + row * self._groups, numbers
        share = len(pairs) // len(scales)  # that one of the scales is for
        for first, scale in zip(range(0, len(pairs), share), scales, strict=True):
            dot = k.scalar(0.0, "f32")
            for i in range(first, first + share, CHUNK // 2):
                x = self._x.load_vector(unit * GROUP + 2 * i, CHUNK)
                for j in range(CHUNK // 2):
                    two = k.shuffle(x, x, [2 * j, 2 * j + 1])
                    dot = dot2(k, pairs[i + j], two, dot)
            total = k.fma(scale, dot, total)
        return k.fma(minimum, self._sums.load(unit), total) if minimum and self._sums else total
