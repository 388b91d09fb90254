"""Conversations of marker messages, to find what a chat template writes around contents."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from sf_local.text.chat_template import JinjaTemplate
from sf_local.text.tokenizer import Tokenizer

Turn = tuple[str, str]  # role and content of a message

# Messages of trial conversations, whose contents are found again in the rendered text
SYSTEM_TURN: Turn = ("system", "SystemMarker71")
USER_TURN: Turn = ("user", "UserMarker72")
REPLY_TURN: Turn = ("assistant", "ReplyMarker73")
NEXT_USER_TURN: Turn = ("user", "UserMarker74")


class TurnTemplate:
    """A model's template for conversations of a role and a text each, without the BOS that
    `Tokenizer.encode` adds.

    It writes the time of when it was made, so that a conversation keeps its prompt, and with it its
    place in the prefix cache.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, text: str | None = None) -> None:
        """As JinjaTemplate's; raises ChatTemplateError."""
        made_at = datetime.now()
        self._model = JinjaTemplate(tokenizer, name, text, now=lambda: made_at)
        self._added_bos = tokenizer.bos_token if tokenizer.adds_bos else None

    def render(
        self, turns: Sequence[Turn], add_generation_prompt: bool = True, images: int = 0
    ) -> str:
        """The prompt of a conversation, each message of which begins with so many images. Raises
        ChatTemplateError."""
        messages = [_message(role, content, images) for role, content in turns]
        text = self._model.render(messages, add_generation_prompt=add_generation_prompt)
        return text.removeprefix(self._added_bos) if self._added_bos else text

    def gaps(
        self, turns: Sequence[Turn], add_generation_prompt: bool = True, images: int = 0
    ) -> list[str]:
        """What the template writes before, between and after the contents of `turns`.

        Raises:
            ChatTemplateError: `render` does, or a content is not found once, in its place.
        """
        text, gaps = self.render(turns, add_generation_prompt, images), []
        for role, content in turns:
            gap, found, text = text.partition(content)
            if not found or content in text:
                self.fail(f"does not write the {role} message once and in its place")
            gaps.append(gap)
        return [*gaps, text]

    def stops_after(self, reply_suffix: str) -> tuple[str, ...]:
        """As JinjaTemplate's."""
        return self._model.stops_after(reply_suffix)

    def fail(self, what: str) -> NoReturn:
        """Raise ChatTemplateError: this template does `what`."""
        self._model.fail(what)


def _message(role: str, content: str, images: int) -> dict[str, Any]:
    if not images:
        return {"role": role, "content": content}
    text = {"type": "text", "text": content}
    return {"role": role, "content": [{"type": "image"}] * images + [text]}
