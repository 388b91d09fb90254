"""A model's own chat template, in Jinja: messages to the prompt that the model was trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import Any, NoReturn

import jinja2

from sf_local.errors import ChatTemplateError, RequestError
from sf_local.text.jinja import compile_template, plain_data
from sf_local.text.messages import as_parts, as_text, has_image, with_objects
from sf_local.text.tokenizer import Tokenizer
from sf_local.text.tool_formats import tool_format

Messages = Sequence[dict[str, Any]]

_ROLES = "system", "user", "assistant", "tool", "function", "ipython"  # that are usual
_END = "\ud803"  # of a message that is continued: a lone surrogate, which no text has
_ASK, _REPLY = "QuestionMarker71", "ReplyMarker72"
_JSON = '{"marker73": 1}'
_QUESTION = {"role": "user", "content": _ASK}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "tool_marker74", "description": "", "parameters": {"type": "object"}},
}


@dataclass(frozen=True)
class _Form:
    """A compiled template, and in which forms it writes what messages hold."""

    source: str
    template: jinja2.Template
    takes_text: bool = True  # a content that is a str
    takes_parts: bool = True  # a content that is a list of parts
    takes_json: bool = True  # arguments of a tool call as JSON text, as OpenAI has them
    writes_tools: bool = False


class JinjaTemplate:
    """Writes conversations as one model expects them, equal to what transformers writes.

    Where the template does not write what messages hold, because it expects contents or the
    arguments of tool calls in another form, they are given to it in that form.

    Attributes:
        writes_tools: prompts tell of tools that are given.
        tool_format: how the model writes calls of tools; None if that is not known.
        knows_reasoning: it reads or writes <think>, so that answers may begin with it.
        stop_strings: the special token that ends a reply, if the template writes one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        text: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile the model's templates.

        Args:
            tokenizer: the model's.
            name: of the model, for error messages.
            text: Jinja text, or the name of one of the model's templates. By default the model's
                own, which is the one named "tool_use", if there is one, where tools are given.
            now: the time, for templates that write it.

        Raises:
            ChatTemplateError: there is no template, or it is not valid Jinja.
        """
        self._name, self._tokenizer = name, tokenizer
        sources = tokenizer.chat_templates
        if text is not None:
            if text not in sources and "{{" not in text and "{%" not in text:
                names = ", ".join(sources) or "none"
                raise ChatTemplateError(
                    f"chat_template={text[:80]!r} is neither Jinja text nor the name of one of the "
                    f"model's templates, which are: {names}"
                )
            sources = {"default": sources.get(text, text)}
        if "default" not in sources:
            raise ChatTemplateError(
                f"{name} has no chat template in its tokenizer_config.json; give one as "
                "Engine(chat_template=...), a Jinja text, or in a file as sf-local chat "
                "--chat-template; or write its prompts as plain text"
            )
        self._forms = {
            key: self._form(sources[key], now) for key in ("default", "tool_use") if key in sources
        }
        with_tools = self._form_for(())
        self.writes_tools = with_tools.writes_tools
        self.tool_format = tool_format(with_tools.source)
        self.knows_reasoning = any("think>" in form.source for form in self._forms.values())
        self.stop_strings = self.stops_after(self._reply_suffix())

    def _form(self, source: str, now: Callable[[], datetime]) -> _Form:
        try:
            form = _Form(source, compile_template(source, now))
        except Exception as error:
            self.fail(f"is not valid Jinja: {error}")
        parts = self._tried(form, [as_parts(_QUESTION)])
        return _Form(
            source,
            form.template,
            takes_text=_ASK in self._tried(form, [_QUESTION]),
            takes_parts=_ASK in parts and "'type'" not in parts and '"type"' not in parts,
            takes_json=_JSON in self._tried(form, [_QUESTION, _call(_JSON)])
            or _JSON[1:-1] not in self._tried(form, [_QUESTION, _call({"marker73": 1})]),
            writes_tools=_TOOL["function"]["name"] in self._tried(form, [_QUESTION], tools=[_TOOL]),
        )

    def _tried(self, form: _Form, messages: Messages, **variables: Any) -> str:
        try:
            return self._written(form, messages, variables)
        except Exception:  # the template is untrusted: anything may come out of it
            return ""

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: as `plain_messages` returns them, oldest first.
            tools: JSON schemas of functions.
            add_generation_prompt: end with what opens the model's reply.
            continue_final_message: end within the last message, which the model goes on with.
            variables: more that the template may look at, such as enable_thinking.

        Raises:
            ChatTemplateError: the template fails, for example because it refuses a system message;
                or does not write the message that is continued as it stands.
        """
        form = self._form_for(tools)
        messages = [self._adapted(form, message) for message in messages]
        given: dict[str, Any] = {
            "tools": plain_data(tools), "documents": None,
            "add_generation_prompt": add_generation_prompt, **plain_data(variables or {}),
        }  # fmt: skip
        if continue_final_message:
            messages[-1] = self._opened(messages[-1])
        try:
            text = self._written(form, messages, given)
        except Exception as error:  # the template is untrusted: anything may come out of it
            roles = ", ".join(message["role"] for message in messages)
            why = str(error) or type(error).__name__
            if isinstance(error, jinja2.UndefinedError) and "'content'" in why:
                why += '; give each message a "content", which may be ""'
            self.fail(f"refuses a conversation of {roles}: {why}")
        return self._cut(text) if continue_final_message else text

    def check_roles(self, messages: Messages) -> None:
        """Raise RequestError for a role that is nearly another one, or whose messages the template
        leaves out."""
        for index, role in enumerate(message["role"] for message in messages):
            named = re.compile(f"""['"]{re.escape(role)}['"]""")
            if role in _ROLES or any(named.search(form.source) for form in self._forms.values()):
                continue
            near = get_close_matches(role.lower(), _ROLES, 1, 0.8) if role.isalpha() else []
            if near:  # many templates write any role, which the model has never seen
                raise RequestError(f"messages[{index}].role={role!r}: did you mean {near[0]}?")
            if not self._writes(role) and (near := [r for r in _ROLES if self._writes(r)]):
                raise RequestError(
                    f"messages[{index}].role={role!r}: the chat template of {self._name} has no "
                    f"such role; use {' or '.join(near)}"
                )

    def _writes(self, role: str) -> bool:
        """Whether messages of a role are in the prompt."""
        form = self._forms["default"]
        turns = [self._adapted(form, t) for t in (_QUESTION, {"role": role, "content": _REPLY})]
        return any(_REPLY in self._tried(form, some) for some in (turns, turns[1:]))

    def _written(self, form: _Form, messages: Messages, variables: Mapping[str, Any]) -> str:
        defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
        values = defaults | self._tokenizer.named_tokens | dict(variables)
        return form.template.render(messages=messages, **values)

    def _adapted(self, form: _Form, message: dict[str, Any]) -> dict[str, Any]:
        """The message in a form that the template writes."""
        if form.takes_parts and (has_image(message) or not form.takes_text):
            message = as_parts(message)
        if form.takes_text and not form.takes_parts and not has_image(message):
            message = as_text(message)
        return message if form.takes_json else with_objects(message)

    def _opened(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with a mark after its text."""
        content = message.get("content")
        if isinstance(content, str):
            return message | {"content": f"{content}{_END} "}
        texts = [i for i, part in enumerate(content or ()) if "text" in part]
        if not content or not texts:
            self.fail("has no text to continue in the last message")
        parts = [dict(part) for part in content]
        parts[texts[-1]]["text"] += f"{_END} "
        return message | {"content": parts}

    def _cut(self, text: str) -> str:
        """The prompt up to the mark; the blank behind it tells whether the template trims."""
        before, mark, after = text.rpartition(_END)
        if not mark:
            self.fail("does not write the last message so that it can be continued")
        return before if after.startswith(" ") else before.rstrip()

    def _form_for(self, tools: object) -> _Form:
        default = self._forms["default"]
        return default if tools is None else self._forms.get("tool_use", default)

    def _reply_suffix(self) -> str:
        """What stands after the last reply of a conversation."""
        form = self._forms["default"]
        turns = [_QUESTION, {"role": "assistant", "content": _REPLY}]
        turns = [self._adapted(form, turn) for turn in turns]
        return self._tried(form, turns, add_generation_prompt=False).rpartition(_REPLY)[2]

    def stops_after(self, reply_suffix: str) -> tuple[str, ...]:
        """The special token that ends a reply, if what stands after it begins with one; else
        nothing."""
        suffix = reply_suffix.lstrip()
        starts = (suffix[:end] for end in range(len(suffix), 0, -1))
        is_token = self._tokenizer.token_id
        return next(((text,) for text in starts if is_token(text) is not None), ())

    def fail(self, what: str) -> NoReturn:
        """Raise ChatTemplateError: this template does `what`."""
        raise ChatTemplateError(f"The chat template of {self._name} {what}.") from None


def _call(arguments: object) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}
