"""SamplingParams and Request: what a caller asks for, and what becomes of it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from sf_local.errors import RequestError

MAX_STOPS = 256


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Every value is checked here; RequestError names the culprit.

    max_new_tokens: at most so many tokens, 0 allowed. temperature: below 1e-6 is greedy.
    top_k: -1 for all. top_p: in (0, 1]. stop: texts that end the generation, trimmed.
    stop_token_ids: tokens that do. ignore_eos: go on after the model's own end tokens.
    seed: makes sampling repeatable. n: samples of one prompt (`Engine.samples`).
    priority: higher ones run first. timeout: seconds after which the text so far is the answer.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 0)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1)
        if self.top_k == 0:
            raise RequestError("top_k=0 leaves no token; use -1 for all tokens, or at least 1")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        _check_int("n", self.n, 1)
        _check_int("priority", self.priority, -(1 << 31))
        if self.timeout is not None:
            _check_float("timeout", self.timeout, 0.0, sys.float_info.max)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One prompt and its growing answer. All but the first four fields are the scheduler's.

    The first `num_computed` tokens have their keys and values in `pages`; others can find the first
    `num_published` of them in the cache.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    max_new_tokens: int  # params.max_new_tokens, cut at the end of the context
    output_ids: list[int] = field(default_factory=list)
    sequence: int = field(default_factory=itertools.count().__next__)  # order of arrival
    status: RequestStatus = RequestStatus.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    num_cached: int | None = None  # tokens found in the cache when it first started
    twin: Request | None = None  # computes the first `twin_len` tokens for both
    twin_len: int = 0
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "timeout"

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute."""
        return self.num_computed == self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of the prompt and the answer."""
        prompt_len = len(self.prompt_ids)
        head = list(self.prompt_ids[start:end])
        return head + self.output_ids[max(start - prompt_len, 0) : max(end - prompt_len, 0)]


def _stop_strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Sequence) else None
    if stops is None or not all(isinstance(s, str) for s in stops) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop={stop!r} must be a str or at most {MAX_STOPS} of them")
    return tuple(dict.fromkeys(s for s in stops if s))


def _token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise RequestError(f"stop_token_ids={ids!r} must be a list of token ids")
    for token_id in ids:
        _check_int("stop_token_ids", token_id, 0)
    return tuple(ids)


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise RequestError(f"{name}={value!r} must be an integer of at least {low}")


def _check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (fits and low <= value <= min(high, sys.float_info.max)) or (open_low and value == low):  # type: ignore[operator]
        bounds = f"{'above' if open_low else 'at least'} {low}"
        bounds += f" and at most {high}" if math.isfinite(high) else " and finite"
        raise RequestError(f"{name}={value!r} must be a number {bounds}")
