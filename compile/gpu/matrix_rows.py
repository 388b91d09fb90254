"""Products of up to 16 rows with matrices on GPUs, by matrix instructions.

Shapes: T rows of activations [T, K]; N rows of a matrix [N, K], which are output features.

An instruction multiplies 16 rows of the matrix with 16 rows of activations, so that up to 16 of
these cost hardly more than one. Of a block of 16 rows of the matrix, a wave takes some groups of
32 columns at a time, 4 on gfx9 and 2 on gfx12: lane l has row l % 16 of group l / 16, as it lies in
memory, unpacks it if it is quantized, and multiplies it, a few columns at a time, with the same
columns of row l % 16 of the activations. (On gfx11 instructions want the same numbers in both
halves of a wave, which has one group.) Neither goes through local memory: the waves of a workgroup
share K, so that none needs what another has. At the end their sums are added up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add

from compile.formats.blocks import GROUP
from compile.gpu.kernel import ThreadBuilder
from compile.gpu.norm import scale_of, squares_of
from compile.gpu.parts import PartTile, num_tiles
from compile.gpu.quantized import ROWS
from compile.gpu.rows_product import Matrix, RowsProduct, Work
from compile.gpu.tiles import SIDE, Instruction
from compile.gpu.unpack import CHUNK
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar

MAX_ROWS = SIDE  # of activations that are multiplied together
THREADS = 512  # of a workgroup
UNITS = 304  # compute units of the largest chip, MI300X, each of which shall have a workgroup
ROTATE_BY_8, ALL = 0x128, 0xF  # DPP's control and masks: 16 lanes by 8, in all rows and banks
MOST_SUMS = 1 << 13  # that are added up at once
MAX_LOADS = 7  # of groups of the matrix, that are under way
MAX_BLOCKS = 6  # of rows of the matrix that a workgroup multiplies with the same activations


@dataclass(frozen=True)
class MatrixRows(RowsProduct):
    """Multiplies by matrix instructions, with a norm or without: `rows` is up to 16."""

    @property
    def name(self) -> str:
        """By everything that makes it differ."""
        return f"matrix_{super().name}"

    @property
    def threads(self) -> int:
        """Of a workgroup."""
        return THREADS

    @property
    def tile(self) -> int:
        """Rows of the matrix of a workgroup."""
        return ROWS * min(MAX_BLOCKS, -(-num_tiles(self.parts, ROWS) // UNITS))

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        work, blocks = Work(self, k), self.tile // ROWS
        tile = PartTile(k, self.parts, work.matrices, self.tile, k.workgroup())
        activations = _Activations(k, work)
        rounds = -(-work.num_groups // (activations.groups * activations.waves))
        unroll = next(n for n in (7, 4, 3, 2, 1) if rounds % n == 0 and n * blocks <= MAX_LOADS)
        zero = k.scalar(0.0, f"vector<{activations.instruction.sums}xf32>")

        def sums_of(matrix: Matrix) -> list[Scalar]:
            first_of_last = tile.last // ROWS * ROWS
            rows = [
                (tile.row + i * ROWS).minimum(first_of_last) + k.thread() % ROWS
                for i in range(blocks)
            ]
            return k.fold(
                0, rounds, [zero] * blocks,
                lambda first, *sums: self._groups(
                    k, activations, (matrix, rows), [first + i for i in range(unroll)], sums
                ),
                step=unroll,
            )  # fmt: skip

        sums = tile.choose(sums_of, [zero.dtype] * blocks)
        self._add_up(k, work, tile, sums)

    def _groups(
        self, k: ThreadBuilder, activations: _Activations,
        of: tuple[Matrix, Sequence[Scalar]], rounds: Sequence[Scalar],
        sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """The sums of blocks, with the thread's groups of these rounds more of a row of each."""
        sums, (matrix, rows), last = [*sums], of, k.scalar(of[0].num_groups - 1, "index")
        groups = [activations.group_of(number) for number in rounds]
        loaded = [[matrix.load(row, group.minimum(last)) for row in rows] for group in groups]
        for group, packed in zip(groups, loaded, strict=True):
            x = activations.operands(activations.of(group))
            for i, block in enumerate(packed):
                weights = activations.operands(matrix.unpack(block, self.dtype))
                for a, b in zip(weights, x, strict=True):
                    sums[i] = activations.instruction.multiply(k, a, b, sums[i])
        return sums

    def _add_up(
        self, k: ThreadBuilder, work: Work, tile: PartTile[Matrix], totals: Sequence[Scalar]
    ) -> None:  # fmt: skip
        """Add up what the waves have of blocks, as many at once as LDS has room for, and store."""
        thread, outputs, waves = k.thread(), ROWS // self.share, THREADS // k.subgroup
        most = min(len(totals), MOST_SUMS // (waves * self._kept * ROWS))
        parts = k.shared(waves * most * self._kept * ROWS, "f32")
        for start in range(0, len(totals), most):
            if start:
                k.barrier()
            blocks = len(totals[start : start + most])
            size = blocks * self._kept * ROWS
            self._keep(k, parts, thread // k.subgroup * size, totals[start : start + most])
            k.barrier()
            end = self.rows * blocks * outputs
            for first in range(0, end, THREADS):
                unit = thread + first
                row, block = unit // (blocks * outputs), unit // outputs % blocks
                feature = unit % outputs
                at = (block * self._kept + row) * ROWS + feature

                def output(behind: int, at: Scalar = at, size: int = size) -> Scalar:
                    return reduce(add, [parts.load(at + behind + i * size) for i in range(waves)])

                is_whole = first + THREADS <= end
                with nullcontext() if is_whole else k.when(unit.less(k.scalar(end, "index"))):
                    place = tile.place // self.share + (block + start) * outputs + feature
                    self.store(k, work, tile, row, place, output)

    def _keep(
        self, k: ThreadBuilder, parts: Memory, start: Scalar, totals: Sequence[Scalar]
    ) -> None:  # fmt: skip
        """Store a wave's sums of blocks from `start` on: [blocks, kept, 16].

        Lanes without a row store, too: LLVM would move matrix instructions into a branch for the
        others, and those of gfx11 want all lanes.
        """
        lane, instruction = k.thread() % k.subgroup, Instruction.of(k.chip)
        row = (lane % SIDE).minimum(self._kept - 1)
        for i, total in enumerate(totals):
            at = start + (row + i * self._kept) * ROWS
            if instruction.operand < SIDE:  # sums of rows side by side
                parts.store_vector(total, at + instruction.row(lane, 0))
                continue
            for n in range(instruction.sums):
                parts.store(k.element(total, n), at + instruction.row(lane, n))

    @property
    def _kept(self) -> int:
        """Rows of sums in LDS: those of activations, and one for all others."""
        return min(SIDE, self.rows + 1)


class _Activations:
    """A lane's operands of instructions: of row l % 16, or the last, of a workgroup's.

    waves: of a workgroup. groups: of 32 columns that one takes at once. Up to 8 rows, lane l + 8
    loads and normalizes half of what lane l needs, whose own operands nobody does.
    """

    def __init__(self, k: ThreadBuilder, work: Work) -> None:
        self._k, self._work, self._scale = k, work, None
        self.instruction, self.waves = Instruction.of(k.chip), THREADS // k.subgroup
        self._chunks = 2 if self.instruction.operand == SIDE else 1  # of an operand
        self.groups = k.subgroup // SIDE // self._chunks
        last = k.scalar(work.product.rows - 1, "index")
        self._is_shared = work.product.rows <= SIDE // 2
        row = (k.thread() % (SIDE // 2 if self._is_shared else SIDE)).minimum(last)
        self._token = work.token(row)
        if work.product.epsilon is not None:
            self._scale = self._scales(work.product.epsilon).load(row)

    def group_of(self, number: Scalar) -> Scalar:
        """Which group of columns the lane has in a round."""
        wave, lane = self._k.thread() // self._k.subgroup, self._k.thread() % self._k.subgroup
        return (number * self.waves + wave) * self.groups + lane // SIDE % self.groups

    def operands(self, chunks: Sequence[Scalar]) -> list[Scalar]:
        """The operands of instructions that 32 columns are, given as vectors of 8."""
        found = []
        for first in range(0, len(chunks), self._chunks):
            found += self.instruction.operands(self._k, chunks[first : first + self._chunks])
        return found

    def of(self, group: Scalar) -> list[Scalar]:
        """32 columns of the activations: four vectors of 8 numbers of the product's dtype."""
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
        lane, wave = k.thread() % k.subgroup, k.thread() // k.subgroup
        scales = k.shared(MAX_ROWS, "f32")
        for first in range(0, product.rows, self.waves):
            row = wave + first
            start = work.token(row) * product.depth
            squares = squares_of(k, work.x, start, product.depth, lane, k.subgroup)
            scale = scale_of(k.reduce("add", squares), product.depth, epsilon)
            with k.when(lane.equals(0)):
                scales.store(scale, row)
        k.barrier()
        return scales
