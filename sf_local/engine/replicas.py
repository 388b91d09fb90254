"""Replicas: one engine core a device, behind one interface.

A request goes to the replica that was sent most of its prompt before, unless that one is too busy.
What a replica still holds in its prefix cache is not looked at.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Protocol

from sf_local.engine.finish_callback import FinishCallback
from sf_local.engine.generation import Generation
from sf_local.engine.metrics import Replica, RequestMetrics
from sf_local.engine.stats import total
from sf_local.engine.trace_file import TraceFile
from sf_local.engine.worker import Work, Worker
from sf_local.errors import SfLocalError
from sf_local.request.request import Request

BLOCK = 16  # tokens of a prompt that are remembered together
MAX_BLOCKS = 1 << 16
MAX_LEAD = 8  # requests that a replica may have more than the one with the fewest


class Core(Work, Protocol):
    """What a replica needs of an engine core; all but `stats` is called on the worker's thread.

    request_metrics: of the requests that have ended.
    """

    request_metrics: RequestMetrics

    def add(self, generation: Generation) -> None:
        """Take a new request in."""

    def cancel(self, generation: Generation) -> None:
        """End a request with what it has; nothing if it has ended."""

    def flush_cache(self) -> None:
        """Free all pages that no request uses."""

    def stats(self) -> dict[str, float]:
        """What `Engine.stats` reports, for this device."""


class Router:
    """Chooses a replica for a prompt: the one that was sent most of it, unless it is too busy."""

    def __init__(self) -> None:
        self._owners: OrderedDict[int, int] = OrderedDict()  # hash of a prefix -> replica

    def choose(self, tokens: Sequence[int], loads: dict[int, int]) -> int:
        """One of the replicas in `loads`, which says how many requests each has."""
        prefixes = _prefixes(tokens)
        idlest = min(loads, key=lambda i: loads[i])
        chosen = next(
            (o for p in reversed(prefixes) if (o := self._owners.get(p)) in loads), idlest
        )
        if loads[chosen] > loads[idlest] + MAX_LEAD:
            chosen = idlest
        for prefix in prefixes:
            self._owners[prefix] = chosen
            self._owners.move_to_end(prefix)
        while len(self._owners) > MAX_BLOCKS:
            self._owners.popitem(last=False)
        return chosen


def _prefixes(tokens: Sequence[int]) -> list[int]:
    """Hashes of the prompt's beginnings, in whole blocks."""
    found, value = [], 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        value = hash((value, *tokens[end - BLOCK : end]))
        found.append(value)
    return found


class Replicas:
    """The workers of an engine, of which those whose device is lost get no more requests.

    Its methods may be called from any thread. on_finish: what the workers tell of requests that
    have ended; to close is to wait for it. trace: the file that they write to, closed after them.
    """

    def __init__(
        self, workers: Sequence[Worker[Core]], on_finish: FinishCallback | None = None,
        trace: TraceFile | None = None,
    ) -> None:  # fmt: skip
        self.workers, self._on_finish, self._trace = workers, on_finish, trace
        self._router, self._lock = Router(), threading.Lock()

    def start(self) -> None:
        """Open all devices; raises what `Worker.start` does. Close them if this raises."""
        for worker in self.workers:
            worker.start()

    def submit(self, generation: Generation) -> None:
        """Start a generation; raises as `check_usable` does."""
        while True:
            worker = self._choose(generation.request)
            try:
                worker.ask(partial(worker.core.add, generation))
                return
            except SfLocalError:  # it was closed or lost meanwhile; are there others?
                self.check_usable()

    def _choose(self, request: Request) -> Worker[Core]:
        """A worker for a request, which may end at any moment; raises as `check_usable` does."""
        loads = {i: w.num_requests for i, w in enumerate(self.workers) if w.is_usable}
        if not loads:
            self.check_usable()
        if len(self.workers) == 1:
            return self.workers[0]
        with self._lock:
            chosen = self._router.choose(request.prompt_keys or request.prompt_ids, loads)
        return self.workers[chosen]

    def cancel(self, generation: Generation) -> None:
        """End a generation with what it has; nothing if it has ended."""
        for worker in self.workers:  # those that do not have it ignore it
            worker.tell(partial(worker.core.cancel, generation))

    def flush_cache(self) -> None:
        """Free all pages that no request uses; returns when it is done."""
        self.check_usable()
        for worker in self.workers:
            with suppress(SfLocalError):  # of those that are closed or lost
                worker.ask_and_wait(worker.core.flush_cache)

    def drain(self) -> None:
        """Take no new generations, and wait until none is left."""
        for worker in self.workers:
            worker.drain()

    def ask_to_close(self) -> None:
        """Fail what is under way and free the devices, without waiting for it."""
        for worker in self.workers:
            worker.ask_to_close()

    def close(self) -> None:
        """`ask_to_close`, and return when it is done."""
        self.ask_to_close()
        with ExitStack() as closing:  # all of them, also if one raises
            if self._trace is not None:
                closing.callback(self._trace.close)
            if self._on_finish is not None:
                closing.callback(self._on_finish.flush)
            for worker in self.workers:
                closing.callback(worker.close)

    def stats(self) -> dict[str, float]:
        """What `Engine.stats` reports, for all devices together."""
        return total([worker.core.stats() for worker in self.workers])

    def metrics(self, devices: Sequence[str]) -> list[Replica]:
        """What `Engine.metrics` reports. devices: the names of the workers' devices. Raises
        EngineError in a forked child, which would tell its parent's numbers."""
        self.check_process()
        cores = [worker.core for worker in self.workers]
        return [
            Replica(device, core.stats(), core.request_metrics)
            for device, core in zip(devices, cores, strict=True)
        ]

    def check_process(self) -> None:
        """Raise EngineError in a forked child."""
        self.workers[0].check_process()

    def check_usable(self) -> None:
        """Raise what the workers raise, once none of them is usable."""
        self.check_process()
        if not any(worker.is_usable for worker in self.workers):
            causes: list[SfLocalError] = []
            for worker in self.workers:
                try:
                    worker.check_usable()
                except SfLocalError as error:
                    causes.append(error)
            raise type(causes[0])("; ".join(dict.fromkeys(map(str, causes))))
