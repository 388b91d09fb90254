"""How quantized rows lie in the memory of GPUs: every code, scale and minimum by its address."""

from __future__ import annotations

import numpy as np
import pytest

from compile.formats.blocks import BLOCK_TYPES, GROUP, BlockType, Groups
from compile.gpu.quantized import ROWS, column_bytes, group_bytes, group_offset, packed

COLS = 512


def random_groups(kind: BlockType, rows: int) -> Groups:
    rng = np.random.default_rng(0)
    groups = Groups.zeros(kind, rows, COLS)
    groups.codes[:] = rng.integers(0, 2**kind.bits, groups.codes.shape)
    for values in (*groups.numbers, *groups.factors):
        values[:] = rng.integers(0, 100, values.shape)
    return groups


def code_at(words: np.ndarray, bits: int, column: int) -> int:
    """The code of a column, from bytes of words of codes."""
    word, place = divmod(column, 32 // bits)
    shift = bits * (place // 2) + 16 * (place % 2)
    return int(words[4 * word : 4 * word + 4].view("<u4")[0]) >> shift & (1 << bits) - 1


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_every_number_is_where_kernels_look_for_it(kind: BlockType) -> None:
    groups = random_groups(kind, 3 * ROWS)
    data = packed(groups)
    assert data.shape == (3, COLS // kind.columns, column_bytes(kind))
    size = 1 if kind.has_super_blocks else 2
    rng = np.random.default_rng(1)
    for row, col in zip(
        rng.integers(3 * ROWS, size=200), rng.integers(COLS, size=200), strict=True
    ):
        stream, n, c = data[row // ROWS].reshape(-1), row % ROWS, col % GROUP
        group = stream[group_offset(kind, int(col // GROUP)) :][: group_bytes(kind)]
        low, high, numbers = np.split(group, [ROWS * kind.low_bytes, ROWS * kind.code_bytes])
        if kind.bits == 8:
            code = code_at(low[c // 16 * 256 + n * 16 :], 8, c % 16)
        else:
            code = code_at(low[n * 16 :], 4, c)
        if h := kind.high_bits:
            code |= code_at(high[n * 4 * h :], h, c) << 4
        assert code == groups.codes[row, col]
        found = numbers.view(groups.numbers[0].dtype).reshape(ROWS, -1)[n]
        assert len(found) * size * ROWS == len(numbers)
        assert found[c // kind.group] == groups.numbers[0][row, col // kind.group]
        if kind.has_minima:
            assert found[1] == groups.numbers[1][row, col // GROUP]
        if groups.factors:
            factors = data[row // ROWS, col // kind.columns][8 * group_bytes(kind) :].view("f2")
            found = factors.reshape(ROWS, -1)[n]
            assert [*found] == [values[row, col // kind.columns] for values in groups.factors]
