"""Engine: one model on one device, its loop on the device's worker thread, and handles to wait on.

The loop owns scheduler, pages and samplers; callers only put work on an inbox and read a queue, so
nothing here needs a lock. Mistakes of a caller raise in the caller's own thread.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sf_local.artifact import Artifact, ModelConfig, check_target, open_artifact
from sf_local.device import Device, parse_device
from sf_local.errors import DeviceError, EngineError, RequestError
from sf_local.page_pool import PagePool
from sf_local.request import Request, SamplingParams
from sf_local.runner import ModelRunner, Row
from sf_local.sampler import Sampler
from sf_local.scheduler import Scheduler, Step
from sf_local.tokenizer import Detokenizer, StopChecker, Tokenizer

MAX_DEFAULT_KV_BYTES = 1 << 30


@dataclass(frozen=True)
class Output:
    """A finished generation.

    text: without stop strings and special tokens. token_ids: all new tokens, the one that ended it
    included. finish_reason: "stop", "length" or "abort"; matched: the stop text or token id.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    time_to_first_token: float  # seconds since submit
    latency: float  # seconds since submit


class Handle:
    """A generation under way. Iterate over text deltas, or wait for the whole `result()`."""

    def __init__(self, generation: _Generation, loop: _Loop) -> None:
        self._generation, self._loop = generation, loop
        self._output: Output | None = None

    def __iter__(self) -> Iterator[str]:
        """Text deltas that concatenate to the result's text; leaving early cancels the rest."""
        return (text for text, _ in self.deltas() if text)

    def deltas(self) -> Iterator[tuple[str, Output | None]]:
        """Text deltas; the last one, which may be empty, comes with the output."""
        try:
            while self._output is None:
                item = self._generation.deliveries.get()
                if isinstance(item, BaseException):
                    self._generation.deliveries.put(item)  # for whoever asks again
                    raise item
                text, self._output = item
                yield text, self._output
        finally:
            if self._output is None:
                self.cancel()

    def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        for _ in self:
            pass
        assert self._output is not None
        return self._output

    def cancel(self) -> None:
        """End the generation after the current step, with reason "abort"."""
        self._generation.is_cancelled = True
        self._loop.wake()


