"""What the engine does on this machine: speeds, and ratios that do not depend on it.

All measurements run in turn, round after round on one engine, so that figures of one run can be
compared. Prompts are random tokens and the cache is emptied before each measurement: what is found
in it was put there on purpose.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from platform import python_version
from statistics import median
from typing import Any

from sf_local.artifact import open_artifact
from sf_local.engine import Engine
from sf_local.errors import RequestError
from sf_local.generation import Output
from sf_local.kv_size import num_kv_pages
from sf_local.memory import memory_left
from sf_local.request import SamplingParams
from sf_local.scheduler import Limits

ROWS = 8  # requests at once
SHORT = 16  # tokens of a prompt whose length does not matter
SCHEMA = """{
  "type": "object",
  "properties": {
    "first_name": {"type": "string", "maxLength": 20},
    "family_name": {"type": "string", "maxLength": 20},
    "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2020},
    "is_a_member": {"type": "boolean"},
    "favourite_colour": {"enum": ["red", "green", "blue"]}
  },
  "required": ["first_name", "family_name", "year_of_birth", "is_a_member", "favourite_colour"],
  "additionalProperties": false
}"""


@dataclass(frozen=True)
class Sizes:
    """How much work a round is, in tokens unless said otherwise."""

    prefill: tuple[int, int] = (128, 512)
    decode: int = 64
    shared: int = 1000  # by forks
    own: int = 4  # after a shared part
    fork: int = 16  # new ones
    requests: int = 200  # that share a preamble
    preamble: int = 300
    turn: int = 32  # in and out, of a chat
    choose: int = 500  # words before a choice
    long: int = 4000  # prompt beside a stream
    steps: int = 100  # of decoding 8 rows, to see the time outside the compiled functions
    waiting: int = 1000  # requests
    nodes: int = 10_000  # of the cache: all its pages


QUICK = Sizes(
    (16, 64), decode=16, shared=96, fork=4, requests=20, preamble=48, turn=8, choose=20, long=160,
    steps=40, waiting=100, nodes=1000,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str
    wanted: str = ""


@dataclass
class Bench:
    """An engine and what all measurements need."""

    engine: Engine
    sizes: Sizes
    random: random.Random

    def prompt(self, length: int) -> list[int]:
        return self.random.choices(range(self.engine.vocab_size), k=length)

    def run(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[list[Output], float]:
        """The answers to prompts submitted at once, `count` tokens each, and the seconds taken."""
        started_at = time.perf_counter()
        handles = [self.engine.submit(prompt, _params(count)) for prompt in prompts]
        outputs = [handle.result() for handle in handles]
        return outputs, time.perf_counter() - started_at

    def decode_steps(self, prompts: list[list[int]], temperature: float = 0) -> dict[str, float]:
        """What `stats()` grew by in some steps, decoding as many of `prompts` as can run."""
        params = _params(self.engine.max_tokens, temperature)
        handles = [self.engine.submit(prompt, params) for prompt in prompts]
        running = min(len(prompts), Limits.max_running)
        before = self._wait(lambda now: now["running"] == running)
        last_step = before["steps"] + max(self.sizes.steps * ROWS // running, self.sizes.steps // 4)
        after = self._wait(lambda now: now["steps"] >= last_step or now["running"] == 0)
        for handle in handles:
            handle.cancel()
        self._wait(lambda now: now["running"] + now["waiting"] == 0)
        if after["steps"] < last_step:  # this thread slept for too long
            return self.decode_steps(prompts, temperature)
        return {name: after[name] - before[name] for name in after}

    def _wait(self, is_reached: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        while not is_reached(stats := self.engine.stats()):
            time.sleep(0.002)
        return stats


def prefill(bench: Bench) -> list[Figure]:
    figures = []
    for length in bench.sizes.prefill:
        prompt = bench.prompt(length)
        [[cold], [cached]] = (bench.run([prompt], 1)[0] for _ in range(2))
        figures += [
            Figure(f"prefill, {length} tokens", length / cold.time_to_first_token, "tokens/s"),
            Figure(f"first token, {length} cached", 1e3 * cached.time_to_first_token, "ms"),
        ]
    return figures


def decode(bench: Bench) -> list[Figure]:
    rates = []
    for rows in (1, ROWS):
        prompts = [bench.prompt(SHORT) for _ in range(rows)]
        bench.run(prompts, 0)  # so that all decode from the first step
        outputs, _ = bench.run(prompts, bench.sizes.decode)
        spans = [output.latency - output.time_to_first_token for output in outputs]
        rates.append(rows * (bench.sizes.decode - 1) / median(spans))
    return [
        Figure("decode, 1 request", rates[0], "tokens/s"),
        Figure(f"decode, {ROWS} requests", rates[1], "tokens/s"),
        Figure(f"decode, {ROWS} requests / 1", rates[1] / rates[0], "ratio", ">= 4"),
    ]


def fork(bench: Bench) -> list[Figure]:
    sizes = bench.sizes
    shared = bench.prompt(sizes.shared)
    forks = [shared + bench.prompt(sizes.own) for _ in range(ROWS)]
    outputs, seconds = bench.run(forks, sizes.fork)
    bench.engine.flush_cache()
    unrelated = [bench.prompt(len(prompt)) for prompt in forks]
    _, unrelated_seconds = bench.run(unrelated, sizes.fork)
    later = sorted(output.cached_tokens for output in outputs)[1:]
    name = f"{ROWS} forks of {sizes.shared} tokens"
    return [
        Figure(name, seconds, "s"),
        Figure(f"{ROWS} unrelated prompts of that length", unrelated_seconds, "s"),
        Figure(f"{name} / unrelated", seconds / unrelated_seconds, "ratio", "<= 0.25"),
        Figure(f"{name}: cached, least of 7", later[0] / sizes.shared, "ratio", ">= 0.99"),
    ]


def batch(bench: Bench) -> list[Figure]:
    sizes = bench.sizes
    preamble = bench.prompt(sizes.preamble)
    prompts = [preamble + bench.prompt(sizes.own) for _ in range(sizes.requests)]
    outputs, seconds = bench.run(prompts, 4)
    needed = sizes.preamble + sizes.requests * sizes.own
    name = f"{sizes.requests} requests, {sizes.preamble} tokens shared"
    return [
        Figure(name, seconds, "s"),
        Figure(f"{name}: computed / needed", _computed(outputs) / needed, "ratio", "about 1"),
    ]


def chat(bench: Bench) -> list[Figure]:
    """The answer's last token is new, too: it was sampled, but not yet computed."""
    turn = bench.sizes.turn
    prompt = bench.prompt(bench.sizes.preamble)
    [[first], _] = bench.run([prompt], turn)
    second, _ = bench.run([prompt + first.token_ids + bench.prompt(turn)], 1)
    return [Figure("second turn: computed / new", _computed(second) / (turn + 1), "ratio", "<= 1")]


