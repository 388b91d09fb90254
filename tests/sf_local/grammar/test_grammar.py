import copy
import datetime
import functools
import gc
import itertools
import json
import mmap
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import Mock

import jsonschema
import llguidance
import numpy as np
import pydantic
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from sf_local.errors import EngineError, GrammarError
from sf_local.grammar import compiler as module
from sf_local.grammar import matcher as matcher_module
from sf_local.grammar.compiler import GrammarCompiler
from sf_local.grammar.json_schema import REFUSED_KEYWORDS
from sf_local.grammar.matcher import Grammar
from sf_local.text.tokenizer import Tokenizer
from tests.support.child import run_program
from tests.support.toy_tokenizers import byte_level_tokenizer, save, sentencepiece_tokenizer
from tests.support.walk import EOS, Walk, allowed


def new_compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))


def spell(tokenizer: Tokenizer, grammar: Grammar, text: str) -> None:
    """Accept `text`, byte for byte."""
    for byte in text.encode():
        grammar.accept(
            next(i for i in allowed(grammar) if tokenizer.token_bytes(i) == bytes([byte]))
        )


# --- Regexes

REGEXES = [
    "",
    "(?:)",
    "a?",
    "yes|no|maybe",
    r"\d{3}-\d{4}",
    r"^\s*[+-]?\d+(\.\d+)?$",
    r"(?P<word>[a-z]+?) (?:x|y)*",
    r"(?i)hello \w{2,5}",
    r"(?i:ab)C(?-i:d)",
    r"(?s).{3}\n?",
    r".{3}",
    r"(?x) a  b  # a comment",
    r"[^\W\d_]{3}\S\D\W",
    r"[^\w\s]{3}[^\D]",
    r"[\W\d]{4}",
    r"(?a)[^\w]{2}\w",
    r"(?i)[^k-n]{2}[A-c]k(?-i:s[a-c])\w",
    r"(?ai)kelvin",
    r"[[a][]b]\<c\>",
    r"[a&&b]{3}[!--a]",
    r"a{,3}b{2,}c{2}",
    r"\x41\u00e9\U0001F600\t\0",
    r"[\ud800-\uffff]{2}",
    r'"\\(["\\/bfnrt]|u[0-9a-f]{4})"',
    r"/\*[^*]{0,5}\*/",
    r"(^a|^b)(c$|d\Z)",
    r"(?m)\A^x$",
    r"<\|im_end\|>",
    r"(<\|im_end\|>|<think>){2}",
    r"naïve (café|你好|😀)+",
]


@pytest.mark.filterwarnings("ignore:Possible (nested|set):FutureWarning")
@pytest.mark.parametrize("regex", REGEXES)
def test_regex(tokenizer: Tokenizer, compiler: GrammarCompiler, regex: str) -> None:
    for seed in range(12):
        walk = Walk(tokenizer, compiler.regex(regex), seed, jump=seed % 2 == 1)
        assert walk.is_complete and re.fullmatch(regex, walk.text, re.ASCII), walk.text


