"""Answers as transformers renders them, and broken ones, are taken apart into calls and text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.request.output import Delta, ToolCall
from sf_local.text.tool_calls import AnswerParser, is_reasoning
from sf_local.text.tool_formats import ToolFormat, tool_format
from sf_local.text.tools import normalized_tools
from tests.support.published_templates import published_templates
from tests.support.tool_templates import TOOL_TEMPLATES, written_answer

NAMES = "get_weather", "send-mail", "now"
NO_PARAMETERS = {"type": "object", "properties": {}}  # some templates demand them
TOOLS = normalized_tools(
    [{"name": name, "description": "It.", "parameters": NO_PARAMETERS} for name in NAMES]
)
FORMATS = {name: tool_format(text) for name, text in TOOL_TEMPLATES.items()}
HERMES, LLAMA, MISTRAL = FORMATS["qwen"], FORMATS["llama3.1"], FORMATS["mistral_v3"]
Call = tuple[str, dict[str, Any]]
A = '{"name": "now", "arguments": {}}'  # a whole call, as Hermes and Mistral write it
CALLED_A = [("now", {})]


def parsed(
    pieces: list[str], form: ToolFormat | None, in_reasoning: bool = False
) -> tuple[str, str, list[ToolCall]]:
    """Text, reasoning and calls of an answer that arrives in pieces."""
    parser = AnswerParser(form, TOOLS, in_reasoning)
    deltas = [*map(parser.push, pieces), parser.finish()]
    calls = [call for delta in deltas for call in delta.tool_calls]
    return "".join(d.text for d in deltas), "".join(d.reasoning for d in deltas), calls


def taken_apart(text: str, form: ToolFormat | None) -> tuple[str, list[Call]]:
    """Text and calls of an answer."""
    content, _, calls = parsed([text], form)
    return content, plain(calls)


def plain(calls: list[ToolCall]) -> list[Call]:
    return [(call.name, call.arguments) for call in calls]


def message_of(calls: list[Call], **more: Any) -> dict[str, Any]:
    """A message of the assistant in OpenAI's form."""
    given = [
        {"type": "function", "id": f"callNo{i:03}", "function": {"name": n, "arguments": a}}
        for i, (n, a) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": given, **more}


STRINGS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["</tool_call>", "[TOOL_CALLS]", "<think>", "]}", '"}\n', "\\", "\u2028;"]),
)
VALUES = st.recursive(
    st.one_of(STRINGS, st.integers(), st.booleans(), st.none(), st.floats(-1e9, 1e9)),
    lambda parts: st.one_of(st.lists(parts, max_size=3), st.dictionaries(STRINGS, parts)),
    max_leaves=6,
)
CALLS = st.tuples(st.sampled_from(NAMES), st.dictionaries(STRINGS, VALUES, max_size=3))


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@given(calls=st.lists(CALLS, min_size=1, max_size=3))
def test_calls_that_transformers_writes(name: str, calls: list[Call]) -> None:
    form = FORMATS[name]
    calls = calls if form.separator is not None else calls[:1]
    answer = written_answer(TOOL_TEMPLATES[name], TOOLS, message_of(calls))
    text, _, found = parsed([answer], form)
    assert text == ""
    assert plain(found) == calls
    if name in ("mistral_v3", "mistral_nemo", "mistral_v11"):  # they write the ids
        assert [call.id for call in found] == [f"callNo{i:03}" for i in range(len(calls))]
    assert len({call.id for call in found}) == len(calls)
    assert all(len(call.id) == 9 and call.id.isalnum() for call in found)


PUBLISHED = (
    "Mistral-Large-Instruct-2407",
    "Bielik-11B-v3.0-Instruct",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "ibm-granite-granite-4.0",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "unsloth-mistral-Devstral-Small-2507",
)


@pytest.mark.slow  # when they are downloaded
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("name", PUBLISHED)
@given(calls=st.lists(CALLS, min_size=1, max_size=2))
def test_published_templates(name: str, calls: list[Call]) -> None:
    template = published_templates()[name]
    form = tool_format(template)
    calls = calls if form.separator is not None else calls[:1]
    answer = written_answer(template, TOOLS, message_of(calls))
    assert taken_apart(answer, form) == ("", calls)


