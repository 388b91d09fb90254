"""Lines of OpenAI's batch files: requests as Engine takes them, and answers in OpenAI's form."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sf_local.errors import RequestError
from sf_local.request.checks import shown
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What we have besides OpenAI's fields, under our names
_OWN = frozenset(item.name for item in fields(SamplingParams)) - {
    "n", "return_logprob", "logprob_start_len", "top_logprobs_num",
}  # fmt: skip
_LIMITS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
_OPENAI = frozenset(
    ("model", "n", "stream", "logit_bias", "response_format", "tools", "tool_choice",
     "chat_template_kwargs", "parallel_tool_calls")
)  # fmt: skip
_ONLY_CHAT = frozenset(
    ("response_format", "tools", "tool_choice", "chat_template_kwargs", "parallel_tool_calls")
)
_TEXT_TOKENS = 16  # OpenAI's default for completions


@dataclass(frozen=True)
class BatchRequest:
    """What one line asks for.

    custom_id: None for a line of the plain form without one. url: CHAT or TEXT. given: messages, or
    a prompt. options: of `Engine.submit_chat`. model: the name that the line gives.
    """

    custom_id: str | None
    url: str
    given: Any
    params: SamplingParams
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


def parse_line(text: str, most_tokens: int) -> BatchRequest:
    """What a line asks for, in OpenAI's form or as {"prompt": ...} or {"messages": ...}.

    most_tokens: of a chat's answer without a limit of its own.

    Raises RequestError for what is wrong, or not supported here.
    """
    line = parse_json(text)
    if "body" not in line and ("prompt" in line or "messages" in line):
        form = CHAT if "messages" in line else TEXT
        custom_id = line.pop("custom_id", None)
        return _request(custom_id, form, line, None)
    unknown = line.keys() - {"custom_id", "method", "url", "body"}
    if unknown:
        raise RequestError(
            f"{min(unknown)}: is no field of a batch's line; give prompt, or "
            "custom_id, method, url and body"
        )
    if line.get("custom_id") is None:
        raise RequestError("custom_id: is missing")
    if line.get("method") != "POST":
        raise RequestError(f"method={shown(line.get('method'))} must be 'POST'")
    url: Any = line.get("url")
    body: Any = line.get("body")
    if url not in (CHAT, TEXT):
        raise RequestError(f"url={shown(url)} must be {CHAT!r} or {TEXT!r}")
    if not isinstance(body, dict):
        raise RequestError(f"body={shown(body)} must be an object")
    return _request(line["custom_id"], url, body, most_tokens if url == CHAT else _TEXT_TOKENS)


def parse_json(text: str) -> dict[str, Any]:
    """A line's object; raises RequestError if it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is no JSON: {error}") from None
    if not isinstance(line, dict):
        raise RequestError("the line is no JSON object")
    return line


def _request(
    custom_id: object, url: str, body: dict[str, Any], most_tokens: int | None
) -> BatchRequest:
    if custom_id is not None and not (isinstance(custom_id, str) and custom_id):
        raise RequestError(f"custom_id={shown(custom_id)} must be a text")
    name = "messages" if url == CHAT else "prompt"
    _check_fields(body, name, url)
    values = {key: value for key, value in body.items() if key in _OWN and value is not None}
    limits = [key for key in _LIMITS if body.get(key) is not None]
    if len(limits) > 1:
        raise RequestError(f"{' and '.join(limits)}: give one of them")
    values.pop("max_new_tokens", None)
    if limits or most_tokens is not None:
        values["max_new_tokens"] = body[limits[0]] if limits else most_tokens
    values |= _response_format(body.get("response_format"))
    if body.get("logit_bias"):
        values["logit_bias"] = _logit_bias(body["logit_bias"])
    options = {key: body[key] for key in ("tools", "tool_choice", "chat_template_kwargs")
               if body.get(key) is not None}  # fmt: skip
    params = SamplingParams(**values, n=body.get("n"))
    return BatchRequest(custom_id, url, body[name], params, options, body.get("model"))


def _check_fields(body: Mapping[str, Any], name: str, url: str) -> None:
    allowed = _OWN | _OPENAI | set(_LIMITS) | {name}
    if url == TEXT:
        allowed -= _ONLY_CHAT
    given = {key for key, value in body.items() if value is not None}
    if unknown := given - allowed:
        raise RequestError(f"{min(unknown)}: is not supported; leave it out")
    if name not in given:
        raise RequestError(f"{name}: is missing")
    if body.get("stream"):
        raise RequestError("stream=true: a batch has whole answers; leave it out")
    if body.get("parallel_tool_calls") is False:
        raise RequestError("parallel_tool_calls=false: is not supported; leave it out")
    model = body.get("model")
    if not (model is None or isinstance(model, str)):
        raise RequestError(f"model={shown(model)} must be a str")


def _response_format(given: object) -> dict[str, Any]:
    match given:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
    raise RequestError(
        f"response_format={shown(given)} must have the type text, json_object, or "
        "json_schema with a json_schema.schema"
    )


def _logit_bias(given: object) -> dict[int, float]:
    """Token ids are keys, which JSON has as texts."""
    try:
        return {int(token): bias for token, bias in given.items()}  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        raise RequestError(f"logit_bias={shown(given)} must be an object of token ids") from None


def answer_line(
    line_id: str, request: BatchRequest, outputs: Sequence[Output], model: str
) -> dict[str, Any]:
    """The line of an answer, whose choices are `outputs`."""
    make, kind, prefix = (
        (_chat_choice, "chat.completion", "chatcmpl") if request.url == CHAT
        else (_text_choice, "text_completion", "cmpl")
    )  # fmt: skip
    prompt, written = outputs[0].prompt_tokens, sum(o.completion_tokens for o in outputs)
    body = {
        "id": f"{prefix}-{line_id}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [make(i, output) for i, output in enumerate(outputs)],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": outputs[0].cached_tokens},
        },
    }
    response = {"status_code": 200, "request_id": line_id, "body": body}
    return _line(line_id, request.custom_id, response, None)


def error_line(
    line_id: str, custom_id: str | None, error: Exception, status: int
) -> dict[str, Any]:
    """The line of a request that was refused, or failed."""
    code = "invalid_request" if status == 400 else "server_error"
    told = {"code": code, "message": str(error)}
    body = {"error": told | {"type": f"{code}_error", "param": None}}
    response = {"status_code": status, "request_id": line_id, "body": body}
    return _line(line_id, custom_id, response, told)


def _line(line_id: str, custom_id: str | None, response: object, error: object) -> dict[str, Any]:
    return {"id": line_id, "custom_id": custom_id, "response": response, "error": error}


def _chat_choice(index: int, output: Output) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
    if output.reasoning is not None:
        message["reasoning_content"] = output.reasoning
    if output.tool_calls:
        message["content"] = output.text or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in output.tool_calls
        ]
    reason = _finish_reason(output)
    is_call = bool(output.tool_calls) and reason == "stop"
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": "tool_calls" if is_call else reason,
    }


def _text_choice(index: int, output: Output) -> dict[str, Any]:
    reason = _finish_reason(output)
    return {"index": index, "text": output.text, "logprobs": None, "finish_reason": reason}


def _finish_reason(output: Output) -> str:
    """In OpenAI's words, which have none for a timeout."""
    return "stop" if output.finish_reason == "stop" else "length"
