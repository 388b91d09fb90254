"""Tools that a model may call, and which of them it must: what callers give, checked."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sf_local.errors import RequestError
from sf_local.request.checks import shown

_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_KEYS = frozenset(("type", "function"))
_FUNCTION_KEYS = frozenset(("name", "description", "parameters", "strict", "return"))
_FORMS = (
    'a dict {"type": "function", "function": {"name": ..., "description": ..., "parameters": '
    "<JSON schema>}}, its inner dict, or a Python function with type hints"
)


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer calls tools.

    Attributes:
        mode: "auto": as the model likes; "none": it does not; "required": it does.
        name: with "required", the tool that it calls, once; None for any, once or several times.
    """

    mode: Literal["auto", "none", "required"]
    name: str | None = None


def normalized_tools(tools: object) -> list[dict[str, Any]]:
    """Copies of `tools` in OpenAI's form, which chat templates take; [] for None.

    Each one is such a dict, its inner dict, or a Python function: its docstring is the description,
    and its type hints, for which pydantic has the JSON schema, are the parameters.

    Raises:
        RequestError: one has another form, a name that OpenAI does not allow or that another one
            has, or a schema that is not of an object.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes | bytearray):
        raise RequestError(f"tools={shown(tools)} must be a list; each is {_FORMS}")
    normal = [_normalized(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names: dict[str, int] = {}
    for i, tool in enumerate(normal):
        name = tool["function"]["name"]
        if names.setdefault(name, i) != i:
            raise RequestError(
                f"tools[{i}].function.name={name!r} is that of tools[{names[name]}] as well; give "
                "each tool its own"
            )
    return normal


def checked_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """`choice`, which is "auto", "none", "required" or the name of a tool in a dict.

    Args:
        choice: a name as `{"name": ...}`, or `{"type": "function", "function": {"name": ...}}`;
            None is "auto".
        tools: as `normalized_tools` returns them.

    Raises:
        RequestError: it is none of these, or asks for a tool that is not there.
    """
    match choice:
        case None:
            return ToolChoice("auto")
        case "auto" | "none":
            return ToolChoice(choice)
        case "required":
            if not tools:
                raise RequestError("tool_choice='required' needs tools; give tools=")
            return ToolChoice("required")
        case {"type": "function", "function": {"name": str(name), **inner}, **outer}:
            is_name = not (inner or outer)
        case {"name": str(name), **outer}:
            is_name = not outer
        case _:
            is_name = False
    if not is_name:
        raise RequestError(
            f"tool_choice={shown(choice)} must be 'auto', 'none', 'required' or {{\"name\": ...}}"
        )
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        there = f"of tools are {', '.join(names)}" if names else "there are none; give tools="
        raise RequestError(f"tool_choice: there is no tool {name[:100]!r}; the names {there}")
    return ToolChoice("required", name)


def _normalized(tool: object, path: str) -> dict[str, Any]:
    if inspect.isroutine(tool):
        return _of_function(tool, path)
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        inner = {key: value for key, value in tool.items() if key != "type"}
        tool = {"type": tool.get("type", "function"), "function": inner}
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        raise RequestError(f"{path}={shown(tool)} must be {_FORMS}")
    copy = _copied(tool if "type" in tool else {"type": "function", **tool}, path)
    if copy["type"] != "function":
        raise RequestError(f"{path}.type={shown(copy['type'])} must be 'function'")
    _check_keys(copy, _KEYS, path)
    _check_function(copy["function"], f"{path}.function")
    return copy


def _copied(tool: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A copy that nobody else changes; its keys keep their order, in which templates write them."""
    try:
        text = json.dumps(tool, ensure_ascii=False, allow_nan=False, default=_as_dict)
        text.encode()
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be written as JSON: {error}") from None
    return copy


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _check_keys(tool: dict[str, Any], known: frozenset[str], path: str) -> None:
    for key in tool.keys() - known:
        raise RequestError(f"{path} has the unknown key {key[:100]!r}; known are {sorted(known)}")


def _check_function(function: dict[str, Any], path: str) -> None:
    _check_keys(function, _FUNCTION_KEYS, path)
    name = function.get("name")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RequestError(
            f"{path}.name={shown(name)} must be 1 to 64 letters a-z, A-Z, digits, "
            "underscores and hyphens"
        )
    for key, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        value = function.get(key)
        if value is not None and not isinstance(value, kind):
            raise RequestError(f"{path}.{key}={shown(value)} must be a {kind.__name__}")
    kinds = (function.get("parameters") or {}).get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise RequestError(
            f"{path}.parameters.type={shown(kinds)} must be 'object'; each argument is one "
            "of its properties"
        )


def _of_function(function: Any, path: str) -> dict[str, Any]:
    import pydantic  # takes 0.1 s

    try:
        parameters = pydantic.TypeAdapter(function).json_schema()
    except Exception as error:  # pydantic has several, and hints may raise anything
        why = (str(error) or type(error).__name__).partition("\n")[0]
        raise RequestError(f"{path}={function.__qualname__} has no JSON schema: {why}") from None
    description = inspect.getdoc(function) or ""
    inner = {"name": function.__name__, "description": description, "parameters": parameters}
    _check_function(inner, f"{path}.function")
    return {"type": "function", "function": inner}
