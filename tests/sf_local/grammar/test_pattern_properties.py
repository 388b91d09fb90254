"""Objects with keys by patterns: texts come to their end, and jsonschema finds them valid."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.errors import GrammarError
from sf_local.grammar.compiler import GrammarCompiler
from sf_local.text.tokenizer import Tokenizer
from tests.support.walk import Walk, accepts

DIGIT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 9}
BOOL: dict[str, Any] = {"type": "boolean"}
CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}


def check(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], num_walks: int
) -> int:
    """Walk through the grammar of `schema`; returns how often that came to an end."""
    ends = 0
    for seed in range(num_walks):
        grammar = compiler.json_schema(schema)
        walk = Walk(tokenizer, grammar, seed, jump=seed % 2 == 1, limit=200)
        if walk.is_complete:
            jsonschema.Draft202012Validator(schema).validate(json.loads(walk.text))
            ends += 1
    return ends


# Objects without additionalProperties
OBJECTS: list[dict[str, Any]] = [
    {"properties": {"name": DIGIT}, "patternProperties": {"^x_": DIGIT}},
    {"properties": {"ab": BOOL}, "patternProperties": {"^ab$": {}}},
    {"properties": {"a": {}}, "patternProperties": {"^a$": BOOL}},
    {"properties": {"a": BOOL, "b": BOOL}, "patternProperties": {"^(a|b)$": BOOL}},
    {"properties": {"a": DIGIT, "b": {}}, "patternProperties": {"^[ab]$": {"maximum": 3}}},
    {"properties": {"ab": BOOL}, "patternProperties": {"^ab$": {"const": True}, "^a$": BOOL}},
    {"properties": {"ab": {"type": "string"}, "c": BOOL}, "patternProperties": {"^ab$": BOOL}},
    {"properties": {"ab": False, "c": BOOL}, "patternProperties": {"^ab$": BOOL}},
    {"required": ["ab"], "patternProperties": {"^ab$": BOOL}},
    {"required": ["a", "b"], "patternProperties": {"^(a|b)$": DIGIT}},
    {"required": ["x_a"], "patternProperties": {"^x_": BOOL}},
    {"required": ["ab"], "patternProperties": {"^ab$": BOOL}, "maxProperties": 2},
    {"required": ["x_1", "x_2"], "properties": {"x_1": {"minimum": 5}},
     "patternProperties": {"^x_": DIGIT}},
    {"properties": {"a": BOOL, "aa": {}, "aaa": {}}, "patternProperties": {"^a{1,3}$": BOOL}},
    {"properties": {"": BOOL}, "patternProperties": {"^$": {}, "^b$": DIGIT}},
    {"properties": {'"\\\n': BOOL}, "patternProperties": {'^"\\\\\n$': BOOL}},
    {"properties": {"é\n": {}, 'q"': {}}, "patternProperties": {'^(é\\n|q")$': DIGIT}},
    {"properties": {"é": BOOL}, "patternProperties": {"^\u00e9$": BOOL}},
    {"properties": {"é": {}, "a\n": {}}, "patternProperties": {r"^\w+$": DIGIT}},
    {"properties": {"a": BOOL}, "patternProperties": {r"^[^\s\S]$": BOOL}},
    {"properties": {"a": BOOL}, "patternProperties": {"^ab?$": BOOL, "^c": {"enum": []}}},
    {"patternProperties": {"^x": {"type": "integer"}, "^y": BOOL}},
    {"patternProperties": {r"^\d": DIGIT, "^[0-9]": {"minimum": 5}}},
    {"properties": {"o": {**CLOSED, "properties": {"k": {}}, "patternProperties": {"^k$": DIGIT}}}},
    {"$ref": "#/$defs/d", "properties": {"a": BOOL},
     "$defs": {"d": {"type": "object", "patternProperties": {"^a$": BOOL, "^b": BOOL}}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", OBJECTS, ids=json.dumps)
def test_no_other_keys(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    """No text ends in the middle where named keys are all that a pattern matches."""
    schema = {**CLOSED, **schema}
    assert check(tokenizer, compiler, schema, 8) > 4


@pytest.mark.parametrize("additional", [True, BOOL])
@pytest.mark.parametrize("pattern", ["(?:)", "^", ".*", "^.*$", "(?s)^.*$", "^[^a]*$|a"])
def test_patterns_of_all_keys(
    tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str, additional: Any
) -> None:
    """A key that matches no pattern must not begin: it could not end."""
    schema = {
        "type": "object",
        "patternProperties": {pattern: False},
        "additionalProperties": additional,
    }
    assert check(tokenizer, compiler, schema, 8) == 8
    schema["patternProperties"] = {pattern: DIGIT}
    assert check(tokenizer, compiler, schema, 8) > 4
    assert accepts(tokenizer, compiler.json_schema(schema), '{"a": 3, "é": 4, "": 5}')


def test_keys_that_are_named_elsewhere(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """They remain optional where only a pattern, or additionalProperties, has them."""
    inner = {**CLOSED, "patternProperties": {"^ab$": BOOL}}
    schema = {"type": "object", "properties": {"ab": inner}, "required": ["ab"]}
    for text in ('{"ab": {}}', '{"ab": {"ab": true}}'):
        assert accepts(tokenizer, compiler.json_schema(schema), text)
    inner = {"patternProperties": {"^(?:[^a]|a.|$)": DIGIT}, "additionalProperties": BOOL}
    schema = {**CLOSED, "properties": {"a": {"type": "object", **inner}}, "required": ["a"]}
    assert check(tokenizer, compiler, schema, 8) > 4
    for text in ("{}", '{"a": true}', '{"b": 1}'):
        assert accepts(tokenizer, compiler.json_schema(schema), f'{{"a": {text}}}')


@pytest.mark.parametrize("others", [False, True])
def test_combined_schemas(tokenizer: Tokenizer, compiler: GrammarCompiler, others: bool) -> None:
    """Where other schemas name the keys of a pattern."""
    inner = {"patternProperties": {"^ab$": {"const": True}}, "additionalProperties": others}
    named = {"type": "object", "properties": {"ab": BOOL, "c": BOOL}}
    for schema in (
        {"allOf": [named, inner]},
        {"allOf": [inner, named]},
        {"$defs": {"inner": inner}, "$ref": "#/$defs/inner", **named},
        {"anyOf": [inner, {"required": ["ab"]}], **named},
        {"patternProperties": inner["patternProperties"], "allOf": [named],
         "additionalProperties": others},
    ):  # fmt: skip
        assert check(tokenizer, compiler, schema, 8) > 4
        for text in ('{"ab": true}', '{"ab": false}', '{"c": true}', '{"ab": true, "c": true}'):
            is_valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
            assert accepts(tokenizer, compiler.json_schema(schema), text) == is_valid, text


def test_keywords_apart(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """additionalProperties do not concern keys of patterns, whatever stands between the two."""
    schema = {
        "type": "object", "patternProperties": {"^a": DIGIT}, "anyOf": [{"required": ["ab"]}],
        "properties": {"b": BOOL}, "additionalProperties": False,
    }  # fmt: skip
    assert check(tokenizer, compiler, schema, 8) > 4
    assert accepts(tokenizer, compiler.json_schema(schema), '{"b": true, "ab": 1, "ac": 2}')


def test_matching_takes_no_years(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    name = "a" * 40 + "!"
    schema = {**CLOSED, "properties": {name: BOOL}, "patternProperties": {"^(a+)+$": DIGIT}}
    assert accepts(tokenizer, compiler.json_schema(schema), json.dumps({name: True}))


def test_half_of_a_surrogate_pair(compiler: GrammarCompiler) -> None:
    schema = {"properties": {"\ud800": BOOL}, "patternProperties": {"^x": DIGIT}}
    for more in ({}, CLOSED):
        with pytest.raises(GrammarError, match="surrogate"):
            compiler.json_schema(json.dumps({**schema, **more}))


SPELLINGS = [
    {"properties": {"name": DIGIT}, "additionalProperties": BOOL},
    {"patternProperties": {"^n": DIGIT}, "additionalProperties": BOOL},
    {"required": ["name"], "properties": {"name": DIGIT}, "additionalProperties": {}},
    {"allOf": [{"properties": {"name": DIGIT}}, {"required": ["me"]}]},
    {"properties": {"name": DIGIT, "\x01": BOOL}, "additionalProperties": True},
    {"properties": {"o": {"properties": {"name": DIGIT}, "additionalProperties": True}}},
]


@pytest.mark.parametrize("schema", SPELLINGS, ids=json.dumps)
def test_other_spellings_are_the_same_keys(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    schema = {"type": "object", **schema}
    validator = jsonschema.Draft202012Validator(schema)
    for key in (r"n\u0061me", r"n\u0061m\u0065", r"\u006eame", r"\u0001", r"\n\u0061me", "me"):
        for outer in ("%s", '{"o": %s}', '{"me": true, %s'):
            text = outer % f'{{"{key}": true}}'
            text = text.replace(", {", ", ")
            if accepts(tokenizer, compiler.json_schema(schema), text):
                assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("control", ["\t", "\n", "\x1f"])
def test_control_characters_in_named_keys(
    tokenizer: Tokenizer, compiler: GrammarCompiler, control: str
) -> None:
    r"""A pattern's keys have none, which JSON writes as \t, \u0009 or \u001F and \u001f."""
    name = f"x{control}"
    schema = {**CLOSED, "properties": {name: BOOL}, "patternProperties": {"^x": {}, "^y": DIGIT}}
    code = ord(control)
    for key in (rf"x\u{code:04x}", rf"x\u{code:04X}", json.dumps(name)[1:-1]):
        for value in ("1", "true"):
            text = f'{{"{key}": {value}}}'
            if accepts(tokenizer, compiler.json_schema(schema), text):
                assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), text
    assert accepts(tokenizer, compiler.json_schema(schema), json.dumps({name: True}))
    with pytest.raises(GrammarError, match=r"the key 'x.*beside #/patternProperties"):
        compiler.json_schema({**schema, "additionalProperties": True})


