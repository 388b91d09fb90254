"""PromptLogprobs: log probabilities of a prompt's tokens, as SGLang's server reports them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sf_local.request.output import Logprobs, TopTokens
from sf_local.sampling.logits import WrongLogits, what_is_wrong


class PromptLogprobs:
    """Collects the log probabilities of a prompt's tokens from `start` on, chunk by chunk.

    num_top: how many of the likeliest tokens to report with each.
    """

    def __init__(self, prompt_ids: Sequence[int], start: int, num_top: int) -> None:
        self.prompt_ids, self.start, self._num_top = prompt_ids, start, num_top
        self._logprobs: list[float | None] = [None]
        self._top: list[TopTokens | None] = [None]

    def add(self, position: int, logits: NDArray[np.float32]) -> None:
        """Add a chunk: the logits after each of its tokens [n, V], of which the first is at
        `position` in the prompt. Tokens that have been added already are skipped.

        Raises WrongLogits for NaN, +inf, and where no token is possible.
        """
        first = self.start + len(self._logprobs)  # the next token to add
        last = min(position + len(logits), len(self.prompt_ids) - 1)
        for token in range(first, last + 1):
            row = logits[token - 1 - position]
            peak = float(row.max())
            if what := what_is_wrong(peak):
                raise WrongLogits(f"{what} after position {token - 1}")
            total = peak + math.log(np.exp(row - peak).sum(dtype=np.float64))
            self._logprobs.append(float(row[self.prompt_ids[token]]) - total)
            top = likeliest(row, self._num_top)
            self._top.append(TopTokens(row[top].astype(np.float64) - total, top.astype(np.int32)))

    def result(self) -> Logprobs:
        """What was collected; the fields of the output are empty."""
        ids = self.prompt_ids[self.start : self.start + len(self._logprobs)]
        logprobs = Logprobs(ids, self._logprobs)
        logprobs.make_later("prompt_top", self._top)
        return logprobs


def likeliest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest of values [V], largest first."""
    if not count:
        return np.empty(0, np.intp)
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    # `count` blocks have a max of at least that peak, so no smaller value is among the largest.
    size = min(256, len(values) // (4 * count))
    peaks = values  # as blocks of less than 32 would cost more than they save
    if size >= 32:
        peaks = np.maximum.reduceat(values, np.arange(0, len(values), size))
    best = np.flatnonzero(values >= np.partition(peaks, -count)[-count])
    return best[np.argsort(-values[best], kind="stable")[:count]]
