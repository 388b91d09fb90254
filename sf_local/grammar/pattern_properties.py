"""Patterns of keys that match nothing beyond the keys that a schema names.

llguidance writes each named key at most once, and then keys that a pattern matches. If there are
none left, it still allows a comma and finds no key behind it, so such a pattern is written out.
"""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def named_keys(schema: Any) -> list[str]:
    """All keys that a schema, or one inside it, has in properties or required."""
    names: dict[str, None] = {}
    todo = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            for keyword in ("properties", "required"):
                if isinstance(keys := value.get(keyword), (dict, list)):
                    names |= dict.fromkeys(key for key in keys if isinstance(key, str))
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return list(names)


def write_out_patterns(
    schema: dict[str, Any], patterns: dict[str, tuple[str, Any]], names: list[str]
) -> None:
    """Set patternProperties of `schema`, but write as properties what has no keys beyond `names`.

    Args:
        patterns: how a pattern is written in llguidance's syntax, and its schema.
    """
    schema["patternProperties"] = {}
    for pattern, (written, child) in patterns.items():
        matching = [name for name in names if re.search(pattern, name)]
        if _has_others(written, matching):
            schema["patternProperties"][written] = child
            continue
        for name in matching:
            properties = schema.setdefault("properties", {})
            is_alone = properties.setdefault(name, child) is child
            if not is_alone and child not in ({}, True):
                properties[name] = {"allOf": [properties[name], child]}


def _has_others(pattern: str, names: list[str]) -> bool:
    """Whether an object that has all of `names` can have another key that `pattern` matches."""
    from llguidance import LLMatcher

    schema = {
        "type": "object",
        "properties": {name: {"type": "null"} for name in names},
        "required": names,
        "patternProperties": {pattern: {"type": "null"}},
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    before = "{" + "".join(f"{json.dumps(name, ensure_ascii=False)}:null," for name in names) + '"'
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0)
    if matcher.is_error():
        return True  # which is found again, and told, where all of the schema is compiled
    tokens = list(before.encode())
    if matcher.try_consume_tokens(tokens) < len(tokens):
        return False
    matcher.compute_bitmask()
    return not matcher.is_error()


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
