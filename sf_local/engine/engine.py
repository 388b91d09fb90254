"""Engine: one model on one device, for any number of callers, and the handles they wait on.

Mistakes of a caller raise in the caller's own thread; the work is done by `loop.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from sf_local.artifact.open import Artifact, check_target, compiled_targets, open_artifact
from sf_local.engine.scoring import Score, score
from sf_local.device.info import DeviceInfo, check_name, find_device
from sf_local.errors import DeviceError, RequestError
from sf_local.engine.generation import Delivery, Generation, Output
from sf_local.vision.processor import ImageSettings
from sf_local.vision.image_file import GivenImage, ImageInput
from sf_local.engine.kv_budget import memory_bytes, num_kv_pages
from sf_local.engine.core import Loop
from sf_local.engine.memory import memory_left
from sf_local.vision.reader import ImageReader, Prompt
from sf_local.engine.replicas import Replicas
from sf_local.request.request import Request, SamplingParams, shown
from sf_local.text.prompt_encoder import SeamEncoder
from sf_local.text.tokenizer import Tokenizer
from sf_local.engine.top_k import check_params

if TYPE_CHECKING:
    from sf_local.grammar.compiler import Grammar, GrammarCompiler

__all__ = ["Engine", "Handle", "Output"]

PromptInput = str | Sequence[int] | Prompt


class Handle:
    """A generation under way. Iterate over text deltas, or wait for the whole `result()`.

    Dropping the handle, or leaving an iteration early, cancels the generation.
    """

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self._engine = engine  # which lives as long as its generations
        self._generation, self._loop = generation, engine._loop
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()
        self._output: Output | None = None
        generation.deliver = self._deliveries.put
        self._loop.submit(generation)

    def __iter__(self) -> Iterator[str]:
        """Text deltas that concatenate to the result's text."""
        return (text for text, _ in self.deltas() if text)

    def deltas(self) -> Iterator[tuple[str, Output | None]]:
        """Text deltas; the last one, which may be empty, comes with the output."""
        self._loop.check_process()
        try:
            while self._output is None:
                item = self._deliveries.get()
                if isinstance(item, BaseException):
                    self._deliveries.put(item)  # for whoever asks again
                    raise item
                text, output = item
                if output is not None:
                    self._output = output
                    self._deliveries.put(("", output))  # for another thread that waits
                yield text, output
        finally:
            if self._output is None:
                self.cancel()

    def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        self._generation.is_streamed = False
        for _ in self:
            pass
        assert self._output is not None
        return self._output

    def cancel(self) -> None:
        """End the generation after the current step, with reason "abort"."""
        self._loop.cancel(self._generation)

    def __del__(self) -> None:
        if getattr(self, "_output", self) is None:
            self.cancel()


