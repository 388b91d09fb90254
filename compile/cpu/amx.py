"""Products of bf16 matrices with Intel's tile registers (AMX).

An AMX tile is 16 lines of 64 bytes: 16 rows of 32 activations, or 16 pairs of columns for a vector
of output features, which is how the blocks of a matrix are stored anyway. Each row adds up its
products in the order of K and independently of the others, so its result does not depend on the
rows beside it, even if those hold garbage.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from compile.cpu.activations import Activations
from compile.cpu.kernel import KernelBuilder
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

LINES = 16  # rows of activations in a tile, or pairs of columns
LINE_BYTES = 64
COLUMNS = 32  # of activations in a tile
MAX_ROWS = 2 * LINES  # of one product
WORDS_OF_ROW = 2 * LINES  # f32: the sums of a row
WORDS_OF_CONFIG = 16
PANEL = 320  # columns of a block that are expanded at once: with 32 rows they fit the L1, in 40 KB
LINES_AHEAD = 4  # so that 256 rows, while a block is multiplied with them, prefetch the next one
FIRST_X, FIRST_WEIGHT = 4, 6  # registers; before them are the sums


@dataclass(frozen=True)
class Scratch:
    """Memory of a workgroup: a configuration, sums of rows, and columns that are expanded."""

    num_rows: int = MAX_ROWS
    num_columns: int = 0

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return 4 * (WORDS_OF_CONFIG + (self.num_rows + self.num_columns // 2) * WORDS_OF_ROW)


@dataclass(frozen=True)
class Columns:
    """Columns of a block as pairs of bf16: `count` from `first` on, at byte `start` of `memory`.

    ahead: bytes to prefetch where few rows are multiplied. next: where many are, from which byte on
    to prefetch LINES_AHEAD cache lines for each 32 columns.
    """

    memory: Memory
    start: Scalar
    count: Scalar | int
    first: Scalar
    ahead: int = 0
    next: Scalar | None = None


class TileRegisters:
    """Writes what one workgroup does with its tile registers.

    size: of the memory that it takes.
    """

    def __init__(self, k: KernelBuilder, size: Scratch) -> None:
        self._k, self._scratch = k, k.stack()
        self._scratch.num_bytes = size.num_bytes
        self._sums = k.scalar(WORDS_OF_CONFIG, "index")
        self.expanded_at = self._sums + size.num_rows * WORDS_OF_ROW

    def request_permission(self) -> None:
        """Ask Linux for the right to use the registers: arch_prctl(ARCH_REQ_XCOMP_PERM, 18).

        It holds for the process. The kernel asks itself, so that no program that runs it has to.
        """
        self._k.syscall(158, *(self._k.scalar(n, "i64") for n in (0x1023, 18)))

    def configure(self) -> None:
        """Make all registers whole tiles, and zero."""
        words = self._scratch["i32"]
        for i, word in enumerate(_config()):
            words.store(self._k.scalar(word, "i32"), i)
        self._do("ldtilecfg", self._k.pointer(words, self._k.scalar(0, "index")))

    def release(self) -> None:
        """Give the registers up."""
        self._do("tilerelease")

    def zero(self, register: int) -> None:
        """Make a register zero."""
        self._do("tilezero", self._register(register))

    def load(self, register: int, memory: Memory, at: Scalar, stride: int) -> None:
        """Load a tile from byte `at`; its lines are `stride` bytes apart."""
        self._move("tileloadd64", register, memory, at, stride)

    def store(self, register: int, memory: Memory, at: Scalar, stride: int) -> None:
        """Store a tile to byte `at`; its lines are `stride` bytes apart."""
        self._move("tilestored64", register, memory, at, stride)

    def multiply_add(self, total: int, x: int, weights: int) -> None:
        """total += x * weights; f32 [16, 16], bf16 [16, 32], bf16 [16, 16, 2]."""
        self._do("tdpbf16ps", *map(self._register, (total, x, weights)))

    def multiply(
        self, columns: Columns, x: Activations, row: Scalar, num_tiles: int,
        to: Scalar | int = 0, *, adds: bool = False,
    ) -> None:  # fmt: skip
        """Rows of x [M, K], from `row` on, times columns of a block, into the sums of rows `to` on.

        adds: to what these sums are. Read them by `sums`.
        """
        k, line = self._k, 2 * LINE_BYTES  # of a block: a pair of columns of both vectors
        memory, step = columns.memory, LINES * line
        first = k.as_index(to)
        sums = [(r, t) for r in range(num_tiles) for t in range(2)]
        totals = [
            (2 * r + t, (self._sums + (first + r * LINES) * WORDS_OF_ROW + t * LINES) * 4)
            for r, t in sums
        ]
        for total, at in totals:
            if adds:
                self.load(total, self._scratch["f32"], at, line)
            else:
                self.zero(total)
        with k.loop(0, k.as_index(columns.count) // COLUMNS) as i:
            at = columns.start + i * step
            if num_tiles == 1 and columns.ahead:
                for byte in range(0, step, LINE_BYTES):
                    memory.prefetch((at + (columns.ahead + byte)) // 4)
            if num_tiles > 1 and columns.next:
                for n in range(LINES_AHEAD):
                    ahead = columns.next + (i * LINES_AHEAD + n) * LINE_BYTES
                    memory.prefetch(ahead // 4)
            for t in range(2):
                self.load(FIRST_WEIGHT + t, memory, at + t * LINE_BYTES, line)
            for r in range(num_tiles):
                start = (row + r * LINES) * x.row_bytes + (i * LINE_BYTES + columns.first * 2)
                self.load(FIRST_X + r, x.units, start, x.row_bytes)
            for r, t in sums:
                self.multiply_add(2 * r + t, FIRST_X + r, FIRST_WEIGHT + t)
        for total, at in totals:
            self.store(total, self._scratch["f32"], at, line)

    def sums(self, row: Scalar) -> list[Scalar]:
        """Both vectors of a row's sums."""
        at = self._sums + row * WORDS_OF_ROW
        return [self._scratch["f32"].load_vector(at + t * LINES, LINES) for t in range(2)]

    @property
    def expanded(self) -> Memory:
        """The scratch, as i32; columns that are expanded begin at `expanded_at`."""
        return self._scratch["i32"]

    def _move(self, name: str, register: int, memory: Memory, at: Scalar, stride: int) -> None:
        width = self._k.scalar(stride, "i64")
        self._do(name, self._register(register), self._k.pointer(memory, at), width)

    def _register(self, number: int) -> Scalar:
        return self._k.scalar(number, "i8")

    def _do(self, name: str, *arguments: Scalar) -> None:
        names = ", ".join(a.name for a in arguments)
        types = ", ".join(a.dtype for a in arguments)
        self._k.emit(f'llvm.call_intrinsic "llvm.x86.{name}"({names}) : ({types}) -> ()')


def _config() -> list[int]:
    """The 64 bytes that ldtilecfg reads: palette 1, bytes of a line and lines of 8 registers."""
    sizes = [LINE_BYTES] * 8 + [0] * 8, [LINES] * 8 + [0] * 8
    return list(
        struct.unpack("<16i", struct.pack("<16B16H16B", 1, *[0] * 15, *sizes[0], *sizes[1]))
    )
