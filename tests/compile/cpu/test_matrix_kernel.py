"""What products of several rows prefetch, with numbers in the place of MLIR values."""

from __future__ import annotations

from typing import Any

import pytest

from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import Task
from compile.cpu.operands import LINE_BYTES
from compile.formats.blocks import BLOCK_TYPES
from compile.target import Vectors

VECTORS = (Vectors(4, 4), Vectors(8, 4), Vectors(16, 8), Vectors(16, 8, has_dot=True))
COLS = 768  # three super-blocks


class Number(int):
    """Computes as a `Scalar` is written."""

    def minimum(self, other: int) -> Number:
        return Number(min(self, other))

    def __add__(self, other: int) -> Number:
        return Number(int(self) + other)

    def __sub__(self, other: int) -> Number:
        return Number(int(self) - other)

    def __mul__(self, other: int) -> Number:
        return Number(int(self) * other)

    def __floordiv__(self, other: int) -> Number:
        return Number(int(self) // other)


class Lines(set[int]):
    """Memory of bytes; the cache lines that are prefetched."""

    def prefetch(self, index: int, *, level: int) -> None:
        self.add(index // LINE_BYTES)


def prefetched(format_: Format, num_rows: int, block: int) -> Lines:
    """While the rows are multiplied with a block of a task of blocks 0 to 2, `max_rows` at once."""
    numbers: Any = [Number(n) for n in (0, COLS, 0, 0, 3, 0, num_rows)]
    weight, cols, x, *bounds = numbers
    task, lines = Task(format_, weight, cols, x, *bounds, use=print), Lines()
    memory: Any = lines
    for row in range(0, num_rows // format_.max_rows * format_.max_rows, format_.max_rows):
        values: Any = Number(row), Number(block)
        ahead = task.next_block(*values)
        for step in range(COLS // format_.step_columns):
            number: Any = Number(step)
            ahead.prefetch(memory, 1, number)
    return lines


@pytest.mark.parametrize("vectors", VECTORS, ids=str)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", *BLOCK_TYPES])
def test_the_next_block_is_prefetched(dtype: str, vectors: Vectors) -> None:
    """All of it but for a line at its ends, and as good as nothing else."""
    format_ = Format(dtype, vectors)
    num_lines = format_.block_bytes(COLS) / LINE_BYTES
    for block, products, found in ((0, 2, 1), (1, 2, 2), (1, 5, 2), (2, 2, 2)):  # 2 is the last one
        lines = prefetched(format_, products * format_.max_rows + 1, block)
        inside = {n for n in lines if found * num_lines - 1 < n < (found + 1) * num_lines}
        assert len(inside) >= num_lines - 2
        assert len(lines - inside) <= num_lines / 50 + 1
    few = prefetched(format_, 2 * format_.max_rows - 1, 0)
    assert max(few) < num_lines  # what is read anyway
