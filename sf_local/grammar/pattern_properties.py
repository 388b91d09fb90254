"""Objects in which keys have patterns, as llguidance needs them.

llguidance writes each named key at most once, and then keys that a pattern matches or that no
pattern does. Where none of these are left it still allows a comma, behind which nothing can follow.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sf_local.grammar.limits import Refused, shown
from sf_local.grammar.regex import NOT_IN_KEYS

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# All escapes of JSON but \u, with which a key can be written in several ways
ONE_SPELLING = {"json_allowed_escapes": 'nrbtf\\"'}
_ANY: tuple[Any, ...] = (True, {})


def named_keys(schema: Any) -> list[str]:
    """All keys that a schema, or one inside it, has in properties or required."""
    names: dict[str, None] = {}
    todo = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            names |= dict.fromkeys(_own_keys(value))
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return list(names)


def has_other_keys(schema: dict[str, Any]) -> bool:
    """Whether objects may have keys that `schema` neither names nor has a pattern for."""
    has_keys = bool(_own_keys(schema) or schema.get("patternProperties"))
    return has_keys and schema.get("additionalProperties") is not False


def rewrite_pattern_properties(
    schema: dict[str, Any], path: str, write: Callable[[str, bool], str], names: list[str]
) -> None:
    """Write patternProperties and additionalProperties of `schema` so that every key that may
    begin can end, and so that its value is valid whoever reads the patterns.

    A pattern that matches no keys but `names` becomes properties, and so do additionalProperties
    where no other keys are left for them.

    Args:
        write: as `RegexWriter.write_key`.
        names: the keys named anywhere, because allOf and $ref join objects.

    Raises:
        Refused: which keys a pattern matches depends on the reader, and others have a schema; or a
            key has control characters or line ends, and there may be others.
    """
    # Taken out and put in again: llguidance reads both together only if nothing stands between.
    patterns, others = schema.pop("patternProperties"), schema.pop("additionalProperties", True)
    own, kept = set(_own_keys(schema)), dict[str, Any]()
    properties = schema.setdefault("properties", {})
    for pattern, child in patterns.items():
        written = write(pattern, others in _ANY)
        if others not in (*_ANY, False) and write(pattern, True) != written:
            raise Refused(
                f"has {shown(pattern)} at {path}, beside a schema of additionalProperties: which "
                r"keys it matches depends on the reader. Write [0-9A-Za-z_] for \w, [0-9] for \d "
                r"and a blank for \s, or make additionalProperties true or false."
            )
        has_others = _is_possible(names, {written: True}, False)
        if has_others:
            _join(kept, written, child)
        for name in filter(re.compile(pattern).search, names):
            # llguidance itself joins both for its own names, as it reads the pattern.
            if not has_others or (name in own and not (name.isascii() and name.isprintable())):
                _join(properties, name, child)
    if others is not False and kept:
        kept[f"[{NOT_IN_KEYS}]"] = False
        if refused := [name for name in own if re.search(f"[{NOT_IN_KEYS}]", name)]:
            raise Refused(
                f"has the key {shown(refused[0])} beside {path} and additionalProperties, where no "
                "key has control characters or line ends. Set additionalProperties to false."
            )
        if not _is_possible(names, dict.fromkeys(kept, False), True):
            for name in names:
                if not any(re.search(pattern, name) for pattern in patterns):
                    properties.setdefault(name, others)
            others = False
    schema |= {"patternProperties": kept, "additionalProperties": others}


def _own_keys(schema: dict[str, Any]) -> list[str]:
    """The keys in properties or required."""
    properties, required = schema.get("properties"), schema.get("required")
    keys = [*properties] if isinstance(properties, dict) else []
    if isinstance(required, list):
        keys += [key for key in required if isinstance(key, str)]
    return keys


def _join(schemas: dict[str, Any], key: str, schema: Any) -> None:
    """Have `schema` hold for `key` as well."""
    if schemas.setdefault(key, schema) is not schema and schema not in _ANY:
        schemas[key] = {"allOf": [schemas[key], schema]}


def _is_possible(names: Iterable[str], patterns: dict[str, Any], others: bool) -> bool:
    """Whether an object can have a key other than `names`: one that matches a pattern whose schema
    is not False or, with `others`, none of them."""
    from llguidance import LLMatcher

    schema = {
        "type": "object",
        "properties": dict.fromkeys(names, False),
        "patternProperties": patterns,
        "additionalProperties": others,
        "minProperties": 1,
        "x-guidance": ONE_SPELLING,
    }
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0)
    # An error is found again, and told, where all of the schema is compiled.
    return matcher.is_error() or matcher.validate_tokens(list(b'{"')) == 2


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
