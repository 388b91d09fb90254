"""Sampler: logits and SamplingParams to tokens.

What is as wide as the vocabulary is done for all rows at once; what is left of a row after top-k,
top-p or min-p is small. A row comes out the same in any company.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sf_local.logprobs import likeliest
from sf_local.request import SamplingParams

BLOCK = 256  # probabilities are summed up in blocks, so that a draw looks into one of them
FEW = 2048  # allowed tokens, up to which they are taken out instead of hiding the others
FLAT = 1e6  # a temperature at which all tokens are equally likely
HIDDEN = np.float32(1e30)  # subtracted from a logit that a grammar does not allow

Floats = NDArray[np.float32]
Mask = NDArray[np.int32]  # [(V + 31) // 32], bit i % 32 of word i // 32 allows token i


@dataclass(frozen=True)
class Sampled:
    """A token; with its log probability and the likeliest tokens', if asked for."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[float, int]] = ()


class Sampler:
    """What the tokens of one request depend on besides logits: penalties, bias, randomness.

    prompt_ids: tokens that the repetition penalty counts as seen. end_ids: tokens that
    `min_new_tokens` forbids.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int] = (), end_ids: Iterable[int] = ()
    ) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._num_tokens = 0
        self._end_ids = np.fromiter(end_ids, np.intp)
        bias = params.logit_bias
        self._bias_ids = np.fromiter(bias, np.intp)
        self._bias = np.fromiter(bias.values(), np.float32)
        self._has_penalties = params.has_penalties
        self._counts: dict[int, int] = {}  # of each token in the answer
        if params.repetition_penalty != 1:
            self._counts = dict.fromkeys(prompt_ids, 0)

    @property
    def changes_logits(self) -> bool:
        return self._has_penalties or len(self._bias_ids) > 0 or self._is_too_short

    @property
    def takes_the_best(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return self.params.is_greedy and not self.params.return_logprob and not self.changes_logits

    @property
    def is_uncut(self) -> bool:
        """Whether no token is ruled out by its rank."""
        params = self.params
        return params.is_greedy or (params.top_k < 0 and params.top_p == 1 and params.min_p == 0)

    @property
    def _is_too_short(self) -> bool:
        return self._num_tokens < self.params.min_new_tokens

    def push(self, token: int) -> None:
        """Count a token of the answer."""
        self._num_tokens += 1
        if self._has_penalties:
            self._counts[token] = self._counts.get(token, 0) + 1

    def change(self, logits: Floats, allowed: NDArray[np.bool_] | None = None) -> None:
        """Apply penalties, bias, minimal length and grammar to logits [V], in this order, in place.

        Frequency and presence penalty as in OpenAI's API, repetition penalty as in CTRL (Keskar et
        al. 2019): positive logits of tokens seen in prompt or answer are divided by it, others
        multiplied.
        """
        params = self.params
        if self._has_penalties and self._counts:
            ids = np.fromiter(self._counts, np.intp, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            seen = logits[ids] - params.frequency_penalty * counts
            seen -= params.presence_penalty * (counts > 0)
            penalty = params.repetition_penalty
            logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self._is_too_short:
            ends = self._end_ids[self._end_ids < len(logits)]
            if allowed is None or np.count_nonzero(allowed) > np.count_nonzero(allowed[ends]):
                logits[ends] = -np.inf
        if allowed is not None:
            logits -= np.multiply(~allowed, HIDDEN)

    def draw(self) -> float:
        """The next random number, in [0, 1)."""
        return self._random.random()


class BatchSampler:
    """Samples whole batches, in memory that is kept from one to the next; for one thread."""

    def __init__(self) -> None:
        self._work = np.empty((0, 0), np.float32)

    def sample(
        self, samplers: Sequence[Sampler], logits: Floats, masks: Sequence[Mask | None]
    ) -> list[Sampled]:
        """The next tokens of requests, from their logits [n, V] and what their grammars allow.

        Where a grammar allows much, a token is drawn without it first, and again with it if that
        one is not allowed: of the same distribution, and seldom needed.
        """
        allowed = [None if mask is None else _bits(mask, logits.shape[1]) for mask in masks]
        sampled: dict[int, Sampled] = {}
        hopeful: dict[int, NDArray[np.bool_]] = {}
        for i, (sampler, bits) in enumerate(zip(samplers, allowed, strict=True)):
            if bits is None or sampler.changes_logits:
                continue
            if np.count_nonzero(bits) <= FEW:
                sampled[i] = _sample_few(sampler, logits[i], np.flatnonzero(bits))
            elif sampler.is_uncut and not sampler.params.return_logprob:
                hopeful[i] = bits
        rest = [i for i in range(len(samplers)) if i not in sampled]
        first = [None if i in hopeful else bits for i, bits in enumerate(allowed)]
        sampled |= self._sample(samplers, logits, first, rest)
        again = [i for i, bits in hopeful.items() if not bits[sampled[i].token]]
        sampled |= self._sample(samplers, logits, allowed, again)
        return [sampled[i] for i in range(len(samplers))]

    def _sample(
        self,
        samplers: Sequence[Sampler],
        logits: Floats,
        allowed: Sequence[NDArray[np.bool_] | None],
        rows: Sequence[int],
    ) -> dict[int, Sampled]:
        """`sample` for some rows, by number."""
        best = [i for i in rows if allowed[i] is None and samplers[i].takes_the_best]
        others = [i for i in rows if i not in best]
        sampled: dict[int, Sampled] = {}
        if best:
            tokens = logits.argmax(axis=1)
            sampled |= {i: Sampled(int(tokens[i])) for i in best}
        if others:
            work = self._copy(logits, others)
            for row, i in zip(work[:, : logits.shape[1]], others, strict=True):
                samplers[i].change(row, allowed[i])
            sampled |= zip(others, _sample([samplers[i] for i in others], work), strict=True)
        return sampled

    def _copy(self, logits: Floats, rows: Sequence[int]) -> Floats:
        """Some rows, with a whole number of blocks; what is added is impossible."""
        width = logits.shape[1]
        padded = -(-width // BLOCK) * BLOCK
        if self._work.shape[0] < len(rows) or self._work.shape[1] != padded:
            self._work = np.empty((len(rows), padded), np.float32)
        work = self._work[: len(rows)]
        for to, row in zip(work, rows, strict=True):
            to[:width] = logits[row]
        work[:, width:] = -np.inf
        return work


def _sample_few(sampler: Sampler, logits: Floats, tokens: NDArray[np.intp]) -> Sampled:
    """The choice for one row [V] among `tokens`."""
    padded = np.full((1, -(-len(tokens) // BLOCK) * BLOCK), -np.inf, np.float32)
    padded[0, : len(tokens)] = logits[tokens]
    [found] = _sample([sampler], padded)
    top = [(value, int(tokens[i])) for value, i in found.top]
    return Sampled(int(tokens[found.token]), found.logprob, top)


def _sample(samplers: Sequence[Sampler], logits: Floats) -> list[Sampled]:
    """Choices for logits [n, V'] that are changed already; overwrites them."""
    best = logits.argmax(axis=1)
    if all(s.params.is_greedy and not s.params.return_logprob for s in samplers):
        return [Sampled(int(token)) for token in best]
    tops = [
        likeliest(row, s.params.top_logprobs_num).tolist() if s.params.return_logprob else []
        for row, s in zip(logits, samplers, strict=True)
    ]
    scales = [1 if s.params.is_greedy else 1 / min(s.params.temperature, FLAT) for s in samplers]
    rows = np.arange(len(samplers))
    logits -= logits[rows, best][:, None]
    if any(scale != 1 for scale in scales):
        logits *= np.array(scales, np.float32)[:, None]
    top_logits = [row[top] for row, top in zip(logits, tops, strict=True)]
    weights = np.exp(logits, out=logits)
    sums = np.einsum("nbi->nb", weights.reshape(len(samplers), -1, BLOCK))
    tokens = _choose(samplers, best, weights, sums)
    result = []
    for i, sampler in enumerate(samplers):
        token = int(tokens[i])
        if not sampler.params.return_logprob:
            result.append(Sampled(token))
            continue
        total = math.log(math.fsum(sums[i].tolist()))
        pairs = zip(top_logits[i].tolist(), tops[i], strict=True)
        top = [(value - total, t) for value, t in pairs if value > -HIDDEN * scales[i] / 2]
        result.append(Sampled(token, _log(weights[i, token]) - total, top))
    return result


def _choose(
    samplers: Sequence[Sampler], best: NDArray[np.intp], weights: Floats, sums: Floats
) -> NDArray[np.intp]:
    """Tokens by `weights` [n, V'], at most 1; `sums` [n, blocks] are those of their blocks."""
    tokens, whole = best.copy(), []
    for i, sampler in enumerate(samplers):
        params = sampler.params
        if params.is_greedy:
            continue
        if sampler.is_uncut:
            whole.append(i)
            continue
        kept = candidates(weights[i], sums[i], params)
        running = np.cumsum(weights[i, kept], dtype=np.float64)
        index = np.searchsorted(running, sampler.draw() * running[-1], side="right")
        tokens[i] = kept[min(int(index), len(kept) - 1)]
    if whole:
        shares = np.array([samplers[i].draw() for i in whole])
        drawn = _draw(weights, sums, np.array(whole), shares)
        # Rounding may, once in ten million draws, end on a token that is impossible.
        tokens[whole] = np.where(weights[whole, drawn] > 0, drawn, best[whole])
    return tokens


def _draw(
    weights: Floats, sums: Floats, rows: NDArray[np.intp], shares: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Where the running sums of `weights` in these rows pass their shares of the total."""
    each = np.arange(len(rows))
    running = np.cumsum(sums[rows], axis=1, dtype=np.float64)
    bounds = (shares * running[:, -1])[:, None]
    blocks = np.minimum((running <= bounds).sum(axis=1), running.shape[1] - 1)
    before = running[each, blocks] - sums[rows, blocks]
    inner = weights.reshape(len(weights), -1, BLOCK)[rows, blocks]  # [n, BLOCK]
    passed = before[:, None] + np.cumsum(inner, axis=1, dtype=np.float64) <= bounds
    drawn: NDArray[np.intp] = blocks * BLOCK + np.minimum(passed.sum(axis=1), BLOCK - 1)
    return drawn


def _bits(mask: Mask, width: int) -> NDArray[np.bool_]:
    """Whether each of `width` tokens is allowed."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=width).view(np.bool_)


def candidates(weights: Floats, sums: Floats, params: SamplingParams) -> NDArray[np.intp]:
    """Tokens that may be drawn: top-k, of these top-p, of these min-p; as SGLang orders them."""
    is_limited = 0 < params.top_k < len(weights)
    if is_limited:
        tokens = likeliest(weights, params.top_k)
    elif params.top_p < 1:
        tokens = _most(weights, params.top_p * math.fsum(sums.tolist()))
    else:
        tokens = np.flatnonzero(weights)
    if params.top_p < 1:
        total = math.fsum((weights[tokens] if is_limited else sums).tolist())
        tokens = tokens[_nucleus(weights[tokens].astype(np.float64), params.top_p * total)]
    least = max(params.min_p, float(np.finfo(np.float32).tiny))  # the largest weight is 1
    return tokens[weights[tokens] >= least]


def _most(weights: Floats, total: float) -> NDArray[np.intp]:
    """All entries above some bound that together reach `total`: few are left to sort."""
    for bound in (1e-2, 1e-4, 1e-6):
        tokens = np.flatnonzero(weights >= bound)
        if weights[tokens].sum(dtype=np.float64) >= total:
            return tokens
    return np.flatnonzero(weights)


def _nucleus(weights: NDArray[np.float64], total: float) -> NDArray[np.intp]:
    """The fewest largest entries that together reach `total` (Holtzman et al. 2020)."""
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    return order[: max(int(np.searchsorted(before, total)), 1)]


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
