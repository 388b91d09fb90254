"""How long streams stand still while other requests come, are cancelled, or ask for much."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from threading import Event

from sf_local.bench.harness import ROWS, SHORT, Bench, fixed_length
from sf_local.bench.report import Figure
from sf_local.engine.engine import Engine
from sf_local.request.params import MAX_TOP_LOGPROBS

NEWCOMERS = 64  # requests that come at once


def gaps(bench: Bench) -> list[Figure]:
    """While many requests come at once, are cancelled, or ask for many log probabilities; and,
    to compare with, beside one prompt and beside requests that wait."""
    sizes, name = bench.sizes, f"longest gap of {ROWS} streams"
    length = min(sizes.newcomers, bench.engine.max_tokens - sizes.own - 1)
    first = min(sizes.first, bench.engine.max_tokens - 1)
    shared = bench.prompt(length)
    num_top = min(MAX_TOP_LOGPROBS, bench.engine.vocab_size)
    logprobs = replace(
        fixed_length(sizes.decode), return_logprob=True, logprob_start_len=0,
        top_logprobs_num=num_top,
    )  # fmt: skip

    def newcomers() -> None:
        bench.run([shared + bench.prompt(sizes.own) for _ in range(NEWCOMERS)], 1)

    def likeliest() -> None:
        bench.engine.generate(bench.prompt(first), logprobs)

    def wait(is_cancelled: bool) -> None:
        params = fixed_length(bench.engine.max_tokens)
        handles = [bench.engine.submit(bench.prompt(SHORT), params) for _ in range(sizes.waiting)]
        time.sleep(sizes.idle)
        if is_cancelled:
            for handle in handles:
                handle.cancel()
            time.sleep(sizes.idle)

    prompt, waiting = f"a prompt of {length}", f"{sizes.waiting} that wait"
    others: list[tuple[str, Callable[[], object], str]] = [  # the last: what it is compared with
        (prompt, lambda: bench.run([bench.prompt(length)], 1), ""),
        (f"{NEWCOMERS} that share {length}", newcomers, prompt),
        (f"the {num_top} likeliest of {first}", likeliest, prompt),
        (waiting, lambda: wait(False), ""),
        (f"{sizes.waiting} that are cancelled", lambda: wait(True), waiting),
    ]
    longest = {what: 1e3 * longest_gap(bench.engine, disturb) for what, disturb, _ in others}
    return [
        *(Figure(f"{name} beside {what}", gap, "ms") for what, gap in longest.items()),
        *(
            Figure(f"the same beside {what} - {less}", longest[what] - longest[less], "ms", "<= 50")
            for what, _, less in others
            if less
        ),
    ]


def longest_gap(engine: Engine, disturb: Callable[[], object]) -> float:
    """The longest time between two texts of any of 8 streams while `disturb` runs, in seconds."""
    times: list[list[float]] = [[] for _ in range(ROWS)]
    is_over = Event()
    with ThreadPoolExecutor(ROWS) as readers:
        try:
            reading = [readers.submit(_read, engine, own, is_over) for own in times]
            while min(map(len, times)) < 4 and not any(reader.done() for reader in reading):
                time.sleep(0.002)
            started_at = time.perf_counter()
            disturb()
        finally:
            is_over.set()
        for reader in reading:
            reader.result()
    return max(b - a for own in times for a, b in pairwise(own) if b > started_at)


def _read(engine: Engine, times: list[float], is_over: Event) -> None:
    """Note when texts of a stream come; of one after another, if the context is short. It repeats
    a token, as not every token has a text."""
    prompt = engine.encode("a")
    params = replace(fixed_length(engine.max_tokens), logit_bias={prompt[-1]: 100.0})
    while not is_over.is_set():
        for _ in engine.stream(prompt, params):
            times.append(time.perf_counter())
            if is_over.is_set():
                break
