"""Tools and tool_choice as callers give them, in each form, and what is wrong with others."""

from __future__ import annotations

import functools
import json
import threading
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

from sf_local.errors import RequestError
from sf_local.text.tools import ToolChoice, checked_tool_choice, normalized_tools

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"required": ["city"], "type": "object", "properties": {"city": {}}},
}
OPENAI = {"type": "function", "function": WEATHER}


def forecast(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """The weather of some days.

    Args:
        city: in English.
    """
    return f"{city} {days} {unit}"


class Station:
    async def read(self) -> None: ...


def test_forms() -> None:
    bare, inner = dict(WEATHER), {"type": "function", **WEATHER}
    for tool in (OPENAI, bare, inner, {"function": WEATHER}):
        [normal] = normalized_tools((tool,))
        assert json.dumps(normal) == json.dumps(OPENAI), "with its order of keys"
    [normal] = normalized_tools([OPENAI])
    normal["function"]["parameters"]["properties"].clear()
    assert WEATHER["parameters"]["properties"] == {"city": {}}
    assert normalized_tools(None) == normalized_tools([]) == []


def test_functions() -> None:
    first, second = (tool["function"] for tool in normalized_tools([forecast, Station().read]))
    assert first["name"] == "forecast"
    assert first["description"] == forecast.__doc__.replace("\n    ", "\n").strip()
    jsonschema.validate({"city": "Oslo", "unit": "F"}, first["parameters"])
    for wrong in ({}, {"city": 1}, {"city": "Oslo", "days": "x"}, {"city": "Oslo", "unit": "K"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, first["parameters"])
    assert (second["name"], second["parameters"]["properties"]) == ("read", {})


def variadic(*args: int, **kwargs: int) -> None: ...
def positional(a: int, /) -> None: ...
def of_a_lock(lock: threading.Thread) -> None: ...


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (3, r"tools\[1\]=3 must be a dict"),
        (pydantic.BaseModel, r"tools\[1\]=<class .* or a Python function with type hints"),
        (functools.partial(forecast), r"tools\[1\]=functools.* must be a dict"),
        ({"description": "x"}, r"must be a dict .*\"parameters\": <JSON schema>"),
        ({"function": "f"}, "must be a dict"),
        ({"type": "retrieval", "name": "f"}, r"tools\[1\].type='retrieval' must be 'function'"),
        ({"name": "get weather"}, r"tools\[1\].function.name='get weather' must be 1 to 64 lett"),
        ({"name": "f" * 65}, "must be 1 to 64"),
        ({"name": "f\n"}, "must be 1 to 64"),
        ({"name": None}, "name=None must be"),
        ({"name": "f", "description": 3}, "function.description=3 must be a str"),
        ({"name": "f", "parameters": []}, r"function.parameters=\[\] must be a dict"),
        ({"name": "f", "parameters": {"type": "string"}}, "type='string' must be 'object'"),
        ({"name": "f", "strict": 1}, "strict=1 must be a bool"),
        ({"name": "f", "inputSchema": {}}, "unknown key 'inputSchema'; known are .*'parameters'"),
        ({**OPENAI, "x": 1}, r"tools\[1\] has the unknown key 'x'"),
        ({"name": "f", "parameters": {"enum": {1}}}, "cannot be written as JSON: it holds a set"),
        ({"name": "f", "parameters": {"const": float("nan")}}, "cannot be written as JSON"),
        ({"name": "f", "description": "\ud800"}, "cannot be written as JSON"),
        ({"name": "get_weather"}, r"tools\[1\].function.name='get_weather' is that of tools\[0\]"),
        (variadic, "variadic.* has no JSON schema"),
        (positional, "type='array' must be 'object'"),
        (of_a_lock, "of_a_lock.* has no JSON schema: Unable to generate"),
        (lambda: 1, "name='<lambda>' must be"),
    ],
)
def test_wrong_tools(tool: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        normalized_tools([OPENAI, tool])


@pytest.mark.parametrize("tools", ["x", 3, OPENAI, iter([OPENAI])])
def test_tools_are_a_list(tools: Any) -> None:
    with pytest.raises(RequestError, match=r"tools=.* must be a list"):
        normalized_tools(tools)


def test_nested_too_deeply() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        normalized_tools([{"name": "f", "parameters": schema}])


def test_tool_choice() -> None:
    tools = normalized_tools([OPENAI, forecast])
    named = ToolChoice("required", "forecast")
    for choice in ("auto", "none", "required"):
        assert checked_tool_choice(choice, tools) == ToolChoice(choice)
    assert checked_tool_choice(None, tools) == checked_tool_choice("auto", []) == ToolChoice("auto")
    assert checked_tool_choice({"name": "forecast"}, tools) == named
    openai = {"type": "function", "function": {"name": "forecast"}}
    assert checked_tool_choice(openai, tools) == named


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice='any' must be 'auto', 'none', 'required' or"),
        (True, "tool_choice=True must be"),
        ({"name": 3}, "must be"),
        ({"name": "forecast", "x": 1}, "must be"),
        ({"type": "tool", "function": {"name": "get_weather"}}, "must be"),
        ({"name": "forecast"}, "there is no tool 'forecast'; the names of tools are get_weather"),
    ],
)
def test_wrong_tool_choice(choice: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        checked_tool_choice(choice, [OPENAI])


@pytest.mark.parametrize("choice", ["required", {"name": "f"}])
def test_tool_choice_without_tools(choice: Any) -> None:
    with pytest.raises(RequestError, match="give tools="):
        checked_tool_choice(choice, [])