class Engine:
    """Loads an artifact onto a device and serves generations until `shutdown()`.

    Args:
        vmfb: the artifact's folder, or its .vmfb file.
        device: "cpu", "hip", "hip:N" for the N-th GPU, "hip:GPU-<uuid>", or "auto" for what the
            artifact was compiled for. A list: a replica on each, among which requests are spread
            by what of their prompts was computed where, and by load.
        config, parameters, tokenizer: files that do not lie beside the .vmfb.
        kv_pages: KV pages to allocate.
        kv_memory: the same as bytes, "2GiB", or "50%" of the free memory. By default one full
            context times the largest compiled batch, at most 1 GiB; on a GPU 80% of what the
            weights leave free.
        image_memory: bytes, or such as "256MiB", for images that were seen, so that they need not
            be encoded again.
        allow_urls: whether images may be fetched from http(s) URLs.

    Any number of generations run at once, from any thread. A generation depends only on its prompt
    (as token ids) and parameters, not on its company. Raises ArtifactError or DeviceError.
    """

    def __init__(
        self,
        vmfb: str | Path,
        device: str | Sequence[str] = "cpu",
        *,
        config: str | Path | None = None,
        parameters: str | Path | Sequence[str | Path] | None = None,
        tokenizer: str | Path | None = None,
        kv_pages: int | None = None,
        kv_memory: int | str | None = None,
        image_memory: int | str = "256MiB",
        allow_urls: bool = False,
    ) -> None:
        image_bytes = memory_bytes("image_memory", image_memory, None)
        specs = [device] if isinstance(device, str) else device
        if not isinstance(specs, Sequence) or not specs:
            raise DeviceError(f"device={device!r} must be a name, or a list of them")
        for spec in specs:
            check_name(spec)
        places = [find_device(spec, compiled_targets(vmfb)) for spec in specs]
        opened = [
            _Place.of(
                place, vmfb, kv_pages, kv_memory, config=config, parameters=parameters,
                tokenizer=tokenizer,
            )
            for place in places
        ]  # fmt: skip
        self.devices = [place.name for place in places]
        self.artifact = opened[0].artifact
        self.tokenizer = Tokenizer(self.artifact.tokenizer)
        self._images = _image_reader(self.artifact, self.tokenizer, image_bytes, allow_urls)
        self._loop = _open_loops(opened)
        self._finalizer = weakref.finalize(self, self._loop.close)
        self._eos_ids = _eos_ids(self.artifact, self.tokenizer)
        self._encode = SeamEncoder(self.tokenizer)
        manifest = self.artifact.manifest
        self.vocab_size = manifest.vocab_size if manifest else self.tokenizer.vocab_size
        self.max_tokens = min(place.max_tokens for place in opened)

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        from sf_local.grammar.compiler import GrammarCompiler  # a tenth of all imports, for those who use it

        return GrammarCompiler(self.tokenizer, self.vocab_size, self._eos_ids)

    @property
    def image_token(self) -> str | None:
        """What stands for an image in a prompt; None of a text model."""
        manifest = self.artifact.manifest
        return manifest.images["image_token"] if manifest and manifest.images else None

    def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageInput] = (),
    ) -> Handle:
        """Start a generation; raises RequestError for a prompt or parameters that cannot work.

        images: one for each image marker of the prompt (such as "<image>"): a path, the bytes of a
        file, a PIL image, or a data URL.
        """
        return Handle(self, self._generation(prompt, params, images))

    def generate(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageInput] = (),
    ) -> Output:
        """The whole answer to a prompt, given as text or as token ids; images as for `submit`."""
        return self.submit(prompt, params, images=images).result()

    def samples(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageInput] = (),
    ) -> list[Output]:
        """`params.n` answers to one prompt, whose pages they share; seeds count up."""
        params = SamplingParams() if params is None else params
        first, images = params.seed, self.given(images)
        seeds = [None if first is None else (first + i) % 2**64 for i in range(params.n)]
        handles = [
            self.submit(prompt, replace(params, seed=seed, n=1), images=images) for seed in seeds
        ]
        return [handle.result() for handle in handles]

    def stream(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageInput] = (),
    ) -> Iterator[str]:
        """The answer's text, as it grows; mistakes raise here, not at the first delta."""
        return iter(self.submit(prompt, params, images=images))

    async def agenerate(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageInput] = (),
    ) -> Output:
        """`generate` for asyncio; cancelling the task cancels the generation."""
        generation = await self._prepared(prompt, params, images)
        generation.is_streamed = False
        async for _, output in self._adeltas(generation):
            if output is not None:
                return output
        raise AssertionError("a generation ends with an output")

    async def astream(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageInput] = (),
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: `async for text in engine.astream(prompt)`."""
        generation = await self._prepared(prompt, params, images)
        async for text, _ in self._adeltas(generation):
            if text:
                yield text

    async def _prepared(
        self, prompt: PromptInput, params: SamplingParams | None, images: Sequence[ImageInput]
    ) -> Generation:
        """`_generation`, beside the event loop where images must be read and cut."""
        if images:
            return await asyncio.to_thread(self._generation, prompt, params, images)
        return self._generation(prompt, params)

    async def _adeltas(self, generation: Generation) -> AsyncIterator[tuple[str, Output | None]]:
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Delivery]()

        def deliver(item: Delivery) -> None:
            """Raises where the event loop is closed by now, which ends the generation."""
            loop.call_soon_threadsafe(items.put_nowait, item)

        generation.deliver = deliver
        self._loop.submit(generation)
        output = None
        try:
            while output is None:
                item = await items.get()
                if isinstance(item, BaseException):
                    raise item
                text, output = item
                yield text, output
        finally:
            if output is None:
                self._loop.cancel(generation)

    def score(
        self,
        prompt: str,
        continuations: Sequence[str],
        *,
        unconditional: bool = False,
        params: SamplingParams | None = None,
        images: Sequence[ImageInput] = (),
    ) -> list[Score]:
        """Log probabilities of texts that could continue a prompt; see `choices.score`."""
        params = params or SamplingParams()
        return score(self, prompt, continuations, unconditional, params, images)

    def warm(self, prompt: str, *, images: Sequence[ImageInput] = ()) -> None:
        """A hint that prompts will begin so: compute it into the cache. Returns at once."""
        with contextlib.suppress(RequestError):
            params = SamplingParams(max_new_tokens=0, temperature=0)
            self._loop.submit(self._generation(prompt, params, images))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is going on.

        running, waiting: requests. pages_free, pages_used, pages_cached, pages_total: KV pages.
        prompt_tokens, cached_tokens, completion_tokens; hit_rate: share of prompt tokens that the
        cache had. forced_tokens: of the completion, known from a grammar without decoding.
        preemptions, steps; step_seconds: time spent in steps, call_seconds of it inside the
        compiled functions, where mask_seconds of CPU time for grammars are hidden; sample_seconds.
        encoded_tiles: of images, in encode_seconds of the calls.
        """
        return self._loop.stats()

    def flush_cache(self) -> None:
        """Free all pages that no request uses; returns when it is done."""
        self._loop.flush_cache()

    def shutdown(self, drain: bool = False) -> None:
        """End the loop thread and free the device.

        With `drain`, generations under way are finished first; else they fail. Later calls raise.
        """
        if drain:
            self._loop.drain()
        self._loop.close()
        self._finalizer.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def given(self, images: Sequence[ImageInput]) -> list[GivenImage]:
        """Images for several prompts, so that each is read once; raises RequestError."""
        self._check_images(images)
        return [self._images.given(image) for image in images] if self._images else []

    def prepare(self, prompt: PromptInput, images: Sequence[ImageInput] = ()) -> Prompt:
        """A prompt that can be submitted many times, and is encoded only here.

        Raises RequestError as `submit` does, ImageError for an image that cannot be used.
        """
        if isinstance(prompt, Prompt):
            if images:
                raise RequestError("images: the prompt was prepared with its own; give one or none")
            # Another engine may have prepared it, whose model knows other tokens, or images
            self._prompt_ids([max(prompt.ids)] if prompt.ids else [])
            self._check_images(prompt.spans)
            return self._fitting(prompt)
        self._check_images(images)
        ids = self._prompt_ids(prompt)
        if self._images is not None:
            return self._fitting(self._images.expand(ids, images, self.max_tokens))
        return self._fitting(Prompt(ids, ids))

    def _check_images(self, images: Sequence[object]) -> None:
        if not isinstance(images, Sequence) or isinstance(images, str | bytes | bytearray):
            raise RequestError(f"images={shown(images)} must be a list; put a single one in []")
        if images and self._images is None:
            raise RequestError(
                f"images: {len(images)} given, but {self.artifact.name} is a text model; compile "
                "one that sees, such as SmolVLM or LLaVA-1.5"
            )

    def _generation(
        self, prompt: PromptInput, params: SamplingParams | None, images: Sequence[ImageInput] = ()
    ) -> Generation:
        self._loop.check_usable()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params={shown(params)} must be SamplingParams")
        if params.n != 1:
            raise RequestError(f"n={params.n}: several answers to one prompt come from `samples`")
        ready = self.prepare(prompt, images)
        self._check_params(params, len(ready.ids))
        max_new_tokens = min(params.max_new_tokens, self.max_tokens - len(ready.ids))
        request = Request(
            ready.ids, params, max_new_tokens, spans=ready.spans, prompt_keys=ready.keys
        )
        grammar = self._grammar(params)
        generation = Generation(request, self.tokenizer, self._eos_ids, grammar)
        if isinstance(prompt, str):
            generation.remember = functools.partial(self._encode.remember, prompt, ready.plain)
        return generation

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if params.regex is not None:
            return self._grammars.regex(params.regex)
        if params.json_schema is not None:
            return self._grammars.json_schema(params.json_schema)
        return None if params.ebnf is None else self._grammars.ebnf(params.ebnf)

    def _check_params(self, params: SamplingParams, prompt_len: int) -> None:
        """What depends on the model or the prompt; the rest was checked when they were made."""
        if self.artifact.config.top_k is not None:
            check_params(params, self.artifact.config.top_k)
        self._check_tokens("logit_bias", params.logit_bias)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        if params.top_logprobs_num > self.vocab_size:
            raise RequestError(
                f"top_logprobs_num={params.top_logprobs_num}: the model has {self.vocab_size} "
                "tokens"
            )
        if params.return_logprob and params.logprob_start_len >= prompt_len:
            raise RequestError(
                f"logprob_start_len={params.logprob_start_len}: the prompt has {prompt_len} "
                "tokens; give a smaller position, or -1 for none of them"
            )

    def _check_tokens(self, name: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            is_id = isinstance(token, Integral) and not isinstance(token, bool)
            if not (is_id and 0 <= token < self.vocab_size):
                raise RequestError(
                    f"{name}: {shown(token)} is no token id; the model has 0 to "
                    f"{self.vocab_size - 1}"
                )

    def encode(self, prompt: str, continuation: str = "") -> list[int]:
        """Tokens of a prompt, and of what may continue it.

        Where the prompt continues an answer of ours, the tokens are those that this came in.
        """
        return self._encode(prompt + continuation, len(prompt))

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"prompt={shown(prompt)} must be a str, or a list of token ids")
        else:
            ids = list(cast(Sequence[int], prompt))
        if not ids:
            raise RequestError("prompt is empty; give at least one token (a BOS, or a space)")
        self._check_tokens("prompt", ids)
        return ids

    def _fitting(self, prompt: Prompt) -> Prompt:
        """The prompt; RequestError if the context has no room for it and an answer."""
        if len(prompt.ids) >= self.max_tokens:
            of_images = sum(span.end - span.start for span in prompt.spans)
            whose = f" ({of_images} of images)" if of_images else ""
            raise RequestError(
                f"prompt: {len(prompt.ids)} tokens{whose} leave no room for an answer in a context "
                f"of {self.max_tokens}; shorten it, or raise kv_pages or the model's max_seq_len"
            )
        return prompt


