"""Quantized weights: as near as their bits allow."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from compile.formats.blocks import GROUP
from compile.formats.layout import QUANTIZED
from compile.formats.quantize import quantized
from tests.support.quantized import plain_int4


def weights(rows: int = 64, cols: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square, over that of the weights."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def test_eight_bits_are_near() -> None:
    x = weights()
    assert error(quantized(x, "int8").dequantized(), x) < 0.006


def test_four_bits_are_nearer_than_from_minimum_to_maximum() -> None:
    x = weights()
    found = error(quantized(x, "int4").dequantized(), x)
    assert found < 0.08
    assert found < 0.95 * error(plain_int4(x), x)


@example("int8", 1.0132789611816406e-06, 0.0)  # scales that f16 rounds to 0, or down by a third
@example("int8", 1.13e-5, 0.0)
@given(st.sampled_from(QUANTIZED), st.floats(-1e4, 1e4, width=16), st.floats(0, 10, width=16))
def test_flat_groups_and_zeros(dtype: str, level: float, step: float) -> None:
    x = np.full((2, GROUP), level, np.float32)
    x[1, 0] += np.float32(step)
    found = quantized(x, dtype).dequantized()
    assert np.isfinite(found).all()
    assert np.abs(found - x).max() <= 0.01 * np.abs(x).max() + step / 14 + 1e-6
    assert not quantized(np.zeros((1, GROUP), np.float32), dtype).dequantized().any()


@example("int4", -1e5, 0.0)  # overflow on the way, of which a finite fit came out that was far off
@example("int4", -2e5, 3.0)
@given(st.sampled_from(QUANTIZED), st.floats(-1e7, 1e7), st.floats(-1e7, 1e7))
def test_large_weights_are_near_or_not_finite(dtype: str, one: float, other: float) -> None:
    x = weights(1, GROUP)
    x[0, [3, 9]] = one, other
    groups, span = quantized(x, dtype), float(x.max() - x.min())
    if groups.is_finite.all():
        assert np.abs(groups.dequantized() - x).max() <= span / 14 + 0.01 * np.abs(x).max()
    else:
        assert np.abs(x).max() > 65504
