"""Checks of parameters, for all that callers pass in."""

from __future__ import annotations

import math
import sys

from sf_local.errors import RequestError


def shown(value: object) -> str:
    """A value of any type as text for an error message, at most 200 characters of it."""
    try:
        text = repr(value)
    except Exception:  # such as an int of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_bool(name: str, value: object) -> None:
    """Raise RequestError unless the value is a bool."""
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be True or False")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise RequestError unless the value is an int from `low` to `high`."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):  # type: ignore[operator]
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name}={shown(value)} must be an integer {bounds}")


def check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    """Raise RequestError unless the value is a finite number from `low` to `high`, or above `low`
    with `open_low`."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (fits and low <= value <= min(high, sys.float_info.max)) or (open_low and value == low):  # type: ignore[operator]
        bounds = f"{'above' if open_low else 'at least'} {low}"
        bounds += f" and at most {high}" if math.isfinite(high) else " and finite"
        raise RequestError(f"{name}={shown(value)} must be a number {bounds}")
