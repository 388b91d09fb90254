"""What the checks of regexes, JSON schemas and Lark share: limits, refusals, llguidance's input.

llguidance is native code that some inputs crash or keep busy for minutes. The limits are such that
compiling takes at most about two seconds and 4 MiB of stack.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

MAX_OPTIONAL = 1_000  # parts of regexes that may match nothing
MAX_PATTERNS = 6  # regexes that one text must match at once; time grows exponentially


class Refused(Exception):
    """Why a text cannot be compiled; GrammarCompiler puts the parameter's name before it."""


def shown(text: str, limit: int = 60) -> str:
    """`text` quoted for a message, cut after `limit` characters."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def place(text: str, index: int) -> str:
    """Where `index` is in `text`, for a message."""
    line = text.count("\n", 0, index) + 1
    return f"line {line}, column {index - text.rfind(chr(10), 0, index)}"


def lark_grammar(text: str) -> str:
    """A Lark text as llguidance's list of grammars, which is JSON."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def as_json(value: Any) -> str:
    """The JSON text of `value`.

    Raises:
        Refused: a string in it holds half of a surrogate pair, which UTF-8 cannot express.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"holds the lone surrogate \\u{ord(text[error.start]):x}, which no text can contain. "
            "Remove it."
        ) from None
    return text


def cleaned(message: str) -> str:
    """One of llguidance's messages, shortened, without its markers and backtrace."""
    message = re.split("<non-verbose/>|<backtrace>", message)[0].strip().rstrip(".")
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def refuse(message: str) -> NoReturn:
    """Raise one of llguidance's messages, in our words if its own would mislead.

    Raises:
        RecursionError: the grammar is nested too deeply.
        Refused: all else.
    """
    if "recursion limit exceeded" in message:
        raise RecursionError
    if "oneOf constraints are not supported" in message:
        raise Refused(
            "has a oneOf whose alternatives may overlap, which is not supported. Use anyOf, or "
            "give each one a required property with a constant of its own."
        )
    raise Refused(f"cannot be compiled: {cleaned(message)}.")
