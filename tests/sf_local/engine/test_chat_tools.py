"""Chats with tools and reasoning on a tiny model, whose answers a grammar or a script writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import pytest

from sf_local import Engine, Output, SamplingParams, ToolCall
from sf_local.engine.generation import Generation
from sf_local.errors import GrammarError, RequestError
from sf_local.sampling.sampler import Sampled
from tests.support.running import assert_idle
from tests.support.tiny import TinyModel

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{# calls: <tool_call> #}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{{ opening or '' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello!"}]
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["unit"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER, NOW = tool("weather", SCHEMA), tool("now")
PARAMS = SamplingParams(max_new_tokens=150, seed=1)


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact, chat_template=TEMPLATE) as engine:
        yield engine
        assert_idle(engine)


def check_calls(output: Output) -> None:
    for call in output.tool_calls:
        assert call.name in ("weather", "now")
        jsonschema.validate(
            call.arguments, SCHEMA if call.name == "weather" else {"maxProperties": 0}
        )


def test_calls_that_are_required(engine: Engine) -> None:
    outputs = [
        engine.chat(HELLO, SamplingParams(max_new_tokens=150, seed=seed), tools=[WEATHER, NOW],
                    tool_choice="required")
        for seed in range(6)
    ]  # fmt: skip
    for output in outputs:
        assert output.finish_reason == "length" or (output.text == "" and output.tool_calls)
        check_calls(output)
    assert sum(output.finish_reason == "stop" for output in outputs) >= 3


@pytest.mark.parametrize(
    "choice", [{"name": "weather"}, {"type": "function", "function": {"name": "weather"}}]
)
def test_the_call_of_one_tool(engine: Engine, choice: Any) -> None:
    output = engine.chat(HELLO, PARAMS, tools=[NOW, WEATHER], tool_choice=choice)
    assert [call.name for call in output.tool_calls] == ["weather"]
    check_calls(output)


def test_streams_yield_calls(engine: Engine) -> None:
    options: Any = {"tools": [WEATHER], "tool_choice": {"name": "weather"}}
    stream = engine.stream_chat(HELLO, PARAMS, **options)
    [call] = list(stream)
    assert isinstance(call, ToolCall) and stream.output is not None
    assert [call] == list(stream.output.tool_calls)

    async def main() -> list[Any]:
        stream = await engine.asubmit_chat(HELLO, PARAMS, **options)
        return [item async for item in stream]

    [other] = asyncio.run(main())
    assert other.arguments == call.arguments


def test_an_answer_that_is_cut_has_whole_calls_only(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=30, seed=1)
    output = engine.chat(HELLO, params, tools=[WEATHER], tool_choice="required")
    assert (output.finish_reason, output.tool_calls) == ("length", ())
    assert output.text.startswith('<tool_call>\n{"name": "weather"')


def test_reasoning_before_a_call(engine: Engine) -> None:
    """The prompt ends inside <think>; an answer that thinks for ever has no call."""
    params = SamplingParams(max_new_tokens=60, seed=3, logit_bias={3 + ord("<"): 20})
    output = engine.chat(
        HELLO, params, tools=[NOW], tool_choice="required",
        chat_template_kwargs={"opening": "<think>\n"},
    )  # fmt: skip
    assert output.reasoning is None or "<" in output.reasoning
    thinking = TEMPLATE + "{# </think> #}"
    with Engine(engine.artifact.vmfb, chat_template=thinking) as other:
        output = other.chat(
            HELLO, params, tools=[NOW], tool_choice="required",
            chat_template_kwargs={"opening": "<think>\n"},
        )  # fmt: skip
        assert output.text == "" and output.reasoning and "<" in output.reasoning
        output = other.chat(HELLO, SamplingParams(max_new_tokens=20, regex="[a-z]+"))
        assert output.text and output.reasoning is None


def test_tools_that_are_not_to_be_used(engine: Engine) -> None:
    """The model is not told of them, and its answer is text."""
    plain = engine.chat(HELLO, PARAMS)
    output = engine.chat(HELLO, PARAMS, tools=[NOW], tool_choice="none")
    assert (output.text, output.prompt_tokens) == (plain.text, plain.prompt_tokens)
    assert engine.chat(HELLO, PARAMS, tools=[NOW]).prompt_tokens > plain.prompt_tokens


def scripted(engine: Engine, answer: str, **options: Any) -> list[Any]:
    """What a chat delivers, and its output, if the model writes `answer`."""
    generation: Generation = engine._chat_generation(HELLO, PARAMS, **options)
    delivered: list[Any] = []
    generation.deliver, generation.is_streamed = delivered.append, True
    for token in engine.tokenizer.encode(answer):
        generation.accept(Sampled(token, 0.0), can_jump=False)
        generation.write()
    delivered.append(generation.finish("stop"))
    return delivered


def test_calls_and_results_go_on_in_the_chat(engine: Engine) -> None:
    """`Output.tool_calls` as they are, which are none in an answer without calls."""
    call = ToolCall("abcdefgh1", "now", {"zone": "UTC"})
    openai = {
        "id": "abcdefgh1", "type": "function",
        "function": {"name": "now", "arguments": {"zone": "UTC"}},
    }  # fmt: skip
    template = "{% for m in messages %}{{ m.tool_calls|tojson if m.tool_calls is defined }}"
    with Engine(engine.artifact.vmfb, chat_template=template + "{% endfor %}") as other:

        def written(calls: Any) -> str:
            message = {"role": "assistant", "content": "", "tool_calls": calls}
            return other.apply_chat_template([message])

        assert json.loads(written((call,))) == [openai] == json.loads(written([openai]))
        assert written(()) == written(None) == ""


def test_calls_among_text(engine: Engine) -> None:
    """As soon as each is whole, in the middle of the stream; what is no valid call is text."""
    calls = [
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"unit": "C"}}</tool_call>',
    ]
    wrong = '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'
    *deltas, (_, output) = scripted(
        engine, f"See: {calls[0]}\n{calls[1]} and {wrong}", tools=[NOW, WEATHER]
    )
    assert [(call.name, call.arguments) for call in output.tool_calls] == [
        ("now", {}),
        ("weather", {"unit": "C"}),
    ]
    first = next(i for i, (delta, _) in enumerate(deltas) if delta.tool_calls)
    assert any(delta.text for delta, _ in deltas[first:])
    assert output.text.startswith("See:") and output.text.endswith(f"and {wrong}")
    for options in ({}, {"tools": [NOW, WEATHER], "tool_choice": "none"}):
        *_, (_, output) = scripted(engine, calls[0], **options)
        assert (output.text, output.tool_calls) == (calls[0], ())


def test_reasoning_is_apart(tiny: TinyModel) -> None:
    with Engine(tiny.artifact, chat_template=TEMPLATE + "{# <think> #}") as engine:
        *deltas, (_, output) = scripted(engine, "<think>\nwhy\n</think>\n\nThus")
        assert (output.reasoning, output.text) == ("why", "Thus")
        assert [d.reasoning for d, _ in deltas if d.reasoning] == ["w", "h", "y"]
        opening = {"opening": "<think>\n"}
        *_, (_, output) = scripted(engine, "why</think>Thus", chat_template_kwargs=opening)
        assert (output.reasoning, output.text) == ("why", "Thus")
        *_, (_, output) = scripted(engine, "no <think>")
        assert (output.reasoning, output.text) == (None, "no <think>")
        begun = [*HELLO, {"role": "assistant", "content": "<think>be"}]
        generation = engine._chat_generation(begun, PARAMS)
        assert generation.parser is not None
        assert generation.parser.push("cause</think>ok").reasoning == "cause"


def test_a_python_function_is_a_tool(engine: Engine) -> None:
    def weather(unit: Literal["C", "F"], days: int = 1) -> str:
        """The weather."""
        return ""

    output = engine.chat(HELLO, PARAMS, tools=[weather], tool_choice={"name": "weather"})
    [call] = output.tool_calls
    assert call.arguments["unit"] in ("C", "F")
    assert engine.apply_chat_template(HELLO, tools=[weather]).startswith("weather <s>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [NOW], "tool_choice": "maybe"}, "tool_choice='maybe' must be"),
        ({"tools": [NOW], "tool_choice": {"name": "other"}}, "there is no tool 'other'"),
        ({"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ({"tools": [NOW, NOW]}, r"tools\[1\].function.name='now' is that of tools\[0\]"),
        ({"tools": [3]}, r"tools\[0\]=3 must be"),
        ({"tools": "now"}, "tools='now' must be a list"),
        ({"tools": [NOW], "tool_choice": "required", "params": SamplingParams(regex="a")},
         "has a grammar already; leave out regex"),
    ],
)  # fmt: skip
def test_mistakes(engine: Engine, options: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.chat(HELLO, **options)
    with pytest.raises(RequestError, match=message):
        asyncio.run(engine.achat(HELLO, **options))


def test_schemas_that_cannot_be_expressed(engine: Engine) -> None:
    odd = tool("odd", {"type": "object", "properties": {"a": {"not": {"type": "string"}}}})
    with pytest.raises(GrammarError, match="the schema of 'odd'"):
        engine.chat(HELLO, PARAMS, tools=[NOW, odd], tool_choice="required")
    assert engine.chat(HELLO, PARAMS, tools=[NOW, odd]).completion_tokens


def test_templates_without_tools(tiny: TinyModel) -> None:
    without = TEMPLATE[TEMPLATE.index("{% for m") :]
    with Engine(tiny.artifact, chat_template=without) as engine:
        with pytest.raises(RequestError, match="chat template does not write tools"):
            engine.chat(HELLO, PARAMS, tools=[NOW])
        assert engine.chat(HELLO, PARAMS, tools=[]).completion_tokens
    unknown = TEMPLATE.replace("<tool_call>", "unknown")
    with Engine(tiny.artifact, chat_template=unknown) as engine:
        assert engine.chat(HELLO, PARAMS, tools=[NOW]).tool_calls == ()
        with pytest.raises(RequestError, match="calls of tools in an unknown form"):
            engine.chat(HELLO, PARAMS, tools=[NOW], tool_choice="required")
