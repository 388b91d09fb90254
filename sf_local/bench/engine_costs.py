"""What the engine around the model saves and costs: shared prefixes, streams, steps, grammars."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from sf_local.bench.harness import ROWS, SHORT, Bench, fixed_length
from sf_local.bench.report import Figure
from sf_local.engine.engine import Engine
from sf_local.engine.input_processor import PromptInput
from sf_local.engine.scheduler import MAX_RUNNING, PREFILL_TOKENS
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

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


def fork(bench: Bench) -> list[Figure]:
    """Prompts with a long common prefix at once, against as many that have nothing in common."""
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
    """Many requests at once whose prompts share a preamble, which is computed once."""
    sizes = bench.sizes
    preamble = bench.prompt(sizes.preamble)
    prompts = [preamble + bench.prompt(sizes.own) for _ in range(sizes.requests)]
    outputs, seconds = bench.run(prompts, 4)
    needed = sizes.preamble + sizes.requests * sizes.own
    name = f"{sizes.requests} requests, {sizes.preamble} tokens shared"
    return [
        Figure(name, seconds, "s"),
        Figure(f"{name}: computed / needed", _computed(outputs) / needed, "ratio", "<= 1.05"),
    ]


def chat(bench: Bench) -> list[Figure]:
    """The second turn of a chat computes only what is new.

    That is the user's tokens and the answer's last one, which was sampled but not computed.
    """
    turn = bench.sizes.turn
    prompt = bench.prompt(bench.sizes.preamble)
    [[first], _] = bench.run([prompt], turn)
    second, _ = bench.run([prompt + first.token_ids + bench.prompt(turn)], 1)
    return [Figure("second turn: computed / new", _computed(second) / (turn + 1), "ratio", "<= 1")]


def _computed(outputs: Sequence[Output]) -> int:
    return sum(output.prompt_tokens - output.cached_tokens for output in outputs)


def stream(bench: Bench) -> list[Figure]:
    """Gaps in a stream while a long prompt is prefilled, against the last chunk of such a prompt.

    A gap between two texts lasts one chunk and one decode step, or more if a token had no text.
    """
    long = bench.prompt(min(bench.sizes.long, bench.engine.max_tokens - 1))
    gap = stream_gap(bench.engine, long)
    start = max(0, len(long) - PREFILL_TOKENS)
    tails = [long[:start] + bench.prompt(len(long) - start) for _ in range(3)]
    chunk = median(bench.run([tail], 1)[0][0].time_to_first_token for tail in tails)
    return [
        Figure("longest gap of a stream", 1e3 * gap, "ms"),
        Figure(f"last chunk of {len(long)} tokens", 1e3 * chunk, "ms"),
        Figure("longest gap / chunk", gap / chunk, "ratio", "<= 1.5"),
    ]


def stream_gap(engine: Engine, prompt: PromptInput) -> float:
    """The longest time between two texts of a stream while `prompt` is prefilled, in seconds."""
    times: list[float] = []
    for _ in engine.stream("One, two, three, four, five, six,", fixed_length(engine.max_tokens)):
        times.append(time.perf_counter())
        if len(times) == 4:
            num_done = engine.stats()["prompt_tokens"]
            beside = engine.submit(prompt, fixed_length(1))
        elif len(times) > 4 and engine.stats()["prompt_tokens"] > num_done:
            break
    beside.result()
    return max(b - a for a, b in pairwise(times))


def behind(bench: Bench) -> list[Figure]:
    """Short prompts, one after another, behind a long one that is prefilled."""
    length = min(bench.sizes.long, bench.engine.max_tokens - 1)
    [alone], _ = bench.run([bench.prompt(length)], 1)
    long = bench.engine.submit(bench.prompt(length), fixed_length(1))
    waits: list[float] = []
    while not waits or bench.engine.stats()["running"]:
        [short], _ = bench.run([bench.prompt(SHORT)], 1)
        waits.append(short.time_to_first_token)
    ratio = long.result().time_to_first_token / alone.time_to_first_token
    return [
        Figure(f"first token of {SHORT} tokens behind {length}", 1e3 * median(waits), "ms"),
        Figure(f"first token of {length} tokens, beside these / alone", ratio, "ratio", "<= 1.1"),
    ]


def outside(bench: Bench) -> list[Figure]:
    """The share of a step's time that is spent outside the compiled functions.

    For greedy and sampled rows, with many requests waiting, and with a full prefix cache.
    """
    sizes, name = bench.sizes, "outside compiled functions"
    few = [bench.prompt(SHORT)] * ROWS
    bench.run(few[:1], 0)  # so that all decode from the first step
    usual, sampled = bench.decode_steps(few), bench.decode_steps(few, temperature=0.8)
    waiting = bench.decode_steps(few[:1] * (MAX_RUNNING + sizes.waiting))
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


def _share_outside(stats: dict[str, float]) -> float:
    return 100 * (1 - stats["call_seconds"] / stats["step_seconds"])


def grammar(bench: Bench) -> list[Figure]:
    """The cost of masks for rows that follow a schema, and what grammar jumping saves.

    Jumping appends the tokens that a grammar forces to the prompt instead of decoding them.
    """
    params = fixed_length(min(200, bench.engine.max_tokens - SHORT), temperature=1.0)
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
    with Engine(
        artifact.vmfb, bench.device, kv_pages=pages, num_threads=bench.num_threads,
        jump_forward=False,
    ) as engine:  # fmt: skip
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
    """Steps and seconds of one constrained answer whose prompt and grammar are cached."""
    engine.generate(prompt, replace(params, max_new_tokens=1))
    before, started_at = engine.stats()["steps"], time.perf_counter()
    engine.generate(prompt, params)
    return engine.stats()["steps"] - before, time.perf_counter() - started_at


def choose(bench: Bench) -> list[Figure]:
    """Scoring four choices after a prompt, against one prefill of the prompt and a choice."""
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
