"""Messages of a chat as users write them, to the plain data that a chat template is given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from sf_local.errors import RequestError
from sf_local.request.checks import shown
from sf_local.request.output import ToolCall
from sf_local.text.jinja import plain_data

# Names for what a model thought before its answer; templates read the first, or the second
_REASONING = "reasoning_content", "thinking", "reasoning"
_IMAGES = "image", "image_url", "input_image"
_OTHER_MEDIA = "audio", "audio_url", "input_audio", "video", "video_url", "file", "input_file"
_EXAMPLE = 'give a list such as [{"role": "user", "content": "Hello!"}]'


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as dicts of plain data, copied, in the form that templates expect.

    messages: dicts, dataclasses or pydantic models with a "role", and a "content" that is a str, a
        list of parts, or None beside "tool_calls", which may be those of an Output. Values that are
        None are left out. Image parts become {"type": "image"}; `images_of` tells which images they
        show.

    Raises RequestError for anything else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages={shown(messages)} must be a list of messages; {_EXAMPLE}")
    if not messages:
        raise RequestError(f"messages=[] is no conversation; {_EXAMPLE}")
    return [_plain_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def images_of(messages: Sequence[Any]) -> list[Any]:
    """What the image parts of messages show, in their order; None for a part without an image."""
    return [_image(part) for message in messages for part in _parts(message) if _is_image(part)]


def with_images(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The messages with `count` image parts before the text of the last one of the user."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        raise RequestError("images: there is no message of the user that could show them")
    content = messages[last].get("content", "")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    message = messages[last] | {"content": [{"type": "image"}] * count + parts}
    return [*messages[:last], message, *messages[last + 1 :]]


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a list of parts."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return message | {"content": [{"type": "text", "text": content}]}


def as_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, a line for each part."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": "\n".join(part.get("text", "") for part in content)}


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as dicts, where they are JSON text."""
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_with_object(call) for call in calls]} if calls else message


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    holder = function if isinstance(function, dict) else call
    try:
        arguments = json.loads(holder["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call  # there are none, or they are no JSON text
    holder = holder | {"arguments": arguments}
    return call | {"function": holder} if isinstance(function, dict) else holder


def has_image(message: dict[str, Any]) -> bool:
    """Whether the content shows an image."""
    return any(map(_is_image, _parts(message)))


def _plain_message(name: str, message: object) -> dict[str, Any]:
    try:
        plain = plain_data(_with_openai_calls(_without_media(message)))
    except RecursionError:
        raise RequestError(f"{name} is nested too deep, or contains itself") from None
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
        raise RequestError(f'{name}={shown(message)} must be a dict with a "role"; {_EXAMPLE}')
    _check_types(name, _fields(message))
    plain = {key: value for key, value in plain.items() if value is not None}
    if plain.keys().isdisjoint(("content", *_REASONING)) and not plain.get("tool_calls"):
        near = get_close_matches("content", map(str, plain), 1)
        remedy = f", but {near[0]!r}" if near else "; give a text, which may be empty"
        raise RequestError(f'{name}={shown(message)} has no "content"{remedy}')
    content = plain.get("content", "")
    if isinstance(content, tuple):
        content = plain["content"] = list(content)
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(f"{name}.content[{number}]", part)
    elif not isinstance(content, str):
        raise RequestError(f"{name}.content={shown(content)} must be a str or a list of parts")
    calls = plain.get("tool_calls", [])
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{name}.tool_calls={shown(calls)} must be a list of dicts")
    return _with_reasoning(plain)


def _with_openai_calls(message: object) -> object:
    """The message with the calls of an `Output.tool_calls` in OpenAI's form; without, if it is
    empty, which some templates would take for a call."""
    calls = _fields(message).get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**_fields(message), "tool_calls": [_openai_call(call) for call in calls] or None}


def _openai_call(call: object) -> object:
    if not isinstance(call, ToolCall):
        return call
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _check_types(name: str, fields: Mapping[str, Any]) -> None:
    """Raise RequestError where `plain_data` would write the name of a type for a text."""
    if not isinstance(role := fields.get("role"), str):
        raise RequestError(f"{name}.role={shown(role)} must be a str, not {type(role).__name__}")
    content = fields.get("content")
    if not isinstance(content, str | list | tuple | None):
        raise RequestError(
            f"{name}.content={shown(content)} of role {role!r} must be a str or a list of parts, "
            f"not {type(content).__name__}"
        )
    for number, part in enumerate(_parts(fields)):
        if not isinstance(text := part.get("text"), str | None):
            raise RequestError(
                f"{name}.content[{number}].text={shown(text)} must be a str, not "
                f"{type(text).__name__}"
            )


def _check_part(name: str, part: object) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise RequestError(
            f'{name}={shown(part)} must be a dict with a "type", such as '
            '{"type": "text", "text": "Hello!"}'
        )
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise RequestError(f"{name}.text={shown(part.get('text'))} must be a str")
    if part["type"] in _OTHER_MEDIA:
        raise RequestError(f"{name}.type={part['type']!r}: models here read text and images only")
    if part["type"] not in ("text", *_IMAGES):
        raise RequestError(
            f"{name}.type={part['type']!r} is unknown; use one of text, {', '.join(_IMAGES)}"
        )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates use, as in transformers."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _fields(value: object) -> Mapping[str, Any]:
    """A message or part as a mapping; empty if it is none."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)
    dumped = dump() if callable(dump) else {}
    return dumped if isinstance(dumped, Mapping) else {}


def _parts(message: object) -> Iterator[Mapping[str, Any]]:
    content = _fields(message).get("content")
    if isinstance(content, list | tuple):
        yield from map(_fields, content)


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in _IMAGES


def _image(part: Mapping[str, Any]) -> Any:
    """What an image part shows: OpenAI nests a URL, transformers has a key for each kind."""
    url = part.get("image_url")
    if isinstance(url, Mapping):
        url = url.get("url")
    return next((i for i in (part.get("image"), url, part.get("url"), part.get("path")) if i), None)


def _without_media(message: object) -> object:
    """The message whose image parts show nothing: templates only place them."""
    fields = _fields(message)
    if not isinstance(content := fields.get("content"), list | tuple):
        return fields or message
    parts = [{"type": "image"} if _is_image(_fields(part)) else part for part in content]
    return {**fields, "content": parts}
