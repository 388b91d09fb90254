"""Replicas: one loop a device, as if they were one; requests go where their beginning was computed.

Knows of prompts what they were sent with, not what a replica still holds in its cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack

from sf_local.errors import SfLocalError
from sf_local.engine.generation import Generation
from sf_local.engine.core import Loop

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


class Replicas:
    """Several loops in the place of one; those whose device is lost get no more requests."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        self._loops, self._router, self._lock = loops, Router(), threading.Lock()

    def submit(self, generation: Generation) -> None:
        self.check_usable()
        loads = {i: loop.num_requests for i, loop in enumerate(self._loops) if loop.is_usable}
        with self._lock:
            request = generation.request
            chosen = self._router.choose(request.prompt_keys or request.prompt_ids, loads)
        self._loops[chosen].submit(generation)

    def cancel(self, generation: Generation) -> None:
        for loop in self._loops:  # those that do not have it ignore it
            loop.cancel(generation)

    def flush_cache(self) -> None:
        for loop in self._loops:
            if loop.is_usable:
                loop.flush_cache()

    def drain(self) -> None:
        for loop in self._loops:
            loop.drain()

    def close(self) -> None:
        with ExitStack() as closing:  # all of them, also if one raises
            for loop in self._loops:
                closing.callback(loop.close)

    def stats(self) -> dict[str, float]:
        """The sum over all replicas."""
        every = [loop.stats() for loop in self._loops]
        total = {name: sum(stats[name] for stats in every) for name in every[0]}
        prompt_tokens = total["prompt_tokens"]
        total["hit_rate"] = total["cached_tokens"] / prompt_tokens if prompt_tokens else 0.0
        return total

    def check_process(self) -> None:
        self._loops[0].check_process()

    def check_usable(self) -> None:
        """Raise what the loops raise, once no replica is left."""
        self.check_process()
        if not any(loop.is_usable for loop in self._loops):
            causes: list[SfLocalError] = []
            for loop in self._loops:
                try:
                    loop.check_usable()
                except SfLocalError as error:
                    causes.append(error)
            raise type(causes[0])("; ".join(dict.fromkeys(map(str, causes))))
