"""Matrix instructions of AMD's chips, and tiles of matrices in LDS that they multiply.

An instruction multiplies a [16, 16] by b [16, 16], transposed, and adds it to sums [16, 16] f32.
Lane l of a wave holds numbers of row l % 16 of a and b, and of column l % 16 of the sums:

    chips      K of the lane's numbers               rows of its sums
    gfx9       4 (l / 16) .. 4 (l / 16) + 3          the same
    gfx11      all 16, lanes 16 to 31 as 0 to 15     l / 16, l / 16 + 2, ..., l / 16 + 14
    gfx12      8 (l / 16) .. 8 (l / 16) + 7          the same

Which K a lane holds does not matter as long as a and b agree. So a lane of gfx9 loads 8 numbers
side by side, as other chips do, for two instructions. 8 numbers, 16 bytes, are a chunk.

A workgroup computes a tile of 128 by 128 outputs, each of its four waves a quarter. For `depth`
columns after the other, its threads load numbers of both sides into registers, 16 bytes at a time,
and store them as f16 into LDS, from where each wave reads what it multiplies. While a wave
multiplies, the loads for the next columns are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from compile.formats.blocks import GROUP
from compile.gpu.kernel import ThreadBuilder
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.target import Target

SIDE = 16  # rows and columns of an instruction
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


@dataclass(frozen=True)
class Instruction:
    """The matrix instruction of a chip, of f16 or bf16 numbers."""

    name: str
    operand: int  # numbers of a and of b that a lane holds
    sums: int  # that a lane holds

    @classmethod
    def of(cls, chip: str) -> Instruction:
        """That of a chip's name."""
        if chip.startswith("gfx9"):
            return cls("mfma", 4, 4)
        return cls("wmma", 16 if chip.startswith("gfx11") else 8, 8)

    @staticmethod
    def takes(dtype: str, chip: str) -> bool:
        """Whether a chip's instruction multiplies such numbers. That of gfx908 takes fewer bf16 at
        once, and gets no kernels of its own."""
        return dtype == "f16" or (dtype == "bf16" and chip != "gfx908")

    def row(self, lane: Scalar, i: int) -> Scalar:
        """The row of a lane's sum number i."""
        part = lane // SIDE
        return part + 2 * i if self.operand == SIDE else part * self.sums + i

    def side_by_side(self, row: Scalar, size: int) -> Scalar:
        """What to multiply as row `row` of a, so that a lane has sums of `size` side by side."""
        if self.operand == SIDE:
            return row % 2 * size + row // 2
        return row // self.sums * size + row % self.sums

    def multiplied_as(self, row: Scalar, size: int) -> Scalar:
        """As which row of a that is multiplied: the inverse, also of what is further down."""
        part, i = row // size % (SIDE // self.sums), row % self.sums
        return i * 2 + part if self.operand == SIDE else part * self.sums + i

    def multiply(self, k: ThreadBuilder, a: Scalar, b: Scalar, sums: Scalar) -> Scalar:
        """sums + a times b, transposed."""
        blgp = "blgp = none " if self.name == "mfma" else ""
        return k.op(
            f"amdgpu.{self.name} {SIDE}x{SIDE}x{SIDE} {a.name} * {b.name} + {sums.name} {blgp}: "
            f"{a.dtype}, {b.dtype}, {sums.dtype}",
            sums.dtype,
        )

    @property
    def step(self) -> int:
        """Columns of what a wave loads at once, for one instruction or two."""
        return 2 * SIDE if self.name == "mfma" else SIDE

    def chunks(self, lane: Scalar) -> list[Scalar | int]:
        """Which chunks of a step a lane needs."""
        return [0, 1] if self.operand == SIDE else [lane // SIDE]

    def operands(self, k: ThreadBuilder, chunks: Sequence[Scalar]) -> list[Scalar]:
        """A lane's operands of the instructions of a step, from its chunks."""
        if self.name == "mfma":
            return [k.shuffle(chunks[0], chunks[0], range(at, at + 4)) for at in (0, 4)]
        return [k.shuffle(chunks[0], chunks[1], range(SIDE))] if self.operand == SIDE else [*chunks]


@dataclass(frozen=True)
class Panel:
    """Rows of a matrix with `depth` columns each, in LDS from `start` on, as f16.

    The chunks of a row change places by the row's number, so that lanes that load or store the same
    chunk of neighbouring rows do so in different banks.
    """

    k: ThreadBuilder
    memory: Memory
    start: Scalar
    depth: int

    def at(self, row: Scalar, chunk: Scalar | int) -> Scalar:
        """Where a chunk of a row is."""
        k, count = self.k, self.depth // CHUNK
        turn = row % count if count >= CHUNK else row // (CHUNK // count) % count
        place = k.bits("xori", turn, chunk)
        return self.start + row * self.depth + place * CHUNK

    def store(self, values: Scalar, row: Scalar, chunk: Scalar | int) -> None:
        """Store 8 numbers."""
        self.memory.store_vector(values, self.at(row, chunk))


Store = Callable[[Panel], None]  # what a thread has loaded, as f16


class Source(Protocol):
    """A side of a product, as a thread loads it."""

    def load(self, column: Scalar) -> Store:
        """Load the thread's share of `depth` columns from `column` on."""


class Floats:
    """Rows of f16 numbers side by side, of which a tile begins at `first`; of rows beyond the
    last one, the last is loaded."""

    def __init__(
        self, k: ThreadBuilder, tile: Tile, memory: Memory, columns: int, first: Scalar,
        last: Scalar,
    ) -> None:  # fmt: skip
        chunks = tile.depth // CHUNK
        self._memory, thread = memory, k.thread()
        step = tile.threads // chunks  # rows that are loaded at once
        self._chunk, self._rows = thread % chunks, range(0, TILE, step)
        self._row = thread // chunks
        self._starts = [
            (first + self._row + i).minimum(last) * columns + self._chunk * CHUNK
            for i in self._rows
        ]

    def load(self, column: Scalar) -> Store:
        """Chunks of 8 numbers, which are stored as they are."""
        loaded = [self._memory.load_vector(start + column, CHUNK) for start in self._starts]

        def store(panel: Panel) -> None:
            for i, chunk in zip(self._rows, loaded, strict=True):
                panel.store(chunk, self._row + i, self._chunk)

        return store


class Weights:
    """Rows of quantized weights, of which a tile begins at `first`: a thread has 32 columns of one.

    columns: of the matrix, and of the activations, which may have more that are zero. is_gated:
    rows are eight gates and eight ups in turn, and come to lie sixteen and sixteen, so that a lane
    has sums of both.
    """

    def __init__(
        self, k: ThreadBuilder, tile: Tile, matrix: QuantizedMatrix, first: Scalar, last: Scalar,
        columns: tuple[int, int], is_gated: bool,
    ) -> None:  # fmt: skip
        assert tile.threads * GROUP == TILE * tile.depth
        self._matrix, thread = matrix, k.thread()
        row = thread % TILE
        self._group, self._place = thread // TILE, row
        if is_gated:
            self._place = row // 32 * 32 + row % 8 + row // 8 % 2 * 16 + row // 16 % 2 * 8
        self._row = (first + row).minimum(last)
        self._last = None if columns[0] == columns[1] else columns[0] // GROUP - 1

    def load(self, column: Scalar) -> Store:
        """Codes and scales, which are unpacked when they are stored."""
        group = column // GROUP + self._group
        if self._last is not None:
            group = group.minimum(self._last)
        packed = self._matrix.load(self._row, group)

        def store(panel: Panel) -> None:
            for i, chunk in enumerate(self._matrix.unpack(packed)):
                panel.store(chunk, self._place, self._group * (GROUP // CHUNK) + i)

        return store


def part(k: ThreadBuilder) -> tuple[Scalar, Scalar, Scalar]:
    """First row and first column of a wave's part of the tile, and the lane."""
    thread = k.thread()
    wave = thread // k.subgroup
    return wave // 2 * PART, wave % 2 * PART, thread % k.subgroup


class Multiplication:
    """The sums of a tile over K."""

    def __init__(self, k: ThreadBuilder, tile: Tile) -> None:
        self._k, self._tile = k, tile
        self._memory = k.shared(2 * TILE * tile.depth * tile.buffers, "f16")
        self._instruction = Instruction.of(k.chip)

    @property
    def dtypes(self) -> list[str]:
        """Of a lane's sums."""
        return [f"vector<{self._instruction.sums}xf32>"] * BLOCKS**2

    def run(self, sides: Sequence[Source], depth: Scalar) -> list[Scalar]:
        """A lane's sums over `depth` columns, for each row of instructions and each column."""
        k, tile = self._k, self._tile
        size = 2 * TILE * tile.depth
        start, zero = k.scalar(0, "index"), k.scalar(0, "index")
        sums = [k.scalar(0.0, dtype) for dtype in self.dtypes[:1]] * BLOCKS**2
        self._store([side.load(zero) for side in sides], zero)
        k.barrier()
        last = depth - tile.depth

        def step(column: Scalar, start: Scalar, *sums: Scalar) -> list[Scalar]:
            # After the last columns they are loaded once more, instead of a second copy of the code
            following = (column + tile.depth).minimum(last)
            loaded = [side.load(following) for side in sides]
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

    def _store(self, loaded: Sequence[Store], start: Scalar) -> None:
        for store, panel in zip(loaded, self._panels(start), strict=True):
            store(panel)

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
