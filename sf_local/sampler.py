"""Sampler: one row of logits and SamplingParams to the next token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sf_local.request import SamplingParams

BLOCK = 256


class Sampler:
    """Draws the tokens of one request: temperature, then top-k, then top-p, as SGLang does."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token id, from logits [V]."""
        if self.params.is_greedy:
            return int(logits.argmax())
        if self.params.top_k < 0 and self.params.top_p == 1:
            weights = np.exp((logits - logits.max()) * np.float32(1 / self.params.temperature))
            return _draw(weights, self._random.random())
        tokens, probabilities = candidates(logits, self.params)
        return int(tokens[_draw(probabilities, self._random.random())])


def _draw(weights: NDArray[np.floating], share: float) -> int:
    """The index at which the running sum of `weights` [n] passes `share` of the total.

    Sums of blocks come first, so that only one block is summed up entry by entry.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    threshold = share * sums[-1]
    block = min(int(np.searchsorted(sums, threshold, side="right")), len(sums) - 1)
    before = sums[block - 1] if block else 0.0
    inner = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    index = int(np.searchsorted(inner, threshold - before, side="right"))
    return block * BLOCK + min(index, len(inner) - 1)


def candidates(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn, and their unnormalized probabilities."""
    tokens = np.arange(len(logits))
    if 0 < params.top_k < len(logits):
        tokens = np.argpartition(logits, -params.top_k)[-params.top_k :]
        logits = logits[tokens]
    probabilities = np.exp((logits - np.float64(logits.max())) / params.temperature)
    if params.top_p < 1:
        keep = _nucleus(probabilities, params.top_p)
        tokens, probabilities = tokens[keep], probabilities[keep]
    return tokens, probabilities


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The fewest likeliest entries whose share reaches `top_p` (Holtzman et al. 2020)."""
    total = probabilities.sum()
    # All entries below this bound together hold less than 1 - top_p: no need to sort them.
    likely = np.flatnonzero(probabilities * len(probabilities) >= (1 - top_p) * total)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return order[: max(int(np.searchsorted(before, top_p * total)), 1)]
