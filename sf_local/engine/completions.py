"""Completions: what `Engine` does with a prompt, which is to continue or to score it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Unpack

from sf_local.engine.generation import Generation
from sf_local.engine.handle import AsyncStream, Handle, Stream
from sf_local.engine.input_processor import (
    InputProcessor,
    PromptInput,
    RequestOptions,
    deadline_of,
    split_options,
)
from sf_local.engine.preparation import Preparation
from sf_local.engine.replicas import Replicas
from sf_local.engine.scoring import score_requests, scores
from sf_local.errors import RequestError
from sf_local.request.output import Output, Score
from sf_local.request.params import ResolvedParams, SamplingParams
from sf_local.request.prompt import Prompt
from sf_local.text.tokenizer import MANY_CHARACTERS, Tokenizer
from sf_local.vision.image_file import GivenImage, ImageInput


class Completions:
    """The entry points that take a prompt. A subclass sets the attributes."""

    tokenizer: Tokenizer
    image_token: str | None
    _inputs: InputProcessor
    _preparation: Preparation
    _replicas: Replicas

    def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Handle:
        """Start a generation.

        Args:
            prompt: text, token ids, or what `prepare` returned.
            params: how to continue it; by default as `resolved` tells.
            images: one for each image marker of the prompt (such as "<image>"): a path, the bytes
                of a file, a PIL image, or a data URL.
            options: fields of SamplingParams in the place of `params`, such as max_new_tokens=8,
                which max_tokens=8 says, too.

        Raises RequestError for a prompt or parameters that cannot work, ImageError for an image,
        GrammarError for a grammar, and EngineError or DeviceError once the engine is closed.
        """
        return Handle(self, self._replicas, self._generation(prompt, params, **options))

    def samples(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """`params.n` answers to one prompt, whose KV pages they share; their seeds count up from
        `params.seed`. Arguments and errors as for `submit`; if one fails, the others end."""
        started_at = time.perf_counter()
        requests = self._samples(prompt, params, started_at, **options)
        return self._results(requests, started_at)

    def stream(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """The answer's text, as it grows; once it has ended, `stream.output` is the whole result,
        with finish reason and numbers of tokens. Arguments and errors as for `submit`, which raises
        here and not at the first delta."""
        return iter(self.submit(prompt, params, **options))

    async def asubmit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """`submit` for asyncio: raises mistakes at once, and returns what can be iterated over with
        `async for`, or awaited by `.result()`."""
        return await self.astream(prompt, params, **options)

    async def agenerate(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Output:
        """`generate` for asyncio; cancelling the task cancels the generation."""
        return await self.astream(prompt, params, **options).result()

    def astream(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """`stream` for asyncio: `async for text in engine.astream(prompt)`. Mistakes raise at the
        first delta, or at once in `stream = await engine.astream(prompt)`. Once it has ended,
        `stream.output` is the whole result."""
        return AsyncStream(
            self._replicas,
            lambda: self._agenerated(prompt, params, time.perf_counter(), **options),
        )

    async def asamples(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """`samples` for asyncio; cancelling the task cancels the generations."""
        started_at = time.perf_counter()
        requests = await self._preparation.run(self._samples, prompt, params, started_at, **options)
        return await self._aresults(requests, started_at)

    def score(
        self,
        prompt: str,
        continuations: Sequence[str],
        *,
        unconditional: bool = False,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Score]:
        """Log probabilities of texts that could continue a prompt.

        Args:
            continuations: each adds at least one token to the prompt.
            unconditional: score every continuation without the prompt as well.
            params: only priority and timeout count; both may be keyword arguments instead.
            images: as for `submit`.

        Raises as `submit` does, and EngineError if the timeout passes.
        """
        started_at = time.perf_counter()
        requests = score_requests(
            self._inputs, prompt, continuations, unconditional, params, options, started_at
        )
        return scores(self._results(requests, started_at), unconditional)

    async def ascore(
        self,
        prompt: str,
        continuations: Sequence[str],
        *,
        unconditional: bool = False,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Score]:
        """`score` for asyncio; cancelling the task ends the scoring."""
        started_at = time.perf_counter()
        requests = await self._preparation.run(
            score_requests,
            self._inputs, prompt, continuations, unconditional, params, options, started_at,
        )  # fmt: skip
        return scores(await self._aresults(requests, started_at), unconditional)

    def warm(self, prompt: str, *, images: Sequence[ImageInput] = ()) -> None:
        """A hint that prompts will begin so: compute it into the prefix cache. Returns at once, and
        ignores a prompt that cannot work."""
        with contextlib.suppress(RequestError):
            params = ResolvedParams(max_new_tokens=0, temperature=0)
            self._replicas.submit(self._generation(prompt, params, images=images))

    def given(self, images: Sequence[ImageInput]) -> list[GivenImage]:
        """Images that will be used in several prompts, so that each is read once; raises
        RequestError."""
        return self._inputs.given(images)

    def prepare(self, prompt: PromptInput, images: Sequence[ImageInput] = ()) -> Prompt:
        """A prompt that can be submitted many times, and is encoded only here.

        Raises RequestError as `submit` does, ImageError for an image that cannot be used.
        """
        return self._inputs.prepare(prompt, images)

    def mark_inserted(self, prompt: str, spans: Sequence[tuple[int, int]]) -> str:
        """A prompt of which users wrote what lies in some ranges of characters: special tokens in
        them are plain text. Give what this returns in the place of the prompt, as it is.

        spans: begin and end of each, in their order. The image marker stays one.
        """
        return self._inputs.inserted_text().marked_within(prompt, spans, self.image_token)

    def encode(self, prompt: str, continuation: str = "") -> list[int]:
        """Token ids of a prompt, and of what may continue it.

        Where the prompt contains answers of this engine, their tokens are those that were
        generated, so that the prefix cache knows them.
        """
        return self._inputs.encode(prompt, continuation)

    def _samples(
        self,
        prompt: PromptInput,
        params: SamplingParams | None,
        started_at: float,
        /,
        **options: Unpack[RequestOptions],
    ) -> list[tuple[PromptInput, SamplingParams]]:
        """The requests of `samples`."""
        params, others = split_options(params, options)
        resolved = self._inputs.resolved(params)
        deadline = deadline_of(resolved, started_at)
        ready = self._inputs.prepare(prompt, others.get("images", ()), deadline)
        return [(ready, each) for each in resolved.samples()]

    def _results(
        self, requests: Sequence[tuple[PromptInput, SamplingParams]], started_at: float
    ) -> list[Output]:
        """Outputs of requests that run at once; if one fails, the others are cancelled."""
        handles: list[Handle] = []
        try:
            for prompt, params in requests:
                generation = self._generation(prompt, params, started_at)
                handles.append(Handle(self, self._replicas, generation))
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    async def _aresults(
        self, requests: Sequence[tuple[PromptInput, SamplingParams]], started_at: float
    ) -> list[Output]:
        """The same for asyncio."""
        streams: list[AsyncStream] = []
        try:
            for prompt, params in requests:
                prepare = partial(self._agenerated, prompt, params, started_at)
                streams.append(await AsyncStream(self._replicas, prepare))
            return [await stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    def _generation(
        self,
        prompt: PromptInput,
        params: SamplingParams | None,
        started_at: float | None = None,
        /,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        self._replicas.check_usable()
        params, others = split_options(params, options)
        return self._inputs.generation(prompt, params, started_at=started_at, **others)

    async def _agenerated(
        self,
        prompt: PromptInput,
        params: SamplingParams | None,
        started_at: float,
        /,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """`_generation`, in a thread if it can take longer than a few milliseconds."""
        is_long = isinstance(prompt, str) and len(prompt) > MANY_CHARACTERS
        params, others = split_options(params, options)
        resolved = self._inputs.resolved(params)
        if is_long or resolved.is_constrained or others.get("images"):
            return await self._preparation.run(
                self._generation, prompt, resolved, started_at, **others
            )
        return self._generation(prompt, resolved, started_at, **others)
