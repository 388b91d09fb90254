"""Sampler: from logits and SamplingParams to tokens.

The summary of the logits tells in which block of the vocabulary a draw ends, and which blocks hold
candidates at all, so only these blocks are read. A request's tokens do not depend on the other
rows of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import default_rng  # np.random imports it late, perhaps during a fork

from sf_local.artifact.manifest import LOGITS_BLOCK
from sf_local.request.output import NO_TOP, TopTokens
from sf_local.request.params import ResolvedParams
from sf_local.sampling.distribution import Distribution, Tokens, candidates, find
from sf_local.sampling.logits import (
    Floats,
    ModelOutput,
    WrongLogits,
    summarize,
    what_is_wrong,
)

FLAT = 1e6  # a temperature at which all tokens are equally likely


@dataclass(frozen=True)
class Sampled:
    """A token; its log probability and the likeliest tokens, if asked for."""

    token: int
    logprob: float | None = None
    top: TopTokens = NO_TOP


class Allowed(Protocol):
    """The tokens that a grammar allows next. Both methods may raise."""

    def has(self, token: int) -> bool:
        """Whether a token is allowed, which is cheaper than all `tokens`."""

    def tokens(self) -> Tokens:
        """All allowed tokens, ascending."""


class Sampler:
    """The state of one request's sampling: penalties, bias, random numbers.

    prompt_ids: tokens that the repetition penalty counts as seen. end_ids: tokens that
    `min_new_tokens` forbids. inv_temperature: 1 / temperature, 1 if greedy. is_uncut: whether all
    tokens may be drawn, or the best is taken, so that no top-k, top-p or min-p applies.
    was_refused: the grammar rejected the last draw without its mask, so use the mask at once.
    """

    def __init__(
        self, params: ResolvedParams, prompt_ids: Iterable[int] = (), end_ids: Iterable[int] = ()
    ) -> None:
        self.params, self.is_greedy = params, params.is_greedy
        self.inv_temperature = 1.0 if params.is_greedy else 1 / min(params.temperature, FLAT)
        self.was_refused = True
        self._random = default_rng(params.seed)
        self._num_tokens = 0
        self._end_ids = np.fromiter(end_ids, np.intp)
        bias = params.logit_bias
        self._bias_ids = np.fromiter(bias, np.intp)
        self._bias = np.fromiter(bias.values(), np.float32)
        self._has_penalties = params.has_penalties
        self._counts: dict[int, int] = {}  # how often each token is in the answer
        if params.repetition_penalty != 1:
            self._counts = dict.fromkeys(prompt_ids, 0)
        self.is_uncut = params.is_greedy or (
            params.top_k < 0 and params.top_p == 1 and params.min_p == 0
        )
        self._decide()

    def _decide(self) -> None:
        """What kind of choice the next token is; changes when the answer has its minimal length.

        changes_logits: `change` has anything to do. is_plain: it has not, all tokens may be drawn
        or the best is taken, and no log probability is asked for. takes_the_best: the next token is
        just the best one, so that no logits are needed.
        """
        self._is_too_short = self._num_tokens < self.params.min_new_tokens
        self.changes_logits = self._has_penalties or len(self._bias_ids) > 0 or self._is_too_short
        self.is_plain = self.is_uncut and not self.params.return_logprob and not self.changes_logits
        self.takes_the_best = self.is_greedy and self.is_plain

    @property
    def needs_mask(self) -> bool:
        """Whether a grammar's mask will be needed, as far as is known before the draw."""
        return self.was_refused or not self.is_plain

    def push(self, token: int) -> None:
        """Count a token of the answer."""
        self._num_tokens += 1
        if self._is_too_short:
            self._decide()
        if self._has_penalties:
            self._counts[token] = self._counts.get(token, 0) + 1

    def change(self, logits: Floats, allowed: Tokens | None = None) -> None:
        """Apply penalties, bias and minimal length to logits f32 [V], in this order, in place.

        Frequency and presence penalty as in OpenAI's API, repetition penalty as in CTRL (Keskar et
        al. 2019): positive logits of tokens seen in prompt or answer are divided by it, others
        multiplied. Where a grammar allows nothing but end tokens, they stay possible.
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
    samplers: Sequence[Sampler], output: ModelOutput, allowed: Sequence[Allowed | None]
) -> list[Sampled | BaseException]:
    """The next token of each row of a call's output, or the exception that ends its request.

    That is what its grammar raised, or WrongLogits. allowed: None for rows without a grammar.

    Where nothing else is asked for, a token is drawn without the grammar first, and again with it
    if it is rejected. This is the same distribution, and a mask is seldom computed.
    """
    result: list[Sampled | BaseException] = []
    for i, (sampler, grammar) in enumerate(zip(samplers, allowed, strict=True)):
        try:
            sampled = _next(sampler, output, i, grammar)
            if i < len(output.logits) and not output.logits[i, sampled.token] < math.inf:
                raise WrongLogits(what_is_wrong(float(output.logits[i, sampled.token])))
            result.append(sampled)
        except BaseException as error:  # Rust's panics are no Exception
            result.append(error)
    return result


def _next(sampler: Sampler, output: ModelOutput, i: int, allowed: Allowed | None) -> Sampled:
    """The next token of row `i`."""
    if sampler.is_plain:
        token = int(output.best[i]) if sampler.is_greedy else _draw(sampler, output, i)
        if allowed is None:
            return Sampled(token)
        sampler.was_refused = not allowed.has(token)
        if not sampler.was_refused:
            return Sampled(token)
    tokens = None if allowed is None else allowed.tokens()
    if tokens is None and not sampler.changes_logits:
        return _choose(sampler, output.take(slice(i, i + 1)))
    logits = output.logits[i]
    if sampler.changes_logits:
        logits = logits.copy()
        sampler.change(logits, tokens)
    if tokens is not None:
        logits = logits[tokens]
    inv_temperatures = np.array([sampler.inv_temperature], np.float32)
    found = _choose(sampler, summarize(logits[None], inv_temperatures))
    if tokens is None:
        return found
    top = TopTokens(found.top.logprobs, tokens[found.top.ids].astype(np.int32))
    return Sampled(int(tokens[found.token]), found.logprob, top)


def _draw(sampler: Sampler, output: ModelOutput, i: int) -> int:
    """Draw the token of row `i`: first its block, by the blocks' sums, then the token in it."""
    maxima, inv_temperature = output.maxima[i], sampler.inv_temperature
    weights = output.sums[i] * np.exp((maxima - maxima.max()) * inv_temperature)
    block, share = find(weights, sampler.draw())
    logits = output.logits[i, block * LOGITS_BLOCK : (block + 1) * LOGITS_BLOCK]
    place, _ = find(np.exp((logits - maxima[block]) * inv_temperature), share)
    return block * LOGITS_BLOCK + place


def _choose(sampler: Sampler, output: ModelOutput) -> Sampled:
    """The token of the only row, with its log probabilities if asked for."""
    params, token = sampler.params, int(output.best[0])
    if sampler.is_uncut:
        if not sampler.is_greedy:
            token = _draw(sampler, output, 0)
    else:
        row = Distribution(output, sampler.inv_temperature)
        tokens = candidates(row, params)
        place, _ = find(np.exp(row.logs(tokens)), sampler.draw())
        token = int(tokens[place])
    if not params.return_logprob:
        return Sampled(token)
    row = Distribution(output, sampler.inv_temperature)
    total = math.log(row.total)
    tops = row.likeliest(params.top_logprobs_num)
    tops = tops[row.logits[tops] > -np.inf]
    top = TopTokens(row.logs(tops) - total, tops.astype(np.int32))
    return Sampled(token, float(row.logs(np.array([token]))[0]) - total, top)
