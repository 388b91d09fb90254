"""Generation: one request with what turns its tokens into text, and what is delivered of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sf_local.request import Request, SamplingParams
from sf_local.sampler import Sampler
from sf_local.tokenizer import Detokenizer, StopChecker, Tokenizer


@dataclass(frozen=True)
class Output:
    """A finished generation.

    text: without stop strings and special tokens. token_ids: all new tokens, the one that ended it
    included. finish_reason: "stop", "length", "abort" or "timeout"; matched: the stop text or token
    id. cached_tokens: of the prompt, found in the cache.
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


Delivery = tuple[str, Output | None] | BaseException


class Generation:
    """A request with what turns its tokens into text; lives on the loop's thread."""

    def __init__(self, request: Request, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self.request, params = request, request.params
        self.deliver: Callable[[Delivery], object] = lambda item: None
        self.remember: Callable[[Sequence[int], str], None] | None = None
        self.sampler = Sampler(params)
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._stops = StopChecker(params.stop)
        self._stop_ids = _stop_ids(params, tokenizer, eos_ids)
        self._text: list[str] = []
        self._last_delta = ""
        self._matched: str | int | None = None
        self._started_at = time.perf_counter()
        self._first_token_at = self._started_at
        self.deadline = None if params.timeout is None else self._started_at + params.timeout

    def accept(self, token: int) -> str | None:
        """Take a sampled token and deliver its text; the reason, if it ends the generation."""
        request = self.request
        if not request.output_ids:
            self._first_token_at = time.perf_counter()
        request.output_ids.append(token)
        if token in self._stop_ids:
            self._matched = self._stop_ids[token]
            return "stop"
        text, is_stopped = self._stops.push(self._detokenizer.push(token))
        reason = "stop" if is_stopped else None
        if reason is None and len(request.output_ids) >= request.max_new_tokens:
            reason = "length"
        self._text.append(text)
        if text and reason is None:
            self.deliver((text, None))
        elif text:
            self._last_delta = text
        return reason

    def finish(self, reason: str) -> None:
        """Deliver the text held back as one last delta, with the output."""
        tail = self._stops.push(self._detokenizer.flush())[0] + self._stops.flush()
        self._text.append(tail)
        if self._stops.matched is not None:
            reason, self._matched = "stop", self._stops.matched
        request, now = self.request, time.perf_counter()
        output = Output(
            text="".join(self._text),
            token_ids=request.output_ids,
            finish_reason=reason,
            matched=self._matched,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(request.output_ids),
            cached_tokens=request.num_cached or 0,
            time_to_first_token=self._first_token_at - self._started_at,
            latency=now - self._started_at,
        )
        if self.remember is not None and request.output_ids:
            self.remember(request.output_ids, output.text)
        self.deliver((self._last_delta + tail, output))


def _stop_ids(
    params: SamplingParams, tokenizer: Tokenizer, eos_ids: frozenset[int]
) -> dict[int, str | int]:
    """Tokens that end a generation, and what to report as matched.

    Special tokens never show in the text, so a stop string that is one is matched by its id.
    """
    ids: dict[int, str | int] = {} if params.ignore_eos else {i: i for i in eos_ids}
    ids |= {i: i for i in params.stop_token_ids}
    for stop in params.stop:
        token = tokenizer.token_id(stop)
        if token in tokenizer.special_ids:
            ids[token] = stop
    return ids
