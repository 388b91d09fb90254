"""Sampler: one row of logits and SamplingParams to the next token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sf_local.request import SamplingParams


class Sampler:
    """Draws the tokens of one request: temperature, then top-k, then top-p, as SGLang does."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token id, from logits [V]."""
        if self.params.is_greedy:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, self.params)
        threshold = self._random.random() * probabilities.sum()
        drawn = int(np.searchsorted(np.cumsum(probabilities), threshold, side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])


def candidates(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn, likeliest first, and their unnormalized probabilities."""
    vocab_size = len(logits)
    top_k = vocab_size if params.top_k < 0 else min(params.top_k, vocab_size)
    if top_k < vocab_size:
        tokens = np.argpartition(logits, vocab_size - top_k)[vocab_size - top_k :]
    else:
        tokens = np.arange(vocab_size)
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    scaled = logits[tokens].astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled[0])
    if params.top_p < 1:
        # Keep a token while the mass before it is below top_p: the likeliest always stays.
        before = np.cumsum(probabilities) - probabilities
        keep = int(np.searchsorted(before, params.top_p * probabilities.sum()))
        tokens, probabilities = tokens[: max(keep, 1)], probabilities[: max(keep, 1)]
    return tokens, probabilities
