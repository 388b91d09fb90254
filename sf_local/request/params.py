"""SamplingParams: how to continue a prompt."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Self, TypedDict

from sf_local.errors import RequestError
from sf_local.request.checks import (
    check_bool,
    check_float,
    check_int,
    known_names,
    shown,
    told_fields,
    unknown_name,
)

MAX_STOPS = 256
MAX_SAMPLES = 1024
MAX_TOP_LOGPROBS = 1000
MAX_BIASES = 10_000
GRAMMARS = "regex", "json_schema", "ebnf"  # parameters of which at most one is given


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Every value is checked here; RequestError names the wrong one.

    What is not given is None. Then the engine's `defaults` hold; else what the model's makers
    recommend in its generation_config.json, for max_new_tokens, temperature, top_k, top_p, min_p
    and repetition_penalty; else what is said here. `Engine.resolved` tells what holds.

    Attributes:
        max_new_tokens: the most tokens of an answer, else 128; 0 computes the prompt only.
        min_new_tokens: the fewest, else 0; before, the model's end tokens and stop_token_ids are
            forbidden.
        stop: strings that end the answer, and are not part of its text.
        stop_token_ids: tokens that end it.
        ignore_eos: go on after the model's own end tokens.
        frequency_penalty, presence_penalty: in [-2, 2], else 0, for tokens of the answer. Tokens
            are chosen by these parameters in the order in which they stand here.
        repetition_penalty: in (0, 2], for tokens of prompt and answer; 1, which is none, else.
        logit_bias: token id to a number in [-1e4, 1e4] that is added to its logit.
        temperature: at least 0, else 1; below 1e-6 the best token is taken.
        top_k: draw from this many of the likeliest tokens; -1, for all, else.
        top_p: draw from the fewest likeliest tokens that have this probability, in (0, 1], else 1.
        min_p: draw from tokens of at least this share of the best one's probability, in [0, 1],
            else 0.
        seed: makes the draws repeatable.
        regex: a regular expression that the whole text matches. At most one grammar may be given;
            it takes the place of one in the engine's `defaults`.
        json_schema: a JSON schema that the text follows; as text, dict, pydantic model, or another
            type that pydantic knows, such as list[int].
        ebnf: a grammar in Lark's syntax as llguidance reads it, or in llama.cpp's GBNF.
        return_logprob: report log probabilities of the answer's tokens, after penalties, grammar
            and temperature.
        logprob_start_len: report those of the prompt's tokens as well, from this position on; -1,
            for none, else.
        top_logprobs_num: report this many of the likeliest tokens with each of them, else 0.
        n: number of samples of one prompt, for `Engine.samples`, else 1.
        priority: requests of higher priority run first, else 0.
        timeout: seconds after which the text so far is the answer.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | type | None = field(default=None, hash=False)
    ebnf: str | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    n: int | None = None
    priority: int | None = None
    timeout: float | None = None

    def __repr__(self) -> str:
        return told_fields(self)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check(name, value))
        if self.min_new_tokens is not None and self.max_new_tokens is not None:
            check_int("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(
                f"{' and '.join(given)}: give one of them; a text follows one grammar"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Parameters by name, such as those of a JSON file; max_tokens means max_new_tokens.

        Raises RequestError for a wrong value, and for an unknown name, with the nearest one.
        """
        if not isinstance(values, Mapping):
            raise RequestError(f"{shown(values)} must be a dict of sampling parameters")
        for name, value in values.items():
            if name not in SAMPLING_NAMES:
                raise unknown_name(name, value, SAMPLING_NAMES)
        if "max_tokens" not in values:
            return cls(**values)
        if "max_new_tokens" in values:
            raise RequestError(
                "max_tokens and max_new_tokens: give one of them; they mean the same"
            )
        rest = dict(values)
        if (max_tokens := rest.pop("max_tokens")) is not None:
            max_tokens = check_int("max_tokens", max_tokens, 0)  # by the name that was given
        return cls(**rest, max_new_tokens=max_tokens)

    def given(self) -> dict[str, Any]:
        """The values that are given, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def samples(self) -> list[Self]:
        """The parameters of each of the `n` samples; their seeds count up."""
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n or 1)]
        return [replace(self, n=1, seed=None if s is None else s % 2**64) for s in seeds]

    @property
    def is_constrained(self) -> bool:
        """Whether the answer follows a regex, a JSON schema or a grammar."""
        return any(getattr(self, name) is not None for name in GRAMMARS)


# Typed as before, so that type checkers know the fields
SamplingParams.__init__ = known_names(SamplingParams.__init__)  # type: ignore[method-assign]


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments; max_tokens means max_new_tokens."""

    max_tokens: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    regex: str | None
    json_schema: str | Mapping[str, Any] | type | None
    ebnf: str | None
    return_logprob: bool | None
    logprob_start_len: int | None
    top_logprobs_num: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    n: int | None
    priority: int | None
    timeout: float | None


