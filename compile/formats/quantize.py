"""Weights of 8 and 4 bits, in groups of 32 that share a scale.

They are quantized here from floats, or taken as they are from the blocks of a GGUF. A weight is
scale * (code - 128) with 8 bits and scale * code + minimum with 4, as in GGUF's Q8_0 and Q4_1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # weights of a row that share a scale
ZERO = 128  # the 8-bit code of 0
_STEPS = (13.5, 14, 14.25, 14.5, 14.75, 15, 15.25, 15.5, 16, 16.5, 17)  # codes that span a group

GGUF_BLOCKS = {"Q8_0": (8, 34), "Q4_0": (4, 18), "Q4_1": (4, 20)}  # bits, and bytes of a block

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Groups:
    """Quantized rows: codes [rows, K] u8, scales and, with 4 bits, minima [rows, K / 32] f16."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None = None

    @property
    def bits(self) -> int:
        """8 or 4, of a code."""
        return 8 if self.minima is None else 4

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """Of which groups the scale, and the minimum, is a number: [rows, K / 32]."""
        is_finite = np.isfinite(self.scales)
        return is_finite if self.minima is None else is_finite & np.isfinite(self.minima)

    def dequantized(self) -> Floats:
        """The weights [rows, K] f32."""
        codes = self.codes.reshape(len(self.codes), -1, GROUP).astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.minima is None:
            values = (codes - ZERO) * scales
        else:
            values = codes * scales + self.minima.astype(np.float32)[..., None]
        return values.reshape(self.codes.shape)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no number of an f32, f16 or bf16 array is NaN or infinite."""
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[values.dtype.name]
    bits: NDArray[Any] = values.view(np.uint32 if values.itemsize == 4 else np.uint16)
    return not ((bits & exponent) == exponent).any()


def quantized(rows: Floats, bits: int) -> Groups:
    """Quantize finite rows [n, K] f32, K a multiple of 32, to 8 or 4 bits.

    A scale is infinite where a group's weights are too large for f16 scales.
    """
    groups = rows.reshape(len(rows), -1, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, scales, minima = _int8(groups) if bits == 8 else _int4(groups)
    return Groups(codes.reshape(rows.shape), scales, minima)


def _int8(groups: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16], None]:
    exact = np.abs(groups).max(axis=-1) / 127
    scales = exact.astype(np.float16)
    # Near f16's end a scale rounds down by up to all of itself, and its weights would be cut.
    is_short = (scales < exact) & (scales < np.finfo(np.float16).smallest_normal)
    scales = np.where(is_short, np.nextafter(scales, np.float16(1)), scales)
    codes = np.rint(groups * _inverse(scales.astype(np.float32))[..., None])
    return (np.clip(codes, -127, 127) + ZERO).astype(np.uint8), scales, None


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


def from_gguf(raw: NDArray[np.uint8], kind: str) -> Groups | None:
    """Rows [n, bytes] of GGUF blocks of type Q8_0, Q4_0 or Q4_1, not quantized anew.

    None for other types. Q4_0 is scale * (code - 8), so its minimum is -8 * scale, exact in f16.
    """
    if kind not in GGUF_BLOCKS:
        return None
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, GGUF_BLOCKS[kind][1])
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if kind == "Q8_0":
        codes = blocks[..., 2:] ^ np.uint8(ZERO)  # two's complement to an offset of 128
        return Groups(codes.reshape(len(raw), -1), scales)
    with np.errstate(over="ignore"):
        minima = scales * np.float16(-8)
    if kind == "Q4_1":
        minima = blocks[..., 2:4].copy().view(np.float16)[..., 0]
    packed = blocks[..., -16:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return Groups(codes.reshape(len(raw), -1), scales, minima)


def with_bits(groups: Groups, bits: int) -> Groups:
    """The same weights in 8 or 4 bits: unchanged if they have so many, else quantized anew."""
    return groups if groups.bits == bits else quantized(groups.dequantized(), bits)


def packed(groups: Groups, block: int, unit: int) -> NDArray[np.uint8]:
    """Rows in blocks of `block`, as CPU kernels read them: [rows / block, K / 32, bytes] u8.

    Each group has `unit` codes of every row of the block, then the next `unit`; then the rows'
    scales in f16, then their minima. With 4 bits a byte holds two codes: in its low bits that of a
    row in the first half of the block, in its high bits that of the row block / 2 further on.
    """
    rows, cols = groups.codes.shape
    shape = (rows // block, block, cols // GROUP, GROUP // unit, unit)
    codes = groups.codes.reshape(shape).transpose(0, 2, 3, 1, 4)  # [blocks, groups, 32/u, block, u]
    if groups.bits == 4:
        codes = codes[..., : block // 2, :] | (codes[..., block // 2 :, :] << 4)
    parts = [codes.reshape(rows // block, cols // GROUP, -1)]
    for numbers in (groups.scales, groups.minima):
        if numbers is not None:
            turned = numbers.reshape(rows // block, block, -1).transpose(0, 2, 1)
            parts.append(np.ascontiguousarray(turned).view(np.uint8))
    return np.concatenate(parts, axis=-1)
