"""Rotary position embeddings (Su et al. 2021): the table of cosines and sines."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from compile.models.spec import LlamaConfig

ROPE_BLOCK = 8192  # positions that are computed at once


def rope_table(config: LlamaConfig, start: int, end: int) -> NDArray[np.float32]:
    """Cosines and sines of positions start to end - 1: [end - start, 2, head_dim / 2]."""
    angles = np.arange(start, end)[:, None] * rope_frequencies(config)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rope_frequencies(config: LlamaConfig) -> NDArray[np.float64]:
    """Radians a position, scaled as in transformers: [head_dim / 2]."""
    half = config.head_dim // 2
    frequencies: NDArray[np.float64] = config.rope_theta ** (-np.arange(half) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        return frequencies / np.asarray(scaling.factors, np.float64)
    # llama3: the share of the unscaled frequency grows with the turns made in the old context
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0, 1)
    stretched: NDArray[np.float64] = frequencies * (share + (1 - share) / scaling.factor)
    return stretched
