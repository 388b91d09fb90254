"""Metrics, as Prometheus' own client for Python parses them."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from sf_local import Engine, SamplingParams
from sf_local.engine.generation import Generation
from sf_local.engine.metrics import BOUNDS, Histogram, Replica, RequestMetrics, metrics_text
from sf_local.errors import EngineError
from tests.support.child import run_program
from tests.support.running import all_at_once
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12]
PARAMS = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
HISTOGRAMS = (
    "time_to_first_token_seconds", "request_time_per_output_token_seconds",
    "request_queue_time_seconds", "e2e_request_latency_seconds",
)  # fmt: skip


@pytest.fixture
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine


def parsed(text: str) -> dict[str, Metric]:
    """Metrics by their name after the prefix; every family stands there once, with its help."""
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len({*names}) == len(names)
    for family in families:
        assert family.name.startswith("sf_local_")
        assert family.type in ("counter", "gauge", "histogram")
        assert family.documentation and family.samples
        labels = [(s.name, *sorted(s.labels.items())) for s in family.samples]
        assert len({*labels}) == len(labels)
    return {family.name.removeprefix("sf_local_"): family for family in families}


def value(metrics: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum of a family's samples that have these labels."""
    found = [s.value for s in metrics[name].samples if labels.items() <= s.labels.items()]
    assert found
    return sum(found)


def count(metrics: dict[str, Metric], name: str) -> float:
    """How many values a histogram has, which must be one."""
    total = 0.0
    for _, group in itertools.groupby(metrics[name].samples, lambda s: s.labels["replica"]):
        samples = list(group)
        buckets = [(float(s.labels["le"]), s.value) for s in samples if "le" in s.labels]
        assert [bound for bound, _ in buckets] == [*BOUNDS, math.inf]
        counts = [count for _, count in buckets]
        assert counts == sorted(counts) and counts[0] >= 0
        rest = {s.name.rpartition("_")[2]: s.value for s in samples if "le" not in s.labels}
        assert rest.keys() == {"sum", "count"} and rest["count"] == counts[-1]
        lowest = [0.0, *BOUNDS]
        new = [b - a for a, b in itertools.pairwise([0.0, *counts])]
        least = sum(bound * number for bound, number in zip(lowest, new, strict=True))
        assert rest["sum"] >= least * (1 - 1e-9) and bool(rest["sum"]) >= bool(least)
        total += rest["count"]
    return total


def test_the_counts_are_those_of_the_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Generation.accept

    def failing(self: Generation, *arguments: Any) -> Any:
        if self.request.params.seed == 666:
            raise ValueError("injected")
        return accept(self, *arguments)

    monkeypatch.setattr(Generation, "accept", failing)
    before = parsed(engine.metrics())
    assert {name: count(before, name) for name in HISTOGRAMS} == dict.fromkeys(HISTOGRAMS, 0)
    assert value(before, "requests") == 0 == value(before, "prompt_tokens")

    outputs = [engine.generate(PROMPT, PARAMS) for _ in range(3)]
    outputs.append(engine.generate(PROMPT, replace(PARAMS, max_new_tokens=1)))
    outputs.append(engine.generate(PROMPT, replace(PARAMS, stop_token_ids=range(300))))
    outputs.append(engine.generate(PROMPT, replace(PARAMS, timeout=0.0)))
    handle = engine.submit(PROMPT, replace(PARAMS, max_new_tokens=240))
    handle.cancel()
    outputs.append(handle.result())
    with pytest.raises(EngineError):
        engine.generate(PROMPT, replace(PARAMS, seed=666))
    engine.score("abc", ["d", "e"])

    metrics, stats = parsed(engine.metrics()), engine.stats()
    reasons = ("stop", "length", "abort", "timeout", "error")
    numbers = {reason: value(metrics, "requests", finished_reason=reason) for reason in reasons}
    assert numbers == {"stop": 1, "length": 4 + 2, "abort": 1, "timeout": 1, "error": 1}
    assert sum(numbers.values()) == value(metrics, "requests")
    lengths = [output.completion_tokens for output in outputs]
    assert [count(metrics, name) for name in HISTOGRAMS] == [
        sum(n > 0 for n in lengths), sum(n > 1 for n in lengths),
        len(outputs) + 2, len(outputs) + 2,
    ]  # fmt: skip
    for name in ("prompt_tokens", "cached_tokens"):
        assert value(metrics, name) == stats[name] > 0
    assert value(metrics, "generation_tokens") == stats["completion_tokens"] == sum(lengths)
    assert value(metrics, "num_preemptions") == value(metrics, "evicted_pages") == 0
    assert value(metrics, "kv_cache_usage_perc") == value(metrics, "kv_pages", state="used") == 0
    assert value(metrics, "kv_pages", state="cached") == stats["pages_cached"] > 0
    assert value(metrics, "kv_pages") == stats["pages_total"]
    [first] = [s for s in metrics["time_to_first_token_seconds"].samples if s.name.endswith("_sum")]
    assert first.value == pytest.approx(sum(o.time_to_first_token for o in outputs if o.token_ids))
    assert first.labels == {"model_name": "artifact", "device": "cpu", "replica": "0"}


