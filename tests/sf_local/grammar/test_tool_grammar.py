"""All that the grammar of tool calls lets a model write are calls with valid arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.errors import GrammarError
from sf_local.grammar.compiler import GrammarCompiler
from sf_local.grammar.matcher import Grammar
from sf_local.grammar.tool_grammar import Reasoning
from sf_local.text.tokenizer import Tokenizer
from sf_local.text.tool_calls import REASONING_TEXTS, AnswerParser, ToolCall
from sf_local.text.tool_formats import ToolFormat, tool_format
from sf_local.text.tools import normalized_tools
from tests.support.grammars import Schema, schemas
from tests.support.tool_templates import TOOL_TEMPLATES
from tests.support.toy_tokenizers import byte_level_tokenizer, save, sentencepiece_tokenizer
from tests.support.walk import EOS, Walk, allowed

WEATHER: dict[str, Any] = {
    "type": "object",
    "$defs": {"unit": {"enum": ["C", "</tool_call>"]}},
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "unit"],
}
EITHER = [
    {"properties": {name: {"const": name}}, "required": [name], "additionalProperties": False}
    for name in ("a", "b")
]
TOOLS = normalized_tools(
    [
        {"name": "now"},
        {"name": "get-weather", "parameters": WEATHER},
        {"name": "nothing", "parameters": {"type": "object", "properties": {}, "required": []}},
        {"name": "either", "parameters": {"type": ["object", "null"], "anyOf": EITHER}},
    ]
)
FORMATS = {name: tool_format(text) for name, text in TOOL_TEMPLATES.items()}
MARKERS = sorted({text for form in FORMATS.values() for text in form.special_texts})


def new_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """Where the markers of calls are special tokens, other added tokens, or no tokens."""
    raw: tokenizers.Tokenizer = byte_level_tokenizer()
    if kind == "sentencepiece":
        raw = sentencepiece_tokenizer()
    elif kind == "special":
        raw.add_special_tokens([*MARKERS, *REASONING_TEXTS])
    elif kind == "added":
        raw.add_tokens([*MARKERS, *REASONING_TEXTS])
    return save(folder, raw, eos_token="</s>" if kind == "sentencepiece" else "<|im_end|>")


@pytest.fixture(scope="module", params=["special", "added", "none", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return new_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))


def answer_of(tokenizer: Tokenizer, ids: list[int], form: ToolFormat) -> str:
    """What AnswerParser is given: the text with the special tokens that it asks for."""
    texts = *form.special_texts, *REASONING_TEXTS
    shown = {tokenizer.token_id(text) for text in texts}
    return b"".join(
        tokenizer.written_bytes(i) if i in shown else tokenizer.token_bytes(i) for i in ids
    ).decode()


def calls_in(
    tokenizer: Tokenizer, walk: Walk, form: ToolFormat, reasoning: Reasoning = "none"
) -> list[ToolCall]:
    """The calls of a whole walk, which has nothing else besides reasoning."""
    assert walk.is_complete
    parser = AnswerParser(form, TOOLS, reasoning == "open")
    deltas = [parser.push(answer_of(tokenizer, walk.ids, form)), parser.finish()]
    assert "".join(delta.text for delta in deltas) == ""
    return [call for delta in deltas for call in delta.tool_calls]


def check_arguments(call: ToolCall) -> None:
    [tool] = [tool["function"] for tool in TOOLS if tool["function"]["name"] == call.name]
    jsonschema.validate(call.arguments, tool.get("parameters", {"maxProperties": 0}))


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_required(tokenizer: Tokenizer, compiler: GrammarCompiler, name: str) -> None:
    form, counts = FORMATS[name], set()
    can_end = tokenizer.token_id("</think>") is not None  # a walk would not spell it by chance
    for seed in range(8):
        reasoning: Reasoning = "optional" if can_end and seed > 4 else "none"
        grammar = compiler.tool_calls(form, TOOLS, reasoning=reasoning)
        walk = Walk(tokenizer, grammar, seed, jump=bool(seed % 2), limit=3000)
        calls = calls_in(tokenizer, walk, form)
        counts.add(len(calls))
        for call in calls:
            check_arguments(call)
    assert min(counts) == 1
    assert (max(counts) > 1) == (form.separator is not None)


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_name(tokenizer: Tokenizer, compiler: GrammarCompiler, name: str) -> None:
    for tool in ("now", "get-weather", "either", "nothing"):
        grammar = compiler.tool_calls(FORMATS[name], TOOLS, tool)
        walk = Walk(tokenizer, grammar, 1, jump=True, limit=3000)
        [call] = calls_in(tokenizer, walk, FORMATS[name])
        assert call.name == tool
        check_arguments(call)


@settings(max_examples=10, deadline=None)
@given(schema=schemas(), form=st.sampled_from([*FORMATS.values()]), seed=st.integers(0, 9))
def test_random_schemas(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: Schema, form: ToolFormat, seed: int
) -> None:
    tools = normalized_tools([{"name": "now"}, {"name": "f", "parameters": schema}])
    try:
        walk = Walk(tokenizer, compiler.tool_calls(form, tools, "f"), seed, jump=seed > 4)
    except GrammarError as error:
        assert "'f'" in str(error)
        return
    if walk.is_complete:
        parser = AnswerParser(form, tools)
        deltas = [parser.push(answer_of(tokenizer, walk.ids, form)), parser.finish()]
        [call] = [call for delta in deltas for call in delta.tool_calls]
        jsonschema.validate(call.arguments, schema)


def test_no_parameters_are_an_empty_object(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for tool in ("now", "nothing"):
        grammar = compiler.tool_calls(FORMATS["qwen"], TOOLS, tool)
        answer = answer_of(tokenizer, grammar.forced(), FORMATS["qwen"])
        assert answer == f'<tool_call>\n{{"name": "{tool}", "arguments": {{}}}}\n</tool_call>'
        assert grammar.is_complete


def accept(tokenizer: Tokenizer, grammar: Grammar, text: str) -> None:
    """Accept a text as the model would write it: markers as tokens, if they are."""
    if (token := tokenizer.token_id(text)) is not None:
        grammar.accept(token)
        return
    rest = text.encode()
    while rest:
        fitting = [
            i for i in allowed(grammar) if rest.startswith(tokenizer.token_bytes(i) or b"\0")
        ]
        grammar.accept(fitting[0])
        rest = rest.removeprefix(tokenizer.token_bytes(fitting[0]))


@pytest.mark.parametrize("name", ["qwen", "llama3.1"])
def test_calls_after_reasoning(tokenizer: Tokenizer, compiler: GrammarCompiler, name: str) -> None:
    for reasoning in ("optional", "open"):
        grammar = compiler.tool_calls(FORMATS[name], TOOLS, "now", reasoning)
        if reasoning == "optional":
            accept(tokenizer, grammar, "<think>")
        accept(tokenizer, grammar, 'So {"I"\n')
        accept(tokenizer, grammar, "</think>")
        walk = Walk(tokenizer, grammar, 0)
        [call] = calls_in(tokenizer, walk, FORMATS[name])
        assert call.name == "now"


def test_markers_are_tokens(tmp_path: Path) -> None:
    """Also special ones, which no other grammar allows."""
    tokenizer = new_tokenizer(tmp_path, "special")
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))
    for name in ("mistral_v3", "mistral_v11", "qwen"):
        grammar = compiler.tool_calls(FORMATS[name], TOOLS)
        marker = tokenizer.token_id(FORMATS[name].marker)
        assert allowed(grammar) == [marker]
        assert grammar.forced()[0] == marker
    assert (
        tokenizer.token_id("[ARGS]")
        in Walk(tokenizer, compiler.tool_calls(FORMATS["mistral_v11"], TOOLS, "now"), 0).ids
    )
    # beyond the model's logits they are texts
    narrow = GrammarCompiler(tokenizer, tokenizer.token_id("[ARGS]") or 0, frozenset({EOS}))
    Walk(tokenizer, narrow.tool_calls(FORMATS["mistral_v11"], TOOLS, "now"), 0)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "tools: the schema of 'bad' has not at #, which is not supported"),
        ({"properties": {"a": {"uniqueItems": True}}}, "'bad' has uniqueItems at #/properties/a"),
        ({"required": ["a"], "properties": {"a": {"enum": []}}}, "'bad' cannot be compiled: Unsat"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "'bad' has a oneOf whose"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, "'bad' has .* look-ahead"),
        ({"$ref": "#/$defs/x"}, "'bad' has .* leads nowhere"),
        ({"properties": 3}, "'bad' cannot be compiled"),
    ],
)
def test_schemas_that_cannot_be_expressed(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], message: str
) -> None:
    tools = [*TOOLS, *normalized_tools([{"name": "bad", "parameters": schema}])]
    with pytest.raises(GrammarError, match=message):
        compiler.tool_calls(FORMATS["qwen"], tools)
    compiler.tool_calls(FORMATS["qwen"], tools, "now")  # which is none of them


def test_too_many_tools(compiler: GrammarCompiler) -> None:
    schema = {"properties": {"a": {"description": "x" * 1000}}}
    tools = normalized_tools([{"name": f"f{i}", "parameters": schema} for i in range(200)])
    with pytest.raises(GrammarError, match=r"tools has .* characters; at most 131,072"):
        compiler.tool_calls(FORMATS["qwen"], tools)
    compiler.tool_calls(FORMATS["qwen"], tools[:100])
