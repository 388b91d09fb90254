"""AnswerForm: what the answer to a chat may hold besides text: tool calls, and reasoning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sf_local.errors import RequestError
from sf_local.request.params import GRAMMARS, SamplingParams
from sf_local.text.tool_calls import AnswerParser, is_reasoning
from sf_local.text.tool_formats import ToolFormat
from sf_local.text.tools import ToolChoice, checked_tool_choice, normalized_tools

if TYPE_CHECKING:
    from sf_local.grammar.compiler import GrammarCompiler
    from sf_local.grammar.matcher import Grammar
    from sf_local.grammar.tool_grammar import Reasoning
    from sf_local.text.chat_template import JinjaTemplate


@dataclass(frozen=True)
class AnswerForm:
    """tools: those that the prompt tells of, in OpenAI's form. knows_reasoning: whether an answer
    may begin with <think>."""

    tools: list[dict[str, Any]]
    choice: ToolChoice
    tool_format: ToolFormat | None
    knows_reasoning: bool

    @classmethod
    def of(
        cls, template: JinjaTemplate, tools: object, choice: object, params: SamplingParams
    ) -> AnswerForm:
        """What a caller asks for; raises RequestError for what the model cannot do."""
        given = normalized_tools(tools)
        chosen = checked_tool_choice(choice, given)
        used = [] if chosen.mode == "none" else given
        is_free = not params.is_constrained  # else all of the answer is what its grammar says
        tool_format = template.tool_format if used and is_free else None
        form = cls(used, chosen, tool_format, template.knows_reasoning and is_free)
        if used and not template.writes_tools:
            raise RequestError(
                "tools: the model's chat template does not write tools, so that the model would "
                "not know of them; use a model that was trained on tools, or chat_template="
            )
        if chosen.mode == "required":
            form._check_required(params)
        return form

    def _check_required(self, params: SamplingParams) -> None:
        if params.is_constrained:
            names = [name for name in GRAMMARS if getattr(params, name) is not None]
            raise RequestError(
                f"tool_choice: an answer that must be a call has a grammar already; leave out "
                f"{names[0]}"
            )
        if self.tool_format is None:
            raise RequestError(
                "tool_choice: the model's chat template writes calls of tools in an unknown form, "
                "so that they cannot be required; use tool_choice='auto', which returns them as "
                "text"
            )

    def parser(self, opening: str) -> AnswerParser | None:
        """What takes calls and reasoning out of the answer; None if there can be none.

        opening: what the prompt ends with, from where the answer's message begins.
        """
        if self.tool_format is None and not self.knows_reasoning:
            return None
        return AnswerParser(self.tool_format, self.tools, is_reasoning(opening))

    def make_grammar(self, opening: str) -> Callable[[GrammarCompiler], Grammar] | None:
        """What makes the grammar of an answer that must be a call; None for other answers."""
        if self.tool_format is None or self.choice.mode != "required":
            return None
        return functools.partial(
            _make_grammar, self.tool_format, self.tools, self.choice.name, self._reasoning(opening)
        )

    def _reasoning(self, opening: str) -> Reasoning:
        if is_reasoning(opening):
            return "open"
        return "optional" if self.knows_reasoning and "</think>" not in opening else "none"


def _make_grammar(
    tool_format: ToolFormat, tools: list[dict[str, Any]], name: str | None, reasoning: Reasoning,
    grammars: GrammarCompiler,
) -> Grammar:  # fmt: skip
    return grammars.tool_calls(tool_format, tools, name, reasoning)
