"""Random JSON schemas and regexes whose texts are short enough to finish."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=6)
KEYS = st.one_of(
    st.sampled_from(
        ["id", "name", "größe", "値", "a b", 'q"'],
    ),
    WORDS,
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-1000, 1000), WORDS)


@st.composite
def bounded_strings(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(0, 4))
    return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 10))}


@st.composite
def bounded_numbers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-1000, 1000))
    high = low + draw(st.integers(1, 2000))
    kind = draw(st.sampled_from(["integer", "integer", "number"]))
    names = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "maximum")]))
    return {"type": kind, names[0]: low, names[1]: high}


@st.composite
def patterns(draw: st.DrawFn) -> Schema:
    """Classes that exclude what JSON escapes."""
    classes = [
        r'[^"]',
        r'[^"\\]',
        r"[^\\]",
        "[!#-~]",
        r"[^\W]",
        r"[^\s]",
        r"\S",
        r"\W",
        r"[^a-z\n]",
        ".",
    ]
    parts = draw(st.lists(st.sampled_from(classes), min_size=1, max_size=3))
    low = draw(st.integers(1, 3))
    return {
        "type": "string",
        "pattern": "^" + "".join(f"{p}{{{low},{low + 2}}}" for p in parts) + "$",
    }


LEAVES = st.one_of(
    bounded_strings(),
    patterns(),
    bounded_numbers(),
    st.lists(VALUES, min_size=1, max_size=5).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["boolean", "null"]},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "ipv4"},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
        ]
    ),
)


@st.composite
def objects(draw: st.DrawFn, children: st.SearchStrategy[Schema]) -> Schema:
    """Some keys are optional."""
    properties = draw(st.dictionaries(KEYS, children, min_size=1, max_size=4))
    required = [key for key in properties if draw(st.booleans())]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


@st.composite
def arrays(draw: st.DrawFn, children: st.SearchStrategy[Schema]) -> Schema:
    low = draw(st.integers(0, 2))
    items = {"items": draw(children), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}
    if draw(st.integers(0, 99)) == 37:
        items["uniqueItems"] = True
    return {"type": "array", **items}


@st.composite
def tuples(draw: st.DrawFn, children: st.SearchStrategy[Schema]) -> Schema:
    items = draw(st.lists(children, min_size=1, max_size=3))
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _containers(children: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    unions = st.lists(children, min_size=2, max_size=3).map(lambda options: {"anyOf": options})
    records = objects(children)
    return st.one_of(records, records, arrays(children), tuples(children), unions)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Some schemas name a part of theirs, and a few say what no grammar can."""
    schema = draw(objects(st.recursive(LEAVES, _containers, max_leaves=5)))
    if draw(st.integers(0, 9)) == 7:
        part = draw(LEAVES)
        schema["properties"]["ref"] = {"$ref": "#/$defs/part"}
        schema["$defs"] = {"part": part}
    if draw(st.integers(0, 99)) == 37:
        schema["not"] = {"required": ["never"]}
    return schema


CLASSES = st.sampled_from(
    ["[a-z]", "[A-Z0-9]", r"\d", "[^a-y]", "[äöü]", "[Ж-щ]", r"\w", r"[\d.]", "[a-c-]", "."]
)
LITERALS = st.text(
    st.one_of(st.sampled_from("abcxyz .,-+*?(){}[]|^$\\/"), st.sampled_from("äß東京é😀")),
    min_size=1,
    max_size=4,
).map(re.escape)
REPEATS = st.sampled_from(["?", "{2}", "{1,3}", "{0,4}", "{3}", "??"])


def _compounds(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    sequences = st.lists(parts, min_size=1, max_size=4).map("".join)
    choices = st.lists(parts, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
    repeats = st.tuples(parts, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
    return st.one_of(sequences, choices, repeats)


@st.composite
def regexes(draw: st.DrawFn) -> str:
    """A few look ahead, which no grammar can."""
    regex = draw(st.recursive(st.one_of(CLASSES, LITERALS), _compounds, max_leaves=8))
    return f"(?!q){regex}" if draw(st.integers(0, 99)) == 37 else regex
