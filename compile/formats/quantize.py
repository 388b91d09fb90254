"""Quantizes floats to 8 and 4 bits, in groups of 32 that share a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import BLOCK_TYPES, GROUP, ZERO, Floats, Groups

_STEPS = (13.5, 14, 14.25, 14.5, 14.75, 15, 15.25, 15.5, 16, 16.5, 17)  # codes that span a group


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no number of an f32, f16 or bf16 array is NaN or infinite."""
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[values.dtype.name]
    bits: NDArray[Any] = values.view(np.uint32 if values.itemsize == 4 else np.uint16)
    return not ((bits & exponent) == exponent).any()


def quantized(rows: Floats, dtype: str) -> Groups:
    """Quantize finite rows [n, K] f32, K a multiple of 32, to "int8" or "int4".

    A scale is infinite where a group's weights are too large for f16 scales.
    """
    groups = rows.reshape(len(rows), -1, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, *numbers = _int8(groups) if dtype == "int8" else _int4(groups)
    return Groups(BLOCK_TYPES[dtype], codes.reshape(rows.shape), numbers)


def _int8(groups: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    exact = np.abs(groups).max(axis=-1) / 127
    scales = exact.astype(np.float16)
    # Near f16's end a scale rounds down by up to all of itself, and its weights would be cut.
    is_short = (scales < exact) & (scales < np.finfo(np.float16).smallest_normal)
    scales = np.where(is_short, np.nextafter(scales, np.float16(1)), scales)
    codes = np.rint(groups * _inverse(scales.astype(np.float32))[..., None])
    return (np.clip(codes, -127, 127) + ZERO).astype(np.uint8), scales


def _int4(
    groups: Floats,
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Try several grids for each group, fit scale and minimum by least squares, keep the best.

    As llama.cpp's k-quants do; larger weights count for more. groups: [n, K / 32, 32].
    """
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    is_too_large = np.maximum(np.abs(low), (high - low) / 15) > np.finfo(np.float16).max
    importance = np.abs(groups) + np.sqrt(np.mean(groups**2, axis=-1, keepdims=True))
    best_error = np.full(low.shape, np.inf, np.float32)
    best: list[NDArray[Any]] = [np.zeros(groups.shape, np.uint8)]
    best += [np.full(low.shape, np.inf, np.float16) for _ in range(2)]
    for steps in _STEPS:
        codes = _codes(groups, low, _inverse((high - low) / np.float32(steps)))
        for _ in range(2):
            scales, minima = _fitted(groups, codes, importance)
            codes = _codes(groups, minima.astype(np.float32), _inverse(scales.astype(np.float32)))
        values = codes * scales.astype(np.float32)[..., None] + minima.astype(np.float32)[..., None]
        error = (importance * (values - groups) ** 2).sum(axis=-1)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best[0] = np.where(is_better[..., None], codes.astype(np.uint8), best[0])
        best[1] = np.where(is_better, scales, best[1])
        best[2] = np.where(is_better, minima, best[2])
    # Overflow on the way can end in a fit that is finite, and far from the weights.
    return best[0], np.where(is_too_large, np.float16(np.inf), best[1]), best[2]


def _codes(groups: Floats, minima: Floats, inverse: Floats) -> Floats:
    codes: Floats = np.clip(np.rint((groups - minima[..., None]) * inverse[..., None]), 0, 15)
    return codes


def _fitted(
    groups: Floats, codes: Floats, importance: Floats
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Scale and minimum of each group that come nearest to it with these codes."""
    weight = importance.sum(axis=-1)
    x, y = (importance * codes).sum(axis=-1), (importance * groups).sum(axis=-1)
    xx = (importance * codes * codes).sum(axis=-1)
    xy = (importance * codes * groups).sum(axis=-1)
    scales = (weight * xy - x * y) * _inverse(weight * xx - x * x)
    minima = (y - scales * x) * _inverse(weight)
    return scales.astype(np.float16), minima.astype(np.float16)


def _inverse(x: Floats) -> Floats:
    """1 / x, and 0 for 0."""
    with np.errstate(divide="ignore"):
        return np.where(x == 0, np.float32(0), np.float32(1) / x).astype(np.float32)
