"""Answers that call tools, as grammars: in the model's own format, with arguments by schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sf_local.grammar.json_schema import checked_schema
from sf_local.grammar.limits import as_json, lark_grammar
from sf_local.text.tool_calls import REASONING_TEXTS
from sf_local.text.tool_formats import ToolFormat

Reasoning = Literal["none", "optional", "open"]
# Beside one of these an object without listed properties may have some all the same
_OTHER_KEYS = frozenset(
    ("additionalProperties", "patternProperties", "minProperties", "allOf", "anyOf", "oneOf",
     "$ref")
)  # fmt: skip


def arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a tool's arguments: an object, and an empty one without parameters.

    tool: in OpenAI's form.
    """
    schema = {**(tool["function"].get("parameters") or {"properties": {}}), "type": "object"}
    is_empty = schema.get("properties") == {} and not schema.get("required")
    if is_empty and not schema.keys() & _OTHER_KEYS:
        schema["additionalProperties"] = False
    return schema


def tool_grammar(
    tool_format: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    several: bool,
    reasoning: Reasoning,
    token_id: Callable[[str], int | None],
) -> str:
    """Calls of `tools` as llguidance's grammar, of one that may be any of them, or of several.

    Args:
        tools: in OpenAI's form.
        several: more calls may follow the first, if the format has a place for them.
        reasoning: "open" if the answer begins inside <think>, "optional" if it may.
        token_id: the token of a marker, as which alone it is written; None if it is text.

    Raises:
        Refused: a schema is not supported.
    """
    texts = [*tool_format.special_texts, *REASONING_TEXTS]
    markers = re.compile("(" + "|".join(map(re.escape, texts)) + ")")

    def literal(text: str) -> str:
        """What stands for a text: its markers are tokens, where the model has such."""
        parts = [(part, token_id(part)) for part in markers.split(text) if part]
        quoted = [json.dumps(text) if token is None else f"<[{token}]>" for text, token in parts]
        return " ".join(quoted) or '""'

    more = ""
    if several and tool_format.separator is not None:
        more = f"({literal(tool_format.separator)} call)*"
    rules = [
        f"start: {'' if reasoning == 'none' else 'reasoning '}calls",
        f"calls: {literal(tool_format.opening)} call {more} {literal(tool_format.closing)}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
    ]
    for i, tool in enumerate(tools):
        name = tool["function"]["name"]
        before = literal(tool_format.before_name + name + tool_format.before_arguments)
        schema = as_json(checked_schema(arguments_schema(tool)))
        rules.append(f"call_{i}: {before} %json {schema} {literal(tool_format.after_arguments)}")
    if reasoning != "none":
        opening, end = REASONING_TEXTS
        whole = r"thoughts /\n{0,2}/"
        rules.append(
            f"reasoning: {whole if reasoning == 'open' else f'({literal(opening)} {whole})?'}"
        )
        if token_id(end) is None:
            rules.append(f"thoughts[suffix={json.dumps(end)}]: /(?s:.*)/")
        else:
            rules.append(f"thoughts: /(?s:.*)/ {literal(end)}")
    return lark_grammar("\n".join(rules))
