"""Stats: what an engine core counts, as `Engine.stats` reports it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sf_local.engine.scheduler import Scheduler


@dataclass
class Counters:
    """Since the start. Seconds are of the worker's thread; call_seconds are inside compiled
    functions, where mask_seconds are hidden."""

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
    """Counters, and what is going on."""
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
    }


def hit_rate(cached_tokens: float, prompt_tokens: float) -> float:
    """The share of prompt tokens that the cache had."""
    return cached_tokens / prompt_tokens if prompt_tokens else 0.0
