"""SamplingParams and Request: what a caller asks for, and what becomes of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from sf_local.errors import RequestError

if TYPE_CHECKING:
    from sf_local.vision.reader import Span

MAX_STOPS = 256
MAX_SAMPLES = 1024
MAX_TOP_LOGPROBS = 1000
MAX_BIASES = 10_000
GRAMMARS = "regex", "json_schema", "ebnf"


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Every value is checked here; RequestError names the culprit.

    Length: at least min_new_tokens (the model's end tokens and stop_token_ids are forbidden before)
    and at most max_new_tokens, 0 allowed. stop: texts that end the generation, trimmed.
    stop_token_ids: tokens that do. ignore_eos: go on after the model's own end tokens.

    Choice of a token, in this order: frequency_penalty and presence_penalty in [-2, 2], for tokens
    of the answer; repetition_penalty in (0, 2], for tokens of prompt and answer, 1 for none;
    logit_bias: token id to what is added to its logit; temperature, below 1e-6 is greedy;
    top_k, -1 for all; top_p in (0, 1]; min_p in [0, 1]. seed makes it repeatable.

    Grammar, at most one: regex that the whole text matches; json_schema as text, dict or pydantic
    model; ebnf in Lark's syntax as llguidance reads it, or llama.cpp's GBNF.

    return_logprob: report log probabilities of the answer's tokens, after penalties, grammar and
    temperature, and of the prompt's from position logprob_start_len on (-1: none); with each, the
    top_logprobs_num likeliest tokens.

    n: samples of one prompt (`Engine.samples`). priority: higher ones run first. timeout: seconds
    after which the text so far is the answer.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | type | None = field(default=None, hash=False)
    ebnf: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 0)
        _check_int("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True)
        _check_int("top_k", self.top_k, -1)
        _check_int("logprob_start_len", self.logprob_start_len, -1)
        _check_int("top_logprobs_num", self.top_logprobs_num, 0, MAX_TOP_LOGPROBS)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("return_logprob", self.return_logprob)
        if self.top_k == 0:
            raise RequestError("top_k=0 leaves no token; use -1 for all tokens, or at least 1")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_int("priority", self.priority, -(1 << 31))
        if self.timeout is not None:
            _check_float("timeout", self.timeout, 0.0, sys.float_info.max)
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(
                f"{' and '.join(given)}: give one of them; a text follows one grammar"
            )
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


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
    sequence: int = -1  # order of arrival at the scheduler; -1 before
    status: RequestStatus = RequestStatus.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    num_cached: int | None = None  # tokens found in the cache when it first started
    first_logits: int | None = None  # the logits from this position on are wanted, too
    spans: Sequence[Span] = ()  # of the prompt, where tiles of images are
    prompt_keys: Sequence[int] = ()  # what the cache knows the prompt by, if not its ids
    twin: Request | None = None  # computes the first `twin_len` tokens for both
    twin_len: int = 0
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "timeout"

    @property
    def num_reusable(self) -> int:
        """Tokens that may come from the cache: the last one's logits are always wanted."""
        last = self.num_tokens - 1
        return last if self.first_logits is None else min(last, self.first_logits)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute, and it shows no image."""
        is_last = self.num_computed == self.num_tokens - 1
        return is_last and not (self.spans and self.spans[-1].end == self.num_tokens)

    @property
    def is_jumping(self) -> bool:
        """Whether the prompt is computed, but more than the last token is left of the answer."""
        return len(self.prompt_ids) <= self.num_computed < self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of the prompt and the answer."""
        return self._slice(self.prompt_ids, start, end)

    def keys(self, count: int) -> list[int]:
        """What the cache knows the first `count` tokens by."""
        return self._slice(self.prompt_keys or self.prompt_ids, 0, count)

    def _slice(self, prompt: Sequence[int], start: int, end: int) -> list[int]:
        prompt_len = len(prompt)
        head = list(prompt[start:end])
        return head + self.output_ids[max(start - prompt_len, 0) : max(end - prompt_len, 0)]


def shown(value: object) -> str:
    """A value in an error message, which may be anything."""
    try:
        text = repr(value)
    except Exception:  # such as an int of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _stop_strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Sequence) else None
    if stops is None or not all(isinstance(s, str) for s in stops) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop={shown(stop)} must be a str or at most {MAX_STOPS} of them")
    return tuple(dict.fromkeys(s for s in stops if s))


def _token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise RequestError(f"stop_token_ids={shown(ids)} must be a list of token ids")
    for token_id in ids:
        _check_int("stop_token_ids", token_id, 0)
    return tuple(ids)


def _logit_bias(bias: object) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIASES:
        raise RequestError(
            f"logit_bias={shown(bias)} must be a dict of at most {MAX_BIASES} token ids to numbers"
        )
    for token, value in bias.items():
        _check_int("logit_bias", token, 0)
        _check_float(f"logit_bias[{token}]", value, -1e4, 1e4)
    return dict(bias)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be True or False")


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):  # type: ignore[operator]
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name}={shown(value)} must be an integer {bounds}")


def _check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (fits and low <= value <= min(high, sys.float_info.max)) or (open_low and value == low):  # type: ignore[operator]
        bounds = f"{'above' if open_low else 'at least'} {low}"
        bounds += f" and at most {high}" if math.isfinite(high) else " and finite"
        raise RequestError(f"{name}={shown(value)} must be a number {bounds}")
