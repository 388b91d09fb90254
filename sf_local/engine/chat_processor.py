"""ChatProcessor: turns the messages of a chat into a checked generation, or refuses them."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from sf_local.engine.generation import Generation
from sf_local.engine.input_processor import PROMPT_OF_CHAT, InputProcessor, deadline_of
from sf_local.errors import ChatTemplateError, RequestError
from sf_local.request.params import SamplingOptions, SamplingParams
from sf_local.text.prompt_encoder import PromptEncoder
from sf_local.vision.image_file import ImageInput

if TYPE_CHECKING:
    from sf_local.text.chat_template import JinjaTemplate

Messages = Sequence[Any]
Turns = list[dict[str, Any]]


class ChatOptions(SamplingOptions, total=False):
    """What every entry point for chats takes besides messages and parameters; see `submit_chat`."""

    tools: Sequence[Any] | None
    tool_choice: str | Mapping[str, Any]
    images: Sequence[ImageInput] | None
    chat_template_kwargs: Mapping[str, Any] | None


class ChatProcessor:
    """Renders chats by the model's template and encodes them; whatever is refused is refused here.

    chat_template: Jinja text in the place of the model's own. escape: whether special tokens in
    what users wrote are plain text.
    """

    def __init__(self, inputs: InputProcessor, chat_template: str | None, escape: bool) -> None:
        self._inputs, self._chat_template, self._escape = inputs, chat_template, escape
        self._encode = PromptEncoder(inputs.tokenizer)
        self._template: JinjaTemplate | None = None

    def template(self) -> JinjaTemplate:
        """The chat template; compiled, with the import of Jinja, on first use. Raises
        ChatTemplateError."""
        if self._template is None:
            from sf_local.text.chat_template import JinjaTemplate

            name = self._inputs.artifact.name
            self._template = JinjaTemplate(self._inputs.tokenizer, name, self._chat_template)
        return self._template

    def render(self, messages: Messages, tools: Sequence[Any] | None, **options: Any) -> str:
        """As `Engine.apply_chat_template`."""
        from sf_local.text.messages import images_of, plain_messages
        from sf_local.text.tools import normalized_tools

        if tools is not None:  # dicts are written as they are
            tools = [tool if isinstance(tool, Mapping) else normalized_tools([tool])[0]
                     for tool in tools]  # fmt: skip
        turns = plain_messages(messages)
        self._inputs.check_images(images_of(messages))
        self.template().check_roles(turns)
        return self.template().render(turns, tools=tools, **options)

    def generation(
        self, messages: Messages, params: SamplingParams | None, options: Mapping[str, Any],
        started_at: float | None = None,
    ) -> Generation:  # fmt: skip
        """A request for the next message, with all that its answer needs; raises as
        `Engine.submit_chat` does. started_at: `time.perf_counter()` of the call; else now."""
        from sf_local.engine.answer_form import AnswerForm

        started_at = time.perf_counter() if started_at is None else started_at
        params, template = self._inputs.resolved(params), self.template()
        if params.n != 1:
            raise RequestError(
                f"n={params.n}: several answers to a chat come from `samples`; {PROMPT_OF_CHAT}"
            )
        deadline = deadline_of(params, started_at)
        turns, images = self._messages(messages, options.get("images") or ())
        form = AnswerForm.of(template, options.get("tools"), options.get("tool_choice"), params)
        chat = _Chat(template, turns, form.tools or None, options.get("chat_template_kwargs"))
        text = chat.written()
        parts = self._escaped(chat, text) if self._escape else [(text, False)]
        ids, is_whole = self._inputs.tokenizer.encode_parts(parts), len(parts) == 1
        if is_whole:  # else no other prompt has these tokens
            ids = self._encode.joined(text, ids)
        prompt = self._inputs.prepare(ids, images, deadline)
        if not params.ignore_eos:
            params = replace(params, stop=(*params.stop, *template.stop_strings))
        opening = chat.opening(text) if form.knows_reasoning else ""
        generation = self._inputs.generation(
            prompt, params, started_at=started_at, parser=form.parser(opening),
            make_grammar=form.make_grammar(opening),
        )  # fmt: skip
        if is_whole and self._inputs.reuses_answer_tokens:
            generation.remember = functools.partial(self._encode.remember, text, prompt.plain)
        return generation

    def _messages(
        self, messages: Messages, images: Sequence[ImageInput]
    ) -> tuple[Turns, list[ImageInput]]:
        """The messages as plain data, and the images that they show."""
        from sf_local.text.messages import images_of, plain_messages, with_images

        turns, shown = plain_messages(messages), images_of(messages)
        self.template().check_roles(turns)
        self._inputs.check_images(images)
        self._inputs.check_images(shown)
        if images and not shown:
            turns, shown = with_images(turns, len(images)), [None] * len(images)
        return turns, _filled(shown, images)

    def _escaped(self, chat: _Chat, text: str) -> list[tuple[str, bool]]:
        """A prompt in parts, each with whether special tokens in it are plain text."""
        inserted = self._inputs.inserted_text()
        mark = inserted.marked
        marked = replace(
            chat, turns=mark(chat.turns), tools=mark(chat.tools), variables=mark(chat.variables)
        )
        if marked == chat:
            return [(text, False)]
        parts = inserted.parts(marked.written())
        if "".join(part for part, _ in parts) != text:
            raise ChatTemplateError(
                f"The chat template of {self._inputs.artifact.name} writes contents with special "
                "tokens so that they cannot be told from its own. Remove such tokens from the "
                "messages; or, if you trust all of them, use Engine(escape_special_tokens=False) "
                "in Python."
            )
        return parts


@dataclass(frozen=True)
class _Chat:
    """What a prompt is written of, in plain data."""

    template: JinjaTemplate
    turns: Turns
    tools: Sequence[Any] | None
    variables: Mapping[str, Any] | None

    def written(self) -> str:
        """The prompt. It ends where the answer begins, within a last message of the assistant."""
        return self._rendered(continue_final_message=self._is_continued, is_open=True)

    def opening(self, text: str) -> str:
        """What the prompt `text` ends with, from where the answer's message begins."""
        if self._is_continued:
            return str(self.turns[-1].get("content", ""))
        closed = self._rendered(continue_final_message=False, is_open=False)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(text, closed, strict=False))
        return text[sum(1 for _ in same) :]

    @property
    def _is_continued(self) -> bool:
        return bool(self.turns[-1]["role"] == "assistant")

    def _rendered(self, continue_final_message: bool, is_open: bool) -> str:
        return self.template.render(
            self.turns, tools=self.tools, variables=self.variables,
            continue_final_message=continue_final_message,
            add_generation_prompt=is_open and not continue_final_message,
        )  # fmt: skip


def _filled(shown_images: list[Any], images: Sequence[ImageInput]) -> list[ImageInput]:
    """What image parts show; those that only mark a place show the `images`, in their order."""
    places = sum(image is None for image in shown_images)
    if places != len(images):
        raise RequestError(
            f"images: {len(images)} given for {places} parts of the messages that show none "
            'themselves; give one for each {"type": "image"}'
        )
    rest = iter(images)
    return [next(rest) if image is None else image for image in shown_images]
