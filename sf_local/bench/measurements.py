"""What the engine does on this machine: speeds, and ratios that do not depend on it.

All measurements run in turn, round after round on one engine, so that figures of one run can be
compared. Prompts are random tokens and the cache is emptied before each measurement: what is found
in it was put there on purpose. What the machine can do at most is measured beside what is compared
with it.
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

from sf_local.artifact.open import Artifact, open_artifact
from sf_local.bench import fresh_process
from sf_local.bench.report import Figure, summary
from sf_local.bench.roofline import decode_bytes, peak_flops, prefill_flops, read_bandwidth
from sf_local.device.info import find_device
from sf_local.engine.engine import Engine
from sf_local.engine.input_processor import PromptInput
from sf_local.engine.kv_budget import num_kv_pages
from sf_local.engine.scheduler import Limits
from sf_local.errors import RequestError
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

ROWS = 8  # requests at once
ALL_ROWS = (1, 2, 4, 8, 16)
SHORT = 16  # tokens of a prompt whose length does not matter
TURNS = 3  # of decoding, a round
FREE_TEXT = r"[a-z ]*"  # a grammar that forces nothing and never ends
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

    prefill: tuple[int, ...] = (32, 128, 512, 2048)
    contexts: tuple[int, ...] = (SHORT, 512, 4096)  # before one row's decode
    decode: int = 64
    first: int = 1000  # cached, or not, before the `own` tokens of a prompt
    fresh: int = 512  # prompt of a process of its own
    idle: float = 3.0  # seconds
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
    (8, 16, 32, 64), (SHORT, 64, 128), decode=16, first=96, fresh=64, idle=0.1, shared=96, fork=4,
    requests=20, preamble=48, turn=8, choose=20, long=160, steps=40, waiting=100, nodes=1000,
)  # fmt: skip


@dataclass
class Bench:
    """An engine and what all measurements need."""

    engine: Engine
    device: str
    sizes: Sizes
    random: random.Random

    def prompt(self, length: int) -> list[int]:
        return self.random.choices(range(self.engine.vocab_size), k=length)

    def fitting(self, lengths: Sequence[int], answer: int) -> list[int]:
        """Lengths of prompts that leave room for an answer in the model's context."""
        return [length for length in lengths if length + answer <= self.engine.max_tokens]

    def run(
        self, prompts: Sequence[Sequence[int]], count: int, regex: str | None = None
    ) -> tuple[list[Output], float]:
        """The answers to prompts submitted at once, `count` tokens each, and the seconds taken."""
        params = replace(_params(count), regex=regex)
        started_at = time.perf_counter()
        handles = [self.engine.submit(prompt, params) for prompt in prompts]
        outputs = [handle.result() for handle in handles]
        return outputs, time.perf_counter() - started_at

    def decode_rates(self, groups: Sequence[tuple[list[list[int]], str | None]]) -> list[float]:
        """Tokens a second of each group's prompts together, with a regex or without.

        Groups take turns, and the median of theirs counts: what slows the machine, slows all.
        """
        for prompts, _ in groups:
            self.run(prompts, 0)  # so that all decode from the first step
        turns = [[self._decode_rate(*group) for group in groups] for _ in range(TURNS)]
        return [median(rates) for rates in zip(*turns, strict=True)]

    def _decode_rate(self, prompts: list[list[int]], regex: str | None) -> float:
        outputs, _ = self.run(prompts, self.sizes.decode, regex)
        spans = [output.latency - output.time_to_first_token for output in outputs]
        return len(prompts) * (self.sizes.decode - 1) / median(spans)

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
    """Time to the first token of prompts of which nothing is cached."""
    lengths = bench.fitting(bench.sizes.prefill, 1)
    seconds = {n: bench.run([bench.prompt(n)], 1)[0][0].time_to_first_token for n in lengths}
    base, long = lengths[:2][-1], lengths[-1]
    growth = (seconds[long] / long) / (seconds[base] / base)
    return [
        *(Figure(f"prefill, {n} tokens", n / seconds[n], "tokens/s") for n in lengths),
        Figure(f"prefill time a token, {long} tokens / {base}", growth, "ratio", "<= 1.5"),
        *_prefill_roofline(bench, {n: seconds[n] for n in lengths[-2:]}),
    ]


def _prefill_roofline(bench: Bench, seconds: dict[int, float]) -> list[Figure]:
    """Multiplications and additions that prompts need, over what the CPU's registers can do."""
    artifact = bench.engine.artifact
    if not (artifact.manifest and artifact.manifest.device == "cpu"):
        return []
    peak = peak_flops(artifact.manifest.weight_dtype)
    name = f"peak of {peak.name}"
    shares = {n: prefill_flops(artifact, n) / t / peak.flops for n, t in seconds.items()}
    return [
        Figure(name, peak.flops / 1e9, "GFLOP/s"),
        *(Figure(f"prefill, {n} tokens: share of {name}", 100 * shares[n], "%") for n in shares),
    ]


