"""Engine: one model on one device or several, for any number of callers.

A caller's mistakes raise in the caller's own thread, in `input_processor.py`; the work is done on
the thread of each device, by `core.py`.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

from sf_local.artifact.open import compiled_targets
from sf_local.device.info import device_names, find_device
from sf_local.engine.batches import Batches
from sf_local.engine.chat_processor import ChatProcessor
from sf_local.engine.finish_callback import OnFinish
from sf_local.engine.input_processor import InputProcessor, split_options
from sf_local.engine.interrupts import check_threads
from sf_local.engine.kv_budget import memory_bytes
from sf_local.engine.metrics import metrics_text
from sf_local.engine.placement import (
    MakeRunner,
    Place,
    checked_num_threads,
    log_loaded,
    place_workers,
)
from sf_local.engine.preparation import Preparation
from sf_local.engine.scheduler import MAX_RUNNING
from sf_local.engine.sources import from_source
from sf_local.engine.worker import finish_closing
from sf_local.errors import RequestError
from sf_local.model.runner import ModelRunner
from sf_local.request.checks import check_bool, check_int, known_names, shown, unknown_name
from sf_local.request.params import ResolvedParams, SamplingOptions, SamplingParams
from sf_local.text.tokenizer import Tokenizer


class BackendOptions(TypedDict, total=False):
    """What `Engine` takes beside an artifact and a device, and ShortfinLocal passes on."""

    config: str | Path | None
    parameters: str | Path | Sequence[str | Path] | None
    tokenizer: str | Path | None
    kv_pages: int | None
    kv_memory: int | str | None
    image_memory: int | str
    num_threads: int | None
    allow_urls: bool
    prefill_tokens: int | None
    max_running: int
    jump_forward: bool
    reuse_answer_tokens: bool
    escape_special_tokens: bool
    on_finish: OnFinish | None
    trace: str | Path | None


class EngineOptions(BackendOptions, total=False):
    """All that `Engine` takes beside an artifact and a device."""

    chat_template: str | None
    defaults: SamplingParams | None


class Engine(Batches):
    """Loads an artifact onto a device and serves generations until `shutdown()`.

    Args:
        vmfb: the artifact's folder, or its .vmfb file.
        device: "cpu", "hip", "hip:N" for the N-th GPU, "hip:GPU-<uuid>", or "auto" for what the
            artifact was compiled for. A list makes a replica on each; a request goes to the replica
            that was sent most of its prompt before, unless that one is too busy.
        config, parameters, tokenizer: files that do not lie beside the .vmfb.
        kv_pages: KV pages to allocate, on each device. On the CPU they take memory as they are
            used.
        kv_memory: the same as bytes, "2GiB" (2^31 bytes), "2GB" (2 * 10^9), or "50%" of the free
            memory, which replicas on one device share. By default one full context times the
            largest compiled batch, at most 1 GiB; on a GPU 80% of what the weights leave free.
        image_memory: bytes, or a text such as "256MiB", of images that are kept so that they need
            not be encoded again.
        num_threads: threads that compute on a CPU, of each replica; 1 to the number of cores that
            the process may use, which is the default. Linux moves them between these. Refused for
            a GPU.
        allow_urls: whether images may be fetched from http(s) URLs.
        prefill_tokens: prompt tokens that are computed in one step, padding included; by default
            256, and on a CPU, with up to 1 GiB of weights, 512 while the device has a single
            request. More make long prompts faster; the other requests wait longer between two of
            their tokens, and a new one, or whoever cancels one, until the step is done.
            Models that can begin only at whole pages, or at the beginning of a prompt, round it up;
            `stats()` tells the number beside other requests.
        max_running: requests that compute at a time; others wait.
        jump_forward: take tokens that a grammar leaves no choice about without computing them one
            by one.
        reuse_answer_tokens: encode a prompt that begins with an earlier prompt and its answer to
            the tokens of both, so that the prefix cache finds them, where the tokenizer would have
            split the text otherwise. Without it a prompt's tokens depend on its text alone.
        chat_template: a Jinja text, or the name of one of the model's templates, that chats are
            written by; by default the model's own.
        escape_special_tokens: encode special tokens in the messages of chats as plain text, so that
            nobody can end a message within its content. Those of the template stay tokens.
        defaults: parameters of requests that do not give them.
        on_finish: called once for every request that was submitted and has ended, with what
            `result()` returns (an Output, also of aborts and timeouts) or raises (an SfLocalError),
            and with its resolved SamplingParams. Each of `samples`, each text of `score` and each
            `warm` is a request. Calls come one after another on a thread of their own, in the order
            in which requests end, and hold up no stream; what one raises is logged. `shutdown`
            waits for them. A function that refers to the engine keeps it open until `shutdown`.
        trace: a file to write Chrome's trace events to, for ui.perfetto.dev: what each device does
            when, and where the time of each request goes, whose track bears the `request_id` of its
            Output. About 1 KB a step and 300 bytes a token, written at the end of every step, so
            that a process that is killed leaves them. An earlier trace is overwritten. If the disk
            is full, the trace ends, which is logged, and the engine goes on.

    Any number of generations run at once, from any thread. A generation depends only on its prompt
    (as token ids) and parameters, not on what runs beside it. Raises RequestError for an option
    that cannot work, ArtifactError, DeviceError, or EngineError where gevent or eventlet replaced
    threads.
    """

    @known_names
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
        num_threads: int | None = None,
        allow_urls: bool = False,
        prefill_tokens: int | None = None,
        max_running: int = MAX_RUNNING,
        jump_forward: bool = True,
        reuse_answer_tokens: bool = True,
        chat_template: str | None = None,
        escape_special_tokens: bool = True,
        defaults: SamplingParams | None = None,
        on_finish: OnFinish | None = None,
        trace: str | Path | None = None,
        _make_runner: MakeRunner = ModelRunner,
    ) -> None:
        started_at = time.perf_counter()
        check_threads()
        image_bytes = memory_bytes("image_memory", image_memory, None)
        if prefill_tokens is not None:
            prefill_tokens = check_int("prefill_tokens", prefill_tokens, 1)
        max_running = check_int("max_running", max_running, 1)
        allow_urls = check_bool("allow_urls", allow_urls)
        jump_forward = check_bool("jump_forward", jump_forward)
        reuse_answer_tokens = check_bool("reuse_answer_tokens", reuse_answer_tokens)
        escape_special_tokens = check_bool("escape_special_tokens", escape_special_tokens)
        if not isinstance(vmfb, str | os.PathLike):
            raise RequestError(f"vmfb={shown(vmfb)} must be the path of an artifact")
        if not isinstance(chat_template, str | None):
            raise RequestError(f"chat_template={shown(chat_template)} must be a Jinja text")
        if not (on_finish is None or callable(on_finish)):
            raise RequestError(f"on_finish={shown(on_finish)} must be a function, or None")
        names = device_names(device)
        finish_closing()
        devices = [find_device(name, compiled_targets(vmfb)) for name in names]
        self.devices = [found.name for found in devices]
        num_threads = checked_num_threads(num_threads, devices)
        places = [
            Place.of(
                found, vmfb, kv_pages, kv_memory, self.devices.count(found.name), config=config,
                parameters=parameters, tokenizer=tokenizer,
            )
            for found in devices
        ]  # fmt: skip
        self.artifact = places[0].artifact
        self.tokenizer = Tokenizer(self.artifact.tokenizer)
        # The marker that stands for an image in a prompt; None for a text model
        images = self.artifact.manifest and self.artifact.manifest.images
        self.image_token = images["image_token"] if images else None
        self.max_tokens = min(place.max_tokens for place in places)
        self._inputs = InputProcessor(
            self.artifact, self.tokenizer, self.max_tokens, image_bytes, allow_urls,
            reuse_answer_tokens, defaults,
        )  # fmt: skip
        self._chats = ChatProcessor(self._inputs, chat_template, escape_special_tokens)
        if chat_template is not None:
            self._chats.template()  # raises what is wrong with it
        self.vocab_size = self._inputs.vocab_size
        self._replicas = place_workers(
            places, num_threads=num_threads, prefill_tokens=prefill_tokens, max_running=max_running,
            jump_forward=jump_forward, on_finish=on_finish, trace=trace, make_runner=_make_runner,
        )  # fmt: skip
        self._preparation = Preparation(self._replicas)
        # Garbage collection would drop a KeyboardInterrupt that is raised while it waits
        self._finalizer = weakref.finalize(self, self._replicas.ask_to_close)
        try:
            self._replicas.start()
        except BaseException:
            self._replicas.close()
            raise
        log_loaded(places, time.perf_counter() - started_at)

    @classmethod
    def from_source(
        cls,
        source: str | Path,
        device: str | Sequence[str] = "cpu",
        *,
        build_options: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """An engine for "demo", a .gguf file, a Hugging Face folder or a repo id, which is compiled
        on first use; or for an artifact.

        build_options, progress: see `sf_local.from_source`, whose errors are raised as well. The
        others are those of `Engine`.
        """
        for name, value in options.items():
            if name not in (known := EngineOptions.__annotations__):
                raise unknown_name(name, value, ["build_options", "device", "progress", *known])
        artifact = from_source(source, device, progress=progress, **(build_options or {}))
        return cls(artifact, device, **options)

    def resolved(
        self, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> ResolvedParams:
        """The parameters that hold for a request with these: what they give, else the engine's
        `defaults`, else what the model's makers recommend in generation_config.json, else what
        SamplingParams says. Raises RequestError for parameters that contradict each other."""
        return self._inputs.resolved(split_options(params, options, SamplingOptions)[0])

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is going on; sums over all devices.

        running, waiting: requests. pages_free, pages_used, pages_cached, pages_total: KV pages.
        prompt_tokens, cached_tokens, completion_tokens; hit_rate: share of prompt tokens that the
        prefix cache had. forced_tokens: those of the completion that a grammar left no choice
        about. preemptions: of requests, whose KV pages others needed; evictions: of KV pages from
        the prefix cache. steps; step_seconds: time spent in steps, and call_seconds of it in
        compiled functions, beside which grammars took mask_seconds of CPU time; sample_seconds.
        encoded_tiles: of images, in encode_seconds. prefill_tokens (beside other requests),
        max_running: the limits in use on each device.
        """
        return self._replicas.stats()

    def metrics(self) -> str:
        """The metrics of this engine in Prometheus' text format, version 0.0.4, for an app to serve
        as "text/plain; version=0.0.4".

        Counters, gauges and histograms of latencies, named as vLLM's with the prefix `sf_local_`;
        labels: model_name, device, and replica, which counts the devices. A request is counted when
        it ends, each text of `score` as one. Any thread may call this at any time, after `shutdown`
        too; raises EngineError in a forked child.
        """
        return metrics_text(self.artifact.name, self._replicas.metrics(self.devices))

    def check_usable(self) -> None:
        """Raise EngineError or DeviceError if the engine takes no more requests."""
        self._replicas.check_usable()

    def flush_cache(self) -> None:
        """Free all KV pages that no request uses, on the CPU with their memory; returns when it is
        done."""
        self._replicas.flush_cache()

    def shutdown(self, drain: bool = False) -> None:
        """End the worker threads and free the devices.

        With `drain`, generations under way are finished first; else they fail. Later calls raise
        EngineError.
        """
        if drain:
            self._replicas.drain()
        self._replicas.close()
        self._preparation.close()
        self._finalizer.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
