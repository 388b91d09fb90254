"""MatrixKernel: what kernels of CPUs have in common that multiply rows with a model's matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compile.cpu import amx as tiles
from compile.cpu.amx import Tiles
from compile.cpu.kernel import KernelBuilder, Memory, Views
from compile.cpu.matmul import Activations, Format
from compile.mlir.builder import Builder, Dim, Scalar, Tensor, tensor_type
from compile.target import TILES

WORKGROUPS = 64  # at least one a thread; those that find all done return at once
MIN_TASKS = 16  # of a matrix, or some threads would wait for others

Size = int | str  # a number, or the name of one that is known when the kernel is called


@dataclass(frozen=True)
class Task:
    """Rows low .. high - 1 of x [M, K] times blocks first .. last - 1 of a matrix [N, K].

    use(sums, row, block): what becomes of a block's outputs, two f32 vectors a row.
    """

    format: Format
    weight: Scalar  # the matrix's first byte
    cols: int
    x: Activations
    first: Scalar
    last: Scalar
    low: Scalar
    high: Scalar
    use: Callable[[list[Scalar], Scalar, Scalar], None]

    def block_at(self, block: Scalar) -> Scalar:
        return self.weight + block * self.format.block_bytes(self.cols)


class MatrixKernel:
    """A kernel called `name`, most of whose matrices are of `layers`: `write` it into a module,
    `dispatch` it from functions. Phases count tasks in `counters`."""

    def __init__(self, name: str, layers: Format) -> None:
        self.name, self.layers, self.vectors = name, layers, layers.vectors
        self.k = KernelBuilder(has_bf16=self.vectors.has_dot)
        self.weights: Views
        self.counters: Memory
        self.tiles: Tiles | None = None
        self._outputs: list[tuple[tuple[Size, ...], str]] = []

    def write(self, b: Builder) -> None:
        self.k.write(b, self.name, WORKGROUPS)

    def layout(self) -> str:
        return f"#{self.name}_layout = {self.k.layout()}"

    def dispatch(
        self, b: Builder, constants: Sequence[Dim], inputs: Sequence[Tensor],
        changed: Sequence[Tensor], sizes: Mapping[str, Dim],
    ) -> list[Tensor]:  # fmt: skip
        """Call it with indices, tensors, and tensors that it changes; those, then the outputs."""
        numbers = [b.index(d).to("i32") for d in constants]
        arguments = [*inputs, *changed]
        outputs = [
            Tensor("", tuple(sizes[d] if isinstance(d, str) else d for d in dims), dtype)
            for dims, dtype in self._outputs
        ]
        operands = ", ".join([*(x.name for x in numbers), *(x.name for x in arguments)])
        types = ", ".join(["i32"] * len(numbers) + [_sized(x) for x in arguments])
        results = ", ".join([*(_in_place(x) for x in changed), *(_sized(t) for t in outputs)])
        name = b.fresh()
        b.emit(
            f"{name}:{len(changed) + len(outputs)} = flow.dispatch @{self.name}::@{self.name}"
            f"({operands}) : ({types}) -> ({results})"
        )
        return [Tensor(f"{name}#{i}", t.shape, t.dtype) for i, t in enumerate([*changed, *outputs])]

    # Memory

    def _output(self, dims: tuple[Size, ...], dtype: str = "f32") -> Views:
        self._outputs.append((dims, dtype))
        return Views(self.k, self.k.binding())

    def _result(self, dims: tuple[Size, ...], dtype: str = "f32") -> Memory:
        return self._output(dims, dtype).open(dtype)[dtype]

    def _activations(self, width: int) -> Activations:
        return self._activations_of("tiled", width)

    def _activations_of(self, rows: Size, width: int) -> Activations:
        views = self._output((rows, Activations.bytes_of_row(self.layers, width)), "i8")
        return Activations(self.k, views, self.layers, width)

    # Matrix products

    def _matmul(
        self,
        number: Scalar,
        weight: Scalar,
        size: tuple[int, int],
        x: Activations,
        num_rows: Scalar,
        use: Callable[[list[Scalar], Scalar, Scalar], None],
        format_: Format | None = None,
    ) -> None:
        """Rows of x [M, K] times a matrix [N, K]: `use(sums, row, block)`, two vectors a row."""
        k, format_ = self.k, format_ or self.layers
        num_blocks, block_bytes = -(-size[0] // self.vectors.block), format_.block_bytes(size[1])
        tuning = self.vectors.tuning
        # One long stream of weights is read faster than several short ones.
        run = max(1, min(tuning.task_bytes // block_bytes, num_blocks // MIN_TASKS))
        num_runs, row_chunk = -(-num_blocks // run), tuning.row_chunk

        chunks = (num_rows + (row_chunk - 1)) // row_chunk
        with k.phase(self.counters, number, chunks * num_runs) as number_of_task:
            first, low = number_of_task % num_runs * run, number_of_task // num_runs * row_chunk
            high = (low + row_chunk).minimum(num_rows)
            last = (first + run).minimum(k.scalar(num_blocks, "index"))
            task = Task(format_, weight, size[1], x, first, last, low, high, use)
            if format_.is_tiled and size[1] % tiles.COLUMNS == 0:
                self._multiply_tiles(task)
            else:
                self._multiply_vectors(task)

    def _multiply_vectors(self, task: Task) -> None:
        def multiply(row: Scalar, num_rows: int, block: Scalar, count: int) -> None:
            rows = [row + r for r in range(num_rows)]
            starts = [task.block_at(block + i) for i in range(count)]
            sums = task.format.product(self.k, self.weights, starts, task.cols, task.x, rows)
            for i in range(count):
                task.use(sums[i * TILES :][: TILES * num_rows], row, block + i)

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

    def _multiply_tiles(self, task: Task) -> None:
        assert self.tiles is not None
        used = self.tiles

        def multiply(first: Scalar, count: int) -> None:
            """All blocks, so that what is written lies in few pages of memory."""
            rows = (task.high - first).minimum(self.k.scalar(count, "index"))
            with self.k.loop(task.first, task.last) as block:
                start, num_tiles = task.block_at(block), count // tiles.LINES
                used.multiply(task.format, self.weights, start, task.cols, task.x, first, num_tiles)
                with self.k.loop(0, rows) as row:
                    task.use(used.sums(row), first + row, block)

        height = (task.high - task.low + (tiles.LINES - 1)) // tiles.LINES * tiles.LINES
        most = tiles.MOST * tiles.LINES
        self._in_groups(task.low, task.low + height, most, tiles.LINES, multiply)

    def _in_groups(
        self, low: Scalar, high: Scalar, most: int, least: int, do: Callable[[Scalar, int], None]
    ) -> None:
        """From `low` to `high` in groups of `most`, then of half as many, down to `least`."""
        while most >= least:
            count = (high - low) // most
            with self.k.loop(0, count) as i:
                do(low + i * most, most)
            low = low + count * most
            most //= 2

    def _each(self, sums: list[Scalar], row: Scalar, block: Scalar) -> list[tuple[Scalar, ...]]:
        """(value, row, first output feature) of each vector."""
        lanes = self.vectors.lanes
        return [
            (value, row + i // 2, block * self.vectors.block + i % 2 * lanes)
            for i, value in enumerate(sums)
        ]


def padded(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


def _sized(x: Tensor) -> str:
    """Its type with the sizes of dynamic dimensions."""
    dynamic = ", ".join(d for d in x.shape if isinstance(d, str))
    return tensor_type(x.shape, x.dtype) + (f"{{{dynamic}}}" if dynamic else "")


def _in_place(x: Tensor) -> str:
    """A result that is the argument `x`."""
    dynamic = ", ".join(d for d in x.shape if isinstance(d, str))
    return x.name + (f"{{{dynamic}}}" if dynamic else "")