_chars = st.sampled_from([*"ab1_ -\n", "é", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\.", "."])
_in_class = st.sampled_from([*"ab1_ \n[&~", "é", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "a-f"])
_classes = st.builds(
    lambda no, items: f"[{no}{''.join(items)}]",
    st.sampled_from(["", "^"]),
    st.lists(_in_class, min_size=1, max_size=3),
)
_regexes = st.recursive(
    _chars | _classes,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{0,2}", "{1,3}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        inner.map(lambda text: f"(?i:{text})"),
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore:Possible (nested|set):FutureWarning")
@settings(max_examples=150)
@given(regex=_regexes, seed=st.integers(0, 99))
def test_any_regex(tokenizer: Tokenizer, compiler: GrammarCompiler, regex: str, seed: int) -> None:
    try:
        grammar = compiler.regex(regex)
    except GrammarError as error:  # such as [^\w\W]
        assert "matches no text" in str(error)
        return
    walk = Walk(tokenizer, grammar, seed, jump=bool(seed % 2))
    assert walk.is_complete and re.fullmatch(regex, walk.text, re.ASCII), walk.text


@functools.cache
def byte_tokens(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {tokenizer.token_bytes(i): i for i in range(3, 300)}


def matches(tokenizer: Tokenizer, grammar: Grammar, text: bytes) -> bool:
    for byte in text:
        token = byte_tokens(tokenizer)[bytes([byte])]
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return grammar.is_complete or grammar.allows(EOS)


@functools.cache
def edges() -> list[str]:
    """Characters at the borders of what Python's classes match, and some that have odd cases."""
    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    words = [end for found in re.finditer(r"\w+", every) for end in found.span()]
    others = [end for found in re.finditer(r"\s+|\d+", every) for end in found.span()]
    near = {i + step for i in words[::7] + others[::2] for step in (-1, 0)}
    odd = "\0\x1c\x7f\x85\u0345\u0130\u017f\u200c\u2028\u24b6\ufeff\ua7cb\U000105c0"
    return [every[i] for i in sorted(near)] + list(odd)


def ascii_flag(regex: str) -> int:
    """With which Python's sets are those of a regex here: ASCII, unless it asks for Unicode."""
    return 0 if re.match(r"\(\?i?u", regex) else re.ASCII


@pytest.mark.parametrize("flags", ["", "(?i)", "(?a)", "(?u)", "(?iu)"])
@pytest.mark.parametrize(
    "regex", [r"\w", r"\d", r"\s", r"\W", r"\D", r"\S", r"[^\W\d_]", r"[\wé-]", r"[^\w\s]", "[^a]"]
)
def test_categories_are_pythons(
    tokenizer: Tokenizer, compiler: GrammarCompiler, flags: str, regex: str
) -> None:
    for char in edges():
        allowed = matches(tokenizer, compiler.regex(flags + regex), char.encode())
        assert allowed == bool(re.fullmatch(flags + regex, char, ascii_flag(flags))), ascii(char)


def test_words_are_unicode_if_asked(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text = "François ٣٤".encode()
    assert matches(tokenizer, compiler.regex(r"(?u)\w+ \d{2}"), text)
    assert not matches(tokenizer, compiler.regex(r"\w+ .{2}"), text)
    assert not matches(tokenizer, compiler.regex(r".+ \d{2}"), text)
    assert matches(tokenizer, compiler.regex("(?iu)yes"), "ye\u017f".encode())
    assert not matches(tokenizer, compiler.regex("(?i)yes"), "ye\u017f".encode())


# --- JSON schemas

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": [1, 2, None]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "point": POINT,
    "optional": {**POINT, "required": []},
    "described": {**POINT, "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x",
                  "title": "t", "description": "d", "default": {}, "examples": [1],
                  "$comment": "c", "deprecated": True, "x-mine": 1},
    "types": {"type": ["string", "null", "boolean"], "maxLength": 3},
    "enum": {"enum": ["a", 1, None, True, {"x": [1, 2]}, 1.5, 'é\n"', -0.0, 10**15]},
    "enum and length": {"enum": ["a", "abc", "abcd"], "minLength": 2},
    "const": {"const": {"a": [1, "b\0", None], "c": {}}},
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}$"},
    "pattern inside": {"type": "string", "pattern": "b|^c$", "maxLength": 5},
    "pattern Unicode": {"type": "string", "pattern": r"^\W\D\S[^\w]$"},
    "pattern set": {"type": "string", "pattern": r"^[[a&&b]\<$"},
    "integer": {"type": "integer", "exclusiveMinimum": -3, "maximum": 12},
    "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "near int64": {"type": "integer", "minimum": 2**63 - 5000, "maximum": 2**63 - 1},
    "inside 53 bits": {"type": "integer", "minimum": 2**60 + 1, "maximum": 2**60 + 999},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 100},
    "draft 4": {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer",
                "minimum": 3, "exclusiveMinimum": True, "maximum": 6},
    "array": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "null"},
              "maxItems": 3},
    "draft 7 tuple": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array",
                      "items": [{"const": 1}], "additionalItems": False, "minItems": 1},
    "$ref": {"$defs": {"a/b": POINT, "c~d": {"const": 2}}, "type": "array", "minItems": 2,
             "prefixItems": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/%24defs/c~0d"}],
             "items": False},
    "$ref into a tree": {"type": "array", "items": False, "minItems": 2, "prefixItems": [
                         {"type": "string", "pattern": r"^\W\d$"}, {"$ref": "#/prefixItems/0"}]},
    "tree": {"type": "object", "properties": {"value": {"enum": [1, 2]}, "children": {
             "type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
             "required": ["value", "children"], "additionalProperties": False},
    "anyOf": {"anyOf": [{"type": "integer", "maximum": 5}, {"type": "string", "maxLength": 2}]},
    "oneOf types": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "oneOf tags": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            "cat": {**POINT, "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
            "dog": {**POINT, "properties": {"kind": {"enum": ["dog", "wolf"]},
                                            "age": {"type": "boolean"}}, "required": ["kind"]},
        },
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "allOf objects": {"allOf": [
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
        {"properties": {"b": {"type": "boolean"}}, "required": ["b"], "maxProperties": 2}]},
    "patternProperties": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}},
                          "additionalProperties": False, "maxProperties": 3},
    "both properties": {"type": "object", "properties": {"ab": {"type": "integer"}},
                        "patternProperties": {"^a": {"minimum": 0, "maximum": 3}},
                        "required": ["ab"], "additionalProperties": False, "maxProperties": 1},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "minProperties": {**POINT, "minProperties": 2},
    "odd keys": {"type": "object", "properties": {'a"b\\c\né': {"type": "null"}},
                 "required": ['a"b\\c\né'], "additionalProperties": False},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 25},
    "uuid": {"type": "string", "format": "uuid"},
    "anything": {},
    "True": True,
}  # fmt: skip


CONTROLS = [r"^[\x00-\x1f]{2}$", r"^[\0\1]$"]
EXCLUDING = [*CONTROLS, r'^[^"]{3,60}$',
             r'^[^"\\]{3,60}$', r"^[^\\]+$", r'[^"]$', "^[!#-[]{4}$", r"^[^\W\d]{3}$",
             r'^([^\x00-\x1f"]|\\){3}$', r'^[\x00-!#-\[\]-~]{5}$',
             r"^\S{2}.\D\W$", r'^[^a"]*$', r'^(?:[^"]|\n){3}$']  # fmt: skip


@pytest.mark.parametrize("regex", EXCLUDING)
def test_patterns_that_exclude_characters(
    tokenizer: Tokenizer, compiler: GrammarCompiler, regex: str
) -> None:
    schemas: list[dict[str, Any]] = [
        {"type": "string", "pattern": regex},
        {"type": "string", "pattern": regex, "minLength": 1, "maxLength": 50},
        {"type": "object", "patternProperties": {regex: {"const": 1}}, "minProperties": 1,
         "additionalProperties": False, "maxProperties": 1},
    ]  # fmt: skip
    if regex in CONTROLS:  # which keys of patterns do not have
        with pytest.raises(GrammarError, match="minProperties"):
            compiler.json_schema(schemas.pop())
    for schema in schemas:
        for seed in range(8):
            walk = Walk(tokenizer, compiler.json_schema(schema), seed, jump=seed % 2 == 1)
            if walk.is_complete:
                jsonschema.validate(json.loads(walk.text), schema)
    for text in ('a"bc', "a\\bc", '"' * 4, "\\" * 4, "a\nb", "abc"):
        allowed = matches(
            tokenizer,
            compiler.json_schema({"type": "string", "pattern": regex}),
            json.dumps(text).encode(),
        )
        assert not allowed or re.search(regex, text), text


DATES = ["2023-02-28", "2023-02-29", "2024-02-29", "1900-02-29", "2000-02-29", "0000-01-01",
         "0004-02-29", "0001-12-31", "2023-04-31", "2023-13-01", "9999-12-31", "0400-02-29",
         "0100-02-29", "2023-00-10", "2023-01-00", "2023-1-1"]  # fmt: skip
TIMES = ["00:00:00Z", "23:59:60Z", "12:34:56.789+02:00", "24:00:00Z", "12:60:00Z", "12:34:56",
         "12:34:56-23:59", "12:34:56+24:00", "12:34:56.Z"]  # fmt: skip


def is_valid(text: str, format: str) -> bool:
    kind = {"date": datetime.date, "time": datetime.time, "date-time": datetime.datetime}[format]
    try:
        value = kind.fromisoformat(text)
        pydantic.TypeAdapter(kind).validate_json(json.dumps(text))
    except ValueError:
        return False
    return format == "date" or value.tzinfo is not None  # RFC 3339 asks for the offset


