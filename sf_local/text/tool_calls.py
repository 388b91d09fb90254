"""Tool calls and reasoning, taken out of an answer while a model writes it."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

from sf_local.request.output import Delta, ToolCall
from sf_local.text.tool_formats import ToolFormat

REASONING_TEXTS = "<think>", "</think>"
_OPEN, _CLOSE = REASONING_TEXTS

_BLANKS = " \t\r\n"
_WORD = frozenset(string.ascii_letters + string.digits + "_-")
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID = re.compile("[A-Za-z0-9]{9}")
# All that JSON and calls of Llama's built-in tools have outside of strings, and what begins them
_VALUE = frozenset(string.ascii_letters + string.digits + _BLANKS + "{}[](),:+-._=" + '"')
_KEYWORD = re.compile(r'\s*+(\w++)\s*+=\s*+("(?:[^"\\]|\\.)*+"|[\w.+-]++)\s*+[,)]')

_Steps = Generator[None, str, Any]


def is_reasoning(prompt_end: str) -> bool:
    """Whether an answer begins inside <think>.

    prompt_end: the end of the prompt, from where the answer's turn begins. Not all of the prompt:
    a user may have written <think> as well.
    """
    return prompt_end.rfind(_OPEN) > prompt_end.rfind(_CLOSE)


class AnswerParser:
    """Separates an answer into text, tool calls and reasoning, however it is cut into pieces.

    Reasoning is what stands in <think>...</think> at the beginning, without blanks at its ends and
    those after it. A call is valid if it is whole, names one of the tools, and its arguments are a
    JSON object; they may still violate the tool's schema. Calls are taken out of the text, with the
    blanks beside them. All else stays text, also a call of an unknown tool, or one that was cut.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tools: Iterable[Mapping[str, Any]] = (),
        in_reasoning: bool = False,
    ) -> None:
        """Args:
        tool_format: how the model writes calls; None to look for none.
        tools: those it may call, as `normalized_tools` returns them.
        in_reasoning: the prompt ends inside <think>, see `is_reasoning`.
        """
        self._format = tool_format
        # Special tokens that must be in the text
        self.special_texts = (*REASONING_TEXTS, *(tool_format.special_texts if tool_format else ()))
        self._names = {tool["function"]["name"] for tool in tools}
        self._ids: set[str] = set()
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        # A generator reads the answer character by character. What it holds may belong to a call,
        # or is blank; `_char` is what it has seen and not consumed, "" at the end.
        self._held: list[str] = []
        self._char: str | None = None
        self._parsing = self._answer(in_reasoning)
        next(self._parsing)

    def push(self, text: str) -> Delta:
        """Go on with the answer's next characters. What may become a call is held back."""
        for char in text:
            self._parsing.send(char)
        return self._taken()

    def finish(self) -> Delta:
        """End the answer, after which nothing can be pushed: what was held back."""
        with suppress(StopIteration):
            self._parsing.send("")
        return self._taken()

    def _taken(self) -> Delta:
        delta = Delta("".join(self._text), "".join(self._reasoning), tuple(self._calls))
        self._text.clear()
        self._reasoning.clear()
        self._calls.clear()
        return delta

    def _peek(self) -> _Steps:
        """Returns the next character, "" at the end; waits for it."""
        if self._char is None:
            self._char = yield
        return self._char

    def _hold(self) -> None:
        """Consume the character that `_peek` returned."""
        self._held.append(cast(str, self._char))
        self._char = None

    def _flush(self) -> None:
        """What is held is text."""
        self._text += self._held
        self._held.clear()

    def _answer(self, in_reasoning: bool) -> _Steps:
        if in_reasoning:
            yield from self._thoughts()
        markers = [self._format.marker] if self._format else []
        between = self._format.between if self._format else ""
        expected = [_OPEN, *markers]  # reasoning only begins where nothing has been written
        may_call = self._format is not None and self._format.is_marker_optional
        while char := (yield from self._peek()):
            start = len(self._held)
            found = yield from self._one_of(expected)
            if found == _OPEN:
                yield from self._thoughts()
            elif found:
                may_call = yield from self._marked_call()
            elif len(self._held) > start:  # a part of a marker
                may_call = may_call and set(self._held[start:]) <= set(between)
            elif may_call and char == "{":
                may_call = yield from self._json_call()
            else:
                self._hold()
                may_call = may_call and char in _BLANKS + between
                if char in _BLANKS:
                    continue
            expected = markers
            if not may_call:
                self._flush()
        if not self._ids or "".join(self._held).strip(_BLANKS + between):
            self._flush()

    def _thoughts(self) -> _Steps:
        """Reasoning up to its end, and the blanks beside it."""
        self._held.clear()
        yield from self._blanks()
        self._held.clear()
        while char := (yield from self._peek()):
            start = len(self._held)
            if (yield from self._one_of([_CLOSE])):
                break
            if len(self._held) == start:
                self._hold()
                if char in _BLANKS:
                    continue
            self._reasoning += self._held
            self._held.clear()
        self._held.clear()
        yield from self._blanks()
        self._held.clear()

    def _blanks(self) -> _Steps:
        while (char := (yield from self._peek())) and char in _BLANKS:
            self._hold()

    def _word(self) -> _Steps:
        """Letters, digits, underscores and hyphens; returns them."""
        start = len(self._held)
        while (yield from self._peek()) in _WORD:
            self._hold()
        return "".join(self._held[start:])

    def _one_of(self, texts: Collection[str]) -> _Steps:
        """Returns which of `texts` comes next; "" if none does, perhaps after a part of one.

        A text that does not fit is not looked at again, as none can begin inside another.
        """
        read = ""
        while char := (yield from self._peek()):
            if not any(text.startswith(read + char) for text in texts):
                break
            self._hold()
            read += char
            if read in texts:
                return read
        return ""

    def _marked_call(self) -> _Steps:
        """What follows a marker, if it is no JSON; returns whether a call in JSON may come next."""
        yield from self._blanks()
        assert self._format is not None
        if self._format.end_marker or (yield from self._peek()) not in _WORD:
            return True
        name = yield from self._word()
        if self._format.is_marker_optional:
            return (yield from self._llama_call(name))
        return (yield from self._mistral_call(name))

    def _llama_call(self, name: str) -> _Steps:
        """`name.call(key="value", ...)`, as Llama calls its built-in tools."""
        if not (yield from self._one_of([".call"])):
            return False
        return self._add(name, _keywords((yield from self._brackets())))

    def _mistral_call(self, name: str) -> _Steps:
        """`name[ARGS]{...}`, perhaps with `[CALL_ID]` and an id before `[ARGS]`."""
        call_id = None
        if (yield from self._one_of(["[CALL_ID]", "[ARGS]"])) == "[CALL_ID]":
            call_id = yield from self._word()
            yield from self._one_of(["[ARGS]"])
        return self._add(name, _parsed((yield from self._brackets())), call_id)

    def _json_call(self) -> _Steps:
        """`{"name": ..., "arguments": {...}}`; returns whether another may follow at once."""
        assert self._format is not None
        written = yield from self._brackets()
        if not written:
            return False
        marker = ""
        if self._format.end_marker:
            yield from self._blanks()
            found = yield from self._one_of([self._format.end_marker, self._format.marker])
            if not found and (yield from self._peek()):
                return False
            marker = found.removesuffix(self._format.end_marker)  # some models leave the end out
            del self._held[len(self._held) - len(marker) :]
        is_call = self._add_json(_parsed(written))
        if marker:
            self._flush()
            self._held += marker
        return bool(marker) or (is_call and not self._format.end_marker)

    def _brackets(self) -> _Steps:
        """Returns what stands in brackets, with them: JSON, or close to it; "" if it does not end.

        It stops where JSON cannot go on, as there a next call may begin.
        """
        start, depth, in_string, is_escaped = len(self._held), 0, False, False
        while char := (yield from self._peek()):
            if char < " " if in_string else char not in _VALUE:
                break
            self._hold()
            if in_string:
                in_string = is_escaped or char != '"'
                is_escaped = char == "\\" and not is_escaped
                continue
            in_string = char == '"'
            depth += (char in "{[(") - (char in "}])")
            if depth <= 0:
                return "".join(self._held[start:])
        return ""

    def _add_json(self, value: object) -> bool:
        if not isinstance(value, dict) or {"arguments", "parameters"} <= value.keys():
            return False
        arguments = value.get("arguments", value.get("parameters", {}))
        return self._add(value.get("name"), arguments, value.get("id"))

    def _add(self, name: object, arguments: object, call_id: object = None) -> bool:
        """Add the call that is held, if it is valid; returns whether it is."""
        is_known = isinstance(name, str) and name in self._names
        if not (is_known and isinstance(arguments, dict)):
            return False
        is_id = isinstance(call_id, str) and _ID.fullmatch(call_id) and call_id not in self._ids
        own_id = cast(str, call_id) if is_id else _new_id()
        self._ids.add(own_id)
        self._calls.append(ToolCall(own_id, cast(str, name), arguments))
        self._held.clear()
        return True


def _new_id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


def _parsed(text: str) -> Any:
    """The JSON value of a text; None if it has none, or one nested too deeply or not Unicode."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:  # perhaps a lone surrogate, which no later prompt could hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")


def _keywords(text: str) -> dict[str, Any] | None:
    """The arguments in `(key="value", ...)`; None for anything else."""
    arguments, end = {}, 1
    while found := _KEYWORD.match(text, end):
        arguments[found[1]] = _parsed(found[2])
        end = found.end()
    is_whole = text == "()" or (len(text) > 2 and end == len(text))
    return arguments if is_whole and None not in arguments.values() else None
