"""sf_local: `sf_engine.py ARTIFACT TOKENS`, an Engine with a KV cache of TOKENS tokens.

Serves artifacts exported by amdsharktank as well.
"""

import os
import re
import sys
from pathlib import Path

from worker import seconds, serve

from sf_local import Engine, SamplingParams, __version__
from sf_local.artifact.open import open_artifact
from sf_local.engine.limits import limits_of

artifact = open_artifact(sys.argv[1])
pages = -(-int(sys.argv[2]) // artifact.config.page_size)
engine = Engine(artifact.vmfb.parent, kv_pages=pages)


def params(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


def first(prompt: list[int]) -> int:
    return engine.generate(prompt, params(1)).token_ids[0]


def warm(prompt: list[int]) -> None:
    engine.generate(prompt, params(8))
    engine.flush_cache()


def decode(prompt: list[int], count: int) -> float:
    output = engine.generate(prompt, params(count))
    return (count - 1) / (output.latency - output.time_to_first_token)


def prefill(prompt: list[int]) -> float:
    return len(prompt) / seconds(lambda: engine.generate(prompt, params(1)))


def together(prompts: list[list[int]], count: int) -> float:
    def run() -> None:
        for handle in [engine.submit(prompt, params(count)) for prompt in prompts]:
            handle.result()

    return len(prompts) * count / seconds(run)


def cached(shared: list[int], one: list[int], other: list[int]) -> float:
    engine.generate(shared + one, params(1))
    return seconds(lambda: engine.generate(shared + other, params(1)))


def memory() -> float:
    """Peak resident bytes over those of the weights and the KV pages (one is never given out)."""
    peak = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]
    needed = artifact.num_weight_bytes + (pages + 1) * artifact.config.page_bytes
    return int(peak) * 1024 / needed


def settings() -> str:
    stats, kv_dtype = engine.stats(), artifact.config.paged_kv_cache.kv_cache_dtype
    made = artifact.manifest
    weights = made.weight_dtype if made else "unknown"
    if made and made.activation_dtype:
        weights += f" with activations in {made.activation_dtype}"
    limits = limits_of(artifact)
    return (
        f"sf_local {__version__}, weights {weights}, {len(os.sched_getaffinity(0))} threads, KV in "
        f"{kv_dtype}, steps of {limits.prefill_tokens} tokens ({limits.most_prefill_tokens} of a "
        f"single request), at most {stats['max_running']:.0f} requests at a time, prefix cache"
    )


serve({f.__name__: f for f in (
    first, warm, decode, prefill, together, cached, memory, settings
)})  # fmt: skip
