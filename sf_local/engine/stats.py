"""What an engine core counts, as `Engine.stats` reports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sf_local.engine.scheduler import Scheduler


@dataclass
class Counters:
    """Counts since the start. Seconds are those of the worker's thread. call_seconds are spent in
    compiled functions and waiting for them; grammars compute their masks meanwhile
    (mask_seconds)."""

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    completion_tokens: float = 0.0
    forced_tokens: float = 0.0
    steps: float = 0.0
    step_seconds: float = 0.0
    call_seconds: float = 0.0
    mask_seconds: float = 0.0
    sample_seconds: float = 0.0
    encoded_tiles: float = 0.0
    encode_seconds: float = 0.0


def stats(scheduler: Scheduler, counters: Counters) -> dict[str, float]:
    """The counters, the number of requests and KV pages in each state, and the limits."""
    pool = scheduler.pool
    return {
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "pages_free": pool.num_free,
        "pages_used": pool.num_used,
        "pages_cached": pool.num_cached,
        "pages_total": pool.num_pages - 1,
        **asdict(counters),
        "hit_rate": hit_rate(counters.cached_tokens, counters.prompt_tokens),
        "preemptions": scheduler.num_preemptions,
        "evictions": scheduler.num_evictions,
        "prefill_tokens": scheduler.limits.prefill_tokens,
        "max_running": scheduler.limits.max_running,
    }


def total(every: Sequence[dict[str, float]]) -> dict[str, float]:
    """The stats of several devices together: sums, but for rates and limits, which are each one's
    own."""
    summed = {name: sum(stats[name] for stats in every) for name in every[0]}
    summed["hit_rate"] = hit_rate(summed["cached_tokens"], summed["prompt_tokens"])
    return summed | {name: every[0][name] for name in ("prefill_tokens", "max_running")}


def hit_rate(cached_tokens: float, prompt_tokens: float) -> float:
    """The share of prompt tokens that the cache had."""
    return cached_tokens / prompt_tokens if prompt_tokens else 0.0
