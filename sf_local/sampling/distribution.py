"""Distribution: weights of all tokens of one row, and which of them top-k, top-p and min-p keep.

A weight is exp((logit - largest logit) * inv_temperature): the probability, up to a factor.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.manifest import LOGITS_BLOCK
from sf_local.request.params import ResolvedParams
from sf_local.sampling.logits import ModelOutput, WrongLogits, what_is_wrong
from sf_local.sampling.logprobs import likeliest

LESS_THAN_ALL = 1 - 2**-50  # so that rounding does not lead beyond the last weight

Tokens = NDArray[np.intp]  # token ids [n]


def find(weights: NDArray[np.floating], share: float) -> tuple[int, float]:
    """Where the running sum of weights [n] passes a share, in [0, 1), of their total.

    Returns the index of that weight, and the share of it that was needed. With a random share, the
    index is drawn in proportion to the weights. Raises WrongLogits where the total is NaN, infinite
    or 0.
    """
    running = weights.cumsum(dtype=np.float64)
    if not 0 < running[-1] < math.inf:  # if it is 0, no token is possible
        raise WrongLogits(what_is_wrong(float(running[-1]) or -math.inf))
    bound = share * (LESS_THAN_ALL * running[-1])
    place = int(running.searchsorted(bound, "right"))
    return place, float(1 - (running[place] - bound) / weights[place])


class Distribution:
    """Weights of the tokens of a ModelOutput's only row; the likeliest token has weight 1.

    logits: f32 [V]. total: the sum of all weights.
    """

    def __init__(self, output: ModelOutput, inv_temperature: float) -> None:
        [self.logits], [self._maxima] = output.logits, output.maxima
        self._inv_temperature = inv_temperature
        self._top = float(self._maxima.max())
        maxima = self._maxima.astype(np.float64)
        weights = output.sums[0] * np.exp((maxima - self._top) * inv_temperature)
        self.total = float(weights.sum())

    def logs(self, tokens: Tokens) -> NDArray[np.float64]:
        """Logarithms of the weights of some tokens [n]."""
        logits = self.logits[tokens].astype(np.float64)
        return np.asarray((logits - self._top) * self._inv_temperature)

    def at_least(self, weight: float) -> Tokens:
        """All tokens of at least this weight, and maybe some of slightly less."""
        return self._reach(self._top + math.log(weight) / self._inv_temperature - 1e-3)

    def likeliest(self, count: int) -> Tokens:
        """The `count` tokens of the largest weights, largest first."""
        if not 0 < count <= len(self._maxima):
            return likeliest(self.logits, count)
        # `count` blocks have a max of at least this, so no smaller logit is among the largest.
        tokens = self._reach(np.partition(self._maxima, -count)[-count])
        return np.asarray(tokens[likeliest(self.logits[tokens], count)])

    def _reach(self, logit: float) -> Tokens:
        """All tokens with a logit of at least this."""
        blocks = np.flatnonzero(self._maxima >= logit)
        tokens = (blocks[:, None] * LOGITS_BLOCK + np.arange(LOGITS_BLOCK)).reshape(-1)
        tokens = tokens[tokens < len(self.logits)]
        return np.asarray(tokens[self.logits[tokens] >= logit])


def candidates(row: Distribution, params: ResolvedParams) -> Tokens:
    """Tokens that may be drawn: top-k, of these top-p, of these min-p, in SGLang's order."""
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


def _most(row: Distribution, total: float) -> Tokens:
    """All tokens above some weight that together reach `total`, so that few need sorting."""
    for bound in (1e-2, 1e-4, 1e-6):
        tokens = row.at_least(bound)
        if np.exp(row.logs(tokens)).sum() >= total:
            return tokens
    return np.arange(len(row.logits))


def _nucleus(weights: NDArray[np.float64], total: float) -> Tokens:
    """Indices of the fewest largest weights that together reach `total` (Holtzman et al. 2020)."""
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    return order[: max(int(np.searchsorted(before, total)), 1)]