def decode(bench: Bench) -> list[Figure]:
    """Steps of so many rows, all of about the same short context."""
    groups = [([bench.prompt(SHORT) for _ in range(rows)], None) for rows in ALL_ROWS]
    rates = dict(zip(ALL_ROWS, bench.decode_rates(groups), strict=True))
    most = ALL_ROWS[-1]
    return [
        *(Figure(f"decode, {n} row{'s' * (n > 1)}", rates[n], "tokens/s") for n in ALL_ROWS),
        Figure(f"decode, {ROWS} rows / 1", rates[ROWS] / rates[1], "ratio", ">= 4"),
        Figure(f"decode step, {most} rows / 1", most * rates[1] / rates[most], "ratio", "<= 2.2"),
        *_decode_roofline(bench, rates[1]),
    ]


def _decode_roofline(bench: Bench, rate: float) -> list[Figure]:
    """Bytes that one row's steps need, over what the CPUs can read from memory."""
    artifact = bench.engine.artifact
    if not (artifact.manifest and artifact.manifest.device == "cpu"):
        return []
    bandwidth = read_bandwidth()
    share = decode_bytes(artifact, SHORT + bench.sizes.decode / 2) * rate / bandwidth
    wanted = ">= 80" if artifact.manifest.weight_dtype == "bf16" else ""
    return [
        Figure("memory bandwidth, reading", bandwidth / 1e9, "GB/s"),
        Figure("decode, 1 row: share of bandwidth", 100 * share, "%", wanted),
    ]


def context(bench: Bench) -> list[Figure]:
    """Decode of one row after more and more tokens."""
    lengths = bench.fitting(bench.sizes.contexts, bench.sizes.decode)
    groups = [([bench.prompt(n)], None) for n in lengths]
    rates = dict(zip(lengths, bench.decode_rates(groups), strict=True))
    short, long = lengths[0], lengths[-1]
    growth = rates[short] / rates[long]
    return [
        *(Figure(f"decode, context {n}", rates[n], "tokens/s") for n in lengths),
        Figure(f"decode time, context {long} / {short}", growth, "ratio", "<= 1.6"),
    ]


def first_token(bench: Bench) -> list[Figure]:
    """A prompt whose beginning nobody has asked before, and then another that begins so."""
    shared = bench.prompt(bench.sizes.first)
    prompts = [shared + bench.prompt(bench.sizes.own) for _ in range(2)]
    cold, cached = (bench.run([prompt], 1)[0][0].time_to_first_token for prompt in prompts)
    name = f"first token, {bench.sizes.first} + {bench.sizes.own} tokens"
    return [
        Figure(f"{name}, cold", 1e3 * cold, "ms"),
        Figure(f"{name}, {bench.sizes.first} cached", 1e3 * cached, "ms"),
    ]


def constrained(bench: Bench) -> list[Figure]:
    """Decode with a grammar that allows much and forces nothing, and without."""
    prompts = [bench.prompt(SHORT) for _ in range(ROWS)]
    free, bound = bench.decode_rates([(prompts, None), (prompts, FREE_TEXT)])
    return [
        Figure(f"decode, {ROWS} rows with a grammar", bound, "tokens/s"),
        Figure(f"decode time, {ROWS} rows, with a grammar / without", free / bound, "ratio"),
    ]


