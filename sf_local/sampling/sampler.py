"""Sampler: logits and SamplingParams to tokens.

What sums the logits up says in which block of the vocabulary a draw ends, and which blocks hold
candidates at all, so only these are looked into. A row comes out the same in any company.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sf_local.request.params import SamplingParams
from sf_local.sampling.distribution import Row, Tokens, candidates, find
from sf_local.sampling.logits import (
    BLOCK,
    Floats,
    ModelOutput,
    WrongLogits,
    summarize,
    what_is_wrong,
)

FLAT = 1e6  # a temperature at which all tokens are equally likely


@dataclass(frozen=True)
class Sampled:
    """A token; with its log probability and the likeliest tokens', if asked for."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[float, int]] = ()


class Allowed(Protocol):
    """What a grammar allows next; each may raise."""

    def has(self, token: int) -> bool: ...

    def tokens(self) -> Tokens: ...


class Sampler:
    """What the tokens of one request depend on besides logits: penalties, bias, randomness.

    prompt_ids: tokens that the repetition penalty counts as seen. end_ids: tokens that
    `min_new_tokens` forbids. scale: what logits are multiplied by.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int] = (), end_ids: Iterable[int] = ()
    ) -> None:
        self.params, self.is_greedy = params, params.is_greedy
        self.scale = 1.0 if params.is_greedy else 1 / min(params.temperature, FLAT)
        self.was_refused = True  # the grammar did not allow what was drawn last without its mask
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
        self.is_uncut = params.is_greedy or (
            params.top_k < 0 and params.top_p == 1 and params.min_p == 0
        )
        self._decide()

    def _decide(self) -> None:
        """What kind of choice the next token is; changes when the answer has its minimal length.

        changes_logits: penalties, bias or the minimal length do. is_plain: they do not, no token
        is cut off, and no log probabilities are asked for. takes_the_best: the likeliest token is
        all that is asked for.
        """
        self._is_too_short = self._num_tokens < self.params.min_new_tokens
        self.changes_logits = self._has_penalties or len(self._bias_ids) > 0 or self._is_too_short
        self.is_plain = self.is_uncut and not self.params.return_logprob and not self.changes_logits
        self.takes_the_best = self.is_greedy and self.is_plain

    @property
    def needs_mask(self) -> bool:
        """Whether a grammar's mask is needed, as far as one can tell before the draw."""
        return self.was_refused or not self.is_plain

    def push(self, token: int) -> None:
        """Count a token of the answer."""
        self._num_tokens += 1
        if self._is_too_short:
            self._decide()
        if self._has_penalties:
            self._counts[token] = self._counts.get(token, 0) + 1

    def change(self, logits: Floats, allowed: Tokens | None = None) -> None:
        """Apply penalties, bias and minimal length to logits [V], in this order, in place.

        Frequency and presence penalty as in OpenAI's API, repetition penalty as in CTRL (Keskar et
        al. 2019): positive logits of tokens seen in prompt or answer are divided by it, others
        multiplied. Where only end tokens are `allowed` they stay possible.
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
            if allowed is None or not np.isin(allowed, ends).all():
                logits[ends] = -np.inf

    def draw(self) -> float:
        """The next random number, in [0, 1)."""
        return self._random.random()


def sample(
    samplers: Sequence[Sampler], following: ModelOutput, allowed: Sequence[Allowed | None]
) -> list[Sampled | Exception]:
    """The next tokens of requests: from what follows them, and what their grammars allow.

    Where nothing else is asked for, a token is drawn without the grammar first, and again with it
    if that one is not allowed: of the same distribution, and seldom needed. The exception is what a
    grammar raised, or WrongLogits.
    """
    result: list[Sampled | Exception] = []
    for i, (sampler, grammar) in enumerate(zip(samplers, allowed, strict=True)):
        try:
            sampled = _next(sampler, following, i, grammar)
            if i < len(following.logits) and not following.logits[i, sampled.token] < math.inf:
                raise WrongLogits(what_is_wrong(float(following.logits[i, sampled.token])))
            result.append(sampled)
        except Exception as error:
            result.append(error)
    return result


def _next(sampler: Sampler, following: ModelOutput, i: int, allowed: Allowed | None) -> Sampled:
    """The next token of row `i`."""
    if sampler.is_plain:
        token = int(following.best[i]) if sampler.is_greedy else _draw(sampler, following, i)
        if allowed is None:
            return Sampled(token)
        sampler.was_refused = not allowed.has(token)
        if not sampler.was_refused:
            return Sampled(token)
    tokens = None if allowed is None else allowed.tokens()
    if tokens is None and not sampler.changes_logits:
        return _choose(sampler, following.take(slice(i, i + 1)))
    logits = following.logits[i]
    if sampler.changes_logits:
        logits = logits.copy()
        sampler.change(logits, tokens)
    if tokens is not None:
        logits = logits[tokens]
    found = _choose(sampler, summarize(logits[None], np.array([sampler.scale], np.float32)))
    if tokens is None:
        return found
    top = [(value, int(tokens[token])) for value, token in found.top]
    return Sampled(int(tokens[found.token]), found.logprob, top)


def _draw(sampler: Sampler, following: ModelOutput, i: int) -> int:
    """The token of row `i` where the sum of weights passes a random share of the total."""
    maxima, scale = following.maxima[i], sampler.scale
    weights = following.sums[i] * np.exp((maxima - maxima.max()) * scale)
    block, share = find(weights, sampler.draw())
    logits = following.logits[i, block * BLOCK : (block + 1) * BLOCK]
    place, _ = find(np.exp((logits - maxima[block]) * scale), share)
    return block * BLOCK + place


def _choose(sampler: Sampler, following: ModelOutput) -> Sampled:
    """The choice for one row, with what is reported of it."""
    params, token = sampler.params, int(following.best[0])
    if sampler.is_uncut:
        if not params.is_greedy:
            token = _draw(sampler, following, 0)
    else:
        row = Row(following, sampler.scale)
        tokens = candidates(row, params)
        place, _ = find(np.exp(row.logs(tokens)), sampler.draw())
        token = int(tokens[place])
    if not params.return_logprob:
        return Sampled(token)
    row = Row(following, sampler.scale)
    total = math.log(row.total)
    tops = row.likeliest(params.top_logprobs_num)
    tops = tops[row.logits[tops] > -np.inf]
    top = zip((row.logs(tops) - total).tolist(), tops.tolist(), strict=True)
    return Sampled(token, float(row.logs(np.array([token]))[0]) - total, list(top))
