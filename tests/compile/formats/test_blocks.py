"""How quantized rows lie in memory: every code, scale and minimum where kernels look for it."""

from __future__ import annotations

import numpy as np
import pytest

from compile.formats.blocks import BLOCK_TYPES, GROUP, BlockType, Groups, packed

BLOCK, ROWS, COLS = 8, 16, 512


def random_groups(kind: BlockType) -> Groups:
    rng = np.random.default_rng(0)
    groups = Groups.zeros(kind, ROWS, COLS)
    groups.codes[:] = rng.integers(0, 2**kind.bits, groups.codes.shape)
    for values in (*groups.numbers, *groups.factors):
        values[:] = rng.integers(0, 100, values.shape)
    return groups


def number(data: np.ndarray, at: int, index: int, dtype: str) -> float:
    size = np.dtype(dtype).itemsize
    start = at + index * size
    return float(data[start : start + size].view(dtype)[0])


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
@pytest.mark.parametrize("unit", [1, 4])
def test_packed(kind: BlockType, unit: int) -> None:
    groups = random_groups(kind)
    data = packed(groups, BLOCK, unit)
    assert data.shape == (ROWS // BLOCK, COLS // kind.columns, kind.stored_bytes * BLOCK)
    integer = "i1" if kind.has_signed_scales else "u1"
    h, num_parts = kind.high_bits, GROUP // kind.group
    for row, col in [(0, 0), (5, 1), (9, 33), (15, 511), (12, 302), (3, 17), (4, 255), (7, 286)]:
        stored = data[row // BLOCK, col // kind.columns]
        group = stored[col % kind.columns // GROUP * kind.group_bytes * BLOCK :]
        n, c = row % BLOCK, col % GROUP
        q, b = divmod(c, unit)
        if kind.bits == 8:
            code = int(group[q * BLOCK * unit + n * unit + b])
        else:
            half = BLOCK // 2
            both = int(group[q * half * unit + n % half * unit + b])
            code = both >> 4 if n >= half else both & 15
        if h:
            plane, place = divmod(q, 8 // h)
            high = int(group[kind.low_bytes * BLOCK + (plane * BLOCK + n) * unit + b])
            code |= (high >> place * h & (2**h - 1)) << 4
        assert code == groups.codes[row, col]
        for i, numbers in enumerate(groups.numbers):
            which = c // kind.group if i == 0 else num_parts
            dtype = integer if kind.has_super_blocks else "f2"
            found = number(group, kind.code_bytes * BLOCK, which * BLOCK + n, dtype)
            assert found == numbers[row, col // kind.group]
        for i, factors in enumerate(groups.factors):
            found = number(stored, 8 * kind.group_bytes * BLOCK, i * BLOCK + n, "f2")
            assert found == factors[row, col // kind.columns]


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_zeros(kind: BlockType) -> None:
    groups = Groups.zeros(kind, 2, 512)
    assert not groups.dequantized().any()
    for values in (groups.numbers[0], *groups.factors[:1]):
        values[:] = 1
    assert not groups.dequantized().any()


def test_put() -> None:
    """Into the first columns; the others stay zero."""
    kind = BLOCK_TYPES["q4_k"]
    groups, other = Groups.zeros(kind, ROWS, 2 * COLS), random_groups(kind)
    groups.put(slice(0, ROWS), other)
    found = groups.dequantized()
    np.testing.assert_array_equal(found[:, :COLS], other.dequantized())
    assert not found[:, COLS:].any()
