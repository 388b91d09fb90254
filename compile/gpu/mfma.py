"""Products of 2 to 16 rows with quantized matrices, by matrix instructions of gfx9.

Shapes: T rows of activations [T, K]; N rows of a matrix [N, K], which are output features.

An instruction multiplies 16 rows of the matrix with 16 rows of activations, so that up to 16 of
these cost hardly more than one. Of a block of 16 rows of the matrix, a wave takes 4 groups of 32
columns at a time: lane l has row l % 16 of group l / 16, as it lies in memory, unpacks it, and
multiplies it 4 columns at a time, with the same columns of row l % 16 of the activations. Neither
goes through local memory: the waves of a workgroup share K, so that none needs what another has.
At the end their sums are added up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

from compile.formats.blocks import GROUP
from compile.gpu.kernel import ThreadBuilder
from compile.gpu.matvec import FewRows, Work
from compile.gpu.norm import scale_of, squares_of
from compile.gpu.parts import PartTile, num_tiles
from compile.gpu.quantized import ROWS
from compile.gpu.tiles import SIDE, Instruction
from compile.gpu.unpack import CHUNK, QuantizedMatrix
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

MAX_ROWS = SIDE  # of activations that are multiplied together
WAVES = 8  # of a workgroup
LANES = 64  # of a wave
GROUPS = LANES // SIDE  # of columns that a wave takes at once
UNITS = 304  # compute units of the largest chip, MI300X, each of which shall have a workgroup
ROTATE_BY_8, ALL = 0x128, 0xF  # DPP's control and masks: 16 lanes by 8, in all rows and banks
MAX_LOADS = 7  # of groups of the matrix, that are under way
MAX_BLOCKS = 6  # of rows of the matrix that a workgroup multiplies with the same activations


@dataclass(frozen=True)
class MfmaRows(FewRows):
    """The same as FewRows; with a norm, rows of activations may be several."""

    @property
    def name(self) -> str:
        """By everything that makes it differ."""
        return f"mfma_{super().name}"

    @property
    def threads(self) -> int:
        """Of a workgroup."""
        return WAVES * LANES

    @property
    def tile(self) -> int:
        """Rows of the matrix of a workgroup."""
        return ROWS * min(MAX_BLOCKS, -(-num_tiles(self.parts, ROWS) // UNITS))

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        work, blocks = Work(self, k), self.tile // ROWS
        tile = PartTile(k, self.parts, work.matrices, self.tile, k.workgroup())
        activations = _Activations(k, work)
        rounds = -(-work.num_groups // (GROUPS * WAVES))
        unroll = next(n for n in (7, 4, 3, 2, 1) if rounds % n == 0 and n * blocks <= MAX_LOADS)
        zero = k.scalar(0.0, f"vector<{Instruction.of(k.chip).sums}xf32>")

        def sums_of(matrix: QuantizedMatrix) -> list[Scalar]:
            first_of_last = tile.last // ROWS * ROWS
            rows = [
                (tile.row + i * ROWS).minimum(first_of_last) + k.thread() % ROWS
                for i in range(blocks)
            ]
            return k.fold(
                0, rounds * WAVES, [zero] * blocks,
                lambda step, *sums: self._groups(
                    k, activations, (matrix, rows), step, unroll, sums
                ),
                step=WAVES * unroll,
            )  # fmt: skip

        self._finish(k, work, tile, tile.choose(sums_of, [zero.dtype] * blocks))

    def _groups(
        self, k: ThreadBuilder, activations: _Activations,
        of: tuple[QuantizedMatrix, Sequence[Scalar]], first: Scalar, unroll: int,
        sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """The sums of blocks, with `unroll` groups more of the thread's row of each."""
        thread, instruction, sums, (matrix, rows) = k.thread(), Instruction.of(k.chip), [*sums], of
        wave, last = thread // LANES, k.scalar(matrix.num_groups - 1, "index")
        groups = [
            (first + i * WAVES + wave) * GROUPS + thread % LANES // SIDE for i in range(unroll)
        ]
        loaded = [[matrix.load(row, group.minimum(last)) for row in rows] for group in groups]
        for group, packed in zip(groups, loaded, strict=True):
            x = [y for chunk in activations.group(group) for y in instruction.operands(k, [chunk])]
            for i, block in enumerate(packed):
                weights = [
                    y for chunk in matrix.unpack(block) for y in instruction.operands(k, [chunk])
                ]
                for a, b in zip(weights, x, strict=True):
                    sums[i] = instruction.multiply(k, a, b, sums[i])
        return sums

    def _finish(
        self, k: ThreadBuilder, work: Work, tile: PartTile[QuantizedMatrix],
        totals: Sequence[Scalar],
    ) -> None:  # fmt: skip
        """Add up what the waves have, and store it."""
        thread, blocks, outputs = k.thread(), len(totals), ROWS // self.share
        size = blocks * self.rows * ROWS
        parts, rows = k.shared(WAVES * size, "f32"), k.scalar(self.rows, "index")
        row, part = thread % SIDE, thread % LANES // SIDE
        with k.when(row.less(rows)):
            for i, total in enumerate(totals):
                at = thread // LANES * size + (row + i * self.rows) * ROWS + part * 4
                parts.store_vector(total, at)
        k.barrier()
        end = self.rows * blocks * outputs
        for first in range(0, end, self.threads):
            unit = thread + first
            row, block, feature = (
                unit // (blocks * outputs), unit // outputs % blocks, unit % outputs
            )  # fmt: skip
            at = (block * self.rows + row) * ROWS

            def output(n: Scalar, at: Scalar = at) -> Scalar:
                return reduce(add, [parts.load(at + n + i * size) for i in range(WAVES)])

            is_whole = first + self.threads <= end
            with nullcontext() if is_whole else k.when(unit.less(k.scalar(end, "index"))):
                place = tile.place // self.share + block * outputs
                self.store(k, work, tile, row, place, feature, output)