@pytest.mark.slow
def test_formats_of_published_templates() -> None:
    """Those that write calls otherwise are not taken for one of ours."""
    forms = {name: tool_format(text) for name, text in published_templates().items()}
    ours = {name for name, form in forms.items() if form is not None}
    assert ours == {
        *PUBLISHED, "Mistral-Nemo-Instruct-2407", "MiMo-VL", "Qwen-QwQ-32B", "Reka-Edge",
        "ibm-granite-granite-4.1", "granite-4.0", "granite-4.1",
    }  # fmt: skip


def test_text_and_reasoning_beside_calls() -> None:
    calls = [("now", {}), ("get_weather", {"city": "Paris"})]
    message = message_of(
        calls, content="Let me see.", reasoning_content="Which\n\ncity? <tool_call>"
    )
    answer = written_answer(TOOL_TEMPLATES["qwen"], TOOLS, message)
    text, reasoning, found = parsed([answer], HERMES)
    assert text == "Let me see."
    assert reasoning == message["reasoning_content"]
    assert plain(found) == calls


def test_built_in_tools_of_llama() -> None:
    calls = [("get_weather", {"query": "in (Menlo) Park", "unit": "c"})]
    template, message = TOOL_TEMPLATES["llama3.1"], message_of(calls)
    answer = written_answer(template, TOOLS, message, builtin_tools=["get_weather"])
    assert answer.startswith("<|python_tag|>get_weather.call(")
    assert taken_apart(answer, LLAMA) == ("", calls)
    assert taken_apart("<|python_tag|>now.call()", LLAMA) == ("", CALLED_A)
    assert taken_apart('<|python_tag|>now.call(n=1, x="\\"")', LLAMA)[1] == [
        ("now", {"n": 1, "x": '"'})
    ]
    for text in (
        "print(1)",
        "now.call(1)",
        "now.call(a=)",
        "now.call(a=1",
        "now.call(a=1,)",
        "now",
    ):
        assert taken_apart(f"<|python_tag|>{text}", LLAMA) == (f"<|python_tag|>{text}", [])


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        (HERMES, f"Now.\n\n<tool_call>{A}</tool_call>\n", "Now.", CALLED_A),
        (HERMES, f"<tool_call>\n{A}\n</tool_call>\n\nDone. ", "\n\nDone.", CALLED_A),
        (HERMES, f"<tool_call>\n{A}", "", CALLED_A),  # ended before its mark
        (HERMES, f"<tool_call>\n{A}\n</tool_", "", CALLED_A),
        (HERMES, f"<tool_call>{A}</tool_call>" * 2, "", CALLED_A * 2),
        (HERMES, f"<tool_call><tool_call>{A}</tool_call>", "", CALLED_A),
        (HERMES, f"<tool_call>{A}\n<tool_call>{A}</tool_call>", "", CALLED_A * 2),
        (HERMES, f"<tool_call>{A}\n<tool_call>{{", "<tool_call>{", CALLED_A),
        (LLAMA, "<|python_tag|>" + A, "", CALLED_A),
        (LLAMA, f"\n{A}; {A.replace('arguments', 'parameters')}", "", CALLED_A * 2),
        (LLAMA, f"I call <|python_tag|>{A}", "I call", CALLED_A),
        (LLAMA, '{"type": "function", "name": "now", "parameters": {}}', "", CALLED_A),
        (MISTRAL, f"[TOOL_CALLS] [{A}, {A}]", "", CALLED_A * 2),
        (MISTRAL, f"[TOOL_CALLS][{A}]\n", "", CALLED_A),
        (MISTRAL, f"So: [TOOL_CALLS] {A}", "So:", CALLED_A),
        (MISTRAL, "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now{}", "", CALLED_A * 2),
        (MISTRAL, f"[TOOL_CALLS] [{A}, {{", ", {", CALLED_A),  # cut within the second
    ],
)
def test_calls(form: ToolFormat, answer: str, text: str, calls: list[Call]) -> None:
    assert taken_apart(answer, form) == (text, calls)