def stream(bench: Bench) -> list[Figure]:
    """A stream beside a long prompt; then the last chunk of such a prompt, alone.

    A gap between two texts is one chunk and one decode, or more if a token had no text.
    """
    long = bench.prompt(min(bench.sizes.long, bench.engine.max_tokens - 1))
    engine, times = bench.engine, []
    for _ in engine.stream("One, two, three, four, five, six,", _params(engine.max_tokens)):
        times.append(time.perf_counter())
        if len(times) == 4:
            num_done = engine.stats()["prompt_tokens"]
            beside = engine.submit(long, _params(1))
        elif len(times) > 4 and engine.stats()["prompt_tokens"] > num_done:
            break
    beside.result()
    gap = max(b - a for a, b in pairwise(times))
    start = max(0, len(long) - Limits.prefill_tokens)
    tails = [long[:start] + bench.prompt(len(long) - start) for _ in range(3)]
    chunk = median(bench.run([tail], 1)[0][0].time_to_first_token for tail in tails)
    return [
        Figure("longest gap of a stream", 1e3 * gap, "ms"),
        Figure(f"last chunk of {len(long)} tokens", 1e3 * chunk, "ms"),
        Figure("longest gap / chunk", gap / chunk, "ratio", "about 1"),
    ]


def outside(bench: Bench) -> list[Figure]:
    """Time in steps, but outside the compiled functions."""
    sizes, name = bench.sizes, "outside compiled functions"
    few = [bench.prompt(SHORT)] * ROWS
    bench.run(few[:1], 0)  # so that all decode from the first step
    usual, sampled = bench.decode_steps(few), bench.decode_steps(few, temperature=0.8)
    waiting = bench.decode_steps(few[:1] * (Limits.max_running + sizes.waiting))
    tokens = range(min(sizes.nodes, bench.engine.vocab_size))
    bench.run([[token] for token in tokens], 0)  # a node and a page each
    nodes = int(bench.engine.stats()["pages_cached"])
    bench.run(few[:1], 0)
    cached = bench.decode_steps(few)
    return [
        Figure(f"decode step, {ROWS} rows", 1e3 * usual["step_seconds"] / usual["steps"], "ms"),
        Figure(f"{name}, {ROWS} rows", _share_outside(usual), "%", "< 5"),
        Figure(f"{name}, {ROWS} rows, not greedy", _share_outside(sampled), "%", "< 5"),
        Figure(f"{name}, {sizes.waiting} waiting", _share_outside(waiting), "%", "< 5"),
        Figure(f"{name}, {nodes} nodes cached", _share_outside(cached), "%", "< 5"),
    ]