def test_waiting_is_told_apart(tiny: TinyModel) -> None:
    """One request computes at a time; the last one waits for all others."""
    with Engine(tiny.artifact, max_running=1) as engine:
        with all_at_once(engine):
            handles = [engine.submit([i, *PROMPT], PARAMS) for i in range(4)]
        *others, last = outputs = [handle.result() for handle in handles]
    assert last.queue_time > sum(other.latency - other.time_to_first_token for other in others)
    for output in outputs:
        assert output.queue_time < output.time_to_first_token < output.latency


def test_one_that_never_begins_waits_till_its_end(tiny: TinyModel) -> None:
    with Engine(tiny.artifact) as engine:
        output = engine.generate(PROMPT, replace(PARAMS, timeout=0.0))
        assert 0 < output.queue_time <= output.latency


def test_scrapes_while_requests_run(tiny: TinyModel) -> None:
    """Each is whole, and no counter falls."""
    is_done, scrapes = threading.Event(), []
    with Engine(tiny.artifact, ["cpu", "cpu"], kv_pages=20) as engine:

        def scrape() -> None:
            while not is_done.is_set():
                scrapes.append(engine.metrics())

        threads = [threading.Thread(target=scrape) for _ in range(2)]
        for thread in threads:
            thread.start()
        params = replace(PARAMS, max_new_tokens=40)
        handles = [engine.submit([i, *PROMPT], params) for i in range(24)]
        for handle in handles:
            handle.result()
        is_done.set()
        for thread in threads:
            thread.join()
        last = engine.metrics()
    step = max(1, len(scrapes) // 40)
    for text in [*scrapes[::step], last]:
        metrics = parsed(text)
        for name in HISTOGRAMS:
            assert count(metrics, name) <= 24
        for replica in "01":
            assert value(metrics, "kv_pages", replica=replica) == 20
            assert 0 <= value(metrics, "kv_cache_usage_perc", replica=replica) <= 1
    assert value(metrics, "requests", finished_reason="length") == 24
    assert all(value(metrics, "requests", replica=r) > 0 for r in "01")
    assert value(metrics, "generation_tokens") == 24 * 40
    assert value(metrics, "evicted_pages") > 0
    assert engine.metrics() == last, "the numbers stay after shutdown"


def test_two_engines(tiny: TinyModel) -> None:
    """What one counts, the other does not."""
    with Engine(tiny.artifact) as first, Engine(tiny.artifact) as second:
        first.generate(PROMPT, PARAMS)
        assert value(parsed(first.metrics()), "requests") == 1
        assert value(parsed(second.metrics()), "requests") == 0


def test_a_lost_engine_still_tells(tiny: TinyModel) -> None:
    engine = Engine(tiny.artifact)
    handles = [engine.submit([i, *PROMPT], replace(PARAMS, max_new_tokens=240)) for i in range(9)]
    engine.shutdown()
    metrics = parsed(engine.metrics())
    failed = 0
    for handle in handles:
        try:
            handle.result()
        except EngineError:
            failed += 1
    assert value(metrics, "requests", finished_reason="error") == failed
    assert value(metrics, "requests") == 9
    assert value(metrics, "num_requests_running") == value(metrics, "num_requests_waiting") == 0


def test_a_forked_child(tiny: TinyModel) -> None:
    program = """
import os, sys
from sf_local import Engine
from sf_local.errors import EngineError
engine = Engine(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        engine.metrics()
    except EngineError as error:
        os._exit(7 if "after os.fork()" in str(error) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
engine.shutdown()
"""
    assert run_program(program, tiny.artifact) == "7\n"


@given(st.text())
def test_labels_are_escaped(name: str) -> None:
    names = "running", "waiting", "pages_free", "pages_cached", "prompt_tokens", "cached_tokens"
    stats = dict.fromkeys((*names, "completion_tokens", "preemptions", "evictions"), 0.0)
    replica = Replica("hip:0", stats | {"pages_total": 1.0}, RequestMetrics())
    for family in text_string_to_metric_families(metrics_text(name, [replica, replica])):
        assert {sample.labels["model_name"] for sample in family.samples} == {name}
        assert {sample.labels["replica"] for sample in family.samples} == {"0", "1"}


@given(st.lists(st.floats(0, 5000) | st.sampled_from(BOUNDS), max_size=30))
def test_a_histogram_is_as_theirs(values: list[float]) -> None:
    registry, ours = CollectorRegistry(), Histogram()
    theirs = TheirHistogram("h", "help", registry=registry, buckets=BOUNDS)
    for number in values:
        theirs.observe(number)
        ours.observe(number)
    [family] = text_string_to_metric_families(
        re.sub(r"(?m)^(# .* )?h_created.*\n", "", generate_latest(registry).decode())
    )
    expected = [(s.name.removeprefix("h"), s.labels, s.value) for s in family.samples]
    found = [(s.suffix, dict(s.labels), s.value) for s in ours.samples()]
    key = lambda sample: (sample[0], float(sample[1].get("le", 0)))  # noqa: E731
    assert sorted(found, key=key) == sorted(expected, key=key)