class Engine:
    """Loads an artifact onto a device and serves generations until `close()`.

    Args:
        vmfb: the artifact's folder, or its .vmfb file.
        device: "cpu", "hip" or "hip:N".
        config, parameters, tokenizer: files that do not lie beside the .vmfb.
        kv_pages: KV pages to allocate; by default one full context, at most 1 GiB.

    Raises ArtifactError or DeviceError.
    """

    def __init__(
        self,
        vmfb: str | Path,
        device: str = "cpu",
        *,
        config: str | Path | None = None,
        parameters: str | Path | Sequence[str | Path] | None = None,
        tokenizer: str | Path | None = None,
        kv_pages: int | None = None,
    ) -> None:
        kind, _ = parse_device(device)
        self.artifact = open_artifact(
            vmfb, config=config, parameters=parameters, tokenizer=tokenizer
        )
        if self.artifact.manifest:
            check_target(self.artifact.manifest, kind)
        self.tokenizer = Tokenizer(self.artifact.tokenizer)
        self._loop = _Loop(self.artifact, device, _num_pages(self.artifact.config, kv_pages))
        self._finalizer = weakref.finalize(self, self._loop.close)
        self._eos_ids = _eos_ids(self.artifact, self.tokenizer)
        page_size = self.artifact.config.page_size
        self.max_tokens = min(
            self.artifact.config.max_seq_len, (self._loop.pool.num_pages - 1) * page_size
        )

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Handle:
        """Start a generation; raises RequestError for a prompt or parameters that cannot work."""
        params = params or SamplingParams()
        prompt_ids = self._prompt_ids(prompt)
        request = Request(
            prompt_ids, params, min(params.max_new_tokens, self.max_tokens - len(prompt_ids))
        )
        generation = _Generation(request, self.tokenizer, self._eos_ids)
        self._loop.submit(generation)
        return Handle(generation, self._loop)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Output:
        """The whole answer to a prompt, given as text or as token ids."""
        return self.submit(prompt, params).result()

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer's text, as it grows; mistakes raise here, not at the first delta."""
        return iter(self.submit(prompt, params))

    def stats(self) -> dict[str, int]:
        """Requests running and waiting, pages free and in total (without page 0)."""
        scheduler, pool = self._loop.scheduler, self._loop.pool
        return {
            "running": int(scheduler.running is not None),
            "waiting": len(scheduler.waiting),
            "pages_free": pool.num_free,
            "pages_total": pool.num_pages - 1,
        }

    def close(self) -> None:
        """End the loop thread and free the device; generations under way fail."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("prompt is empty; give at least one token (a BOS, or a space)")
        manifest = self.artifact.manifest
        vocab_size = manifest.vocab_size if manifest else self.tokenizer.vocab_size
        for token in ids:
            is_id = isinstance(token, Integral) and not isinstance(token, bool)
            if not (is_id and 0 <= token < vocab_size):
                raise RequestError(
                    f"prompt: {token!r} is no token id; the model has 0 to {vocab_size - 1}"
                )
        if len(ids) >= self.max_tokens:
            raise RequestError(
                f"prompt: {len(ids)} tokens leave no room for an answer in a context of "
                f"{self.max_tokens}; shorten it, or raise kv_pages or the model's max_seq_len"
            )
        return ids


class _Generation:
    """A request with what turns its tokens into text; lives on the loop's thread."""

    def __init__(self, request: Request, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self.request = request
        self.deliveries: SimpleQueue[tuple[str, Output | None] | BaseException] = SimpleQueue()
        self.is_cancelled = False
        self.sampler = Sampler(request.params)
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._stops = StopChecker(request.params.stop)
        # Special tokens never show in the text, so a stop string that is one is matched by its id.
        special = {tokenizer.token_id(stop): stop for stop in request.params.stop}
        self._stop_ids: dict[int, str | int] = {i: i for i in request.params.stop_token_ids}
        self._stop_ids |= {i: s for i, s in special.items() if i in tokenizer.special_ids}
        if not request.params.ignore_eos:
            self._stop_ids = {**{i: i for i in eos_ids}, **self._stop_ids}
        self._text: list[str] = []
        self._last_delta = ""
        self._matched: str | int | None = None
        self._started_at = time.perf_counter()
        self._first_token_at = self._started_at

    def accept(self, token: int) -> str | None:
        """Take a sampled token and deliver its text; the reason, if it ends the generation."""
        request = self.request
        if not request.output_ids:
            self._first_token_at = time.perf_counter()
        request.output_ids.append(token)
        if token in self._stop_ids:
            self._matched = self._stop_ids[token]
            return "stop"
        text, is_stopped = self._stops.push(self._detokenizer.push(token))
        reason = "stop" if is_stopped else None
        if reason is None and len(request.output_ids) >= request.max_new_tokens:
            reason = "length"
        self._text.append(text)
        if text and reason is None:
            self.deliveries.put((text, None))
        elif text:
            self._last_delta = text
        return reason

    def finish(self, reason: str) -> None:
        """Deliver the text held back as one last delta, then the output."""
        tail = self._stops.push(self._detokenizer.flush())[0] + self._stops.flush()
        self._text.append(tail)
        if self._stops.matched is not None:
            reason, self._matched = "stop", self._stops.matched
        request, now = self.request, time.perf_counter()
        output = Output(
            text="".join(self._text),
            token_ids=request.output_ids,
            finish_reason=reason,
            matched=self._matched,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(request.output_ids),
            cached_tokens=0,
            time_to_first_token=self._first_token_at - self._started_at,
            latency=now - self._started_at,
        )
        self.deliveries.put((self._last_delta + tail, output))


class _Loop:
    """Schedule, compute, sample, deliver; until closed. Runs on the device's worker thread."""

    def __init__(self, artifact: Artifact, device: str, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(self.pool, artifact.config.page_size)
        self._inbox: deque[_Generation] = deque()
        self._generations: dict[Request, _Generation] = {}
        self._idle: Any = None  # the future that the loop waits on when it has no work
        self._is_closing = False
        self._failure: BaseException | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._close_lock = threading.Lock()
        self._thread_id = 0
        self._device = Device(device)
        try:
            self._runner = ModelRunner(artifact, self._device, num_pages)
        except BaseException:
            self._device.close()
            raise
        self._device.run(self._run())
        self._started.wait()
        if self._failure is not None:
            self.close()
            raise DeviceError(f"device={device!r} failed at start: {self._failure}")

    def submit(self, generation: _Generation) -> None:
        if self._is_closing:
            raise EngineError("the engine is closed; make a new one")
        self._inbox.append(generation)
        self.wake()
        if self._ended.is_set():  # it closed meanwhile, and may not have seen the inbox
            self._fail_all()

    def wake(self) -> None:
        """Let the loop look at its inbox and at cancellations; callable from any thread."""
        if not self._is_closing:
            self._device.worker.call_threadsafe(self._end_idling)

    def close(self) -> None:
        """Stop after the current step, fail what is under way, free the device."""
        if threading.get_ident() == self._thread_id:  # garbage collected on the loop's own thread
            threading.Thread(target=self.close, name="sf_local-close").start()
            return
        with self._close_lock:
            if self._device is None:
                return
            self.wake()
            self._is_closing = True
            self._device.worker.call_threadsafe(self._end_idling)
            self._ended.wait()
            if self._runner.has_ever_failed:
                self._device.abandon(self._runner)
            else:
                self._runner.close()
                self._device.close()
            del self._runner
            self._device = None  # type: ignore[assignment]

    async def _run(self) -> None:
        self._thread_id = threading.get_ident()
        try:
            await self._runner.start()
            self._started.set()
            while not self._is_closing:
                self._take_inbox()
                self._drop_cancelled()
                step = self.scheduler.next_step()
                if step is None:
                    await self._wait_for_work()
                else:
                    await self._execute(step)
        except BaseException as error:
            self._failure = error
        finally:
            self._is_closing = True
            self._fail_all()
            self._ended.set()
            self._started.set()

    async def _execute(self, step: Step) -> None:
        """Compute one step; an error fails its request alone."""
        request, generation = step.request, self._generations[step.request]
        row = Row(request.tokens(step.start, step.end), step.start, request.pages)
        try:
            compute = self._runner.decode if len(row.tokens) == 1 else self._runner.prefill
            logits = await compute([row])
            request.num_computed = step.end
            reason = (
                generation.accept(generation.sampler.sample(logits[0])) if step.samples else None
            )
        except Exception as error:
            failure = EngineError(f"the step failed: {error}")
            failure.__cause__ = error
            self._end(request, "abort", failure)
            if self._runner.is_broken:
                await self._runner.recover()
            return
        if reason:
            self._end(request, reason)

    def _take_inbox(self) -> None:
        while self._inbox:
            generation = self._inbox.popleft()
            self._generations[generation.request] = generation
            self.scheduler.add(generation.request)
            if generation.request.max_new_tokens == 0:
                self._end(generation.request, "length")

    def _drop_cancelled(self) -> None:
        for request in [r for r, g in self._generations.items() if g.is_cancelled]:
            self._end(request, "abort")

    def _end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        self.scheduler.finish(request, reason)
        generation = self._generations.pop(request)
        if error is None:
            generation.finish(reason)
        else:
            generation.deliveries.put(error)

    def _fail_all(self) -> None:
        cause = f": {self._failure}" if self._failure else "; make a new one"
        self._take_inbox()
        for request in list(self._generations):
            self._end(request, "abort", EngineError(f"the engine is closed{cause}"))

    async def _wait_for_work(self) -> None:
        self._idle = self._device.worker.loop.create_future()
        await self._idle
        self._idle = None

    def _end_idling(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


def _num_pages(config: ModelConfig, kv_pages: int | None) -> int:
    """Pages to allocate, page 0 included."""
    if kv_pages is None:
        one_context = -(-config.max_seq_len // config.page_size)
        return 1 + max(1, min(one_context, MAX_DEFAULT_KV_BYTES // config.page_bytes))
    if not isinstance(kv_pages, int) or isinstance(kv_pages, bool) or kv_pages < 1:
        raise RequestError(f"kv_pages={kv_pages!r} must be an integer of at least 1")
    needed, available = kv_pages * config.page_bytes, _available_memory()
    if needed > available:
        raise RequestError(
            f"kv_pages={kv_pages} take {needed / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB "
            f"are free; use at most {available // config.page_bytes}"
        )
    return 1 + kv_pages


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates it."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else sys.maxsize


def _eos_ids(artifact: Artifact, tokenizer: Tokenizer) -> frozenset[int]:
    if artifact.manifest:
        return frozenset(artifact.manifest.eos_token_ids)
    return frozenset([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
