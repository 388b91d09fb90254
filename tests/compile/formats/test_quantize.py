"""Quantized weights: as near as their bits allow, GGUF blocks as they are, and how they lie."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compile.formats.quantize import GROUP, ZERO, Groups, from_gguf, packed, quantized, with_bits
from tests.support.quantized import plain_int4


def weights(rows: int = 64, cols: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square, over that of the weights."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def test_eight_bits_are_near() -> None:
    x = weights()
    assert error(quantized(x, 8).dequantized(), x) < 0.006


def test_four_bits_are_nearer_than_from_minimum_to_maximum() -> None:
    x = weights()
    found = error(quantized(x, 4).dequantized(), x)
    assert found < 0.08
    assert found < 0.95 * error(plain_int4(x), x)


@example(8, 1.0132789611816406e-06, 0.0)  # scales that f16 rounds to 0, or down by a third
@example(8, 1.13e-5, 0.0)
@given(st.sampled_from([8, 4]), st.floats(-1e4, 1e4, width=16), st.floats(0, 10, width=16))
def test_flat_groups_and_zeros(bits: int, level: float, step: float) -> None:
    x = np.full((2, GROUP), level, np.float32)
    x[1, 0] += np.float32(step)
    found = quantized(x, bits).dequantized()
    assert np.isfinite(found).all()
    assert np.abs(found - x).max() <= 0.01 * np.abs(x).max() + step / 14 + 1e-6
    assert not quantized(np.zeros((1, GROUP), np.float32), bits).dequantized().any()


@example(4, -1e5, 0.0)  # overflow on the way, of which a finite fit came out that was far off
@example(4, -2e5, 3.0)
@given(st.sampled_from([8, 4]), st.floats(-1e7, 1e7), st.floats(-1e7, 1e7))
def test_large_weights_are_near_or_not_finite(bits: int, one: float, other: float) -> None:
    x = weights(1, GROUP)
    x[0, [3, 9]] = one, other
    groups, span = quantized(x, bits), float(x.max() - x.min())
    if groups.is_finite.all():
        assert np.abs(groups.dequantized() - x).max() <= span / 14 + 0.01 * np.abs(x).max()
    else:
        assert np.abs(x).max() > 65504


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_blocks_are_carried_over(kind: str) -> None:
    """The very weights that gguf dequantizes."""
    number = gguf.GGMLQuantizationType[kind]
    raw = gguf.quantize(weights(), number)
    groups = from_gguf(raw, kind)
    assert groups is not None and groups.bits == (8 if kind == "Q8_0" else 4)
    np.testing.assert_array_equal(groups.dequantized(), gguf.dequantize(raw, number))
    assert with_bits(groups, groups.bits) is groups
    other = with_bits(groups, 12 - groups.bits)
    assert error(other.dequantized(), groups.dequantized()) < (0.006 if other.bits == 8 else 0.09)


def test_other_gguf_types_are_not() -> None:
    raw = gguf.quantize(weights(), gguf.GGMLQuantizationType.Q5_0)
    assert from_gguf(raw, "Q5_0") is None


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("unit", [1, 4])
def test_packed(bits: int, unit: int) -> None:
    """Every code, scale and minimum lies where the kernel looks for it."""
    block, rows, cols = 8, 16, 64
    groups = quantized(weights(rows, cols), bits)
    found = packed(groups, block, unit)
    num_codes = GROUP * block * bits // 8
    assert found.shape == (rows // block, cols // GROUP, num_codes + 2 * block * (12 - bits) // 4)
    for row, col in [(0, 0), (5, 1), (9, 33), (15, 63), (12, 38)]:
        group = found[row // block, col // GROUP]
        n, c = row % block, col % GROUP
        if bits == 8:
            code = group[c // unit * block * unit + n * unit + c % unit]
        else:
            half = block // 2
            both = group[c // unit * half * unit + n % half * unit + c % unit]
            code = both >> 4 if n >= half else both & 15
        assert code == groups.codes[row, col]
        numbers = group[num_codes:].copy().view(np.float16)
        assert numbers[n] == groups.scales[row, col // GROUP]
        if groups.minima is not None:
            assert numbers[block + n] == groups.minima[row, col // GROUP]


def test_zero_code() -> None:
    groups = Groups(np.full((1, GROUP), ZERO, np.uint8), np.ones((1, 1), np.float16))
    assert not groups.dequantized().any()