READERS = ["é", "a", "ab", "a\n", "a\nb", "a\rb", "a\u2028", "\u0663", "\u00a0", "\ufeff", "-", "",
           " ", "\u017f", "_", "a\u0301", "\x1c", "\x85", "\x7f", "\x00"]  # fmt: skip
PATTERNS = [r"^\w+$", r"^\W+$", r"^\d", r"^\D+$", r"\s", r"^\S+$", "^a$", "^a.*$", "^.$", "^[^a]*$",
            "a$", r"[^\W\d]", r"^(?:a|.b)$|\d$", "(?s)^a.*$", "(?i)^S$", r"(?a)^\w+$"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_keys_that_readers_of_patterns_disagree_on(
    tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str
) -> None:
    r"""`\w` is Unicode in Python only, and `$` matches before a line end there."""
    for others, named in itertools.product((False, True, BOOL), (False, True)):
        keys = [key for key in READERS if others is False or key.isprintable()] if named else []
        schema: dict[str, Any] = {
            "type": "object", "patternProperties": {pattern: DIGIT}, "additionalProperties": others,
            "properties": {key: {"enum": [True, 1]} for key in keys},
        }  # fmt: skip
        try:
            compiler.json_schema(schema)
        except GrammarError as error:
            assert others is BOOL and "matches other keys in Python" in str(error)
            assert re.search(r"\\[wdsWDS]", pattern)
            continue
        validator = jsonschema.Draft202012Validator(schema)
        for key, value in itertools.product(READERS, (1, True)):
            text = json.dumps({key: value}, ensure_ascii=False)
            if accepts(tokenizer, compiler.json_schema(schema), text):
                assert validator.is_valid({key: value}), text
        for key in ("ab", "b", "a", "3", "a-"):
            text = json.dumps({key: 1 if re.search(pattern, key) else True})
            is_valid = validator.is_valid(json.loads(text))
            assert accepts(tokenizer, compiler.json_schema(schema), text) == is_valid, text


NAMES = ["a", "b", "ab", "x_", "x_a", "name", 'q"', "é", "a\\b", "a\nb", "a\x01", "\x7f", ""]
KEYS = ["^x_", "^a$", "^[ab]$", "^x_[ab]$", "a", ".*", "^[^a]+$", '"', "^é$", r"^\w+$", "(^a|b)",
        "^[a-c]{1,2}$", "^$", "^.$", r"^\d", r"^\S+$", "[^x]", r"^a\\b$", "^(a|b$|)",
        "b|^c|d$"]  # fmt: skip
VALUES = st.sampled_from([DIGIT, BOOL, {"const": None}, {"enum": ["s", 1]}])


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    patterns = st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(False), max_size=2)
    schema = {
        "type": "object",
        "properties": draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)),
        "patternProperties": draw(patterns),
        "required": draw(st.lists(st.sampled_from(NAMES), max_size=1)),
    }
    additional = draw(st.sampled_from([None, False, True, BOOL]))
    return schema if additional is None else {**schema, "additionalProperties": additional}


@st.composite
def combined(draw: st.DrawFn) -> dict[str, Any]:
    first, second = draw(objects()), draw(objects())
    return draw(
        st.sampled_from(
            [
                {"allOf": [first, second]},
                {"$defs": {"first": first}, "$ref": "#/$defs/first", **second},
                {"anyOf": [first, {"properties": {"b": BOOL}, "required": ["b"]}], **second},
                {"type": "array", "items": first, "prefixItems": [second], "maxItems": 2},
            ]
        )
    )


@settings(max_examples=40, deadline=None)
@given(schema=objects() | combined(), texts=st.lists(st.sampled_from(NAMES), max_size=2))
def test_any_object(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], texts: list[str]
) -> None:
    try:
        compiler.json_schema(schema)
    except GrammarError:
        return
    check(tokenizer, compiler, schema, 3)
    validator = jsonschema.Draft202012Validator(schema)
    for value in (1, True, None, "s"):
        value = dict.fromkeys(texts, value)
        for ascii in (False, True):
            text = json.dumps(value, ensure_ascii=ascii)
            if accepts(tokenizer, compiler.json_schema(schema), text):
                assert validator.is_valid(value), text