@pytest.mark.parametrize("format", ["date", "time", "date-time"])
def test_dates_and_times_are_pythons(
    tokenizer: Tokenizer, compiler: GrammarCompiler, format: str
) -> None:
    texts = {"date": DATES, "time": TIMES}.get(
        format, [f"{date}T{time}" for date in DATES for time in TIMES]
    )
    schema: Any = {"type": "string", "format": format}
    for text in texts:
        quoted = json.dumps(text).encode()
        assert matches(tokenizer, compiler.json_schema(schema), quoted) == is_valid(text, format)
    for more in ({}, {"pattern": "[02]"}, {"allOf": [{"maxLength": 40}], "pattern": "0"}):
        for seed in range(6):
            walk = Walk(tokenizer, compiler.json_schema({**schema, **more}), seed)
            assert walk.is_complete and is_valid(json.loads(walk.text), format), walk.text
            jsonschema.validate(json.loads(walk.text), more)


WRAPPERS: list[Any] = [
    {"name": "point", "schema": POINT},
    {"name": "point", "description": "d", "strict": True, "schema": POINT},
    {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}},
    {"type": "json_schema", "json_schema": {"schema": POINT}},
    {"type": "json_schema", "name": "point", "strict": True, "schema": POINT},
    {"type": "json_object", "schema": POINT},
]


@pytest.mark.parametrize("wrapper", [*WRAPPERS, json.dumps(WRAPPERS[0])])
def test_openais_wrappers(tokenizer: Tokenizer, compiler: GrammarCompiler, wrapper: Any) -> None:
    walk = Walk(tokenizer, compiler.json_schema(wrapper), seed=1)
    jsonschema.validate(json.loads(walk.text), POINT)


