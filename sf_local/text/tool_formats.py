"""How models write tool calls: the formats of Llama 3, Hermes, Qwen and Mistral."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What other formats have that write <tool_call> or <|python_tag|> as well: XML, or one list
_OTHER_FORMATS = "<function=", "<arg_key>", "<invoke", "<tool_calls>"
# By these a template of Llama 3 without built-in tools is known: the role of results, and a key
_LLAMA_RESULTS, _LLAMA_KEY = "ipython", '"parameters"'


@dataclass(frozen=True)
class ToolFormat:
    """How one model writes tool calls: as `opening`, calls with `separator` between, `closing`.

    Attributes:
        marker: what announces calls; Llama 3 may leave it out where an answer begins with a call.
        before_name, before_arguments, after_arguments: what stands around the parts of a call. The
            arguments are a JSON object.
        end_marker: what must follow the JSON of a call; "" for nothing.
        separator: None if an answer has one call.
        between: characters besides blanks that may stand between calls.
        is_marker_optional: an answer may begin with the JSON of a call.
        special_texts: texts that must be in the answer's text for AnswerParser, also where they
            are special tokens, which detokenizers drop.
    """

    marker: str
    before_name: str
    before_arguments: str
    after_arguments: str
    special_texts: tuple[str, ...]
    separator: str | None
    opening: str = ""
    closing: str = ""
    end_marker: str = ""
    between: str = ""
    is_marker_optional: bool = False


def tool_format(template: str) -> ToolFormat | None:
    """The format in which a chat template, a Jinja text, writes tool calls; None if it is none of
    Llama 3's, Hermes' and Qwen's, and Mistral's."""
    if "[TOOL_CALLS]" in template:
        return _mistral(template)
    if any(text in template for text in _OTHER_FORMATS):
        return None
    if "<tool_call>" in template:
        return HERMES
    is_llama = _LLAMA_RESULTS in template and _LLAMA_KEY in template.replace('\\"', '"')
    if is_llama or "<|python_tag|>" in template:
        return _llama("; " if "single tool-calls" not in template else None)
    return None


HERMES = ToolFormat(
    marker="<tool_call>",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}\n</tool_call>",
    special_texts=("<tool_call>", "</tool_call>"),
    separator="\n",
    end_marker="</tool_call>",
)


def _llama(separator: str | None) -> ToolFormat:
    """Llama 3's own templates refuse messages with several calls, others of it may not."""
    return ToolFormat(
        marker="<|python_tag|>",
        before_name='{"name": "',
        before_arguments='", "parameters": ',
        after_arguments="}",
        special_texts=("<|python_tag|>",),
        separator=separator,
        between=";",
        is_marker_optional=True,
    )


def _mistral(template: str) -> ToolFormat:
    """Calls are names with JSON from version 11 of its tokenizers on, and before in a list."""
    special_texts = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    if "[ARGS]" in template:
        return ToolFormat(
            marker="[TOOL_CALLS]",
            before_name="[TOOL_CALLS]",
            before_arguments="[ARGS]",
            after_arguments="",
            special_texts=special_texts,
            separator="",
            between="[],",
        )
    has_space = re.search(r"\[TOOL_CALLS\] \[", template) is not None
    return ToolFormat(
        marker="[TOOL_CALLS]",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        special_texts=special_texts,
        separator=", ",
        opening="[TOOL_CALLS] [" if has_space else "[TOOL_CALLS][",
        closing="]",
        between="[],",
    )
