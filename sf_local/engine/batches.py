"""Batches: whole answers to one prompt or chat, to a list of them, or to any number."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal, Unpack, overload

from sf_local.engine.chat_completions import ChatCompletions
from sf_local.engine.chat_processor import ChatOptions, Messages
from sf_local.engine.completions import Completions
from sf_local.engine.generation import Generation
from sf_local.engine.input_processor import RequestOptions, split_options
from sf_local.engine.log import log
from sf_local.engine.many_requests import (
    is_batch,
    is_chat_batch,
    is_messages,
    run_all,
    run_lazily,
)
from sf_local.errors import RequestError
from sf_local.request.checks import check_bool, check_int, shown
from sf_local.request.output import Output
from sf_local.request.params import SamplingOptions, SamplingParams
from sf_local.request.prompt import Prompt


class Batches(Completions, ChatCompletions):
    """The entry points that wait for whole answers: to one prompt or chat, to a list, to many."""

    @overload
    def generate(
        self,
        prompt: str | list[int] | Prompt,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Output]: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        return_exceptions: bool,
        **options: Unpack[SamplingOptions],
    ) -> list[Output | Exception]: ...
    def generate(
        self, prompt: Any, params: Any = None, *, return_exceptions: bool = False, **options: Any
    ) -> Any:
        """The whole answer to a prompt; arguments and errors as for `submit`.

        For a list of prompts, the list of their answers; all are in flight at once. `params` may be
        a list, too. Raises what one of them raises, once the others are cancelled; with
        `return_exceptions` the error stands in the place of its answer.
        """
        if not is_batch(prompt):
            return self._told(self.submit(prompt, params, **options).result())
        params, others = split_options(params, options)
        if others:
            raise RequestError(f"{min(others)} is for one prompt; use `chat` for a list of them")
        check_bool("return_exceptions", return_exceptions)
        return run_all(self._replicas, self._generation, prompt, params, return_exceptions)

    def _told(self, output: Output) -> Output:
        """The output. If it is empty, a log line tells of what the user may have wanted."""
        if not output.text and output.finish_reason == "stop" and self.tokenizer.chat_templates:
            log(
                logging.INFO,
                "The answer is empty: the model ended it at once. The prompt was given to it as it "
                "stands; Engine.chat writes it as a message, as this model was trained on.",
            )
        return output

    @overload
    def chat(
        self,
        messages: list[list[Any]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> list[Output]: ...
    @overload
    def chat(
        self,
        messages: list[list[Any]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        return_exceptions: bool,
        **options: Unpack[ChatOptions],
    ) -> list[Output | Exception]: ...
    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Output: ...
    def chat(
        self, messages: Any, params: Any = None, *, return_exceptions: bool = False, **options: Any
    ) -> Any:
        """The model's whole answer to a chat; arguments and errors as for `submit_chat`.

        For a list of chats, the list of their answers, an empty one for []; all are in flight at
        once. `params` may be a list, too. Raises what one of them raises, once the others are
        cancelled; with `return_exceptions` the error stands in the place of its answer.
        """
        if not is_chat_batch(messages):
            return self.submit_chat(messages, params, **options).result()
        check_bool("return_exceptions", return_exceptions)
        params, others = split_options(params, options, ChatOptions)
        make = partial(self._chat_generation, **others)
        return run_all(self._replicas, make, messages, params, return_exceptions)

    @overload
    def map(
        self,
        items: Iterable[Any],
        params: SamplingParams | None = None,
        *,
        ordered: bool = False,
        progress: bool = True,
        max_in_flight: int = 256,
        return_exceptions: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Output]: ...
    @overload
    def map(
        self,
        items: Iterable[Any],
        params: SamplingParams | None = None,
        *,
        ordered: bool = False,
        progress: bool = True,
        max_in_flight: int = 256,
        return_exceptions: bool,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Output | Exception]: ...
    def map(
        self, items: Iterable[Any], params: SamplingParams | None = None, *, ordered: bool = False,
        progress: bool = True, max_in_flight: int = 256, return_exceptions: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Any]:  # fmt: skip
        """Answers to prompts and chats as they complete, in memory that does not grow with their
        number.

        Args:
            items: prompts, as `submit` takes them, or messages, as `submit_chat` does. They are
                read as there is room for them, and those with a common beginning sent together.
            params: of all of them.
            ordered: yield answers in the order of the items. Each has its item's number, from 0 on,
                as `output.index`.
            progress: show a bar with the speed, on a terminal.
            max_in_flight: how many run or wait at a time; four times as many are read ahead.
            return_exceptions: yield the error of an item, with its `index`. Otherwise the first one
                is raised here, and the others are cancelled.
            options: of `submit_chat`, for messages; and fields of SamplingParams, in the place of
                `params`.

        Leaving the loop cancels what is under way. Raises RequestError for arguments that cannot
        work.
        """
        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            raise RequestError(f"items={shown(items)} must be prompts or chats, such as a list")
        for name, value in (
            ("ordered", ordered), ("progress", progress), ("return_exceptions", return_exceptions),
        ):  # fmt: skip
            check_bool(name, value)
        max_in_flight = check_int("max_in_flight", max_in_flight, 1)
        self._replicas.check_usable()
        params, others = split_options(params, options, ChatOptions)
        make = partial(self._generation_of, self._inputs.resolved(params), others)
        return run_lazily(
            self._replicas, make, items,
            ordered=ordered, progress=progress, max_in_flight=max_in_flight,
            return_exceptions=return_exceptions,
        )  # fmt: skip

    def _generation_of(
        self, params: SamplingParams, options: dict[str, Any], item: Any, _: object = None
    ) -> Generation:
        if is_messages(item):
            return self._chat_generation(item, params, **options)
        if options:
            raise RequestError(f"{min(options)} is for messages, but an item is {shown(item)}")
        return self._generation(item, params)
