"""ChatProcessor: turns the messages of a chat into a checked generation, or refuses them."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from sf_local.engine.generation import Generation
from sf_local.engine.input_processor import InputProcessor, checked
from sf_local.errors import ChatTemplateError, RequestError
from sf_local.request.params import SamplingParams
from sf_local.text.prompt_encoder import PromptEncoder
from sf_local.vision.image_file import ImageInput

if TYPE_CHECKING:
    from sf_local.text.chat_template import JinjaTemplate
    from sf_local.text.inserted_text import InsertedText

Messages = Sequence[Any]


class ChatOptions(TypedDict, total=False):
    """What every entry point for chats takes besides messages and parameters; see `submit_chat`."""

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
        self._inserted: InsertedText | None = None

    def template(self) -> JinjaTemplate:
        """The chat template; compiled, with the import of Jinja, on first use. Raises
        ChatTemplateError."""
        if self._template is None:
            from sf_local.text.chat_template import JinjaTemplate

            name = self._inputs.artifact.name
            self._template = JinjaTemplate(self._inputs.tokenizer, name, self._chat_template)
        return self._template

    def render(self, messages: Messages, **options: Any) -> str:
        """As `Engine.apply_chat_template`."""
        from sf_local.text.messages import plain_messages

        return self.template().render(plain_messages(messages), **options)

    def generation(
        self,
        messages: Messages,
        params: SamplingParams | None,
        images: Sequence[ImageInput] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """A request for the next message, with all that its answer needs; raises as
        `Engine.submit_chat` does."""
        from sf_local.text.messages import images_of, plain_messages, with_images

        started_at = time.perf_counter()
        params = checked(params)
        turns, images = plain_messages(messages), () if images is None else images
        shown_images = images_of(messages)
        self._inputs.check_images(images)
        self._inputs.check_images(shown_images)
        if images and not shown_images:
            turns, shown_images = with_images(turns, len(images)), [None] * len(images)
        text, parts = self._rendered(turns, chat_template_kwargs)
        ids = self._inputs.tokenizer.encode_parts(parts)
        is_whole = len(parts) == 1  # else no other prompt has these tokens
        if is_whole:
            ids = self._encode.joined(text, ids)
        deadline = None if params.timeout is None else started_at + params.timeout
        prompt = self._inputs.prepare(ids, _filled(shown_images, images), deadline)
        stops = (*params.stop, *self.template().stop_strings())
        params = params if params.ignore_eos else replace(params, stop=stops)
        generation = self._inputs.generation(prompt, params, started_at=started_at)
        if is_whole and self._inputs.reuses_answer_tokens:
            generation.remember = functools.partial(self._encode.remember, text, prompt.plain)
        return generation

    def _rendered(
        self, turns: list[dict[str, Any]], variables: Mapping[str, Any] | None
    ) -> tuple[str, list[tuple[str, bool]]]:
        """The prompt of a chat, and its parts, each with whether special tokens in it are plain
        text. A last message of the assistant is continued."""
        is_continued = turns[-1]["role"] == "assistant"
        render = functools.partial(
            self.template().render,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
        )
        text = render(turns, variables=variables)
        if not self._escape:
            return text, [(text, False)]
        if self._inserted is None:
            from sf_local.text.inserted_text import InsertedText

            self._inserted = InsertedText(self._inputs.tokenizer.special_tokens)
        given = turns, variables
        marked = self._inserted.marked(turns), self._inserted.marked(variables)
        if marked == given:
            return text, [(text, False)]
        parts = self._inserted.parts(render(marked[0], variables=marked[1]))
        if "".join(part for part, _ in parts) != text:
            raise ChatTemplateError(
                f"The chat template of {self._inputs.artifact.name} writes contents with special "
                "tokens so that they cannot be told from its own. Remove such tokens from the "
                "messages, or give Engine(escape_special_tokens=False) if you trust all of them."
            )
        return text, parts


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
