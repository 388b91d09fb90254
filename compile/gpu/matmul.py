"""Products of many rows with a matrix on GPUs, by matrix instructions: the kernel of prefill.

Shapes: T rows of activations [T, K] f16, which are tokens; N rows of a matrix [N, K], which are
output features.

A workgroup computes a tile of 128 by 128 outputs, each of its four waves a quarter. For `depth`
columns after the other, its threads load numbers of both sides into registers, 16 bytes at a time,
and store them as f16 into LDS, from where each wave reads what it multiplies. While a wave
multiplies, the loads for the next columns are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from compile.gpu.kernel import Kernel, Kernels, ThreadBuilder
from compile.gpu.tiles import CHUNK, SIDE, Instruction, Panel
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder, Memory
from compile.mlir.values import Scalar
from compile.target import Target

TILE = 128  # rows and columns of outputs of a workgroup
WAVES = 4  # of a workgroup, each for half of the rows and half of the columns
PART = TILE // 2  # rows and columns of a wave
BLOCKS = PART // SIDE  # rows and columns of instructions of a wave


@dataclass(frozen=True)
class Tile:
    """How a chip multiplies. depth: columns of both sides between two barriers. buffers: how often
    they are in LDS, so that one is written while another is read."""

    chip: str
    subgroup: int
    depth: int
    buffers: int

    @classmethod
    def of(cls, target: Target) -> Tile:
        """That of a chip: as much as leaves room for two workgroups in LDS, and the registers."""
        if target.subgroup == 64:
            return cls(target.name, 64, 64, 1)
        return cls(target.name, 32, 32, 2)

    @property
    def threads(self) -> int:
        """Of a workgroup."""
        return WAVES * self.subgroup


class Source(Protocol):
    """A side of a product, as a thread loads it."""

    def load(self, column: Scalar) -> list[Scalar]:
        """What a thread loads of `depth` columns from `column` on, as it lies in memory."""

    def store(self, loaded: Sequence[Scalar], panel: Panel) -> None:
        """Store it as f16."""


class Floats:
    """Rows of f16 numbers side by side, of which a tile begins at `first`; of rows beyond the
    last one, the last is loaded."""

    def __init__(
        self,
        k: ThreadBuilder,
        tile: Tile,
        memory: Memory,
        columns: int,
        first: Scalar,
        last: Scalar,
    ) -> None:
        chunks = tile.depth // CHUNK
        self._memory, thread = memory, k.thread()
        step = tile.threads // chunks  # rows that are loaded at once
        self._chunk, self._row, self._step = thread % chunks, thread // chunks, step
        self._starts = [
            (first + self._row + i * step).minimum(last) * columns + self._chunk * CHUNK
            for i in range(TILE // step)
        ]

    def load(self, column: Scalar) -> list[Scalar]:
        """Chunks of 8 numbers."""
        return [self._memory.load_vector(start + column, CHUNK) for start in self._starts]

    def store(self, loaded: Sequence[Scalar], panel: Panel) -> None:
        """As they are."""
        for i, chunk in enumerate(loaded):
            panel.store(chunk, self._row + i * self._step, self._chunk)


@dataclass(frozen=True)
class Product(Kernel):
    """Activations [T, K] f16 times a matrix [N, K] f16, plus a residual [T, N] f32: [T, N] f32.

    Bindings: activations, matrix, residual if there is one, result. Constant: T. Workgroups: those
    of T, those of N.
    """

    tile: Tile
    columns: int  # N
    depth: int  # K, a multiple of the tile's depth
    has_residual: bool

    @property
    def name(self) -> str:
        """By its sizes."""
        return f"product_{self.columns}x{self.depth}{'_added' if self.has_residual else ''}"

    @property
    def threads(self) -> int:
        """Of a workgroup: those of four waves."""
        return self.tile.threads

    @property
    def result(self) -> tuple[str, str]:
        """Sums of products of f16 numbers are f32."""
        return "f32", "f32"

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        lhs, matrix = (k.view(k.binding(read_only=True), "f16") for _ in range(2))
        residual = k.view(k.binding(read_only=True), "f32") if self.has_residual else None
        result = k.view(k.binding(), "f32")
        num_rows = k.constant()
        row, column = (k.workgroup(axis) * TILE for axis in (0, 1))
        last = k.scalar(self.columns - 1, "index")
        sides = (
            Floats(k, self.tile, lhs, self.depth, row, num_rows - 1),
            Floats(k, self.tile, matrix, self.depth, column, last),
        )
        sums = Multiplication(k, self.tile, sides).run(self.depth)
        self._finish(k, sums, row, column, num_rows, residual, result)

    def _finish(
        self, k: ThreadBuilder, sums: Sequence[Scalar], row: Scalar, column: Scalar,
        num_rows: Scalar, residual: Memory | None, result: Memory,
    ) -> None:  # fmt: skip
        """Store the sums. Rows and columns beyond the last are not stored; for the residual, which
        is loaded without a branch, the last stands in for them."""
        instruction, (part_row, part_column, lane) = Instruction.of(k.chip), part(k)
        first_column = column + part_column + lane % SIDE
        columns = [first_column + j * SIDE for j in range(BLOCKS)]
        rows = [row + part_row + instruction.row(lane, n) for n in range(instruction.sums)]
        for i in range(BLOCKS):
            at_rows = [at + i * SIDE for at in rows]
            values = {
                (n, j): k.element(sums[i * BLOCKS + j], n)
                for n in range(instruction.sums)
                for j in range(BLOCKS)
            }
            if residual:
                for n, j in values:
                    at = at_rows[n].minimum(num_rows - 1) * self.columns
                    at_column = columns[j].minimum(self.columns - 1)
                    values[n, j] += residual.load(at + at_column)
            for n, at_row in enumerate(at_rows):
                with k.when(at_row.less(num_rows)):
                    for j, at_column in enumerate(columns):
                        is_whole = self.columns % TILE == 0
                        inside = at_column.less(k.scalar(self.columns, "index"))
                        with nullcontext() if is_whole else k.when(inside):
                            result.store(values[n, j], at_row * self.columns + at_column)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Each output, one after the other."""
        lhs, matrix = (k.view(k.binding(read_only=True), "f16") for _ in range(2))
        residual = k.view(k.binding(read_only=True), "f32") if self.has_residual else None
        result = k.view(k.binding(), "f32")
        with k.loop(0, k.constant()) as row, k.loop(0, self.columns) as column:
            zero = k.scalar(0.0, "vector<8xf32>")

            def add(i: Scalar, sums: Scalar) -> list[Scalar]:
                a, b = (
                    k.convert(memory.load_vector(at * self.depth + i, CHUNK), "f32")
                    for memory, at in ((lhs, row), (matrix, column))
                )
                return [k.fma(a, b, sums)]

            [sums] = k.fold(0, self.depth, [zero], add, step=CHUNK)
            at = row * self.columns + column
            total = k.sum(sums)
            result.store(total + residual.load(at) if residual else total, at)


