"""Conversations that hypothesis draws, and transformers' rendering of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _normalize_chat_messages, render_jinja_template

Message = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a <city>, such as Zürich",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
TEXTS = st.sampled_from(
    ["Hi!", "  before", "behind \n", "", "a\n\nb", "é漢 <b>&\"'</b>", "{{ x }}{% if %}",
     "</think>so", "<think>\nwhy\n</think>\n\nThus."]
)  # fmt: skip


@st.composite
def calls(draw: st.DrawFn) -> list[Message]:
    """A reply that calls tools, and their answers."""
    names = draw(st.lists(st.sampled_from(["get_weather", "now"]), min_size=1, max_size=2))
    arguments: dict[str, Any] = {"get_weather": {"city": "Zürich", "days": 2}, "now": {}}
    called = [
        {
            "id": f"abcdefgh{number}",
            "type": "function",
            "function": {"name": name, "arguments": arguments[name]},
        }
        for number, name in enumerate(names)
    ]
    reply: Message = {"role": "assistant", "tool_calls": called}
    reply |= draw(st.sampled_from([{}, {"content": None}, {"content": ""}, {"content": "See"}]))
    reply |= draw(st.sampled_from([{}, {"reasoning_content": "I need it"}]))
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "name": name, "content": draw(TEXTS)}
        for call, name in zip(called, names, strict=True)
    ]
    return [reply, *answers]


@st.composite
def conversations(draw: st.DrawFn, with_parts: bool = False) -> list[Message]:
    """Messages; contents of users may be lists of parts."""
    contents: st.SearchStrategy[Any] = TEXTS
    if with_parts:
        contents |= st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), min_size=1)
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents)})
        reply = TEXTS.map(lambda text: [{"role": "assistant", "content": text}])
        thought = TEXTS.map(
            lambda text: [{"role": "assistant", "content": "So", "reasoning": text}]
        )
        messages += draw(st.one_of(reply, thought, calls(), st.just([])))
    return messages


def by_transformers(template: str, messages: list[Message], **options: Any) -> str | None:
    """The prompt that transformers writes; None if it refuses to."""
    try:
        normal = _normalize_chat_messages(messages)
        [text], _ = render_jinja_template([normal], chat_template=template, **options)
    except Exception:
        return None
    return str(text)
