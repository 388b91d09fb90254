"""Products of bf16 matrices with Intel's tile registers (AMX).

A tile is 16 lines of 64 bytes: 16 rows of 32 activations, or 16 pairs of columns of a vector of
outputs, as the blocks of a matrix have them anyway. Rows do not see one another, and each adds up
in the order of K, so a row comes out the same in any company, beside rows of garbage too.
"""

from __future__ import annotations

from compile.kernel import KernelBuilder, Memory, Views
from compile.matmul import Activations, Format
from compile.mlir import Scalar

LINES = 16  # rows of activations in a tile, or pairs of columns
LINE_BYTES = 64
COLUMNS = 32  # of activations in a tile
MOST = 2  # tiles of rows in one product
SCRATCH = MOST * LINES * 2 * LINES  # f32
FIRST_X, FIRST_WEIGHT = 4, 6  # registers; before them are the sums


class Tiles:
    """Writes what one workgroup does with its tile registers.

    scratch: memory of this workgroup's own, with SCRATCH f32 from `start` on.
    """

    def __init__(self, k: KernelBuilder, scratch: Views, start: Scalar) -> None:
        self._k, self.scratch, self._start = k, scratch, start

    def open(self) -> None:
        """Configure all registers: palette 1, of LINES lines."""
        words, first = self.scratch["i32"], self._start
        lengths, heights = [LINE_BYTES | LINE_BYTES << 16] * 4, [LINES * 0x01010101] * 2
        for i, word in enumerate([1, 0, 0, 0, *lengths, 0, 0, 0, 0, *heights, 0, 0]):
            words.store(self._k.scalar(word, "i32"), first + i)
        self._do("ldtilecfg", self._pointer(words, first * 4))

    def close(self) -> None:
        self._do("tilerelease")

    def multiply(
        self, format_: Format, weights: Views, block: Scalar, cols: int, x: Activations,
        row: Scalar, num_tiles: int,
    ) -> None:  # fmt: skip
        """Scratch [num_tiles * 16, 2 vectors] = rows of x [M, K] times the block at this byte."""
        k, line = self._k, 2 * LINE_BYTES  # of a block: a pair of columns of both vectors
        memory, step = weights[format_.operand.unit_dtype], LINES * line
        x_bytes, stride = x.units, k.scalar(x.row_bytes, "i64")
        width = k.scalar(line, "i64")
        for tile in range(2 * num_tiles):
            self._do("tilezero", self._register(tile))
        with k.loop(0, cols // COLUMNS) as i:
            at = block + i * step
            if num_tiles == 1:
                for byte in range(0, step, LINE_BYTES):
                    memory.prefetch((at + (format_.vectors.tuning.ahead + byte)) // 4)
            for t in range(2):
                self._move("tileloadd64", FIRST_WEIGHT + t, memory, at + t * LINE_BYTES, width)
            for r in range(num_tiles):
                start = (row + r * LINES) * x.row_bytes + i * LINE_BYTES
                self._move("tileloadd64", FIRST_X + r, x_bytes, start, stride)
            for r in range(num_tiles):
                for t in range(2):
                    registers = 2 * r + t, FIRST_X + r, FIRST_WEIGHT + t
                    self._do("tdpbf16ps", *map(self._register, registers))
        for r in range(num_tiles):
            for t in range(2):
                to = (self._start + (r * LINES * 2 + t) * LINES) * 4
                self._move("tilestored64", 2 * r + t, self.scratch["f32"], to, width)

    def sums(self, row: Scalar) -> list[Scalar]:
        """Both vectors of a row of scratch."""
        at = self._start + row * (2 * LINES)
        return [self.scratch["f32"].load_vector(at + t * LINES, LINES) for t in range(2)]

    def _move(self, name: str, register: int, memory: Memory, at: Scalar, stride: Scalar) -> None:
        """A tile from or to byte `at`, its lines `stride` bytes apart."""
        self._do(name, self._register(register), self._pointer(memory, at), stride)

    def _register(self, number: int) -> Scalar:
        return self._k.scalar(number, "i8")

    def _pointer(self, memory: Memory, at: Scalar) -> Scalar:
        return self._k.pointer(memory, at)

    def _do(self, name: str, *arguments: Scalar) -> None:
        names = ", ".join(a.name for a in arguments)
        types = ", ".join(a.dtype for a in arguments)
        self._k.emit(f'llvm.call_intrinsic "llvm.x86.{name}"({names}) : ({types}) -> ()')
