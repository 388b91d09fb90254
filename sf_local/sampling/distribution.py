"""TODO."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sf_local.request.params import SamplingParams
from sf_local.sampling.logits import BLOCK, ModelOutput, WrongLogits, what_is_wrong
from sf_local.sampling.logprobs import likeliest

LESS_THAN_ALL = 1 - 2**-50  # rounding must not reach beyond the last weight


Tokens = NDArray[np.intp]


def find(weights: NDArray[np.floating], share: float) -> tuple[int, float]:
    """Where the running sum of weights passes a share of their total, and by which share of that
    weight."""
    running = weights.cumsum(dtype=np.float64)
    if not 0 < running[-1] < math.inf:
        # Of a total of 0 no token is possible.
        raise WrongLogits(what_is_wrong(float(running[-1]) or -math.inf))
    bound = share * (LESS_THAN_ALL * running[-1])
    place = int(running.searchsorted(bound, "right"))
    return place, float(1 - (running[place] - bound) / weights[place])


class Row:
    """One row of `ModelOutput` by its sampler's scale. The weight of the likeliest token is 1."""

    def __init__(self, following: ModelOutput, scale: float) -> None:
        [self.logits], [self._maxima], self._scale = following.logits, following.maxima, scale
        self._top = float(self._maxima.max())
        weights = following.sums[0] * np.exp(
            (self._maxima.astype(np.float64) - self._top) * self._scale
        )
        self.total = float(weights.sum())

    def logs(self, tokens: Tokens) -> NDArray[np.float64]:
        """Logarithms of the weights of some tokens."""
        logs: NDArray[np.float64] = (
            self.logits[tokens].astype(np.float64) - self._top
        ) * self._scale
        return logs

    def at_least(self, weight: float) -> Tokens:
        """All tokens of this weight or more, and maybe some that come near it."""
        return self._reach(self._top + math.log(weight) / self._scale - 1e-3)

    def likeliest(self, count: int) -> Tokens:
        """That many tokens, best first."""
        if not 0 < count <= len(self._maxima):
            return likeliest(self.logits, count)
        # So many blocks hold a logit of at least ...: what is below is not among the largest.
        tokens = self._reach(np.partition(self._maxima, -count)[-count])
        return np.asarray(tokens[likeliest(self.logits[tokens], count)])

    def _reach(self, logit: float) -> Tokens:
        """All tokens with this logit or more."""
        blocks = np.flatnonzero(self._maxima >= logit)
        tokens = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
        tokens = tokens[tokens < len(self.logits)]
        return np.asarray(tokens[self.logits[tokens] >= logit])


def candidates(row: Row, params: SamplingParams) -> Tokens:
    """Tokens that may be drawn: top-k, of these top-p, of these min-p; as SGLang orders them."""
    least = max(params.min_p, float(np.finfo(np.float32).tiny))  # the largest weight is 1
    total = row.total
    if 0 < params.top_k < len(row.logits):
        tokens = row.likeliest(params.top_k)
        total = float(np.exp(row.logs(tokens)).sum())
    elif params.top_p < 1:
        tokens = _most(row, params.top_p * total)
    else:
        tokens = row.at_least(least)
    weights = np.exp(row.logs(tokens))
    if params.top_p < 1:
        nucleus = _nucleus(weights, params.top_p * total)
        tokens, weights = tokens[nucleus], weights[nucleus]
    return tokens[weights >= least]


def _most(row: Row, total: float) -> Tokens:
    """All tokens above some weight that together reach `total`: few are left to sort."""
    for bound in (1e-2, 1e-4, 1e-6):
        tokens = row.at_least(bound)
        if np.exp(row.logs(tokens)).sum() >= total:
            return tokens
    return np.arange(len(row.logits))


def _nucleus(weights: NDArray[np.float64], total: float) -> Tokens:
    """The fewest largest entries that together reach `total` (Holtzman et al. 2020)."""
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    return order[: max(int(np.searchsorted(before, total)), 1)]
