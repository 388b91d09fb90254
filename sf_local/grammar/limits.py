"""What the readers of regexes, schemas and Lark share: refusals, and the form llguidance takes.

llguidance is native code that some inputs crash or keep busy for minutes. The readers' limits are
such that compiling ends within about two seconds and its recursion within 4 MiB of stack.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

MAX_OPTIONAL = 1_000  # parts of regexes that may be empty
MAX_PATTERNS = 6  # regexes that one text must match; time grows exponentially


class Refused(Exception):
    """Why a text cannot be compiled, to be completed with the parameter's name."""


def shown(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def lark_grammar(text: str) -> str:
    """`text` as a list of one grammar: a bare text that begins with { is read as JSON."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def as_json(value: Any) -> str:
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
    """llguidance's message, shortened, without the marks of its own verbosity."""
    message = re.split("<non-verbose/>|<backtrace>", message)[0].strip().rstrip(".")
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def refuse(message: str) -> NoReturn:
    """Raise what llguidance said; in our words where its own speak of other things."""
    if "recursion limit exceeded" in message:
        raise RecursionError
    if "oneOf constraints are not supported" in message:
        raise Refused(
            "has a oneOf whose alternatives may overlap, which is not supported. Use anyOf, or "
            "give each one a required property with a constant of its own."
        )
    raise Refused(f"cannot be compiled: {cleaned(message)}.")