# What models wrote, as their makers' documentation prints it
DOCUMENTED = {
    "qwen": (  # Qwen's guide to function calling
        '<tool_call>\n{"name": "get_current_temperature", "arguments": {"location": "San '
        'Francisco, CA, USA"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_temperature_date", "arguments": {"location": "San Francisco, '
        'CA, USA", "date": "2024-10-01"}}\n</tool_call>',
        [
            ("get_current_temperature", {"location": "San Francisco, CA, USA"}),
            ("get_temperature_date", {"location": "San Francisco, CA, USA", "date": "2024-10-01"}),
        ],
    ),
    "hermes": (  # the model card of Hermes 2 Pro
        '<tool_call>\n{"arguments": {"symbol": "TSLA"}, "name": "get_stock_fundamentals"}\n'
        "</tool_call>",
        [("get_stock_fundamentals", {"symbol": "TSLA"})],
    ),
    "llama3.1": (  # Meta's prompt format of Llama 3.1: a tool of the user's
        '<|python_tag|>{\n    "type": "function",\n    "name": "trending_songs",\n'
        '    "parameters": {\n        "n": "10",\n        "genre": "all"\n    }\n}',
        [("trending_songs", {"n": "10", "genre": "all"})],
    ),
    "llama3.1 built-in": (  # and one that the model knows
        '<|python_tag|>brave_search.call(query="Menlo Park California weather")',
        [("brave_search", {"query": "Menlo Park California weather"})],
    ),
    "mistral_v3": (  # Mistral's guide to tokenization
        '[TOOL_CALLS] [{"name": "get_current_weather", "arguments": {"location": "Paris, France", '
        '"format": "celsius"}, "id": "VvvODy9mT"}]',
        [("get_current_weather", {"location": "Paris, France", "format": "celsius"})],
    ),
    "mistral_nemo": (  # the same for Tekken, its later tokenizer
        '[TOOL_CALLS][{"name": "calculator", "arguments": {"operation": "2+2"}, '
        '"id": "VvvODy9mT"}]',
        [("calculator", {"operation": "2+2"})],
    ),
    "mistral_v13": (  # tried by vLLM, of Mistral Small 3.2
        '[TOOL_CALLS]add[ARGS]{"a": 3.5, "b": 4}[TOOL_CALLS]multiply[ARGS]{"a": 3, "b": 6}',
        [("add", {"a": 3.5, "b": 4}), ("multiply", {"a": 3, "b": 6})],
    ),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_answers_in_documentation(name: str) -> None:
    answer, calls = DOCUMENTED[name]
    parser = AnswerParser(
        FORMATS[name.split()[0]], normalized_tools([{"name": n} for n, _ in calls])
    )
    deltas = [*map(parser.push, answer), parser.finish()]
    assert "".join(delta.text for delta in deltas) == ""
    found = [call for delta in deltas for call in delta.tool_calls]
    assert plain(found) == calls
    if '"id"' in answer:
        assert [call.id for call in found] == ["VvvODy9mT"]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        "Plain text, {braces} and [brackets]. ",
        "<tool_call>",
        '<tool_call>\n{"name": "now", "arguments": {}',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call',  # and then not
        '<tool_call>{"name": "now", "arguments": {}} and so on',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": []}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"x": ' + "9" * 5_000 + "}}</tool_call>",
        '<tool_call>{"name": "now", "arguments": {"x": "a\nb"}}</tool_call>',
        "<tool_call>{'name': 'now', 'arguments': {}}</tool_call>",
        "<tool_call>[" + A + "]</tool_call>",
        "<tool_call>" + "[{" * 5_000,
        '<tool_call>{"name": "now", "arguments": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        "</tool_call>",
        "Thoughts: <think>no</think>",
        '<tool_call>{"name": "now\\',
    ],
)
@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL, None])
def test_what_is_no_call_stays_text(form: ToolFormat | None, answer: str) -> None:
    if answer.endswith("</tool_call"):
        answer += "!"
    for pieces in ([answer], [*answer[:1000], answer[1000:]]):
        assert parsed(pieces, form) == (answer, "", [])


@pytest.mark.parametrize(
    ("broken", "whole", "form"),
    [
        ("<tool_call>{bad ", f"<tool_call>{A}</tool_call>", HERMES),
        ('<tool_call>{"name": "now}\n</tool_call>\n', f"<tool_call>{A}</tool_call>", HERMES),
        ('<tool_call>{"name": 1}\n', f"<tool_call>{A}</tool_call>", HERMES),
        ("<tool_call>{}</tool_call>", f"<tool_call>{A}</tool_call>", HERMES),
        ("[TOOL_CALLS] [{'a'}]", f"[TOOL_CALLS] [{A}]", MISTRAL),
        ("<|python_tag|>{'a'}", f"<|python_tag|>{A}", LLAMA),
        ("<|python<|", f"<|python_tag|>{A}", LLAMA),
    ],
)
def test_a_call_after_a_broken_one(broken: str, whole: str, form: ToolFormat) -> None:
    text, calls = taken_apart(f"{broken}{whole}", form)
    assert calls == CALLED_A
    assert text.startswith(broken.rstrip())


