"""ChatCompletions: what `Engine` does with the messages of a chat, which is to answer them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from sf_local.engine.chat_processor import ChatOptions, ChatProcessor, Messages
from sf_local.engine.generation import Generation
from sf_local.engine.handle import AsyncStream, Handle, Stream
from sf_local.engine.input_processor import split_options
from sf_local.engine.preparation import Preparation
from sf_local.engine.replicas import Replicas
from sf_local.request.output import Output, ToolCall
from sf_local.request.params import SamplingParams


class ChatCompletions:
    """The entry points that take messages. A subclass sets the attributes."""

    _chats: ChatProcessor
    _preparation: Preparation
    _replicas: Replicas

    def submit_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Handle[str | ToolCall]:
        """Start an answer to a chat.

        The prompt is what the model's chat template writes; special tokens in what users wrote are
        plain text in it. The answer ends where the template ends it. A last message of the
        assistant is continued.

        Args:
            messages: dicts with "role" and "content", as OpenAI and transformers have them, or
                objects with these fields, oldest first. A content is a text or a list of parts,
                {"type": "text", "text": ...} and {"type": "image", "image": ...}. "tool_calls" of
                the assistant may be `Output.tool_calls`; their results have the role "tool".
            params: how to answer; by default as `resolved` tells.
            tools: functions that the model may ask to be called, in OpenAI's form or as Python
                functions with type hints. Its calls are `Output.tool_calls`.
            tool_choice: "auto"; "none"; "required" for one or more calls, whose arguments are then
                sure to be valid; {"name": ...} for one call of this tool.
            images: for the parts of type "image" that hold none, in their order. If there are no
                such parts, the last message of the user begins with them.
            chat_template_kwargs: more that the template looks at, such as enable_thinking.
            options: fields of SamplingParams, in the place of `params`.

        Raises RequestError for messages or parameters that cannot work, ChatTemplateError for a
        model without a chat template, or one that refuses the messages, and what `submit` raises.
        """
        return Handle(self, self._replicas, self._chat_generation(messages, params, **options))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream[str | ToolCall]:
        """The answer's text, as it grows, and each ToolCall once it is whole. `stream.output` is
        the whole answer at the end. Arguments and errors as for `submit_chat`, which raises here
        and not at the first delta."""
        return iter(self.submit_chat(messages, params, **options))

    async def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Output:
        """`chat` for asyncio; cancelling the task cancels the answer."""
        return await self.astream_chat(messages, params, **options).result()

    async def asubmit_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream[str | ToolCall]:
        """`submit_chat` for asyncio: raises mistakes at once, and returns what can be iterated over
        with `async for`, or awaited by `.result()`."""
        return await self.astream_chat(messages, params, **options)

    def astream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream[str | ToolCall]:
        """`stream_chat` for asyncio, as `astream`."""

        async def prepare() -> Generation:
            return await self._preparation.run(
                self._chat_generation, messages, params, time.perf_counter(), **options
            )

        return AsyncStream(self._replicas, prepare)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat, as transformers' method of this name returns it with
        tokenize=False.

        Args:
            tools: JSON schemas of functions, written as they are, or Python functions.
            add_generation_prompt: end with what opens the model's reply.
            continue_final_message: end within the last message.

        Raises RequestError for messages that are none, and ChatTemplateError.
        """
        return self._chats.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, variables=chat_template_kwargs,
        )  # fmt: skip

    def _chat_generation(
        self,
        messages: Messages,
        params: SamplingParams | None,
        started_at: float | None = None,
        /,
        **options: Unpack[ChatOptions],
    ) -> Generation:
        self._replicas.check_usable()
        params, others = split_options(params, options, ChatOptions)
        return self._chats.generation(messages, params, others, started_at)
