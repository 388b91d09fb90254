"""ModelOutput: logits of a model call, with a summary of each block of 256 of them.

Compiled functions make the summary on the device; `summarize` does the same here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.manifest import LOGITS_BLOCK

LOWEST = np.float32(-1e30)  # the max of a block without possible tokens; finite, so never NaN

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ModelOutput:
    """Output of one model call: logits after each row's last token, and a summary of them, so that
    the sampler reads only the blocks of logits it needs.

    Attributes:
        logits: f32 [m, V], of the first m <= n rows only.
        best: the token with the largest logit, the first if there are several, int64 [n].
        maxima: of each block of logits, the max, f32 [n, ceil(V / LOGITS_BLOCK)].
        sums: of each block of logits, the sum of exp((logit - max) * inv_temperature), by the row's
            inverse temperature, f32 [n, ceil(V / LOGITS_BLOCK)].
    """

    logits: Floats
    best: NDArray[np.int64]
    maxima: Floats
    sums: Floats

    def take(self, rows: Sequence[int] | slice) -> ModelOutput:
        """Rows by index, ascending."""
        arrays = (self.logits, self.best, self.maxima, self.sums)
        return ModelOutput(*(_rows(array, rows) for array in arrays))


def _rows(array: NDArray[Any], rows: Sequence[int] | slice) -> NDArray[Any]:
    """Those of the rows that the array has: of the logits, the last rows may be missing."""
    if isinstance(rows, slice) or not rows or rows[-1] < len(array):
        return array[rows]
    return array[[i for i in rows if i < len(array)]]


class WrongLogits(Exception):
    """What a device returned cannot be logits; the message says what was found."""


def what_is_wrong(largest: float) -> str | None:
    """What is wrong with logits whose max is `largest`; None if nothing is.

    Logits of -inf are allowed, for impossible tokens, but some token must be possible.
    """
    if math.isnan(largest):
        return "NaN among the logits"
    if largest == math.inf:
        return "+inf among the logits"
    return "no finite logit" if largest <= LOWEST else None


def find_wrong(output: ModelOutput, vocab_size: int | None) -> dict[int, str]:
    """What is wrong with rows, by their index; rows that are fine are left out.

    Judged by the summary alone: a NaN among the logits makes the sum of its block NaN, while the
    max of a GPU may ignore it. vocab_size: None if unknown.
    """
    num_tokens = output.maxima.shape[1] * LOGITS_BLOCK if vocab_size is None else vocab_size
    tops, totals = output.maxima.max(axis=1), output.sums.sum(axis=1)
    wrong: dict[int, str] = {}
    for i, (token, top, total) in enumerate(
        zip(output.best.tolist(), tops.tolist(), totals.tolist(), strict=True)
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
    """A ModelOutput as code for GPUs returns it.

    packed: the best token, the maxima and the sums of each row, f32 [n, 1 + 2 * blocks].
    """
    num_blocks = packed.shape[1] // 2
    with np.errstate(invalid="ignore"):  # NaN becomes no token
        best = packed[:, 0].astype(np.int64)
    return ModelOutput(logits, best, packed[:, 1 : 1 + num_blocks], packed[:, 1 + num_blocks :])


def summarize(logits: Floats, inv_temperatures: Floats) -> ModelOutput:
    """The ModelOutput of logits [n, V] for inverse temperatures [n]."""
    n, width = logits.shape
    blocks = logits
    if width % LOGITS_BLOCK:
        blocks = np.full((n, -(-width // LOGITS_BLOCK) * LOGITS_BLOCK), -np.inf, np.float32)
        blocks[:, :width] = logits
    blocks = blocks.reshape(n, -1, LOGITS_BLOCK)
    maxima = np.maximum(blocks.max(axis=2), LOWEST)
    with np.errstate(invalid="ignore"):  # +inf is found in the maxima
        weights = blocks - maxima[:, :, None]
    weights *= inv_temperatures[:, None, None]
    sums = np.exp(weights, out=weights).sum(axis=2)
    return ModelOutput(logits, logits.argmax(axis=1), maxima, sums)


def spread(values: Floats, ids: NDArray[np.int64]) -> Floats:
    """Logits [n, max(ids) + 1] with `values` [n, k] at `ids` [n, k], and -inf elsewhere."""
    logits = np.full((len(ids), int(ids.max()) + 1), -np.inf, np.float32)
    np.put_along_axis(logits, ids, values, axis=1)
    return logits
