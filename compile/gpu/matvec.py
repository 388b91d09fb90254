"""Products of few rows with quantized matrices on GPUs: the kernels of decode.

Shapes: T rows of activations [T, K]; N rows of a matrix [N, K], which are output features.

A workgroup of 256 threads multiplies a block of 16 rows of the matrix: thread t has row t % 16, and
every 16th group of 32 columns, from group t / 16 on. It unpacks a group once for all rows of
activations, which lie in local memory as f16, with the sum of each group for types with minima. At
the end 16 sums an output are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.gpu.kernel import THREADS, Kernel, Kernels, ThreadBuilder, dot2
from compile.gpu.norm import scale_of, scale_of_row
from compile.gpu.parts import Parts, PartTile, first_rows, name_of, num_tiles, total_rows
from compile.gpu.quantized import ROWS
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.activations import gated
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder, Memory
from compile.mlir.values import Scalar

SLOTS = THREADS // ROWS  # groups of columns that a workgroup multiplies at once
STEPS = 28  # times SLOTS groups: columns in local memory, of all rows together


@dataclass(frozen=True)
class FewRows(Kernel):
    """Activations [T, K] times a quantized matrix: [T, N].

    Bindings: activations, the norm's weight [K] f32 if there is one, matrix, residual [T, N] f32 if
    there is one, result. Constant: T. Workgroups: N / 16 of each part, T / rows.

    parts: of the matrix, of types of BLOCK_TYPES, each of them in a binding. rows: of activations
    that a workgroup multiplies. epsilon: of an RMS norm of the activations, which are f32 then and
    f16 else; only with one row, but for `MatrixRows`. epilogue: "" for f32 results, "add" for the
    residual added, "silu" for silu(gate) * up of a matrix of one part with eight gates and eight
    ups in turn: [T, N / 2] f16.
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
    def result(self) -> tuple[str, str]:
        """Activations are rounded to f16, and so is what the next product reads."""
        return "f16" if self.epilogue == "silu" else "f32", "f16"

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

    # What a thread does

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        work = Work(self, k)
        steps = -(-work.num_groups // SLOTS)
        chunk = min(steps, max(1, STEPS // self.rows))
        scale = None
        if self.epsilon is not None:
            scale = scale_of_row(k, work.x, self.depth, self.epsilon)
        stage = _Stage(work, k, chunk, scale)
        tile = PartTile(k, self.parts, work.matrices, ROWS, k.workgroup())

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
        row = thread // outputs

        def output(n: Scalar) -> Scalar:
            start = row * THREADS + n
            return reduce(add, [parts.load(start + i * ROWS) for i in range(SLOTS)])

        with k.when(row.less(k.scalar(self.rows, "index"))):
            place = tile.place // self.share
            self.store(k, work, tile, row, place, thread % outputs, output)

    def store(
        self, k: ThreadBuilder, work: Work, tile: PartTile[QuantizedMatrix], row: Scalar,
        place: Scalar, feature: Scalar, output: Callable[[Scalar], Scalar],
    ) -> None:  # fmt: skip
        """Store a feature of what a block of the matrix, whose first is `place`, gives for one of
        the workgroup's rows; output: the sum of a row of the block."""
        token = k.workgroup(1) * self.rows + row
        place = place + feature
        with k.when(token.less(work.num_rows)), k.when(place.less(tile.end // self.share)):
            value = output(feature)
            if self.epilogue == "silu":
                value = gated(value, output(feature + ROWS // 2))
            work.store(value, token, place)

    # The same in loops

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
                matrix: QuantizedMatrix, token: Scalar, n: Scalar, scale: Scalar | None = scale
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
    kernels: Kernels, product: FewRows, activations: Sequence[Tensor], matrices: Sequence[Tensor],
    residual: Tensor | None = None,
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

    def __init__(self, product: FewRows, k: ExecutableBuilder) -> None:
        self.product, self._k = product, k
        has_norm = product.epsilon is not None
        self.x = k.view(k.binding(read_only=True), "f32" if has_norm else "f16")
        self.norm = k.view(k.binding(read_only=True), "f32") if has_norm else None
        kinds = [BLOCK_TYPES[part.kind] for part in product.parts]
        self.matrices = [QuantizedMatrix(k, kind, product.depth) for kind in kinds]
        self.num_groups = max(matrix.num_groups for matrix in self.matrices)
        self.has_minima = any(kind.has_minima for kind in kinds)
        has_residual = product.epilogue == "add"
        self._residual = k.view(k.binding(read_only=True), "f32") if has_residual else None
        self._out = k.view(k.binding(), product.result[0])
        self.num_rows = k.constant()

    def token(self, row: Scalar) -> Scalar:
        """The row of all that a workgroup's row is, or the last."""
        k = self._k
        return (k.workgroup(1) * self.product.rows + row).minimum(self.num_rows - 1)

    def activations(self, token: Scalar, column: Scalar, scale: Scalar | None) -> Scalar:
        """A vector of CHUNK activations in f16, after the norm, which multiplies the row with
        `scale` and its weight; columns beyond the last are 0."""
        k, depth = self._k, self.product.depth
        inside = column.less(k.scalar(depth, "index"))
        column = column.minimum(k.scalar(depth - CHUNK, "index"))
        x = self.x.load_vector(token * depth + column, CHUNK)
        x = inside.select(x, k.scalar(0.0, x.dtype))
        if self.norm is None or scale is None:
            return x
        x = x * k.broadcast(scale, CHUNK) * self.norm.load_vector(column, CHUNK)
        return k.convert(x, "f16")

    def store(self, value: Scalar, token: Scalar, feature: Scalar) -> None:
        """Store an output, with the residual."""
        at = token * self.product.features + feature
        if self._residual:
            value = value + self._residual.load(at)
        self._out.store(value.to(self._out.dtype), at)


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
        """Load groups of all rows from `first` on, one a thread at a time. Columns beyond the last
        are 0."""
        k, end = self._k, self._rows * self._groups
        for start in range(0, end, THREADS):
            unit, inside = k.thread() + start, None
            if start + THREADS > end:
                inside = unit.less(k.scalar(end, "index"))
                unit = unit.minimum(k.scalar(end - 1, "index"))
            pieces = self._load_group(first, unit)
            with k.when(inside) if inside else nullcontext():
                self._store_group(pieces, unit)

    def _load_group(self, first: Scalar, unit: Scalar) -> list[Scalar]:
        """A group of a row, as vectors of f16 numbers."""
        row, group = unit // self._groups, unit % self._groups
        token, column = self._work.token(row), (first + group) * GROUP
        return [
            self._work.activations(token, column + start, self._scale)
            for start in range(0, GROUP, CHUNK)
        ]

    def _store_group(self, pieces: Sequence[Scalar], unit: Scalar) -> None:
        k = self._k
        for i, x in enumerate(pieces):
            self._x.store_vector(x, unit * GROUP + i * CHUNK)
        if not self._sums:
            return
        total, ones = k.scalar(0.0, "f32"), k.scalar(1.0, "vector<2xf16>")
        for x in pieces:
            for j in range(0, CHUNK, 2):
                total = dot2(k, k.shuffle(x, x, [j, j + 1]), ones, total)
        self._sums.store(total, unit)

    def add_products(
        self, total: Scalar, pairs: Sequence[Scalar],
        numbers: tuple[Sequence[Scalar], Scalar | None], place: Scalar, row: int,
    ) -> Scalar:  # fmt: skip
        """The total plus the products of a group's weights with a row's activations.

        pairs, numbers: of the weights, see QuantizedMatrix. place: of the group in the chunk.
        """
        k, unit, (scales, minimum) = self._k, place + row * self._groups, numbers
        halves, half = [], len(pairs) // 2
        for start in (0, half):
            dot = k.scalar(0.0, "f32")
            for i in range(start, start + half, CHUNK // 2):
                x = self._x.load_vector(unit * GROUP + 2 * i, CHUNK)
                for j in range(CHUNK // 2):
                    two = k.shuffle(x, x, [2 * j, 2 * j + 1])
                    dot = dot2(k, pairs[i + j], two, dot)
            halves.append(dot)
        if len(scales) > 1:
            return k.fma(scales[1], halves[1], k.fma(scales[0], halves[0], total))
        total = k.fma(scales[0], halves[0] + halves[1], total)
        return k.fma(minimum, self._sums.load(unit), total) if minimum and self._sums else total
