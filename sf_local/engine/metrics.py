"""Metrics of an engine as Prometheus scrapes them: its text format, version 0.0.4.

The names are those of vLLM after another prefix, so that a dashboard needs little change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from sf_local.request.output import Output

PREFIX = "sf_local_"
BOUNDS = (  # seconds
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0,
    250.0, 500.0, 1000.0,
)  # fmt: skip
REASONS = "stop", "length", "abort", "timeout", "error"

Stats = Mapping[str, float]


class Histogram:
    """How many values were at most each of BOUNDS. One thread observes, and any may read."""

    def __init__(self) -> None:
        # Replaced as a whole, so that counts and sum are always of the same values
        self._state: tuple[tuple[int, ...], float] = ((0,) * (len(BOUNDS) + 1), 0.0)

    def observe(self, value: float) -> None:
        """Count a value."""
        counts, total = self._state
        found = bisect_left(BOUNDS, value)
        self._state = (
            (*counts[:found], counts[found] + 1, *counts[found + 1 :]),
            total + value,
        )

    def samples(self) -> list[Sample]:
        """Its buckets, each with all before it, their sum and their number."""
        counts, total = self._state
        bounds = [*map(str, BOUNDS), "+Inf"]
        buckets = [
            Sample(count, "_bucket", {"le": bound})
            for bound, count in zip(bounds, accumulate(counts), strict=True)
        ]
        return [*buckets, Sample(total, "_sum"), Sample(sum(counts), "_count")]


@dataclass
class RequestMetrics:
    """What is known of the requests of one device that have ended."""

    time_to_first_token: Histogram = field(default_factory=Histogram)
    time_per_output_token: Histogram = field(default_factory=Histogram)
    queue_time: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)
    reasons: Counter[str] = field(default_factory=Counter)

    def observe(self, result: Output | BaseException) -> None:
        """Count a request that ended with this."""
        if not isinstance(result, Output):
            self.reasons["error"] += 1
            return
        self.reasons[result.finish_reason] += 1
        self.queue_time.observe(result.queue_time)
        self.latency.observe(result.latency)
        count, first = result.completion_tokens, result.time_to_first_token
        if count:
            self.time_to_first_token.observe(first)
        if count > 1:
            self.time_per_output_token.observe((result.latency - first) / (count - 1))


@dataclass(frozen=True)
class Replica:
    """One device: what `EngineCore.stats` reports, and its requests."""

    device: str
    stats: Stats
    requests: RequestMetrics


@dataclass(frozen=True)
class Sample:
    """A value; what follows the family's name, and the labels beside those of the replica."""

    value: float
    suffix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A metric: its name after the prefix, its type, its help, and how it is read."""

    name: str
    kind: str
    help: str
    read: Callable[[Replica], Iterable[Sample]]

    def lines(self, every: Sequence[tuple[Mapping[str, str], Replica]]) -> Iterable[str]:
        """Its text, for replicas with their labels."""
        name = PREFIX + self.name
        yield f"# HELP {name} {self.help}"
        yield f"# TYPE {name} {self.kind}"
        for labels, replica in every:
            for sample in self.read(replica):
                pairs = {**labels, **sample.labels}
                text = ",".join(f'{key}="{_escaped(value)}"' for key, value in pairs.items())
                yield f"{name}{sample.suffix}{{{text}}} {sample.value}"


def metrics_text(model_name: str, replicas: Sequence[Replica]) -> str:
    """All metrics of the replicas of one model."""
    every = [
        ({"model_name": model_name, "device": replica.device, "replica": str(number)}, replica)
        for number, replica in enumerate(replicas)
    ]
    return "".join(f"{line}\n" for family in FAMILIES for line in family.lines(every))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _stat(name: str) -> Callable[[Replica], list[Sample]]:
    return lambda replica: [Sample(replica.stats[name])]


def _histogram(name: str) -> Callable[[Replica], list[Sample]]:
    return lambda replica: getattr(replica.requests, name).samples()


def _pages(replica: Replica) -> dict[str, float]:
    """KV pages by state. They are counted while the device's thread goes on; so that they add up,
    those in use are what the others leave."""
    free, cached = replica.stats["pages_free"], replica.stats["pages_cached"]
    return {"used": replica.stats["pages_total"] - free - cached, "cached": cached, "free": free}


def _usage(replica: Replica) -> list[Sample]:
    return [Sample(_pages(replica)["used"] / replica.stats["pages_total"])]


def _pages_by_state(replica: Replica) -> list[Sample]:
    return [Sample(count, labels={"state": state}) for state, count in _pages(replica).items()]


def _requests(replica: Replica) -> list[Sample]:
    counts = replica.requests.reasons
    return [Sample(counts[reason], labels={"finished_reason": reason}) for reason in REASONS]


FAMILIES = (
    Family("num_requests_running", "gauge", "Requests that compute.", _stat("running")),
    Family("num_requests_waiting", "gauge", "Requests that wait for a place.", _stat("waiting")),
    Family("kv_cache_usage_perc", "gauge", "Share of KV pages in use; 1 is all.", _usage),
    Family("kv_pages", "gauge", "KV pages: in use, kept for prefixes, free.", _pages_by_state),
    Family("prompt_tokens_total", "counter", "Tokens of prompts.", _stat("prompt_tokens")),
    Family(
        "cached_tokens_total", "counter", "Those that the prefix cache had.", _stat("cached_tokens")
    ),
    Family(
        "generation_tokens_total", "counter", "Tokens of answers.", _stat("completion_tokens")
    ),
    Family("num_preemptions_total", "counter", "Requests preempted.", _stat("preemptions")),
    Family("evicted_pages_total", "counter", "Cached KV pages evicted.", _stat("evictions")),
    Family("requests_total", "counter", "Requests that have ended, by how.", _requests),
    Family(
        "time_to_first_token_seconds", "histogram", "From the call to the first token.",
        _histogram("time_to_first_token"),
    ),
    Family(
        "request_time_per_output_token_seconds", "histogram",
        "Mean time between the tokens of an answer.", _histogram("time_per_output_token"),
    ),
    Family(
        "request_queue_time_seconds", "histogram", "From submission to the first computation.",
        _histogram("queue_time"),
    ),
    Family(
        "e2e_request_latency_seconds", "histogram", "From the call to the end.",
        _histogram("latency"),
    ),
)  # fmt: skip