def test_a_schema_of_properties_that_wrappers_have(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """It is no wrapper: properties have these names, or the type is JSON Schema's."""
    names = {"name": {"const": "a"}, "schema": {"const": 1}}
    schema = {"type": "object", "properties": names, "required": ["name", "schema"]}
    walk = Walk(tokenizer, compiler.json_schema(schema), seed=1)
    assert json.loads(walk.text) == {"name": "a", "schema": 1}
    grammar = compiler.json_schema({"type": "null", "name": "n", "schema": POINT})
    assert Walk(tokenizer, grammar, seed=1).text == "null"


ECMA = {  # ECMA-262, 22.2.2
    "w": set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"),
    "d": set("0123456789"),
    "s": set("\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff")
    | set(map(chr, range(0x2000, 0x200B))),
}


@pytest.mark.parametrize("regex", [r"\w", r"\d", r"\s", r"\W", r"\D", r"\S", "."])
def test_patterns_mean_the_same_everywhere(
    tokenizer: Tokenizer, compiler: GrammarCompiler, regex: str
) -> None:
    """In ECMA 262, in Python's re, and in Rust's regex, which pydantic uses."""
    schema = {"type": "string", "pattern": f"^{regex}$"}
    rust = pydantic.TypeAdapter(
        Annotated[str, pydantic.StringConstraints(pattern=schema["pattern"])],
        config={"regex_engine": "rust-regex"},
    )
    num_allowed = 0
    for char in {*edges(), *map(chr, range(128)), "\u2028", "\u0301", "é"}:
        text = json.dumps(char, ensure_ascii=False)
        if not matches(tokenizer, compiler.json_schema(schema), text.encode()):
            continue
        num_allowed += 1
        ecma = char not in "\n\r\u2028\u2029"
        if regex != ".":
            ecma = (char in ECMA[regex[1].lower()]) == regex[1].islower()
        assert ecma and re.search(schema["pattern"], char), ascii(char)
        rust.validate_python(char)
    assert num_allowed >= {"s": 5, "d": 10}.get(regex[-1], 60)


@pytest.mark.filterwarnings("ignore:Possible (nested|set):FutureWarning")
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schema(tokenizer: Tokenizer, compiler: GrammarCompiler, name: str) -> None:
    schema = SCHEMAS[name]
    before, num_complete = copy.deepcopy(schema), 0
    for seed in range(12):
        walk = Walk(tokenizer, compiler.json_schema(schema), seed, jump=seed % 2 == 1)
        if walk.is_complete:
            jsonschema.validate(json.loads(walk.text), schema)
            num_complete += 1
    assert num_complete > 6
    assert schema == before


def test_json_is_written_as_json_dumps_does(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    for seed in range(8):
        text = Walk(tokenizer, compiler.json_schema(SCHEMAS["tree"]), seed).text
        assert text == json.dumps(json.loads(text))


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)
    tag: str | None = pydantic.Field(default=None, pattern="^[A-Z]{2}$")


class Owner(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    pets: list[Pet] = pydantic.Field(max_length=2)
    scores: dict[str, bool] = pydantic.Field(max_length=1)


def test_pydantic_model(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for seed in range(12):
        walk = Walk(tokenizer, compiler.json_schema(Owner), seed, jump=seed % 2 == 1)
        if walk.is_complete:
            Owner.model_validate_json(walk.text)


class Circle(pydantic.BaseModel):
    shape: Literal["circle"]
    radius: int


class Square(pydantic.BaseModel):
    shape: Literal["square"]
    side: int


class Drawing(pydantic.BaseModel):
    item: Circle | Square = pydantic.Field(discriminator="shape")


def test_tagged_union_of_pydantic(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for seed in range(6):
        Drawing.model_validate_json(Walk(tokenizer, compiler.json_schema(Drawing), seed).text)


def test_json_text_dict_and_bool_are_the_same(compiler: GrammarCompiler) -> None:
    masks = [allowed(compiler.json_schema(s)) for s in (POINT, json.dumps(POINT, indent=1))]
    assert masks[0] == masks[1]
    assert allowed(compiler.json_schema(True)) == allowed(compiler.json_schema({}))


# --- Lark and GBNF

LARK = r"""
start: sum
sum: item ("+" item)*
item: NUMBER | "(" sum ")" | %json {"enum": ["a", {"b": [1, 2]}]}
NUMBER: /[0-9]{1,3}/   // <[1]> in a comment
"""
SPACED = """
start: sum
sum: NUMBER ("+" NUMBER)*
%import common.INT -> NUMBER
%ignore /[ ]{1,2}/
"""
GBNF = r"""
root ::= greeting ("," ws name){1,2}  # <[1]>
greeting ::= "hi" | "<|im_end|>"
ws ::= " "?
name ::= [a-z] [a-z0-9]*
"""


def test_lark(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for seed in range(12):
        walk = Walk(tokenizer, compiler.ebnf(LARK), seed, jump=seed % 2 == 1)
        if walk.is_complete:
            assert re.fullmatch(r'([()+]|[0-9]{1,3}|"a"|\{"b": \[1, 2\]\})+', walk.text)
        walk = Walk(tokenizer, compiler.ebnf(SPACED), seed, jump=seed % 2 == 1)
        if walk.is_complete:
            assert re.fullmatch(r"[0-9]+( *\+ *[0-9]+)* *", walk.text)


def test_gbnf(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for seed in range(12):
        walk = Walk(tokenizer, compiler.ebnf(GBNF), seed, jump=seed % 2 == 1)
        assert walk.is_complete
        assert re.fullmatch(r"(hi|<\|im_end\|>)(, ?[a-z][a-z0-9]*){1,2}", walk.text)


# --- Refusals

REFUSED: list[tuple[str, Any, list[str]]] = [
    ("regex", 3, ["regex must be a str, not int"]),
    ("regex", "a(b", ["regex='a(b'", "position 1"]),
    ("regex", "*a", ["position 0"]),
    ("regex", "a(?=b)", ["look-ahead"]),
    ("regex", "(?<!a)b", ["negative", "look-behind"]),
    ("regex", r"(a)\1", ["backreference"]),
    ("regex", r"(a)?(?(1)b|c)", ["conditional"]),
    ("regex", r"\bfoo", ["word boundary"]),
    ("regex", "a^b", ["^ in the middle"]),
    ("regex", "(a$)*", ["$ in the middle"]),
    ("regex", "(?a:k)", ["flags a or u"]),
    ("regex", r"\ud800", [r"surrogate \ud800"]),
    ("regex", "a\ud800", ["surrogate", "character 1"]),
    ("regex", r"[^\w\W]", ["matches no text"]),
    ("regex", "a{1000000}", ["10,000 characters"]),
    ("regex", "(a?){500}a{500}", ["too complex"]),
    ("regex", "a" * 70_000, ["70,000", "65,536"]),
    ("json_schema", 3.5, ["json_schema must be", "float"]),
    ("json_schema", {"a": {1, 2}}, ["json_schema", "set"]),
    ("json_schema", '{"a":\n 1,}', ["line 2, column 4"]),
    ("json_schema", '{"minimum": NaN}', ["NaN"]),
    ("json_schema", {"minimum": float("inf")}, ["Infinity"]),
    ("json_schema", r'{"const": "\ud800"}', ["surrogate"]),
    ("json_schema", "[1]", ["'[1]' at #"]),
    ("json_schema", False, ["Unsatisfiable"]),
    ("json_schema", {"enum": []}, ["Unsatisfiable"]),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 1}, ["greater than maximum"]),
    ("json_schema", {"type": "strng"}, ["Invalid type: strng"]),
    ("json_schema", {"properties": {"a": {"not": {}}}}, ["has not at #/properties/a"]),
    ("json_schema", {"items": {"uniqueItems": True}}, ["uniqueItems at #/items"]),
    ("json_schema", {"$ref": "#/$defs/x"}, ["#/$defs/x", "leads nowhere"]),
    ("json_schema", {"$ref": "#/", "$defs": {}}, ["leads nowhere"]),
    ("json_schema", {"$ref": "http://x/y"}, ["only #/..."]),
    ("json_schema", {"$ref": "#"}, ["matches no text"]),
    ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"if": {}}}}, ["if at #/$defs/a"]),
    ("json_schema", {"items": {"$id": "x"}}, ["$id at #/items"]),
    ("json_schema", {"x-guidance": {"lenient": True}}, ["x-guidance"]),
    ("regex", "(?u)" + r"\w" * 2001, ["2,000 classes such as"]),
    ("json_schema", {"allOf": [{"pattern": r"\W" * 1001}, {"pattern": r"\S" * 1000}]}, ["2,000"]),
    ("json_schema", {"format": "phone"}, ["'phone' at #", "uuid"]),
    ("json_schema", {"pattern": "a("}, ["'a('", "#/pattern", "position 1"]),
    ("json_schema", {"pattern": r"\p{L}"}, ["bad escape"]),
    ("json_schema", {"patternProperties": {"a(?=b)": {}}}, ["look-ahead"]),
    ("json_schema", {"minProperties": 2}, ["minProperties=2"]),
    ("json_schema", {"prefixItems": [], "additionalItems": False}, ["use items"]),
    ("json_schema", {"const": 2**60}, ["2**53"]),
    ("json_schema", {"type": "integer", "minimum": 2**70}, ["64 bits"]),
    ("json_schema", {"oneOf": [{"type": "integer"}, {"minimum": 2}]}, ["oneOf", "Use anyOf"]),
    ("json_schema", {"type": "integer", "multipleOf": 1000003}, ["multipleOf at #"]),
    ("json_schema", {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, ["least common"]),
    ("ebnf", "", ["no start rule"]),
    ("ebnf", 'a: "x"', ["no start rule"]),
    ("ebnf", "start: a", ["1(8)", "unknown name"]),
    ("ebnf", 'start: "a', ["lexer error"]),
    ("ebnf", '{"grammars": [{"json_schema": {}}]}', ["1(1)"]),
    ("ebnf", "start: start", ["matches no text"]),
    ("ebnf", 'start: "a"\n <|im_end|>', ["special token '<|im_end|>'", "line 2, column 2"]),
    ("ebnf", 'start: "a" <[2]>', ["special token"]),
    ("ebnf", "start: <[*]>", ["special token"]),
    ("ebnf", "start: a\na[max_tokens=3]: /.*/", ["attribute 'max_tokens'", "line 2, column 3"]),
    ("ebnf", 'start: a\na[stop="x"]: /.*/', ["attribute 'stop'"]),
    ("ebnf", "start: a\na[temperature=0.5]: /.*/", ["attribute 'temperature'"]),
    ("ebnf", '%llguidance {"no_forcing": true}\nstart: "x"', ["%llguidance"]),
    ("ebnf", 'start: %json {"not": {}}', ["has not at #"]),
    ("ebnf", "start: %json {,}", ["%json", "line 1, column 15"]),
    ("ebnf", 'start: %json {"x-guidance": {"lenient": true}}', ["x-guidance"]),
    ("ebnf", 'start: %json {}\n%ignore " "', ["%ignore"]),
    ("ebnf", r"start: /(?-u:\xff)\[2\]/", ["invalid UTF-8"]),
    ("ebnf", "start: @other", ["unknown grammar"]),
    ("ebnf", "%import other.thing\nstart: thing", ["other"]),
    ("ebnf", 'a ::= "x"', ["GBNF", "root"]),
    ("ebnf", "root ::= <[2]>", ["GBNF", "line 1"]),
]


@pytest.mark.parametrize(("kind", "text", "words"), REFUSED)
def test_refused(compiler: GrammarCompiler, kind: str, text: Any, words: list[str]) -> None:
    num_bytes = compiler._cache.num_bytes
    with pytest.raises(GrammarError) as caught:
        getattr(compiler, kind)(text)
    for word in [kind, *words]:
        assert word in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 700
    assert compiler._cache.num_bytes == num_bytes


@pytest.mark.parametrize("keyword", sorted(REFUSED_KEYWORDS))
def test_refused_keywords_are_named(compiler: GrammarCompiler, keyword: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(f"has {keyword} at #/items")):
        compiler.json_schema({"items": {keyword: {}}})
    compiler.json_schema({"properties": {keyword: {"type": "null"}}})  # a name like any other


def test_every_keyword_of_the_drafts_is_known() -> None:
    """A keyword is applied, refused or without effect: none is forgotten."""
    applied = {
        *("$ref", "$defs", "definitions", "allOf", "anyOf", "oneOf", "const", "enum", "type"),
        *("items", "additionalItems", "prefixItems", "minItems", "maxItems", "properties"),
        *("additionalProperties", "patternProperties", "required", "minProperties"),
        *("maxProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$id"),
    }
    for draft in (jsonschema.Draft4Validator, jsonschema.Draft7Validator,
                  jsonschema.Draft201909Validator, jsonschema.Draft202012Validator):  # fmt: skip
        assert set(draft.VALIDATORS) - applied <= set(REFUSED_KEYWORDS)


# --- Hostile texts: each ends soon, with an error or a grammar that works, and none takes the
# process along.


def chain(length: int, link: str = '{{"$ref": "#/$defs/d{}"}}') -> str:
    defs = ", ".join(f'"d{i}": ' + link.format(i + 1) for i in range(length))
    return f'{{"$ref": "#/$defs/d0", "$defs": {{{defs}, "d{length}": {{"const": 1}}}}}}'


IN_OBJECT = '{{"type": "object", "properties": {{"a": {{"$ref": "#/$defs/d{}"}}}}}}'


def all_of(pattern: str, count: int) -> str:
    return json.dumps({"allOf": [{"type": "string", "pattern": pattern % i} for i in range(count)]})


HOSTILE: list[tuple[str, str]] = [
    ("regex", "(a*)*b"),
    ("regex", "(a|a)*b"),
    ("regex", "(x+x+)+y"),
    ("regex", "a{1,100000}"),
    ("regex", "[xy]a{10000}"),
    ("regex", "(a{1000}){1000}"),
    ("regex", "x|(a{100}){1000}"),
    ("regex", "(.{1,3000}){3000}"),
    ("regex", "([a-z]{1,1000}){1,1000}"),
    ("regex", "(.*a.{15}){3}"),
    ("regex", ".*".join("abcdefghijklmnop")),
    ("regex", "|".join(f"w{i}x" for i in range(8000))),
    ("regex", "[" + "".join(map(chr, range(0x4E00, 0x9FFF, 2))) + "]{3}"),
    ("regex", r"[\w\W]{1,5000}"),
    ("regex", "a*" * 5000),
    ("regex", r"\W*" * 900),
    ("regex", "(" * 10000 + ")" * 10000),
    ("regex", "[a" * 10000),
    ("regex", "a\0b"),
    ("json_schema", '{"items": ' * 3000 + "true" + "}" * 3000),
    ("json_schema", '{"items": ' * 200 + "true" + "}" * 200),
    ("json_schema", '{"const": ' + "[" * 50000 + "]" * 50000 + "}"),
    ("json_schema", '{"const": ' + "[" * 200 + "]" * 200 + "}"),
    ("json_schema", chain(500)),
    ("json_schema", chain(3000)),
    ("json_schema", chain(240, IN_OBJECT)),
    ("json_schema", chain(1200, IN_OBJECT)),
    ("json_schema", '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}'),
    ("json_schema", '{"anyOf": [{"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/0"}]}'),
    ("json_schema", json.dumps({"enum": [f"word{i}" for i in range(9000)]})),
    ("json_schema", json.dumps({"enum": [f"word{i}" for i in range(50000)]})),
    ("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(900)}})),
    ("json_schema", json.dumps({"type": "object", "required": [f"p{i}" for i in range(9000)]})),
    ("json_schema", json.dumps({"const": "hello world " * 10000})),
    ("json_schema", '{"minimum": ' + "9" * 5000 + "}"),
    ("json_schema", '{"type": "integer", "maximum": 1e400}'),
    ("json_schema", '{"type": "string", "minLength": 1000000000}'),
    ("json_schema", '{"type": "array", "items": {"const": 1}, "minItems": 1000000000}'),
    ("json_schema", '{"type": "array", "items": {"const": 1}, "maxItems": 1000000000}'),
    ("json_schema", '{"type": "integer", "multipleOf": 99991, "minimum": -5, "maximum": 1e15}'),
    ("json_schema", '{"type": "number", "multipleOf": 1e-300}'),
    ("json_schema", '{"type": "integer", "multipleOf": 0}'),
    ("json_schema", '{"type": "string", "pattern": "^x?(a{1000}){1000}$"}'),
    ("json_schema", all_of("a{%d}.*b", 39)),
    ("json_schema", all_of(".*w%d.*", 20)),
    ("json_schema", json.dumps({"patternProperties": {f"^a{i}x": {} for i in range(3000)}})),
    ("ebnf", 'start: start start start | "x" | ""'),
    ("ebnf", 'start: b start "x" | "y"\nb: "" | "z"'),
    ("ebnf", 'start: A\nA: "a" A | "b"'),
    ("ebnf", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(900)) + 'a900: "x"'),
    ("ebnf", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(2000)) + 'a2000: "x"'),
    ("ebnf", "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(2000)) + 'A2000: "x"'),
    ("ebnf", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"'),
    ("ebnf", "start: " + "(" * 9000 + '"a"' + ")" * 9000),
    ("ebnf", "start: /" + "(" * 9000 + "a" + ")" * 9000 + "/"),
    ("ebnf", "start: " + " ".join(f'"x{i}"' for i in range(3000))),
    ("ebnf", 'start: A\nA: B{1000}\nB: C{1000}\nC: "x"'),
    ("ebnf", 'start: a{1000}\na: b{1000}\nb: "x"'),
    ("ebnf", 'start: "x"{1000000000}'),
    ("ebnf", "start: /" + r"\W*" * 3000 + "/"),
    ("ebnf", "start: A\nA: " + "B " * 50 + "\nB: /" + r"\W*" * 50 + "/"),
    ("ebnf", "start: A\nA: " + " & ".join(f"/.*w{i}.*/" for i in range(20))),
    ("ebnf", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000),
    ("ebnf", "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(800)) + "a800 ::= []"),
    ("ebnf", 'root ::= "a\\'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), HOSTILE, ids=lambda text: text[:40])
def test_hostile(tokenizer: Tokenizer, compiler: GrammarCompiler, kind: str, text: str) -> None:
    try:
        Walk(tokenizer, getattr(compiler, kind)(text), seed=1, jump=True, limit=30)
    except GrammarError as error:
        assert len(str(error)) < 700


AMBIGUOUS = 'start: (("a" "b"?){1,200}){1,200}'  # rows of items that grow with every token


@pytest.mark.parametrize("method", ["fill_mask", "allows", "accept", "forced"])
def test_what_takes_too_long_ends_its_generation(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """By a clock of CPU time, as all others wait for it."""
    compiler, clock = new_compiler(tokenizer), itertools.count(0, 0.3)
    grammar = compiler.regex("[ab]+")
    token = allowed(grammar)[0]
    arguments = {"fill_mask": [np.empty(grammar.num_words, np.int32)], "forced": []}
    monkeypatch.setattr(matcher_module.time, "thread_time", lambda: next(clock))
    with pytest.raises(GrammarError, match="took more than 250 ms"):
        getattr(grammar, method)(*arguments.get(method, [token]))
    assert compiler._cache.num_bytes == 0


_WORDS = [f"w{i}" for i in range(3000)]
LARGE: list[tuple[str, Any, str]] = [
    ("ebnf", "start: " + "|".join(f'"{word}"' for word in _WORDS), "w2999"),
    ("ebnf", "root ::= " + "|".join(f'"{word}"' for word in _WORDS), "w2999"),
    ("ebnf", 'root ::= [^x]{1,300} "x"', "abcdefghijklmnopqrstuvwx"),
    ("json_schema", {"properties": {w: {"const": 1} for w in _WORDS[:1000]}, "type": "object"},
     '{"w1": 1, "w998": 1}'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "grammar", "text"), LARGE)
def test_limits_of_work_leave_room_for_large_grammars(
    tokenizer: Tokenizer, compiler: GrammarCompiler, kind: str, grammar: Any, text: str
) -> None:
    spell(tokenizer, getattr(compiler, kind)(grammar), text)


GREEDY = """
import random, sys
from pathlib import Path
from sf_local.errors import GrammarError
from sf_local.text.tokenizer import Tokenizer
from tests.sf_local.grammar.test_grammar import Walk, new_compiler

tokenizer = Tokenizer(Path(sys.argv[1]))
compiler = new_compiler(tokenizer)
chance = random.Random(1)
grammars = ['root ::= "x" ws " y"\\nws ::= [ ]*', 'start: "x" WS " y"\\nWS: /[ ]*/']
for _ in range(40):
    few, more, end = (chance.choice(["a", "[ab]", " ", "[^c]", "(ab)"]) for _ in range(3))
    text = few.strip("[]()^")[:1] + chance.choice(["", "y", "ab"])
    grammars.append(f'start: "x" T "{text}"\\nT: /{few}*/')
    grammars.append(f'start: U T "{text}"\\nT: /{few}+/\\nU: /{more}*/')
    grammars.append(f'root ::= "x" t "{text}" e\\nt ::= [{few.strip("[]()")}]*\\ne ::= "{text}"+')
for number, text in enumerate(grammars):
    try:
        Walk(tokenizer, compiler.ebnf(text), seed=number, jump=True, limit=30)
    except GrammarError:
        pass
print(len(grammars))
"""


def test_terminals_that_take_what_must_follow(tmp_path: Path) -> None:
    """llguidance must come back from each. In a process of its own, which can be ended."""
    save(tmp_path, byte_level_tokenizer(), eos_token="<|im_end|>")
    assert run_program(GREEDY, tmp_path, timeout=120).strip() == "122"


def test_a_grammar_that_gives_up_is_not_kept(tokenizer: Tokenizer) -> None:
    compiler = new_compiler(tokenizer)
    grammar = compiler.ebnf(AMBIGUOUS)
    with pytest.raises(GrammarError, match=r"too complex to follow.*items"):
        spell(tokenizer, grammar, "a" * 60)
    with pytest.raises(GrammarError, match="too complex to follow"):
        grammar.forced()
    assert not grammar.is_complete
    assert compiler._cache.num_bytes == 0


# --- Masks, the end, forced tokens


def test_end_token_only_where_the_text_may_end(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    grammar = compiler.regex("ab*")
    assert EOS not in allowed(grammar)
    spell(tokenizer, grammar, "a")
    assert EOS in allowed(grammar)
    assert not grammar.is_complete
    grammar.accept(EOS)
    assert grammar.is_complete
    assert allowed(grammar) == [EOS]
    assert grammar.forced() == []


def test_complete_when_nothing_can_follow(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.regex("a")
    spell(tokenizer, grammar, "a")
    assert grammar.is_complete
    assert allowed(grammar) == [EOS]
    grammar.accept(EOS)
    assert grammar.is_complete


@pytest.mark.parametrize("token", [EOS, 0, 1])
def test_a_token_that_is_not_allowed(compiler: GrammarCompiler, token: int) -> None:
    grammar = compiler.regex("aa")
    with pytest.raises(EngineError, match=f"Token {token}"):
        grammar.accept(token)
    assert not grammar.is_complete


def test_special_tokens_never_match_text(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.regex("(?s).+")
    assert not tokenizer.special_ids.intersection(allowed(grammar))


def test_several_end_tokens(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({0, EOS}))
    assert set(allowed(compiler.regex("a?"))) >= {0, EOS}
    for token in (0, EOS):
        grammar = compiler.regex("a?")
        grammar.accept(token)
        assert grammar.is_complete


@pytest.mark.parametrize("vocab_size", [64, 65, 95, 96, 413, 1024])
@pytest.mark.parametrize("eos_ids", [frozenset({EOS}), frozenset()])
def test_vocabulary_of_the_model(
    tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]
) -> None:
    """Larger than the tokenizer's, or smaller; with an end token or without."""
    compiler = GrammarCompiler(tokenizer, vocab_size, eos_ids)
    grammar = compiler.regex("(?s).*")
    ids = allowed(grammar)
    assert grammar.num_words == (vocab_size + 31) // 32
    assert set(ids) & (tokenizer.special_ids | {i for i in ids if i >= vocab_size}) == eos_ids
    assert max(ids) == min(vocab_size, tokenizer.vocab_size) - 1
    grammar = compiler.regex("!!")
    spell(tokenizer, grammar, "!!")
    assert grammar.is_complete
    assert allowed(grammar) == sorted(eos_ids)


def test_forced_tokens_are_those_of_the_tokenizer(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    text = "The quick brown fox, 你好 😀"
    grammar = compiler.regex(re.escape(text))
    ids = grammar.forced()
    assert grammar.is_complete
    assert ids == tokenizer.encode(text)


FIXED = {
    "type": "object",
    "properties": {
        "first_name": {"enum": ["Ann", "Bob"]},
        "is_member_of_the_club": {"type": "boolean"},
        "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2000},
    },
    "required": ["first_name", "is_member_of_the_club", "year_of_birth"],
    "additionalProperties": False,
}


def follow(
    tokenizer: Tokenizer, grammar: Grammar, wanted: str, jump: bool
) -> tuple[list[int], int]:
    """Tokens and steps of a model that wants to write `wanted`."""
    ids: list[int] = []
    rest, num_steps = wanted.encode(), 0
    while not grammar.is_complete:
        new = grammar.forced() if jump else []
        if not new:
            fitting = [i for i in allowed(grammar) if rest.startswith(tokenizer.token_bytes(i))]
            new = [max(fitting, key=lambda i: len(tokenizer.token_bytes(i)))]
            grammar.accept(new[0])
            num_steps += 1
        ids += new
        rest = rest[len(b"".join(map(tokenizer.token_bytes, new))) :]
    return ids, num_steps


def check_jumps(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    wanted = '{"first_name": "Bob", "is_member_of_the_club": false, "year_of_birth": 1987}'
    slow, num_slow = follow(tokenizer, compiler.json_schema(FIXED), wanted, jump=False)
    fast, num_fast = follow(tokenizer, compiler.json_schema(FIXED), wanted, jump=True)
    assert tokenizer.decode(slow) == tokenizer.decode(fast) == wanted
    assert slow == fast
    assert num_fast * 2 <= num_slow


def test_forced_tokens_halve_the_steps_of_fixed_keys(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    check_jumps(tokenizer, compiler)


def test_forced_text_that_spells_a_special_token(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    grammar = compiler.regex(r"<\|im_end\|><\|im_start\|>")
    ids = grammar.forced()
    assert grammar.is_complete
    assert tokenizer.decode(ids) == "<|im_end|><|im_start|>"


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = save(
        tmp_path, sentencepiece_tokenizer(), bos_token={"content": "<s>"}, eos_token="</s>"
    )
    compiler = new_compiler(tokenizer)
    for seed in range(6):
        walk = Walk(tokenizer, compiler.regex("naïve [a-z]{2} 你?😀</s>"), seed, jump=seed % 2 == 1)
        assert re.fullmatch("naïve [a-z]{2} 你?😀</s>", walk.text)
        walk = Walk(tokenizer, compiler.json_schema(POINT), seed, jump=seed % 2 == 1)
        jsonschema.validate(json.loads(walk.text), POINT)
    text = "quick brown fox"
    ids = compiler.regex(text).forced()
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bare.normalizer = normalizers.Replace(" ", "▁")  # no space before the text
    assert ids == bare.encode(text, add_special_tokens=False).ids
    check_jumps(tokenizer, compiler)


# --- Cache and threads


def test_equal_texts_are_compiled_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = new_compiler(tokenizer)
    compiled: list[str] = []
    make = compiler._vocabulary.matcher

    def counting(grammar: str, limits: Any) -> Any:
        compiled.append(grammar)
        return make(grammar, limits)

    monkeypatch.setattr(compiler._vocabulary, "matcher", counting)
    first, second = compiler.regex("ab"), compiler.regex("ab")
    spell(tokenizer, first, "a")
    assert allowed(first) != allowed(second)  # each its own state
    compiler.json_schema("true")
    compiler.json_schema(True)
    assert len(compiled) == 2


def test_other_threads_have_a_turn_while_the_vocabulary_is_built(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every native call holds the GIL to its end, so what makes masks fast is prepared in another
    one than the tokens."""
    native = Mock(wraps=llguidance.LLTokenizer)
    monkeypatch.setattr(llguidance, "LLTokenizer", native)
    new_compiler(tokenizer).build()
    assert native.call_args.kwargs["slices"] == [] and native.general_slices.called


def test_cache_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 4 * module.MATCHER_BYTES)
    monkeypatch.setattr(module, "new_memory", lambda: 0)
    compiler = new_compiler(tokenizer)
    for i in range(8):
        compiler.regex("first")
        compiler.regex(f"a{i}")
        assert compiler._cache.num_bytes <= 4 * module.MATCHER_BYTES
    assert [text for _, text in compiler._cache._entries] == ["a6", "first", "a7"]
    compiler.regex("b" * 9000)  # nothing else fits beside it
    assert len(compiler._cache._entries) == 1


def test_what_lexers_grow_counts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both when a grammar is compiled, and with the masks of its generations."""
    memory = itertools.count(0, 1 << 20)
    for where in (module, matcher_module):
        monkeypatch.setattr(where, "new_memory", lambda: next(memory))
    monkeypatch.setattr(module, "CACHE_BYTES", 6 << 20)
    compiler = new_compiler(tokenizer)
    compiler.regex("other")
    grammar = compiler.regex("[ab]{9}")
    assert 2 << 20 < compiler._cache.num_bytes < 3 << 20
    spell(tokenizer, grammar, "a")  # a mask and a token
    assert 4 << 20 < compiler._cache.num_bytes < 5 << 20
    spell(tokenizer, grammar, "a")  # for which the other one makes room
    assert [text for _, text in compiler._cache._entries] == ["[ab]{9}"]
    spell(tokenizer, grammar, "abab")
    other = compiler.regex("another")
    spell(tokenizer, grammar, "a")  # which is no longer in the cache, but goes on
    spell(tokenizer, other, "a")
    assert compiler._cache.num_bytes < 6 << 20


MANY = """
import sys
from pathlib import Path
import numpy as np
from sf_local.grammar import compiler as module
from sf_local.text.tokenizer import Tokenizer
from tests.sf_local.grammar.test_grammar import new_compiler

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

module.CACHE_BYTES = 4 << 20
tokenizer = Tokenizer(Path(sys.argv[1]))
compiler, random = new_compiler(tokenizer), np.random.default_rng(0)
letters = [tokenizer.encode(letter)[-1] for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"]
for number in range(60):
    grammar = compiler.regex("(.*a.{%d})+" % (99 + number))  # its lexer grows with every token
    mask = np.empty(grammar.num_words, np.int32)
    for token in random.choice(letters, 300).tolist():
        grammar.fill_mask(mask)
        grammar.accept(token)
    if number == 3:
        before = resident()
print(resident() - before >> 20)
"""


def test_many_grammars_take_no_more_memory_than_the_cache_may(tmp_path: Path) -> None:
    """Also where they take what evicted ones gave back, as the kernel counts it."""
    save(tmp_path, byte_level_tokenizer(), eos_token="<|im_end|>")
    assert int(run_program(MANY, tmp_path, timeout=120)) < 6


def test_page_faults_tell_what_is_new() -> None:
    block, before = mmap.mmap(-1, 8 << 20), matcher_module.new_memory()
    block.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    grown = matcher_module.new_memory() - before
    block[0] = 2
    assert len(block) <= grown < 2 * len(block)


def test_many_threads_compile_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compiled = new_compiler(tokenizer), list[str]()
    make, start, come = compiler._vocabulary.matcher, threading.Barrier(8), list[str]()

    def counting(grammar: str, limits: Any) -> Any:
        compiled.append(grammar)
        while len(come) % 8:  # until all ask for it, however busy the machine is
            time.sleep(0.01)
        time.sleep(0.2)
        return make(grammar, limits)

    def work(text: str) -> str:
        start.wait()
        come.append(text)
        try:
            return str(compiler.ebnf(text).is_complete)
        except GrammarError as error:
            return str(error)

    monkeypatch.setattr(compiler._vocabulary, "matcher", counting)
    for text in ('start: "ab"', "start: unknown"):
        with ThreadPoolExecutor(8) as pool:
            results = set(pool.map(work, [text] * 8))
        assert len(results) == 1
    assert len(compiled) == 2


def test_a_compiler_that_was_used_is_freed(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level_tokenizer(), eos_token="<|im_end|>")
    compiler = new_compiler(tokenizer)
    Walk(tokenizer, compiler.json_schema(POINT), seed=1, jump=True)
    freed = weakref.ref(tokenizer)
    del tokenizer, compiler
    gc.collect()
    assert freed() is None


def test_grammars_from_many_threads(tokenizer: Tokenizer) -> None:
    compiler = new_compiler(tokenizer)
    failures: list[object] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        try:
            for i in range(10):
                regex = f"[a-c]{{3}}{i}x"
                walk = Walk(tokenizer, compiler.regex(regex), seed)
                assert re.fullmatch(regex, walk.text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_llguidance_is_imported_with_the_first_grammar() -> None:
    code = "import sys, sf_local.grammar.compiler; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- The real tokenizer


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Tokenizer]:
    yield Tokenizer(smollm2)


@pytest.mark.model
def test_real_tokenizer(real: Tokenizer) -> None:
    compiler = new_compiler(real)
    check_jumps(real, compiler)
    for seed in range(6):
        walk = Walk(real, compiler.json_schema(POINT), seed, jump=seed % 2 == 1)
        jsonschema.validate(json.loads(walk.text), POINT)
        walk = Walk(real, compiler.regex(r"\w{3}, \S{2}"), seed, jump=seed % 2 == 1)
        assert re.fullmatch(r"\w{3}, \S{2}", walk.text)
    text = "The capital of France is Paris, isn't it? 1234 <|im_end|>"
    grammar = compiler.regex(re.escape(text))
    ids = grammar.forced()
    assert grammar.is_complete
    assert real.decode(ids) == text
    assert not real.special_ids.intersection(ids)


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"properties": {"a": {}}, "type": "object"}, '{"b": 1}', False),
        ({"properties": {"a": {}}, "type": "object"}, '{"a": 1, "b": 1}', False),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"b": 1}', True),
        ({"type": "object"}, '{"b": 1}', True),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"b": 1}', True),
        ({"anyOf": [{"type": "object", "properties": {"a": {}}}]}, '{"b": 1}', False),
        (
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {"const": 1}}}]},
            '{"a": 1, "b": 1}',
            True,
        ),
        (
            {"type": "object", "properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
            '{"a": 1, "b": 1}',
            True,
        ),
        (
            {
                "$defs": {"x": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}},
                "$ref": "#/$defs/x",
            },
            '{"a": {"b": 1}}',
            False,
        ),
    ],
)
def test_listed_properties_are_all_there_are(
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    schema: dict[str, Any],
    text: str,
    fits: bool,
) -> None:
    grammar = compiler.json_schema(schema)
    if fits:
        spell(tokenizer, grammar, text)
    else:
        with pytest.raises(StopIteration):  # no token for it
            spell(tokenizer, grammar, text)
