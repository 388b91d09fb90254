"""Engine: one model on one device, for any number of callers, and the handles they wait on.

Mistakes of a caller raise in the caller's own thread; the work is done by `core.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sf_local.artifact.open import compiled_targets
from sf_local.device.info import check_name, find_device
from sf_local.engine.generation import Generation
from sf_local.engine.handle import Handle
from sf_local.engine.input_processor import InputProcessor, PromptInput
from sf_local.engine.kv_budget import memory_bytes
from sf_local.engine.placement import Place, open_places
from sf_local.engine.scoring import score
from sf_local.errors import DeviceError, RequestError
from sf_local.request.output import Delivery, Output, Score
from sf_local.request.params import SamplingParams
from sf_local.request.prompt import Prompt
from sf_local.text.tokenizer import Tokenizer
from sf_local.vision.image_file import GivenImage, ImageInput

if TYPE_CHECKING:
    pass

__all__ = ["Engine", "Handle", "Output"]


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
            Place.of(
                place, vmfb, kv_pages, kv_memory, config=config, parameters=parameters,
                tokenizer=tokenizer,
            )
            for place in places
        ]  # fmt: skip
        self.devices = [place.name for place in places]
        self.artifact = opened[0].artifact
        self.tokenizer = Tokenizer(self.artifact.tokenizer)
        self.max_tokens = min(place.max_tokens for place in opened)
        self._inputs = InputProcessor(
            self.artifact, self.tokenizer, self.max_tokens, image_bytes, allow_urls
        )
        self.vocab_size = self._inputs.vocab_size
        self._placement = open_places(opened)
        self._finalizer = weakref.finalize(self, self._placement.close)

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
        self._placement.submit(generation)
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
                self._placement.cancel(generation)

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
            self._placement.submit(self._generation(prompt, params, images))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is going on.

        running, waiting: requests. pages_free, pages_used, pages_cached, pages_total: KV pages.
        prompt_tokens, cached_tokens, completion_tokens; hit_rate: share of prompt tokens that the
        cache had. forced_tokens: of the completion, known from a grammar without decoding.
        preemptions, steps; step_seconds: time spent in steps, call_seconds of it inside the
        compiled functions, where mask_seconds of CPU time for grammars are hidden; sample_seconds.
        encoded_tiles: of images, in encode_seconds of the calls.
        """
        return self._placement.stats()

    def flush_cache(self) -> None:
        """Free all pages that no request uses; returns when it is done."""
        self._placement.flush_cache()

    def shutdown(self, drain: bool = False) -> None:
        """End the loop thread and free the device.

        With `drain`, generations under way are finished first; else they fail. Later calls raise.
        """
        if drain:
            self._placement.drain()
        self._placement.close()
        self._finalizer.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def given(self, images: Sequence[ImageInput]) -> list[GivenImage]:
        """Images for several prompts, so that each is read once; raises RequestError."""
        return self._inputs.given(images)

    def prepare(self, prompt: PromptInput, images: Sequence[ImageInput] = ()) -> Prompt:
        """A prompt that can be submitted many times, and is encoded only here.

        Raises RequestError as `submit` does, ImageError for an image that cannot be used.
        """
        return self._inputs.prepare(prompt, images)

    def encode(self, prompt: str, continuation: str = "") -> list[int]:
        """Tokens of a prompt, and of what may continue it.

        Where the prompt continues an answer of ours, the tokens are those that this came in.
        """
        return self._inputs.encode(prompt, continuation)

    def _generation(
        self, prompt: PromptInput, params: SamplingParams | None, images: Sequence[ImageInput] = ()
    ) -> Generation:
        self._placement.check_usable()
        return self._inputs.generation(prompt, params, images)
