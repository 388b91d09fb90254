"""Objects in which keys have patterns, as llguidance needs them.

llguidance writes each named key at most once, and then keys that a pattern matches or that no
pattern does. Where none of these are left it still allows a comma, behind which nothing can follow.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sf_local.grammar.limits import Refused, lark_grammar, refuse, shown
from sf_local.grammar.regex import NOT_IN_KEYS, RegexWriter

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

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
    schema: dict[str, Any], path: str, regexes: RegexWriter, names: list[str]
) -> None:
    """Write patternProperties and additionalProperties of `schema` so that every key that may
    begin can end, and so that its value is valid whoever reads the patterns.

    A pattern that matches no keys but `names` becomes properties, and so do additionalProperties
    where no other keys are left for them.

    Args:
        names: the keys named anywhere, because allOf and $ref join objects.

    Raises:
        Refused: a pattern is not supported, or which keys it matches depends on the reader, and
            others have a schema; or a key has control characters, and there may be others.
    """
    # Taken out and put in again: llguidance reads both together only if nothing stands between.
    patterns, others = schema.pop("patternProperties"), schema.pop("additionalProperties", True)
    own, matched, kept = _own_keys(schema), set[str](), dict[str, Any]()
    odd = {name for name in own if re.search(f"[{NOT_IN_KEYS}]", name)}
    properties = schema.setdefault("properties", {})
    for pattern, child in patterns.items():
        try:
            written, largest, pythons = _written(pattern, others, regexes)
        except Refused as error:
            raise Refused(f"has {shown(pattern)} at {path}, which {error}") from None
        for_all = _matching(written, names)
        for_any = _matching(largest, names) | _matching(pythons, odd)
        matched |= for_any
        named = for_all | for_any.intersection(own)
        if _is_possible(for_all, {f"^{written}$": True}, False):
            _join(kept, f"^{written}$", child)
            named -= for_all  # llguidance itself joins both for these
        for name in filter(named.__contains__, names):
            _join(properties, name, child)
    if others is not False and patterns:
        kept[f"[{NOT_IN_KEYS}]"] = False
        if odd:
            raise Refused(
                f"has the key {shown(min(odd))} beside {path} and additionalProperties, where no "
                "key has control characters or line ends. Set additionalProperties to false."
            )
        rest = [name for name in names if name not in matched]
        if not _is_possible(rest, dict.fromkeys(kept, False), True):
            properties |= {name: properties.get(name, others) for name in rest}
            others = False
    schema |= {"patternProperties": kept, "additionalProperties": others}


def _written(pattern: str, others: Any, regexes: RegexWriter) -> tuple[str, str, str]:
    """Regexes of keys: that belong to `pattern` beside additionalProperties that are `others`, that
    it matches for some reader, and that it matches in Python, also with control characters."""
    largest = regexes.write_key(pattern, is_largest=True)
    written = largest if others in _ANY else regexes.write_key(pattern, is_largest=False)
    if written != largest and others is not False:
        raise Refused(
            r"matches other keys in Python than in JavaScript, beside a schema of "
            r"additionalProperties. Write [0-9A-Za-z_] for \w, [0-9] for \d and a blank for \s, or "
            r"make additionalProperties true or false."
        )
    return written, largest, regexes.write_searched(pattern)


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
    schema = {
        "type": "object",
        "properties": dict.fromkeys(names, False),
        "patternProperties": patterns,
        "additionalProperties": others,
        "minProperties": 1,
        "x-guidance": ONE_SPELLING,
    }
    matcher = _matcher(json.dumps({"grammars": [{"json_schema": schema}]}))
    # An error is found again, and told, where all of the schema is compiled.
    return matcher.is_error() or matcher.validate_tokens(list(b'{"')) == 2


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that `pattern` matches as a whole. Python's `re` may need years to tell."""
    matcher = _matcher(lark_grammar(f"start: /(?:{pattern})/"))
    if matcher.is_error():
        refuse(matcher.get_error())
    return {name for name in names if _is_accepted(matcher.deep_copy(), name)}


def _is_accepted(matcher: LLMatcher, text: str) -> bool:
    tokens = [*text.encode(errors="surrogatepass")]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def _matcher(grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(_byte_tokenizer(), grammar, log_level=0)


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
