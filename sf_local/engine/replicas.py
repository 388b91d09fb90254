"""Replicas: one engine core a device, as if they were one; requests go where their beginning was
computed.

Knows of prompts what they were sent with, not what a replica still holds in its cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from sf_local.artifact.open import Artifact
from sf_local.device.device import Device
from sf_local.engine.core import EngineCore
from sf_local.engine.failures import Failures
from sf_local.engine.generation import Generation
from sf_local.engine.scheduler import limits_of
from sf_local.engine.stats import hit_rate
from sf_local.engine.worker import Worker
from sf_local.errors import SfLocalError
from sf_local.model.runner import ModelRunner

RunnerFactory = Callable[[Artifact, Device, int, int], ModelRunner]

BLOCK = 16  # tokens that are remembered together
MAX_BLOCKS = 1 << 16
MAX_LEAD = 8  # requests that a replica may have more than the one with the fewest


class Router:
    """Chooses a replica for a prompt: the one that knows most of it, unless it is too busy."""

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


class Replica:
    """A core on a worker of its own: what takes the generations of one device."""

    def __init__(
        self, artifact: Artifact, device: str, num_pages: int, make_runner: RunnerFactory
    ) -> None:
        def open_core(opened: Device, failures: Failures) -> EngineCore:
            limits = limits_of(artifact)
            runner = make_runner(artifact, opened, num_pages, limits.prefill_tokens)
            return EngineCore(artifact, opened, runner, num_pages, limits, failures)

        self.worker = Worker(device, open_core)
        self.core = self.worker.core
        self.drain, self.close = self.worker.drain, self.worker.close
        self.check_process, self.check_usable = self.worker.check_process, self.worker.check_usable

    def submit(self, generation: Generation) -> None:
        self.worker.ask(lambda: self.core.add(generation))

    def cancel(self, generation: Generation) -> None:
        self.worker.tell(lambda: self.core.cancel(generation))

    def flush_cache(self) -> None:
        self.worker.ask_and_wait(self.core.flush_cache)

    def stats(self) -> dict[str, float]:
        return self.core.stats()

    @property
    def is_usable(self) -> bool:
        return self.worker.is_usable

    @property
    def num_requests(self) -> int:
        return self.worker.num_requests


class Replicas:
    """Several replicas in the place of one; those whose device is lost get no more requests."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas, self._router, self._lock = replicas, Router(), threading.Lock()

    def submit(self, generation: Generation) -> None:
        self.check_usable()
        loads = {
            i: replica.num_requests for i, replica in enumerate(self.replicas) if replica.is_usable
        }
        with self._lock:
            request = generation.request
            chosen = self._router.choose(request.prompt_keys or request.prompt_ids, loads)
        self.replicas[chosen].submit(generation)

    def cancel(self, generation: Generation) -> None:
        for replica in self.replicas:  # those that do not have it ignore it
            replica.cancel(generation)

    def flush_cache(self) -> None:
        for replica in self.replicas:
            if replica.is_usable:
                replica.flush_cache()

    def drain(self) -> None:
        for replica in self.replicas:
            replica.drain()

    def close(self) -> None:
        with ExitStack() as closing:  # all of them, also if one raises
            for replica in self.replicas:
                closing.callback(replica.close)

    def stats(self) -> dict[str, float]:
        """The sum over all replicas."""
        every = [replica.stats() for replica in self.replicas]
        total = {name: sum(stats[name] for stats in every) for name in every[0]}
        total["hit_rate"] = hit_rate(total["cached_tokens"], total["prompt_tokens"])
        return total

    def check_process(self) -> None:
        self.replicas[0].check_process()

    def check_usable(self) -> None:
        """Raise what the replicas raise, once no replica is left."""
        self.check_process()
        if not any(replica.is_usable for replica in self.replicas):
            causes: list[SfLocalError] = []
            for replica in self.replicas:
                try:
                    replica.check_usable()
                except SfLocalError as error:
                    causes.append(error)
            raise type(causes[0])("; ".join(dict.fromkeys(map(str, causes))))
