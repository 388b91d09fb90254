"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Output:
    """A finished generation.

    text: without stop strings and special tokens. token_ids: all new tokens, the one that ended it
    included. finish_reason: "stop", "length", "abort" or "timeout"; matched: the stop text or token
    id. cached_tokens: of the prompt, found in the cache. logprobs: with `return_logprob`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    time_to_first_token: float  # seconds since submit
    latency: float  # seconds since submit
    logprobs: Logprobs | None = None


Delivery = tuple[str, Output | None] | BaseException


Top = list[tuple[float, int]]  # (log probability, token), best first


@dataclass
class Logprobs:
    """Natural log probabilities of a prompt's tokens from some position on, and of its answer's.

    prompt_ids, prompt: those tokens; the first has None, for nothing is known before it. The
    model's own distribution. output: the answer's tokens, under the distribution they were drawn
    from before top-k, top-p and min-p; 0 for those that a grammar forced. prompt_top, output_top:
    the likeliest tokens in their places.
    """

    prompt_ids: Sequence[int] = ()
    prompt: list[float | None] = field(default_factory=list)
    prompt_top: list[Top | None] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    output_top: list[Top] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """Tokens of a continuation with their natural log probabilities, given all before them.

    The tokens are those of prompt and continuation together that the prompt alone does not have:
    where both merge at the seam, the merged token counts. unconditional: without the prompt; the
    first is None, for nothing is before it.
    """

    token_ids: list[int]
    logprobs: list[float]
    unconditional: list[float | None] | None
    prompt_tokens: int
    cached_tokens: int

    @property
    def mean(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)