def part(k: ThreadBuilder) -> tuple[Scalar, Scalar, Scalar]:
    """First row and first column of a wave's part of the tile, and the lane."""
    thread = k.thread()
    wave = thread // k.subgroup
    return wave // 2 * PART, wave % 2 * PART, thread % k.subgroup


class Multiplication:
    """The sums of a tile over K."""

    def __init__(self, k: ThreadBuilder, tile: Tile, sides: Sequence[Source]) -> None:
        self._k, self._tile, self._sides = k, tile, sides
        self._memory = k.shared(2 * TILE * tile.depth * tile.buffers, "f16")
        self._instruction = Instruction.of(k.chip)

    def run(self, depth: int) -> list[Scalar]:
        """A lane's sums, for each row of instructions and each column."""
        k, tile = self._k, self._tile
        size = 2 * TILE * tile.depth
        start, zero = k.scalar(0, "index"), k.scalar(0, "index")
        sums = [k.scalar(0.0, f"vector<{self._instruction.sums}xf32>")] * BLOCKS**2
        self._store(self._load(zero), zero)
        k.barrier()
        last = k.scalar(depth - tile.depth, "index")

        def step(column: Scalar, start: Scalar, *sums: Scalar) -> list[Scalar]:
            # After the last columns they are loaded once more, instead of a second copy of the code
            loaded = self._load((column + tile.depth).minimum(last))
            sums = tuple(self._multiply(start, sums))
            if tile.buffers == 1:
                k.barrier()
            else:
                start = k.scalar(size, "index") - start
            k.schedule_barrier()
            self._store(loaded, start)
            k.barrier()
            return [start, *sums]

        return k.fold(0, depth, [start, *sums], step, step=tile.depth)[1:]

    def _panels(self, start: Scalar) -> list[Panel]:
        tile = self._tile
        return [
            Panel(self._k, self._memory, start + i * TILE * tile.depth, tile.depth) for i in (0, 1)
        ]

    def _load(self, column: Scalar) -> list[list[Scalar]]:
        return [side.load(column) for side in self._sides]

    def _store(self, loaded: Sequence[Sequence[Scalar]], start: Scalar) -> None:
        for side, values, panel in zip(self._sides, loaded, self._panels(start), strict=True):
            side.store(values, panel)

    def _multiply(self, start: Scalar, sums: Sequence[Scalar]) -> list[Scalar]:
        """The sums with the columns that are in LDS."""
        k, instruction, sums = self._k, self._instruction, [*sums]
        row, column, lane = part(k)
        for first in range(0, self._tile.depth // CHUNK, instruction.step // CHUNK):
            k.schedule_barrier()
            operands = [
                self._operands(panel, at + lane % SIDE, lane, first)
                for panel, at in zip(self._panels(start), (row, column), strict=True)
            ]
            for n in range(len(operands[0][0])):
                for i in range(BLOCKS):
                    for j in range(BLOCKS):
                        a, b = operands[0][i][n], operands[1][j][n]
                        at = i * BLOCKS + j
                        sums[at] = instruction.multiply(k, a, b, sums[at])
        return sums

    def _operands(self, panel: Panel, row: Scalar, lane: Scalar, first: int) -> list[list[Scalar]]:
        """Of each block of rows from `row` on, the operands of a step from chunk `first` on."""
        k, instruction = self._k, self._instruction
        chunks = [k.as_index(chunk) + first for chunk in instruction.chunks(lane)]
        places = [panel.at(row, chunk) for chunk in chunks]
        return [
            instruction.operands(
                k,
                [panel.memory.load_vector(at + i * SIDE * panel.depth, CHUNK) for at in places],
            )
            for i in range(BLOCKS)
        ]


def multiply(
    kernels: Kernels, product: Product, lhs: Tensor, matrix: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Run a product: [T, N] f32 of lhs [T, K] f16 and a matrix; residual: [T, N] f32."""
    tiles = kernels.tiles(lhs.shape[0], TILE), -(-product.columns // TILE), 1
    inputs = [lhs, matrix, *([residual] if residual else [])]
    result = Tensor("", (lhs.shape[0], product.columns), "f32")
    return kernels.call(product, tiles, [lhs.shape[0]], inputs, outputs=[result])[0]