def grammar(bench: Bench) -> list[Figure]:
    """Rows that follow a schema; and one object, with its forced tokens appended or decoded."""
    params = _params(min(200, bench.engine.max_tokens - SHORT), temperature=1.0)
    params = replace(params, json_schema=SCHEMA, ignore_eos=False)
    prompts = [bench.prompt(SHORT) for _ in range(ROWS)]
    before = bench.engine.stats()
    for handle in [bench.engine.submit(prompt, params) for prompt in prompts]:
        handle.result()
    after = bench.engine.stats()
    grown = {name: after[name] - before[name] for name in after}
    cost = grown["mask_seconds"] + grown["sample_seconds"]
    params = replace(params, temperature=0)  # the same text both ways
    jumping, plain = (_object(bench, prompts[0], params, jumps) for jumps in (True, False))
    return [
        Figure(
            f"mask and sampling, {ROWS} constrained rows", 1e3 * cost / grown["steps"], "ms", "< 1"
        ),
        Figure("fixed-key object, forced tokens appended", jumping[0], "steps"),
        Figure("fixed-key object, all tokens decoded", plain[0], "steps"),
        Figure(
            "fixed-key object, steps: appended / decoded", jumping[0] / plain[0], "ratio", "<= 0.5"
        ),
        Figure("fixed-key object, time: appended / decoded", jumping[1] / plain[1], "ratio"),
    ]


def _object(
    bench: Bench, prompt: list[int], params: SamplingParams, jumps: bool
) -> tuple[float, float]:
    """Steps and seconds of one constrained answer; its prompt is cached."""
    loop = bench.engine._loop
    bench.run([prompt], 0)
    before, started_at = bench.engine.stats()["steps"], time.perf_counter()
    loop._can_jump = jumps
    bench.engine.generate(prompt, params)
    loop._can_jump = True
    return bench.engine.stats()["steps"] - before, time.perf_counter() - started_at


def choose(bench: Bench) -> list[Figure]:
    """Four choices after a prompt, against a prefill of the prompt with the longest one."""
    words = ["the ", "cat ", "house ", "runs ", "blue ", "over ", "a ", "and "]
    prompt = "".join(bench.random.choices(words, k=bench.sizes.choose))
    choices = ["yes", "no", "maybe, but not now", "it depends on the weather"]
    [[_], one] = bench.run([bench.engine.encode(prompt + choices[-1])], 0)
    bench.engine.flush_cache()
    started_at = time.perf_counter()
    bench.engine.score(prompt, choices)
    ratio = (time.perf_counter() - started_at) / one
    return [
        Figure(
            f"choice of 4 after {bench.sizes.choose} words / 1 prefill", ratio, "ratio", "<= 1.5"
        )
    ]


MEASUREMENTS = (prefill, decode, fork, batch, chat, stream, grammar, choose, outside)


def run(
    artifact: str | Path,
    device: str = "cpu",
    rounds: int = 3,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure; returns what `--json` writes. Raises as Engine does."""
    if rounds < 1:
        raise RequestError(f"rounds={rounds} must be at least 1")
    sizes, rounds = (QUICK, 1) if quick else (Sizes(), rounds)
    opened, free = open_artifact(artifact), memory_left("cpu", 0, 0)
    pages = min(sizes.nodes, num_kv_pages(opened.config, "cpu", free, None, "50%"))
    with Engine(artifact, device, kv_pages=pages) as engine:
        figures = [Figure("memory after load", _resident_megabytes(), "MB")]
        bench = Bench(engine, sizes, random.Random(0))
        bench.run([bench.prompt(SHORT) for _ in range(ROWS)], SHORT)  # reads the weights
        for number in range(rounds):
            for measurement in MEASUREMENTS:
                progress(f"round {number + 1} of {rounds}: {measurement.__name__}")
                engine.flush_cache()
                figures += measurement(bench)
        figures.append(Figure("memory at the end", _resident_megabytes(), "MB"))
    return {
        "artifact": str(artifact),
        "model": opened.manifest.source["name"] if opened.manifest else None,
        "device": device,
        "cpu": re.findall(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": python_version()}
        | {name: version(name) for name in ("sf-local", "shortfin", "numpy")},
        "rounds": rounds,
        "kv_pages": pages,
        "figures": _summary(figures),
    }


def table(report: dict[str, Any]) -> str:
    """The figures of a report, aligned for a screen."""
    rows = [("", "median", "min..max", "unit", "wanted")]
    for name, figure in report["figures"].items():
        low, middle, high = (_short(figure[key]) for key in ("min", "median", "max"))
        rows.append((name, middle, f"{low}..{high}", figure["unit"], figure["wanted"]))
    a, b, c, d = (max(len(row[i]) for row in rows) for i in range(4))
    lines = (f"{r[0]:{a}}  {r[1]:>{b}}  {r[2]:>{c}}  {r[3]:{d}}  {r[4]}" for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def _summary(figures: Sequence[Figure]) -> dict[str, dict[str, Any]]:
    summary: dict[str, dict[str, Any]] = {}
    for figure in figures:
        empty = {"unit": figure.unit, "wanted": figure.wanted, "values": []}
        summary.setdefault(figure.name, empty)["values"].append(figure.value)
    for entry in summary.values():
        values = entry["values"]
        entry |= {"median": median(values), "min": min(values), "max": max(values)}
    return summary


def _params(count: int, temperature: float = 0) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=temperature, ignore_eos=True)


def _computed(outputs: Sequence[Output]) -> int:
    return sum(output.prompt_tokens - output.cached_tokens for output in outputs)


def _share_outside(stats: dict[str, float]) -> float:
    return 100 * (1 - stats["call_seconds"] / stats["step_seconds"])


def _resident_megabytes() -> float:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