def test_a_call_comes_as_soon_as_it_is_whole() -> None:
    parser = AnswerParser(MISTRAL, TOOLS)
    assert parser.push("Well, ") == Delta("Well,")
    assert parser.push("now.") == Delta(" now.")
    assert parser.push(f"[TOOL_CALLS] [{A[:-1]}") == Delta()
    assert plain(list(parser.push("}").tool_calls)) == CALLED_A
    assert plain(list(parser.push(f", {A}").tool_calls)) == CALLED_A
    assert parser.push("]") == parser.finish() == Delta()
    parser = AnswerParser(HERMES, TOOLS)
    assert parser.push(f"<tool_call>{A}</tool_call") == Delta()
    assert plain(list(parser.push(">").tool_calls)) == CALLED_A
    assert AnswerParser(None).push("Hm") == Delta("Hm")
    assert AnswerParser(None, in_reasoning=True).push("Hm") == Delta(reasoning="Hm")


# --- Reasoning


@pytest.mark.parametrize(
    ("answer", "in_reasoning", "reasoning", "text"),
    [
        ("<think>\nHm, \n\nso.\n</think>\n\nYes. ", False, "Hm, \n\nso.", "Yes. "),
        ("\n<think></think>Yes", False, "", "Yes"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("Hm.</think>\nYes</think>", True, "Hm.", "Yes</think>"),
        ("Hm. </thin king ", True, "Hm. </thin king", ""),
        ("<think>Hm.\n", False, "Hm.", ""),  # cut by length
        (" Yes <think>", False, "", " Yes <think>"),
        ("<thinking>", False, "", "<thinking>"),
    ],
)
def test_reasoning(answer: str, in_reasoning: bool, reasoning: str, text: str) -> None:
    for form in (None, HERMES, LLAMA):
        for pieces in ([answer], list(answer)):
            assert parsed(pieces, form, in_reasoning) == (text, reasoning, [])


def test_calls_in_reasoning_are_none() -> None:
    call = f"<tool_call>{A}</tool_call>"
    text, reasoning, calls = parsed([f"I may {call}.</think>{call}"], HERMES, in_reasoning=True)
    assert (text, reasoning, plain(calls)) == ("", f"I may {call}.", CALLED_A)
    assert parsed([f"<think>Hm.</think>\n{A}"], LLAMA)[2]


def test_where_a_prompt_ends() -> None:
    assert is_reasoning("<|im_start|>assistant\n<think>\n")
    assert is_reasoning("<|im_start|>assistant\n<think>\nSo far")
    assert not is_reasoning("<|im_start|>assistant\n")
    assert not is_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# --- Pieces

PARTS = st.one_of(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>"),
            *("</think>", "[", "]", ",", "; ", "{", "}", '"', "\\", "\n", " ", "<", "now"),
            *("[ARGS]", ".call(", A, f"<tool_call>{A}</tool_call>", f"[TOOL_CALLS] [{A}"),
        ]
    ),
    st.text(max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(PARTS, max_size=12),
    form=st.sampled_from([*FORMATS.values(), None]),
    in_reasoning=st.booleans(),
    data=st.data(),
)
def test_pieces_do_not_matter(
    parts: list[str], form: ToolFormat | None, in_reasoning: bool, data: st.DataObject
) -> None:
    answer = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[i:j] for i, j in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    text, reasoning, calls = parsed(pieces, form, in_reasoning)
    whole_text, whole_reasoning, whole_calls = parsed([answer], form, in_reasoning)
    assert (text, reasoning, plain(calls)) == (whole_text, whole_reasoning, plain(whole_calls))


def test_other_formats() -> None:
    assert tool_format("{{ messages }}") is None
    assert json.loads(f"{HERMES.before_name}x{HERMES.before_arguments}1}}"[len("<tool_call>\n") :])
    assert tool_format('ipython {\\"name\\": "x", \\"parameters\\": {}}').separator == "; "