@dataclass(frozen=True)
class _Place:
    """A device with what was compiled for it, and how many KV pages it gets, page 0 included."""

    device: DeviceInfo
    artifact: Artifact
    num_pages: int

    @classmethod
    def of(
        cls, device: DeviceInfo, vmfb: str | Path, kv_pages: int | None,
        kv_memory: int | str | None, **files: Any,
    ) -> _Place:  # fmt: skip
        """Checked as far as it goes without the device."""
        artifact = open_artifact(vmfb, targets=[device.chip], **files)
        if artifact.manifest:
            check_target(artifact.manifest, device.chip)
        num_bytes = artifact.num_weight_bytes
        available = memory_left(device, num_bytes)
        pages = num_kv_pages(
            artifact.config, device.kind, available, kv_pages, kv_memory, num_bytes
        )
        return cls(device, artifact, 1 + pages)

    @property
    def max_tokens(self) -> int:
        artifact = self.artifact
        return min(artifact.max_tokens, (self.num_pages - 1) * artifact.config.page_size)


def _open_loops(places: Sequence[_Place]) -> Loop | Replicas:
    loops: list[Loop] = []
    try:
        for place in places:
            loops.append(Loop(place.artifact, place.device.name, place.num_pages))
    except BaseException:
        for loop in loops:
            loop.close()
        raise
    return loops[0] if len(loops) == 1 else Replicas(loops)


def _image_reader(
    artifact: Artifact, tokenizer: Tokenizer, max_bytes: int, allow_urls: bool
) -> ImageReader | None:
    """None for a text model."""
    settings = artifact.manifest and artifact.manifest.images
    if not settings:
        return None
    return ImageReader(ImageSettings(**settings), tokenizer, max_bytes, allow_urls)


def _eos_ids(artifact: Artifact, tokenizer: Tokenizer) -> frozenset[int]:
    if artifact.manifest:
        return frozenset(artifact.manifest.eos_token_ids)
    return frozenset([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
