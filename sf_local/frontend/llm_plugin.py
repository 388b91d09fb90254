"""A plugin for the command and library `llm`: `llm -m sf:demo "..."`.

What follows "sf:" is what `sf_local.from_source` takes. `llm` imports this module whenever it
starts, so an engine is only imported, and opened, when a model is prompted; it then stays open.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import AttachmentPart, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field, Json

if TYPE_CHECKING:
    from sf_local.engine.engine import Engine
    from sf_local.request.output import Output
    from sf_local.request.params import SamplingParams

PREFIX = "sf:"
IMAGE_TYPES = frozenset(
    {"image/bmp", "image/gif", "image/jpeg", "image/png", "image/tiff", "image/webp"}
)

engines: dict[tuple[str, str], Engine] = {}  # by source and device
_opening = threading.Lock()


class Options(llm.Options):  # type: ignore[misc]
    """Fields of SamplingParams, whose defaults hold for what is not given; and the device."""

    device: str = Field("auto", description='"cpu", "hip", "hip:N", or "auto": the first that fits')
    max_new_tokens: int | None = Field(None, description="Default: what the context has room for")
    min_new_tokens: int | None = Field(None, description="Tokens before which no answer ends")
    stop: str | list[str] | None = Field(None, description="A string that ends the answer")
    stop_token_ids: list[int] | Json[list[int]] | None = Field(None, description="Token ids")
    ignore_eos: bool | None = Field(None, description="Go on after the model's end tokens")
    frequency_penalty: float | None = Field(None, description="From -2 to 2")
    presence_penalty: float | None = Field(None, description="From -2 to 2")
    repetition_penalty: float | None = Field(None, description="Above 0, up to 2; 1 for none")
    logit_bias: dict[int, float] | Json[dict[int, float]] | None = Field(
        None, description="Token ids, with numbers that are added to their logits"
    )
    temperature: float | None = Field(None, description="0 takes the likeliest token")
    top_k: int | None = Field(None, description="Draw from this many tokens; -1 for all")
    top_p: float | None = Field(None, description="Draw from the likeliest of this probability")
    min_p: float | None = Field(None, description="Draw from tokens of this share of the best")
    seed: int | None = Field(None, description="Makes the draws repeatable")
    regex: str | None = Field(None, description="That the whole answer matches")
    ebnf: str | None = Field(None, description="A grammar in Lark's syntax, or GBNF")
    priority: int | None = Field(None, description="Higher ones run first")
    timeout: float | None = Field(None, description="Seconds after which the answer ends")


class _Source:
    """What the model for `llm` and the one for its asyncio have in common."""

    can_stream = True
    supports_schema = True
    supports_tools = True  # an engine whose model knows none refuses them
    attachment_types = (
        IMAGE_TYPES  # a text model refuses them, which is not known before it is open
    )
    Options = Options

    def __init__(self, source: str) -> None:
        self.source = source
        self.model_id = PREFIX + source

    def __str__(self) -> str:
        return f"sf_local: {self.model_id}"


class Model(_Source, llm.Model):  # type: ignore[misc]
    """A model for `llm`: prompts, options, schemas, tools, conversations, and images if it sees."""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer's text, as it grows if `stream`. Raises SfLocalError."""
        engine = open_engine(self.source, prompt.options.device)
        handle = engine.submit_chat(
            _messages(prompt), _params(engine, prompt), tools=_tools(prompt)
        )
        if stream:
            yield from (new for new in handle if isinstance(new, str))
        output = handle.result()
        if not stream:
            yield output.text
        _report(response, output)


class AsyncModel(_Source, llm.AsyncModel):  # type: ignore[misc]
    """`Model` for asyncio."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any
    ) -> AsyncIterator[str]:
        """The answer's text, as it grows if `stream`. Raises SfLocalError."""
        engine = await asyncio.to_thread(open_engine, self.source, prompt.options.device)
        messages = await asyncio.to_thread(_messages, prompt)  # may read files, or fetch them
        params, tools = _params(engine, prompt), _tools(prompt)
        async with aclosing(engine.astream_chat(messages, params, tools=tools)) as answer:
            if stream:
                async for new in answer:
                    if isinstance(new, str):
                        yield new
            output = await answer.result()
            if not stream:
                yield output.text
        _report(response, output)


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Register the demo, what has an alias, and what is asked for."""
    wanted = [f"{PREFIX}demo", *_aliased(), _asked_for()]
    for model_id in dict.fromkeys(wanted):
        if model_id.startswith(PREFIX):
            source = model_id.removeprefix(PREFIX)
            register(Model(source), AsyncModel(source))


def open_engine(source: str, device: str) -> Engine:
    """The engine of a source on a device, opened on first use and then kept."""
    from sf_local.engine.engine import Engine

    with _opening:
        key = source, device
        if key not in engines:
            engines[key] = Engine.from_source(source, device, progress=True)
        return engines[key]


def _asked_for() -> str:
    """The id that `llm.get_model` looks up, if it is what runs.

    It looks only among the registered ones, and tells plugins of none; but any file or repo may be
    meant.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        is_look_up = frame.f_code.co_name in ("get_model", "get_async_model")
        if is_look_up and frame.f_globals.get("__name__") == "llm":
            return str(frame.f_locals.get("name") or llm.get_default_model())
    return ""


def _aliased() -> list[str]:
    try:
        found = json.loads((llm.user_dir() / "aliases.json").read_text())
    except (OSError, ValueError):
        return []
    return [str(model_id) for model_id in found.values()] if isinstance(found, dict) else []


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """The conversation up to and with a prompt of `llm`, in the form of OpenAI's messages."""
    return [new for message in prompt.messages for new in _message(message)]


def _message(message: Any) -> Iterator[dict[str, Any]]:
    """One message, or one for each result of a tool. Images come first, as models are trained;
    `llm` writes them last."""
    content: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, AttachmentPart) and part.attachment is not None:
            content.append({"type": "image", "image": part.attachment.content_bytes()})
        elif isinstance(part, ToolCallPart):
            function = {"name": part.name, "arguments": part.arguments}
            calls.append({"id": part.tool_call_id, "type": "function", "function": function})
        elif isinstance(part, ToolResultPart):
            text = part.exception or part.output
            about = {"tool_call_id": part.tool_call_id, "name": part.name}
            yield {"role": "tool", "content": text, **about}
    content.sort(key=lambda part: part["type"] == "text")
    if content or calls:
        yield {"role": message.role, "content": content, "tool_calls": calls or None}


def _tools(prompt: Any) -> list[dict[str, Any]] | None:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
            },
        }
        for tool in prompt.tools
    ] or None


def _params(engine: Engine, prompt: Any) -> SamplingParams:
    from sf_local.request.params import SamplingParams

    given = prompt.options.model_dump(exclude_none=True, exclude={"device"})
    if prompt.schema is not None:
        given["json_schema"] = prompt.schema
    return SamplingParams(**{"max_new_tokens": engine.max_tokens, **given})


def _report(response: Any, output: Output) -> None:
    """Tell `llm` what it logs, which tools to call, and what `--usage` shows."""
    for call in output.tool_calls:
        response.add_tool_call(llm.ToolCall(call.name, call.arguments, call.id))
    response.set_usage(
        input=output.prompt_tokens,
        output=output.completion_tokens,
        details={"cached_tokens": output.cached_tokens},
    )
    response.response_json = {"finish_reason": output.finish_reason}
