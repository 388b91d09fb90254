"""GGUF blocks as they are carried over: gguf's own dequantize is the judge, to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile.formats.gguf_blocks import GGUF_BLOCKS, from_gguf
from tests.support.quantized import NUMBERS, Kind

ROWS, BLOCKS = 3, 4


def check(raw: np.ndarray, kind: str) -> None:
    """Rows [n, bytes]: the weights are gguf's, where scale and minimum are numbers."""
    groups = from_gguf(raw, kind)
    assert groups is not None
    with np.errstate(all="ignore"):  # scales that are no numbers
        expected = gguf.dequantize(raw, Kind[kind])
        found = groups.dequantized()
    is_number = groups.is_finite.repeat(groups.kind.columns, axis=1)
    if kind == "Q4_0":  # whose zeros have lost their sign, as it has become one with a minimum
        found, expected = found + 0, expected + 0
    bits = [np.where(is_number, x, 0).view(np.uint32) for x in (found, expected)]
    np.testing.assert_array_equal(*bits)
    assert (np.isfinite(expected) | ~is_number).all()


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
@given(st.integers(0))
@settings(max_examples=20)
def test_any_bytes(kind: str, seed: int) -> None:
    size = ROWS, BLOCKS * GGUF_BLOCKS[kind][1]
    check(np.random.default_rng(seed).integers(0, 256, size, np.uint8), kind)


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
@pytest.mark.parametrize("scale", [0.0, -0.0, 6e-8, -6e-8, 1.0, -1.5, 8000.0, -8000.0])
@pytest.mark.parametrize("byte", [0, 0x55, 0xAA, 0xFF])
def test_extremes(kind: str, scale: float, byte: int) -> None:
    """Scales of zero, below the normal, negative and large, with the smallest and largest codes."""
    raw = np.full((ROWS * BLOCKS, GGUF_BLOCKS[kind][1]), byte, np.uint8)
    for at in NUMBERS[Kind[kind]][:2]:
        raw[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    check(raw.reshape(ROWS, -1), kind)


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_scales_that_are_no_numbers(kind: str) -> None:
    raw = np.zeros((1, 2 * GGUF_BLOCKS[kind][1]), np.uint8)
    for at in NUMBERS[Kind[kind]][:2]:
        for value in (np.inf, -np.inf, np.nan):
            bad = raw.copy()
            bad[0, at : at + 2] = np.array([value], np.float16).view(np.uint8)
            groups = from_gguf(bad, kind)
            assert groups is not None and groups.is_finite.tolist() == [[False, True]]


def test_other_types_are_not() -> None:
    assert from_gguf(np.zeros((1, 84), np.uint8), "Q2_K") is None
