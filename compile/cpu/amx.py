"""Products of bf16 matrices with Intel's tile registers (AMX).

An AMX tile is 16 lines of 64 bytes: 16 rows of 32 activations, or 16 pairs of columns for a vector
of output features, which is how the blocks of a matrix are stored anyway. Each row adds up its
products in the order of K and independently of the others, so its result does not depend on the
rows beside it, even if those hold garbage.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from compile.cpu.activations import Activations
from compile.cpu.kernel import KernelBuilder, Memory, Views
from compile.cpu.matmul import Format
from compile.mlir.values import Scalar

LINES = 16  # rows of activations in a tile, or pairs of columns
LINE_BYTES = 64
COLUMNS = 32  # of activations in a tile
MAX_ROWS = 2 * LINES  # of one product
SCRATCH = MAX_ROWS * 2 * LINES  # f32: the sums of one product
WORKGROUP_SCRATCH = SCRATCH + 16  # and a configuration
FIRST_X, FIRST_WEIGHT = 4, 6  # registers; before them are the sums


@dataclass(frozen=True)
class TileConfig:
    """Lines, and bytes of a line, of the registers that are not whole tiles."""

    smaller: dict[int, tuple[int, int]] = field(default_factory=dict)

    def words(self) -> list[int]:
        """The 64 bytes that ldtilecfg reads: palette 1, bytes of a line, lines."""
        sizes = [self.smaller.get(i, (LINES, LINE_BYTES)) for i in range(8)]
        data = struct.pack("<16B8H16x8B8x", 1, *[0] * 15, *(b for _, b in sizes),
                           *(n for n, _ in sizes))  # fmt: skip
        return list(struct.unpack("<16i", data))


WHOLE = TileConfig()


class TileRegisters:
    """Writes what one workgroup does with its tile registers.

    scratch: memory in which WORKGROUP_SCRATCH f32 from `start` on are this workgroup's own.
    """

    def __init__(self, k: KernelBuilder, scratch: Views, start: Scalar) -> None:
        self._k, self._scratch, self._start = k, scratch, start

    def request_permission(self) -> None:
        """Ask Linux for the right to use the registers: arch_prctl(ARCH_REQ_XCOMP_PERM, 18).

        It holds for the process. The kernel asks itself, so that no program that runs it has to.
        """
        numbers = [self._k.scalar(n, "i64") for n in (158, 0x1023, 18)]
        self._k.op(
            'llvm.inline_asm has_side_effects "syscall", '
            '"={rax},{rax},{rdi},{rsi},~{rcx},~{r11},~{memory}" '
            f"{', '.join(n.name for n in numbers)} : (i64, i64, i64) -> i64",
            "i64",
        )

    def configure(self, config: TileConfig = WHOLE) -> None:
        """Set the sizes of all registers, which also makes them zero."""
        words, first = self._scratch["i32"], self._start + SCRATCH
        for i, word in enumerate(config.words()):
            words.store(self._k.scalar(word, "i32"), first + i)
        self._do("ldtilecfg", self._k.pointer(words, first * 4))

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
        self, format_: Format, weights: Views, block: Scalar, cols: int, x: Activations,
        row: Scalar, num_tiles: int,
    ) -> None:  # fmt: skip
        """Rows of x [M, K], from `row` on, times the block at byte `block`, into the scratch.

        The sums are f32 [num_tiles * 16, 2 vectors]; read them by `sums`.
        """
        k, line = self._k, 2 * LINE_BYTES  # of a block: a pair of columns of both vectors
        memory, step = weights[format_.operand.unit_dtype], LINES * line
        sums = [(r, t) for r in range(num_tiles) for t in range(2)]
        for r, t in sums:
            self.zero(2 * r + t)
        with k.loop(0, cols // COLUMNS) as i:
            at = block + i * step
            if num_tiles == 1:
                for byte in range(0, step, LINE_BYTES):
                    memory.prefetch((at + (format_.vectors.tuning.ahead + byte)) // 4)
            for t in range(2):
                self.load(FIRST_WEIGHT + t, memory, at + t * LINE_BYTES, line)
            for r in range(num_tiles):
                start = (row + r * LINES) * x.row_bytes + i * LINE_BYTES
                self.load(FIRST_X + r, x.units, start, x.row_bytes)
            for r, t in sums:
                self.multiply_add(2 * r + t, FIRST_X + r, FIRST_WEIGHT + t)
        for r, t in sums:
            to = (self._start + (r * LINES * 2 + t) * LINES) * 4
            self.store(2 * r + t, self._scratch["f32"], to, line)

    def sums(self, row: Scalar) -> list[Scalar]:
        """Both vectors of a row of the last product."""
        at = self._start + row * (2 * LINES)
        return [self._scratch["f32"].load_vector(at + t * LINES, LINES) for t in range(2)]

    def _move(self, name: str, register: int, memory: Memory, at: Scalar, stride: int) -> None:
        width = self._k.scalar(stride, "i64")
        self._do(name, self._register(register), self._k.pointer(memory, at), width)

    def _register(self, number: int) -> Scalar:
        return self._k.scalar(number, "i8")

    def _do(self, name: str, *arguments: Scalar) -> None:
        names = ", ".join(a.name for a in arguments)
        types = ", ".join(a.dtype for a in arguments)
        self._k.emit(f'llvm.call_intrinsic "llvm.x86.{name}"({names}) : ({types}) -> ()')
