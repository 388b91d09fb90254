"""What follows the last tokens of a call's rows: logits, and what sums them up.

Compiled functions sum up where the logits are made; `summarize` does the same here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # tokens that are summed up together
LOWEST = np.float32(-1e30)  # finite: the maximum of a block in which nothing is possible

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ModelOutput:
    """Logits [n, V] after the last token of each row; the last rows may have none.

    best [n]: the first of the likeliest tokens. maxima, sums [n, ceil(V / BLOCK)]: of each block of
    tokens, the largest logit, and the sum of exp((logit - maximum) * scale) by the row's scale.
    """

    logits: Floats
    best: NDArray[np.int64]
    maxima: Floats
    sums: Floats

    def take(self, rows: Sequence[int] | slice) -> ModelOutput:
        """Some rows, by number."""
        arrays = (self.logits, self.best, self.maxima, self.sums)
        return ModelOutput(*(_rows(array, rows) for array in arrays))


def _rows(array: NDArray[Any], rows: Sequence[int] | slice) -> NDArray[Any]:
    """Those of the rows that the array has."""
    if isinstance(rows, slice) or not rows or rows[-1] < len(array):
        return array[rows]
    return array[[i for i in rows if i < len(array)]]


class WrongLogits(Exception):
    """What a device returned cannot be logits; the message says what it was."""


def what_is_wrong(largest: float) -> str | None:
    """What the largest of some logits says that they cannot be; None if they can.

    Single logits of -inf are impossible tokens, but some token must be possible.
    """
    if math.isnan(largest):
        return "NaN among the logits"
    if largest == math.inf:
        return "+inf among the logits"
    return "no finite logit" if largest <= LOWEST else None


def find_wrong(following: ModelOutput, vocab_size: int | None) -> dict[int, str]:
    """What is wrong with rows, by number, as their best tokens, maxima and sums tell.

    A NaN makes the sum of its block NaN, where a GPU's maximum may pass over it. vocab_size: None
    if it is unknown.
    """
    num_tokens = following.maxima.shape[1] * BLOCK if vocab_size is None else vocab_size
    tops, totals = following.maxima.max(axis=1), following.sums.sum(axis=1)
    wrong: dict[int, str] = {}
    for i, (token, top, total) in enumerate(
        zip(following.best.tolist(), tops.tolist(), totals.tolist(), strict=True)
    ):
        is_token = 0 <= token < num_tokens
        if is_token and LOWEST < top < math.inf and 0 < total < math.inf:
            continue
        what = what_is_wrong(total if math.isnan(total) and top != math.inf else top)
        if what is None and is_token:
            what = f"{total:g} as the sum of all weights"
        wrong[i] = what or f"token {token} of a vocabulary of {num_tokens}"
    return wrong


def unpack(logits: Floats, packed: Floats) -> ModelOutput:
    """From logits, and one array of the best tokens, the maxima and the sums, as GPUs return."""
    num_blocks = packed.shape[1] // 2
    with np.errstate(invalid="ignore"):  # NaN becomes no token
        best = packed[:, 0].astype(np.int64)
    return ModelOutput(logits, best, packed[:, 1 : 1 + num_blocks], packed[:, 1 + num_blocks :])


def summarize(logits: Floats, scales: Floats) -> ModelOutput:
    """Sum up logits [n, V] by scales [n]."""
    n, width = logits.shape
    blocks = logits
    if width % BLOCK:
        blocks = np.full((n, -(-width // BLOCK) * BLOCK), -np.inf, np.float32)
        blocks[:, :width] = logits
    blocks = blocks.reshape(n, -1, BLOCK)
    maxima = np.maximum(blocks.max(axis=2), LOWEST)
    with np.errstate(invalid="ignore"):  # +inf is found in the maxima
        weights = blocks - maxima[:, :, None]
    weights *= scales[:, None, None]
    sums = np.exp(weights, out=weights).sum(axis=2)
    return ModelOutput(logits, logits.argmax(axis=1), maxima, sums)


def spread(values: Floats, ids: NDArray[np.int64]) -> Floats:
    """Logits [n, V] with `values` [n, k] at `ids` [n, k]; -inf for the tokens between."""
    logits = np.full((len(ids), int(ids.max()) + 1), -np.inf, np.float32)
    np.put_along_axis(logits, ids, values, axis=1)
    return logits
