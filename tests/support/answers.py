"""Whether an answer is what the reference would have said, up to rounding.

So that it may be asked of weights in few bits, too, where a token that is as likely as another, or
a random number at the edge of a token's share, may fall to either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.reference import Array, forward, logprobs
from tests.support.tiny import TinyModel


def assert_likeliest(model: TinyModel, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Each token of a greedy answer has the largest logit after those before it."""
    logits = _after(model, prompt, answer)
    found = logits[np.arange(len(answer)), answer]
    assert found == pytest.approx(logits.max(axis=1), abs=1e-4)


def assert_drawn(model: TinyModel, prompt: Sequence[int], answer: Sequence[int], seed: int) -> None:
    """Each token's share of the distribution, at temperature 1, has the seed's random number."""
    shares = np.exp(logprobs(_after(model, prompt, answer)))
    places = np.arange(len(answer)), answer
    ends = shares.cumsum(axis=1)[places]
    numbers = np.random.default_rng(seed).random(len(answer))
    assert numbers == pytest.approx(np.clip(numbers, ends - shares[places], ends), abs=1e-4)


def _after(model: TinyModel, prompt: Sequence[int], answer: Sequence[int]) -> Array:
    """Logits [tokens, V] by which each token of an answer is chosen."""
    rows = forward(model.config, model.weights, [*prompt, *answer[:-1]])
    return rows[len(prompt) - 1 :]