def fresh(bench: Bench) -> list[Figure]:
    """A process of its own; the files are warm, for this one has read them."""
    found = fresh_process.run(
        bench.engine.artifact,
        bench.device,
        prompt=bench.sizes.fresh,
        answer=bench.sizes.decode,
        idle_seconds=bench.sizes.idle,
    )
    return [
        Figure("engine, open to ready", 1e3 * found.load_seconds, "ms"),
        Figure("process start to ready", 1e3 * found.ready_seconds, "ms"),
        Figure("process start to first token", 1e3 * found.first_token_seconds, "ms"),
        Figure("peak memory", found.peak_bytes / 1e6, "MB"),
        Figure("peak memory / (weights + KV pages)", found.memory_ratio, "ratio", "<= 1.25"),
        Figure("idle engine, of one core", 100 * found.idle_share, "%", "< 1"),
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
    gap = stream_gap(bench.engine, long)
    start = max(0, len(long) - Limits.prefill_tokens)
    tails = [long[:start] + bench.prompt(len(long) - start) for _ in range(3)]
    chunk = median(bench.run([tail], 1)[0][0].time_to_first_token for tail in tails)
    return [
        Figure("longest gap of a stream", 1e3 * gap, "ms"),
        Figure(f"last chunk of {len(long)} tokens", 1e3 * chunk, "ms"),
        Figure("longest gap / chunk", gap / chunk, "ratio", "about 1"),
    ]


def stream_gap(engine: Engine, prompt: PromptInput) -> float:
    """Seconds, the longest between two texts of a stream while another prompt is computed."""
    times: list[float] = []
    for _ in engine.stream("One, two, three, four, five, six,", _params(engine.max_tokens)):
        times.append(time.perf_counter())
        if len(times) == 4:
            num_done = engine.stats()["prompt_tokens"]
            beside = engine.submit(prompt, _params(1))
        elif len(times) > 4 and engine.stats()["prompt_tokens"] > num_done:
            break
    beside.result()
    return max(b - a for a, b in pairwise(times))


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
        *_breakdown(usual),
        Figure(f"{name}, {ROWS} rows", _share_outside(usual), "%", "< 5"),
        Figure(f"{name}, {ROWS} rows, not greedy", _share_outside(sampled), "%", "< 5"),
        Figure(f"{name}, {sizes.waiting} waiting", _share_outside(waiting), "%", "< 5"),
        Figure(f"{name}, {nodes} nodes cached", _share_outside(cached), "%", "< 5"),
    ]


def _breakdown(stats: dict[str, float]) -> list[Figure]:
    """Where a step's time goes; the rest schedules, fills in arguments, and delivers text."""
    steps, seconds, calls = stats["steps"], stats["step_seconds"], stats["call_seconds"]
    sampling = stats["sample_seconds"]
    parts = {
        "in compiled functions": calls,
        "sampling": sampling,
        "rest": seconds - calls - sampling,
    }
    return [
        Figure(f"of a step of {ROWS} rows: {name}", 1e6 * part / steps, "us")
        for name, part in parts.items()
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
    jumping = _object(bench.engine, prompts[0], params)
    artifact = bench.engine.artifact
    pages = -(-bench.engine.max_tokens // artifact.config.page_size)  # one context
    with Engine(artifact.vmfb, bench.device, kv_pages=pages, jump_forward=False) as engine:
        plain = _object(engine, prompts[0], params)
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


def _object(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[float, float]:
    """Steps and seconds of one constrained answer; its prompt is cached, and its grammar, too."""
    engine.generate(prompt, replace(params, max_new_tokens=1))
    before, started_at = engine.stats()["steps"], time.perf_counter()
    engine.generate(prompt, params)
    return engine.stats()["steps"] - before, time.perf_counter() - started_at


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


MEASUREMENTS = (
    prefill, decode, context, first_token, constrained, fork, batch, chat, stream, grammar, choose,
    outside, fresh,
)  # fmt: skip


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
    opened, free = open_artifact(artifact), find_device("cpu").free_bytes()
    pages = min(sizes.nodes, num_kv_pages(opened.config, "cpu", free, None, "50%"))
    with Engine(artifact, device, kv_pages=pages) as engine:
        figures = [Figure("memory after load", _resident_megabytes(), "MB")]
        bench = Bench(engine, device, sizes, random.Random(0))
        bench.run([bench.prompt(SHORT) for _ in range(ROWS)], SHORT)  # reads the weights
        for number in range(rounds):
            for measurement in MEASUREMENTS:
                progress(f"round {number + 1} of {rounds}: {measurement.__name__}")
                engine.flush_cache()
                figures += measurement(bench)
        figures.append(Figure("memory at the end", _resident_megabytes(), "MB"))
    return report(opened, device, rounds, figures) | {"kv_pages": pages}


def report(
    artifact: Artifact, device: str, rounds: int, figures: Sequence[Figure]
) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "artifact": str(artifact.vmfb.parent),
        "model": artifact.manifest.source["name"] if artifact.manifest else None,
        "device": device,
        "cpu": re.findall(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": python_version()}
        | {name: version(name) for name in ("sf-local", "shortfin", "numpy")},
        "rounds": rounds,
        "figures": summary(figures),
    }


def _params(count: int, temperature: float = 0) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=temperature, ignore_eos=True)


def _computed(outputs: Sequence[Output]) -> int:
    return sum(output.prompt_tokens - output.cached_tokens for output in outputs)


def _share_outside(stats: dict[str, float]) -> float:
    return 100 * (1 - stats["call_seconds"] / stats["step_seconds"])


def _resident_megabytes() -> float:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3
