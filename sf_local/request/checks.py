"""Checks of parameters, for all that callers pass in."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from sf_local.errors import RequestError

P = ParamSpec("P")
R = TypeVar("R")
# What other libraries call a parameter, and what it is called here
_OTHER_NAMES = {
    **dict.fromkeys(("response_format", "response_model", "guided_json", "schema"), "json_schema"),
    "guided_regex": "regex",
    **dict.fromkeys(("guided_grammar", "grammar"), "ebnf"),
    **dict.fromkeys(("logprobs", "output_logprobs"), "return_logprob"),
    "top_logprobs": "top_logprobs_num",
    "prompt_logprobs": "logprob_start_len",
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_length", "num_predict", "n_predict"),
        "max_new_tokens",
    ),
    **dict.fromkeys(("min_tokens", "min_length"), "min_new_tokens"),
    "repeat_penalty": "repetition_penalty",
    **dict.fromkeys(("num_return_sequences", "best_of"), "n"),
    **dict.fromkeys(("stop_sequences", "stop_strings"), "stop"),
    "eos_token_id": "stop_token_ids",
    "random_seed": "seed",
    "enable_thinking": "chat_template_kwargs",
    **dict.fromkeys(("model", "model_path"), "vmfb"),
    "n_threads": "num_threads",
    "device_map": "device",
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "kv_memory"),
    **dict.fromkeys(("max_num_seqs", "max_running_requests"), "max_running"),
    **dict.fromkeys(("max_num_batched_tokens", "chunked_prefill_size", "n_batch"),
                    "prefill_tokens"),
    "sampling_params": "params",
}  # fmt: skip
_CONTEXT = 'the context is compiled: Engine.from_source(..., build_options={"max_seq_len": ...})'
_WEIGHTS = 'weights are compiled: Engine.from_source(..., build_options={"weight_dtype": "int8"})'
# What is no parameter here, and how it is done
_OTHER_WAYS = {
    "stream": "call `stream` or `stream_chat`, which return what can be iterated over",
    "do_sample": "temperature=0 takes the likeliest token",
    **dict.fromkeys(
        ("choices", "guided_choice"),
        "`Engine.score` compares whole texts, as gen(choices=) of SGLang does, and "
        'json_schema={"enum": [...]} writes one of them',
    ),
    **dict.fromkeys(("n_ctx", "max_model_len", "max_seq_len", "context_length"), _CONTEXT),
    **dict.fromkeys(("weights", "weight_dtype", "dtype", "quantization", "torch_dtype"), _WEIGHTS),
    "n_gpu_layers": 'device="hip" runs all of a model on a GPU that it was compiled for',
    "system": 'give a message {"role": "system", "content": ...}',
}


def shown(value: object) -> str:
    """A value of any type as text for an error message, at most 200 characters of it."""
    try:
        text = repr(value)
    except Exception:  # such as an int of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def told_fields(value: Any) -> str:
    """The repr of a dataclass without fields that are None or have their default."""
    values = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
    defaults = {f.name: f.default for f in fields(value)}
    told = [f"{n}={v!r}" for n, v in values.items() if v is not None and v != defaults[n]]
    return f"{type(value).__name__}({', '.join(told)})"


def unknown_name(name: object, value: object, allowed: Iterable[str]) -> RequestError:
    """The refusal of a parameter that is none of those allowed, with the nearest of them."""
    names = list(allowed)
    other = _OTHER_NAMES.get(str(name))
    near = [other] if other in names else get_close_matches(str(name), names, 1)
    remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
    remedy = _OTHER_WAYS.get(str(name), remedy)
    return RequestError(f"{name}={shown(value)}: there is no such parameter; {remedy}")


def known_names(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises RequestError with the nearest name for an argument that it has
    not, in the place of Python's TypeError."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    known, told = frozenset(names), [name for name in names if not name.startswith("_")]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name not in known:
                raise unknown_name(name, value, told)
        return function(*args, **kwargs)

    return checked


def check_bool(name: str, value: object) -> bool:
    """The value, if it is a bool, of Python or numpy; else raises RequestError."""
    value = plain_number(value)
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be True or False")
    return value


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as Python's int, if it is an integer from `low` to `high`, of Python or numpy; else
    raises RequestError."""
    number = plain_number(value)
    if isinstance(number, Integral) and not isinstance(number, bool):
        number = int(number)
        if number >= low and (high is None or number <= high):
            return number
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise RequestError(f"{name}={shown(value)} must be an integer {bounds}")


def check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> float:
    """The value as Python's number, if it is a finite number from `low` to `high`, or above `low`
    with `open_low`, of Python or numpy; else raises RequestError."""
    number = plain_number(value)
    if isinstance(number, Real) and not isinstance(number, bool):
        is_inside = low <= number <= min(high, sys.float_info.max)  # type: ignore[operator]
        if is_inside and not (open_low and number == low):
            return number if isinstance(number, int) else float(number)
    bounds = f"{'above' if open_low else 'at least'} {low}"
    bounds += f" and at most {high}" if math.isfinite(high) else " and finite"
    raise RequestError(f"{name}={shown(value)} must be a number {bounds}")


def plain_number(value: object) -> object:
    """Python's number for a numpy scalar or an array without dimensions; else the value."""
    return value.item() if getattr(value, "ndim", None) == 0 else value  # type: ignore[attr-defined]