class _Activations:
    """A lane's operands of instructions: of row l % 16, or the last, of a workgroup's.

    Up to 8 rows, lane l + 8 loads and normalizes half of what lane l needs, whose own operands
    nobody does.
    """

    def __init__(self, k: ThreadBuilder, work: Work) -> None:
        self._k, self._work, self._scale = k, work, None
        last = k.scalar(work.product.rows - 1, "index")
        self._is_shared = work.product.rows <= SIDE // 2
        row = (k.thread() % (SIDE // 2 if self._is_shared else SIDE)).minimum(last)
        self._token = work.token(row)
        if work.product.epsilon is not None:
            self._scale = self._scales(work.product.epsilon).load(row)

    def group(self, group: Scalar) -> list[Scalar]:
        """32 columns: four vectors of 8 f16 numbers."""
        column, end = group * GROUP, GROUP
        if self._is_shared:
            end = GROUP // 2
            column += self._k.thread() % SIDE // (SIDE // 2) * end
        own = [
            self._work.activations(self._token, column + start, self._scale)
            for start in range(0, end, CHUNK)
        ]
        return [*own, *map(self._of_other, own)] if self._is_shared else own

    def _of_other(self, numbers: Scalar) -> Scalar:
        """What lane l + 8 of 16 has, or l - 8."""
        k, words = self._k, self._k.bitcast(numbers, f"vector<{CHUNK // 2}xi32>")
        given = [k.scalar(x, "i32") for x in (ROTATE_BY_8, ALL, ALL)] + [k.scalar(1, "i1")]
        none = k.op("llvm.mlir.poison : i32", "i32")  # what it would keep where nothing comes
        turned = [
            k.intrinsic("amdgcn.update.dpp", [none, k.element(words, i), *given], "i32")
            for i in range(CHUNK // 2)
        ]
        return k.bitcast(k.vector(turned), numbers.dtype)

    def _scales(self, epsilon: float) -> Memory:
        """What the norm multiplies each row with; a wave has a row."""
        k, work, product = self._k, self._work, self._work.product
        lane, wave = k.thread() % LANES, k.thread() // LANES
        scales = k.shared(MAX_ROWS, "f32")
        for first in range(0, product.rows, WAVES):
            row = wave + first
            start = work.token(row) * product.depth
            squares = squares_of(k, work.x, start, product.depth, lane, LANES)
            scale = scale_of(k.reduce("add", squares), product.depth, epsilon)
            with k.when(lane.equals(0)):
                scales.store(scale, row)
        k.barrier()
        return scales
