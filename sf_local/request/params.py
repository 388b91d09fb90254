"""SamplingParams: how to continue a prompt."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sf_local.errors import RequestError
from sf_local.request.checks import check_bool, check_float, check_int, shown

MAX_STOPS = 256
MAX_SAMPLES = 1024
MAX_TOP_LOGPROBS = 1000
MAX_BIASES = 10_000
GRAMMARS = "regex", "json_schema", "ebnf"  # parameters of which at most one is given


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Every value is checked here; RequestError names the wrong one.

    Attributes:
        max_new_tokens: the most tokens of an answer; 0 computes the prompt only.
        min_new_tokens: the fewest; before, the model's end tokens and stop_token_ids are forbidden.
        stop: strings that end the answer, and are not part of its text.
        stop_token_ids: tokens that end it.
        ignore_eos: go on after the model's own end tokens.
        frequency_penalty, presence_penalty: in [-2, 2], for tokens of the answer. Tokens are chosen
            by these parameters in the order in which they stand here.
        repetition_penalty: in (0, 2], for tokens of prompt and answer; 1 for none.
        logit_bias: token id to a number in [-1e4, 1e4] that is added to its logit.
        temperature: at least 0; below 1e-6 the best token is taken.
        top_k: draw from this many of the likeliest tokens; -1 for all.
        top_p: draw from the fewest likeliest tokens that have this probability, in (0, 1].
        min_p: draw from tokens of at least this share of the best one's probability, in [0, 1].
        seed: makes the draws repeatable.
        regex: a regular expression that the whole text matches. At most one grammar may be given.
        json_schema: a JSON schema that the text follows; as text, dict or pydantic model.
        ebnf: a grammar in Lark's syntax as llguidance reads it, or in llama.cpp's GBNF.
        return_logprob: report log probabilities of the answer's tokens, after penalties, grammar
            and temperature.
        logprob_start_len: report those of the prompt's tokens as well, from this position on; -1
            for none.
        top_logprobs_num: report this many of the likeliest tokens with each of them.
        n: number of samples of one prompt, for `Engine.samples`.
        priority: requests of higher priority run first.
        timeout: seconds after which the text so far is the answer.
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
        check_int("max_new_tokens", self.max_new_tokens, 0)
        check_int("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        check_float("temperature", self.temperature, 0.0, math.inf)
        check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True)
        check_int("top_k", self.top_k, -1)
        check_int("logprob_start_len", self.logprob_start_len, -1)
        check_int("top_logprobs_num", self.top_logprobs_num, 0, MAX_TOP_LOGPROBS)
        check_bool("ignore_eos", self.ignore_eos)
        check_bool("return_logprob", self.return_logprob)
        if self.top_k == 0:
            raise RequestError("top_k=0 leaves no token; use -1 for all tokens, or at least 1")
        if self.seed is not None:
            check_int("seed", self.seed, 0, 2**64 - 1)
        check_int("n", self.n, 1, MAX_SAMPLES)
        check_int("priority", self.priority, -(1 << 31))
        if self.timeout is not None:
            check_float("timeout", self.timeout, 0.0, sys.float_info.max)
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
        """Whether the best token is taken instead of drawing one."""
        return self.temperature < 1e-6

    @property
    def is_constrained(self) -> bool:
        """Whether the answer follows a regex, a JSON schema or a grammar."""
        return any(getattr(self, name) is not None for name in GRAMMARS)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that have been seen get other logits."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


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
        check_int("stop_token_ids", token_id, 0)
    return tuple(ids)


def _logit_bias(bias: object) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIASES:
        raise RequestError(
            f"logit_bias={shown(bias)} must be a dict of at most {MAX_BIASES} token ids to numbers"
        )
    for token, value in bias.items():
        check_int("logit_bias", token, 0)
        check_float(f"logit_bias[{token}]", value, -1e4, 1e4)
    return dict(bias)
