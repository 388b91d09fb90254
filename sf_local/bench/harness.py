"""The engine that `sf-local bench` measures, and the ways in which measurements drive it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from sf_local.engine.engine import Engine
from sf_local.engine.scheduler import MAX_RUNNING
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

ROWS = 8  # requests that run at once in most measurements
SHORT = 16  # tokens of a prompt whose length does not matter
TURNS = 3  # how often a group of prompts is decoded in one round


@dataclass(frozen=True)
class Sizes:
    """How much work one round is, in tokens unless said otherwise."""

    prefill: tuple[int, ...] = (32, 128, 512, 2048)  # prompts
    contexts: tuple[int, ...] = (SHORT, 512, 4096)  # before one row's decode
    decode: int = 64  # of an answer whose speed is measured
    first: int = 1000  # the part of a prompt that is cached, or not, before its `own` tokens
    fresh: int = 512  # the prompt given to a new process
    idle: float = 3.0  # seconds
    shared: int = 1000  # the prompt that forks have in common
    own: int = 4  # of each prompt after the common part
    fork: int = 16  # the answer of each fork
    requests: int = 200  # number of requests that share a preamble
    preamble: int = 300
    turn: int = 32  # each message and each answer of a chat
    choose: int = 500  # words before a choice
    long: int = 4000  # the prompt that is prefilled beside a stream
    steps: int = 100  # steps of 8 rows in which time outside compiled functions is measured
    newcomers: int = 7000  # the prompt that 64 which come at once have in common
    waiting: int = 1000  # number of requests that wait
    nodes: int = 10_000  # nodes of the prefix cache, one page each


QUICK = Sizes(
    (8, 16, 32, 64), (SHORT, 64, 128), decode=16, first=96, fresh=64, idle=0.1, shared=96, fork=4,
    requests=20, preamble=48, turn=8, choose=20, long=160, steps=40, newcomers=160,
    waiting=100, nodes=1000,
)  # fmt: skip


@dataclass
class Bench:
    """The engine under test, and the requests that measurements are made of."""

    engine: Engine
    device: str
    sizes: Sizes
    random: random.Random
    num_threads: int | None = None

    def prompt(self, length: int) -> list[int]:
        """`length` random token ids."""
        return self.random.choices(range(self.engine.vocab_size), k=length)

    def fitting(self, lengths: Sequence[int], answer: int) -> list[int]:
        """Those `lengths` of prompts that leave room for `answer` tokens in the context."""
        return [length for length in lengths if length + answer <= self.engine.max_tokens]

    def run(
        self, prompts: Sequence[Sequence[int]], count: int, regex: str | None = None
    ) -> tuple[list[Output], float]:
        """Submit all prompts at once: their answers of `count` tokens, and the seconds taken."""
        params = replace(fixed_length(count), regex=regex)
        started_at = time.perf_counter()
        handles = [self.engine.submit(prompt, params) for prompt in prompts]
        outputs = [handle.result() for handle in handles]
        return outputs, time.perf_counter() - started_at

    def decode_rates(self, groups: Sequence[tuple[list[list[int]], str | None]]) -> list[float]:
        """Tokens a second of each group, whose prompts decode together, with a regex or without.

        Groups take turns, so that another load on the machine slows all of them alike; each
        group's median counts.
        """
        for prompts, _ in groups:
            self.run(prompts, 0)  # caches the prompts, so that all rows decode from the first step
        turns = [[self._decode_rate(*group) for group in groups] for _ in range(TURNS)]
        return [median(rates) for rates in zip(*turns, strict=True)]

    def _decode_rate(self, prompts: list[list[int]], regex: str | None) -> float:
        outputs, _ = self.run(prompts, self.sizes.decode, regex)
        spans = [output.latency - output.time_to_first_token for output in outputs]
        return len(prompts) * (self.sizes.decode - 1) / median(spans)

    def decode_steps(self, prompts: list[list[int]], temperature: float = 0) -> dict[str, float]:
        """How much each counter of `Engine.stats()` grew while `prompts` decoded.

        For at least `sizes.steps` steps of 8 rows, or a quarter of that of more rows. Prompts
        beyond what can run at once wait meanwhile.
        """
        params = fixed_length(self.engine.max_tokens, temperature)
        handles = [self.engine.submit(prompt, params) for prompt in prompts]
        running = min(len(prompts), MAX_RUNNING)
        before = self._wait(lambda now: now["running"] == running)
        last_step = before["steps"] + max(self.sizes.steps * ROWS // running, self.sizes.steps // 4)
        after = self._wait(lambda now: now["steps"] >= last_step or now["running"] == 0)
        for handle in handles:
            handle.cancel()
        self._wait(lambda now: now["running"] + now["waiting"] == 0)
        if after["steps"] < last_step:  # all answers ended while this thread slept
            return self.decode_steps(prompts, temperature)
        return {name: after[name] - before[name] for name in after}

    def _wait(self, is_reached: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        while not is_reached(stats := self.engine.stats()):
            time.sleep(0.002)
        return stats


def fixed_length(count: int, temperature: float = 0) -> SamplingParams:
    """Exactly `count` tokens, unless the context ends before."""
    return SamplingParams(max_new_tokens=count, temperature=temperature, top_p=1, ignore_eos=True)
