"""Matrix instructions of AMD's chips, and tiles of matrices in LDS that they multiply.

An instruction multiplies a [16, 16] by b [16, 16], transposed, and adds it to sums [16, 16] f32.
Lane l of a wave holds numbers of row l % 16 of a and b, and of column l % 16 of the sums:

    chips      K of the lane's numbers               rows of its sums
    gfx9       4 (l / 16) .. 4 (l / 16) + 3          the same
    gfx11      all 16, lanes 16 to 31 as 0 to 15     l / 16, l / 16 + 2, ..., l / 16 + 14
    gfx12      8 (l / 16) .. 8 (l / 16) + 7          the same

Which K a lane holds does not matter as long as a and b agree. So a lane of gfx9 loads 8 numbers
side by side, as other chips do, for two instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.gpu.kernel import ThreadBuilder
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

SIDE = 16  # rows and columns of an instruction
CHUNK = 8  # f16 numbers, 16 bytes, which a lane loads or stores at once


@dataclass(frozen=True)
class Instruction:
    """The matrix instruction of a chip, of f16 numbers."""

    name: str
    operand: int  # numbers of a and of b that a lane holds
    sums: int  # that a lane holds

    @classmethod
    def of(cls, chip: str) -> Instruction:
        """That of a chip's name."""
        if chip.startswith("gfx9"):
            return cls("mfma", 4, 4)
        return cls("wmma", 16 if chip.startswith("gfx11") else 8, 8)

    def row(self, lane: Scalar, i: int) -> Scalar:
        """The row of a lane's sum number i."""
        part = lane // SIDE
        return part + 2 * i if self.operand == SIDE else part * self.sums + i

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
        return [k.shuffle(*chunks, range(SIDE))] if self.operand == SIDE else [*chunks]


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
