"""Placement: which devices an engine uses, with what artifact and memory, and a worker on each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sf_local.artifact.open import Artifact, check_target, open_artifact
from sf_local.device.cpu_threads import num_usable_cores
from sf_local.device.device import Device
from sf_local.device.info import DeviceInfo
from sf_local.engine.core import EngineCore
from sf_local.engine.failures import Failures
from sf_local.engine.finish_callback import FinishCallback, OnFinish
from sf_local.engine.kv_budget import memory_left, num_kv_pages
from sf_local.engine.limits import limits_of
from sf_local.engine.log import log
from sf_local.engine.replicas import Core, Replicas
from sf_local.engine.scheduler import Limits
from sf_local.engine.trace_file import TraceFile
from sf_local.engine.worker import Worker
from sf_local.errors import RequestError
from sf_local.model.runner import ModelRunner
from sf_local.request.checks import check_int, shown

MIB = 1 << 20
MakeRunner = Callable[[Artifact, Device, int, int], ModelRunner]
MakeCore = Callable[..., EngineCore]


@dataclass(frozen=True)
class Place:
    """A device, the artifact that was compiled for it, and how many KV pages it gets, page 0
    included."""

    device: DeviceInfo
    artifact: Artifact
    num_pages: int

    @classmethod
    def of(
        cls, device: DeviceInfo, vmfb: str | Path, kv_pages: int | None,
        kv_memory: int | str | None, num_sharing: int = 1, **files: Any,
    ) -> Place:  # fmt: skip
        """Open and check all that can be checked before the device is opened.

        num_sharing: replicas that share the device's memory. `files` are those that `open_artifact`
        takes. Raises what it raises, and RequestError for too many pages.
        """
        artifact = open_artifact(vmfb, targets=[device.chip], **files)
        if artifact.manifest:
            check_target(artifact.manifest, device.chip)
        num_bytes = artifact.num_weight_bytes
        available = memory_left(device, num_bytes, num_sharing)
        pages = num_kv_pages(
            artifact.config, device.kind, available, kv_pages, kv_memory, num_bytes
        )
        return cls(device, artifact, 1 + pages)

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its answer: what the model and the pages have room for."""
        artifact = self.artifact
        return min(artifact.max_tokens, (self.num_pages - 1) * artifact.config.page_size)


def checked_num_threads(num_threads: int | None, devices: Sequence[DeviceInfo]) -> int | None:
    """Engine's `num_threads`; raises RequestError for more than there are cores, and for a GPU."""
    if num_threads is None:
        return None
    for device in devices:
        if device.kind != "cpu":
            raise RequestError(
                f"num_threads={shown(num_threads)} is for the CPU, and device={device.name!r} is "
                "none; leave it out"
            )
    return check_int("num_threads", num_threads, 1, num_usable_cores())


def log_loaded(places: Sequence[Place], seconds: float) -> None:
    """Log what was opened, a line a device. seconds: for all of them together."""
    for place in places:
        artifact, page = place.artifact, place.artifact.config
        log(
            logging.INFO,
            "loaded %s on %s: %.0f MiB of weights, after %.1f s; KV cache: %d pages of %d tokens, "
            "%.0f MiB; a prompt and its answer have room for %d tokens",
            artifact.name, place.device.name, artifact.num_weight_bytes / MIB, seconds,
            place.num_pages - 1, page.page_size, (place.num_pages - 1) * page.page_bytes / MIB,
            place.max_tokens,
        )  # fmt: skip


def place_workers(
    places: Sequence[Place],
    *,
    num_threads: int | None = None,
    prefill_tokens: int | None,
    max_running: int,
    jump_forward: bool,
    on_finish: OnFinish | None = None,
    trace: str | Path | None = None,
    make_runner: MakeRunner = ModelRunner,
) -> Replicas:
    """A worker for every device; `Replicas.start` opens them.

    num_threads: of each CPU; None for all cores.
    trace: a file for what the workers do when; raises what `TraceFile` raises.
    make_runner: called once a device, with the artifact, the open device, the number of pages, and
    the tokens that are prefilled in one step. Tests pass runners that fail or wait.
    """
    limits = [limits_of(place.artifact, prefill_tokens, max_running) for place in places]
    file = None if trace is None else TraceFile(trace)
    callback = None if on_finish is None else FinishCallback(on_finish)
    makers = [_core_maker(place, number, file) for number, place in enumerate(places)]
    workers = [
        _worker(place, num_threads, limit, jump_forward, callback, make_runner, make_core)
        for place, limit, make_core in zip(places, limits, makers, strict=True)
    ]
    return Replicas(workers, callback, file)


def _core_maker(place: Place, number: int, file: TraceFile | None) -> MakeCore:
    """What makes the core of the engine's device of this number, from 0 on."""
    if file is None:
        return EngineCore
    from sf_local.engine.traced_core import TracedCore  # which loads for 3 ms, and is rarely used
    from sf_local.engine.tracing import Trace

    name = f"{place.artifact.name} on {place.device.name}"
    return partial(TracedCore, Trace(file, number, name if number == 0 else f"{name} ({number})"))


def _worker(
    place: Place, num_threads: int | None, limits: Limits, jump_forward: bool,
    on_finish: FinishCallback | None, make_runner: MakeRunner, make_core: MakeCore,
) -> Worker[Core]:  # fmt: skip
    def open_core(device: Device, failures: Failures) -> Core:
        runner = make_runner(place.artifact, device, place.num_pages, limits.most_prefill_tokens)
        return make_core(
            place.artifact, device, runner, limits, failures, jump_forward=jump_forward,
            on_finish=on_finish,
        )  # fmt: skip

    return Worker(place.device.name, open_core, num_threads)