SAMPLING_NAMES = tuple(SamplingOptions.__annotations__)


@dataclass(frozen=True)
class ResolvedParams(SamplingParams):
    """SamplingParams in which every value is set, as `Engine.resolved` returns them.

    What is not given, or None, has the value that holds where no engine and no model says another.
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
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    priority: int = 0

    def __post_init__(self) -> None:
        for known in fields(self):
            if getattr(self, known.name) is None:
                default = {} if known.name == "logit_bias" else known.default
                object.__setattr__(self, known.name, default)
        super().__post_init__()

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken instead of drawing one."""
        return self.temperature < 1e-6

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that have been seen get other logits."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


def _top_k(name: str, value: object) -> int:
    top_k = check_int(name, value, -1)
    if top_k == 0:
        raise RequestError("top_k=0 leaves no token; use -1 for all tokens, or at least 1")
    return top_k


def _stop_strings(name: str, stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Sequence) else None
    if stops is None or not all(isinstance(s, str) for s in stops) or len(stops) > MAX_STOPS:
        raise RequestError(f"{name}={shown(stop)} must be a str or at most {MAX_STOPS} of them")
    return tuple(dict.fromkeys(s for s in stops if s))


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise RequestError(f"{name}={shown(ids)} must be a list of token ids")
    return tuple(check_int(name, token_id, 0) for token_id in ids)


def _logit_bias(name: str, bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIASES:
        raise RequestError(
            f"{name}={shown(bias)} must be a dict of at most {MAX_BIASES} token ids to numbers"
        )
    return {
        check_int(name, token, 0): check_float(f"{name}[{token}]", value, -1e4, 1e4)
        for token, value in bias.items()
    }


_PENALTY = partial(check_float, low=-2.0, high=2.0)
# What each returns is kept: Python's numbers in the place of numpy's, tuples for lists
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": partial(check_int, low=0),
    "min_new_tokens": partial(check_int, low=0),
    "temperature": partial(check_float, low=0.0, high=math.inf),
    "top_p": partial(check_float, low=0.0, high=1.0, open_low=True),
    "top_k": _top_k,
    "min_p": partial(check_float, low=0.0, high=1.0),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "repetition_penalty": partial(check_float, low=0.0, high=2.0, open_low=True),
    "logit_bias": _logit_bias,
    "return_logprob": check_bool,
    "logprob_start_len": partial(check_int, low=-1),
    "top_logprobs_num": partial(check_int, low=0, high=MAX_TOP_LOGPROBS),
    "stop": _stop_strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": check_bool,
    "seed": partial(check_int, low=0, high=2**64 - 1),
    "n": partial(check_int, low=1, high=MAX_SAMPLES),
    "priority": partial(check_int, low=-(1 << 31)),
    "timeout": partial(check_float, low=0.0, high=sys.float_info.max),
}
