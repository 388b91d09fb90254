"""Checks of parameters, for all that callers pass in."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from sf_local.errors import RequestError


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
    near = get_close_matches(str(name), names, 1)
    remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
    return RequestError(f"{name}={shown(value)}: there is no such parameter; {remedy}")


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
