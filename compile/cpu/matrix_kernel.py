"""MatrixKernel: a CPU kernel that multiplies rows of activations with a model's matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from compile.cpu.activations import Activations
from compile.cpu.amx import (
    COLUMNS,
    LINE_BYTES,
    LINES,
    LINES_AHEAD,
    MAX_ROWS,
    PANEL,
    Columns,
    TileRegisters,
)
from compile.cpu.kernel import KernelBuilder
from compile.cpu.matmul import Format
from compile.cpu.operands import Ahead
from compile.formats.blocks import GROUP
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.executable import Memory, Views, dispatch
from compile.mlir.values import Scalar
from compile.target import VECTORS_PER_BLOCK, Tuning

WORKGROUPS = 64  # at least one for each thread; those that find no task left return at once

Size = int | str  # a number, or the name of one that is known when the kernel is called
Use = Callable[[list[Scalar], Scalar, Scalar], None]  # of a product: use(sums, row, block)


@dataclass(frozen=True)
class Part:
    """Rows of a matrix, from block `first` on, that are a parameter of the archive."""

    name: str
    format: Format
    first: int


@dataclass(frozen=True)
class Matrix:
    """A matrix of size [N, K] whose blocks may differ in format.

    find(block): for a block and those after it up to one of `bounds`, where block 0 would begin if
    all were like it, in bytes, and the number of the format if there are several.
    """

    size: tuple[int, int]
    formats: Sequence[Format]
    find: Callable[[Scalar], tuple[Scalar, Scalar | None]]
    bounds: Sequence[int] = ()

    @classmethod
    def whole(cls, size: tuple[int, int], format_: Format, start: Scalar) -> Matrix:
        """A matrix of one format that begins at byte `start`."""
        return cls(size, [format_], lambda block: (start, None))


@dataclass(frozen=True)
class Task:
    """Rows low .. high - 1 of x [M, K] times blocks first .. last - 1 of a matrix [N, K].

    use(sums, row, block) gets the outputs of a block for a row and those after it, two f32 vectors
    for each row.
    """

    format: Format
    weight: Scalar  # the byte where block 0 begins
    cols: int
    x: Activations
    first: Scalar
    last: Scalar
    low: Scalar
    high: Scalar
    use: Use

    def block_at(self, block: Scalar) -> Scalar:
        """The first byte of a block."""
        return self.weight + block * self.format.block_bytes(self.cols)

    def next_block(self, row: Scalar, block: Scalar) -> Ahead:
        """What a product of `max_rows` rows prefetches while it reads a block.

        The first two products of a task prefetch a half of its next block each, and those after
        them the second half again. A task of fewer rows waits for memory anyway, and its last block
        has none after it: these ask for what is being read.
        """
        num_rows, num_steps = self.format.max_rows, -(-self.cols // self.format.step_columns)
        stride = -(-self.format.block_bytes(self.cols) // (2 * num_steps))
        half = ((row - self.low) // num_rows).minimum(1)
        distance = ((self.high - self.low) // (2 * num_rows)).minimum(1)
        start = self.block_at((block + distance).minimum(self.last - 1))
        return Ahead(start + half * (num_steps * stride), stride)


class MatrixKernel:
    """A kernel called `name`: `write` it into a module, `dispatch` it from functions.

    layers: the format of most matrices. A subclass binds `weights`, all parameters in one buffer,
    and `counters`, the tasks of the phases; with AMX it sets `amx`.
    """

    def __init__(self, name: str, layers: Format) -> None:
        self.name, self.layers, self.vectors = name, layers, layers.vectors
        self.k = KernelBuilder(has_bf16=self.vectors.has_dot)
        self.weights: Views
        self.counters: Memory
        self.amx: TileRegisters | None = None
        self.outputs: list[tuple[tuple[Size, ...], str]] = []

    def write(self, b: Builder) -> None:
        """Write the executable into module `b`."""
        self.k.write(b, self.name, WORKGROUPS)

    def layout(self) -> str:
        """The definition of the kernel's pipeline layout, a line before the module."""
        return f"#{self.name}_layout = {self.k.layout()}"

    def dispatch(
        self, b: Builder, constants: Sequence[Dim], inputs: Sequence[Tensor],
        changed: Sequence[Tensor], sizes: Mapping[str, Dim],
    ) -> list[Tensor]:  # fmt: skip
        """Call the kernel; returns the tensors `changed` in place, then the outputs.

        sizes: those that outputs name, e.g. "rows".
        """
        outputs = [
            Tensor("", tuple(sizes[d] if isinstance(d, str) else d for d in dims), dtype)
            for dims, dtype in self.outputs
        ]
        return dispatch(b, self.name, (), constants, inputs, changed, outputs)

    # Memory

    def output(self, dims: tuple[Size, ...], dtype: str = "f32") -> Views:
        """The dispatch's next result [dims], to be opened with the types it is used in."""
        self.outputs.append((dims, dtype))
        return Views(self.k, self.k.binding())

    def result(self, dims: tuple[Size, ...], dtype: str = "f32") -> Memory:
        """The dispatch's next result [dims], of one type."""
        return self.output(dims, dtype).open(dtype)[dtype]

    def activations(self, width: int, rows: Size = "padded_rows") -> Activations:
        """The dispatch's next result: activations [rows, width] for matrices of the layers."""
        views = self.output((rows, self.layers.activation_bytes(width)), "i8")
        return self.layers.activations(self.k, views, width)

    # Phases

    def phase(self, number: Scalar, num_tasks: Scalar) -> AbstractContextManager[Scalar]:
        """Phase `number`, whose tasks the workgroups share; yields the number of each task."""
        return self.k.phase(self.counters, number, num_tasks)

    def matmul(
        self, number: Scalar, matrix: Matrix, x: Activations, num_rows: Scalar, use: Use
    ) -> None:
        """Phase `number`: rows of x [M, K] times a matrix of size [N, K].

        use(sums, row, block): what becomes of outputs; see `Task`.
        """
        k, (size, cols) = self.k, matrix.size
        num_blocks, run = -(-size // self.vectors.block), self._blocks_of_task(matrix)
        num_runs, height = -(-num_blocks // run), self.vectors.tuning.row_chunk

        num_heights = (num_rows + (height - 1)) // height
        with self.phase(number, num_heights * num_runs) as number_of_task:
            first, low = number_of_task % num_runs * run, number_of_task // num_runs * height
            high = (low + height).minimum(num_rows)
            last = (first + run).minimum(k.scalar(num_blocks, "index"))
            weight, which = matrix.find(first)
            for i, format_ in enumerate(matrix.formats):
                task = Task(format_, weight, cols, x, first, last, low, high, use)
                with nullcontext() if which is None else k.when(which.equals(i)):
                    self._multiply(task)

    def _blocks_of_task(self, matrix: Matrix) -> int:
        num_blocks = -(-matrix.size[0] // self.vectors.block)
        block_bytes = max(format_.block_bytes(matrix.size[1]) for format_ in matrix.formats)
        most = blocks_of_task(num_blocks, block_bytes, self.vectors.tuning)
        return max(n for n in range(1, most + 1) if all(b % n == 0 for b in matrix.bounds))

    def _multiply(self, task: Task) -> None:
        if task.format.expands:
            self._expand_and_multiply(task)
        elif task.format.uses_amx and task.cols % COLUMNS == 0:
            self._multiply_amx(task)
        else:
            self._multiply_vectors(task)

    def _multiply_vectors(self, task: Task) -> None:
        def multiply(row: Scalar, num_rows: int, block: Scalar, count: int) -> None:
            rows = [row + r for r in range(num_rows)]
            starts = [task.block_at(block + i) for i in range(count)]
            ahead = task.next_block(row, block) if num_rows == task.format.max_rows else None
            sums = task.format.product(self.k, self.weights, starts, task.cols, task.x, rows, ahead)
            for i in range(count):
                first = i * VECTORS_PER_BLOCK
                task.use(sums[first : first + VECTORS_PER_BLOCK * num_rows], row, block + i)

        single = task.low + (task.high - task.low) // 2 * 2
        with self.k.loop(task.first, task.last) as block:
            self._in_groups(
                task.low, single, task.format.max_rows, 2, lambda i, n: multiply(i, n, block, 1)
            )
        with self.k.loop(single, task.high) as row:
            self._in_groups(
                task.first, task.last, task.format.blocks_at_once, 1,
                lambda i, n: multiply(row, 1, i, n),
            )  # fmt: skip

    def _multiply_amx(self, task: Task) -> None:
        """Block after block, while the next one comes from memory."""
        assert self.amx is not None
        k, amx, size = self.k, self.amx, task.format.block_bytes(task.cols)

        def multiply(block: Scalar, first: Scalar, count: int) -> None:
            """Rows from `first` on times a block."""
            start = task.block_at(block)
            fetched = (first - task.low) // MAX_ROWS * (task.cols // COLUMNS * LINES_AHEAD)
            columns = Columns(
                self.weights[task.format.operand.unit_dtype], start, task.cols,
                k.scalar(0, "index"), self.vectors.tuning.ahead,
                start + size + fetched * LINE_BYTES,
            )  # fmt: skip
            amx.multiply(columns, task.x, first, count // LINES)
            with k.loop(0, (task.high - first).minimum(k.scalar(count, "index"))) as row:
                task.use(amx.sums(row), first + row, block)

        with k.loop(task.first, task.last) as block:
            self._in_groups(
                task.low, task.low + _whole_tiles(task), MAX_ROWS, LINES,
                lambda first, count: multiply(block, first, count),
            )  # fmt: skip

    def _expand_and_multiply(self, task: Task) -> None:
        """Each block becomes bf16, a panel of columns after another, for all rows of the task."""
        assert self.amx is not None
        k, amx = self.k, self.amx
        num_panels = -(-task.cols // PANEL)
        width = padded(-(-task.cols // num_panels), COLUMNS)

        def add_panel(start: Scalar, first: Scalar, *, adds: bool) -> None:
            count = (k.scalar(task.cols, "index") - first).minimum(k.scalar(width, "index"))
            groups = first // GROUP, (first + count) // GROUP
            task.format.quantized.expand(
                k, self.weights, start, groups, amx.expanded, amx.expanded_at
            )
            columns = Columns(amx.expanded, amx.expanded_at * 4, count, first)
            self._in_groups(
                task.low, task.low + _whole_tiles(task), MAX_ROWS, LINES,
                lambda row, num_rows: amx.multiply(
                    columns, task.x, row, num_rows // LINES, row - task.low, adds=adds
                ),
            )  # fmt: skip

        with k.loop(task.first, task.last) as block:
            start = task.block_at(block)
            add_panel(start, k.scalar(0, "index"), adds=False)
            with k.loop(1, num_panels) as panel:
                add_panel(start, panel * width, adds=True)
            with k.loop(task.low, task.high) as row:
                task.use(amx.sums(row - task.low), row, block)

    def _in_groups(
        self, low: Scalar, high: Scalar, most: int, least: int, do: Callable[[Scalar, int], None]
    ) -> None:
        """do(first, count) from `low` to `high` in groups of `most`, then of half as many, down to
        `least`."""
        while most >= least:
            count = (high - low) // most
            with self.k.loop(0, count) as i:
                do(low + i * most, most)
            low = low + count * most
            most //= 2

    def each(self, sums: list[Scalar], row: Scalar, block: Scalar) -> list[tuple[Scalar, ...]]:
        """(vector, row, first output feature) of each vector that a product's `use` gets."""
        lanes = self.vectors.lanes
        return [
            (value, row + i // 2, block * self.vectors.block + i % 2 * lanes)
            for i, value in enumerate(sums)
        ]


def blocks_of_task(num_blocks: int, block_bytes: int, tuning: Tuning) -> int:
    """Blocks of a matrix that one task multiplies: one long stream is read faster than several
    short ones."""
    return max(1, min(tuning.task_bytes // block_bytes, num_blocks // tuning.min_tasks))


def _whole_tiles(task: Task) -> Scalar:
    """The rows of a task, with those that fill the last AMX tile."""
    return (task.high - task.low + (LINES - 1)) // LINES * LINES


def padded(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit
