"""Sampling parameters that the makers of a model recommend, which its artifact carries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

_Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words and as a check


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_between(value: Any, low: float, high: float) -> bool:
    return (_is_int(value) or isinstance(value, float)) and low <= value <= high


# The same as SamplingParams allows, except for an answer without tokens, which nobody recommends
RULES: dict[str, _Rule] = {
    "max_new_tokens": ("an int of at least 1", lambda value: _is_int(value) and value >= 1),
    "temperature": (
        "a finite number of at least 0",
        lambda value: _is_between(value, 0, sys.float_info.max),
    ),
    "top_k": (
        "an int of at least 1, or -1 for all tokens",
        lambda value: _is_int(value) and (value >= 1 or value == -1),
    ),
    "top_p": ("a number above 0, at most 1", lambda v: _is_between(v, 0, 1) and v > 0),
    "min_p": ("a number from 0 to 1", lambda v: _is_between(v, 0, 1)),
    "repetition_penalty": ("a number above 0, at most 2", lambda v: _is_between(v, 0, 2) and v > 0),
}


def check_sampling_default(name: str, value: object) -> None:
    """Raise ValueError for a parameter that no model recommends, or a value that is not allowed."""
    if name not in RULES:
        raise ValueError(f"{name!r} is none of {', '.join(RULES)}")
    rule, holds = RULES[name]
    if not holds(value):
        raise ValueError(f"{name}={value!r} must be {rule}")


def check_sampling_defaults(values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of them that is not allowed."""
    for name, value in values.items():
        check_sampling_default(name, value)
