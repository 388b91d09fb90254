"""Log probabilities of tokens, as SGLang's server reports them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sf_local.request.output import Logprobs, Top
from sf_local.sampling.logits import WrongLogits, what_is_wrong


class PromptLogprobs:
    """Collects the log probabilities of tokens [start, end) of a prompt, in any chunks."""

    def __init__(self, prompt_ids: Sequence[int], start: int, num_top: int) -> None:
        self.prompt_ids, self.start, self._num_top = prompt_ids, start, num_top
        self._entries: list[tuple[float | None, Top | None]] = [(None, None)]

    def add(self, position: int, logits: NDArray[np.float32]) -> None:
        """Logits [n, V] after tokens `position` and on; what was there before is skipped.

        Raises WrongLogits.
        """
        first = self.start + len(self._entries)  # the token wanted next
        last = min(position + len(logits), len(self.prompt_ids) - 1)
        for token in range(first, last + 1):
            row = logits[token - 1 - position]
            peak = float(row.max())
            if what := what_is_wrong(peak):
                raise WrongLogits(f"{what} after position {token - 1}")
            total = peak + math.log(np.exp(row - peak).sum(dtype=np.float64))
            entry = float(row[self.prompt_ids[token]]) - total
            top = [(float(row[i]) - total, i) for i in likeliest(row, self._num_top).tolist()]
            self._entries.append((entry, top))

    def result(self) -> Logprobs:
        return Logprobs(
            self.prompt_ids[self.start : self.start + len(self._entries)],
            [entry for entry, _ in self._entries],
            [top for _, top in self._entries],
        )


def likeliest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The `count` largest of values [V], best first."""
    if not count:
        return np.empty(0, np.intp)
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    # So many blocks hold a value of at least ...: what is below is not among the largest.
    size = max(1, min(256, len(values) // (4 * count)))
    peaks = np.maximum.reduceat(values, np.arange(0, len(values), size))
    best = np.flatnonzero(values >= np.partition(peaks, -count)[-count])
    return best[np.argsort(-values[best], kind="stable")[:count]]
