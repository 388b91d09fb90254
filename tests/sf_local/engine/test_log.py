"""What an engine logs, and that a handler can do it no harm."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError
from tests.support.child import run_program
from tests.support.running import Runners, all_at_once, lose
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12]
PARAMS = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
LOGGER = logging.getLogger("sf_local")


class Panic(BaseException):
    """As a library in Rust raises."""


class Records(logging.Handler):
    """Keeps what is logged, and whether the log was written by somebody who holds a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.engines: list[Engine] = []
        self.was_locked = False

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        for engine in self.engines:
            replicas: Any = engine._replicas
            locks = [replicas._lock, *(worker._fail_lock for worker in replicas.workers)]
            self.was_locked |= any(lock.locked() for lock in locks)

    def lines(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]


@contextmanager
def added(handler: logging.Handler, level: int = logging.DEBUG) -> Iterator[None]:
    before = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
        LOGGER.removeHandler(handler)


@pytest.fixture
def log() -> Iterator[Records]:
    records = Records()
    with added(records):
        yield records
    assert not records.was_locked


def wait_for(log: Records, level: int, count: int = 1) -> list[str]:
    deadline = time.monotonic() + 60
    while len(lines := log.lines(level)) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    return lines


def test_loading_and_closing(tiny: TinyModel, log: Records) -> None:
    with Engine(tiny.artifact, ["cpu", "cpu"], kv_pages=10) as engine:
        log.engines.append(engine)
        page = engine.artifact.config
        first, second = log.lines(logging.INFO)
        assert first == second
        assert re.fullmatch(
            rf"loaded artifact on cpu: \d+ MiB of weights, after \d+\.\d s; KV cache: 10 pages of "
            rf"{page.page_size} tokens, {10 * page.page_bytes / 2**20:.0f} MiB; a prompt and its "
            rf"answer have room for {engine.max_tokens} tokens",
            first,
        )
        engine.generate(PROMPT, PARAMS)
    assert log.lines(logging.INFO)[2:] == ["closed device='cpu'"] * 2
    assert len(log.records) == 4


def test_pages_that_run_out(tiny: TinyModel, log: Records) -> None:
    """The lines add up to what `stats` counts, at most one a step."""
    params = replace(PARAMS, max_new_tokens=40)
    with Engine(tiny.artifact, kv_pages=12) as engine:
        log.engines.append(engine)
        with all_at_once(engine):
            handles = [engine.submit([*PROMPT, i], params) for i in range(6)]
        for handle in handles:
            handle.result()
        stats = engine.stats()
    found = [
        re.fullmatch(r"made room: (\d+) requests preempted, (\d+) cached KV pages evicted", line)
        for line in log.lines(logging.DEBUG)
    ]
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    assert len(numbers) == len(found) < stats["steps"]
    assert [sum(column) for column in zip(*numbers, strict=True)] == [
        stats["preemptions"], stats["evictions"],
    ]  # fmt: skip
    assert stats["preemptions"] > 0 and stats["evictions"] > 0


def test_a_flushed_cache_is_no_eviction(tiny: TinyModel, log: Records) -> None:
    with Engine(tiny.artifact) as engine:
        engine.generate(PROMPT, PARAMS)
        engine.flush_cache()
        assert engine.stats()["evictions"] == 0
    assert not log.lines(logging.DEBUG)


def test_requests_that_end_before_their_time(
    tiny: TinyModel, log: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners = Runners()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        log.engines.append(engine)
        engine.generate(PROMPT, PARAMS)
        engine.generate(PROMPT, replace(PARAMS, timeout=0.0))
        assert wait_for(log, logging.DEBUG) == ["request 1 ended after 0 tokens: timeout"]
        handle = engine.submit(PROMPT, replace(PARAMS, max_new_tokens=240))
        next(handle.deltas())  # which is dropped
        assert re.fullmatch(
            r"request 2 ended after \d+ tokens: abort", wait_for(log, logging.DEBUG, 2)[1]
        )

        async def fail(*_: Any) -> Any:
            raise RuntimeError("injected")

        monkeypatch.setattr(runners[0], "decode", fail)
        with pytest.raises(EngineError):
            engine.generate(PROMPT, PARAMS)
        assert wait_for(log, logging.DEBUG, 3)[2] == (
            "request 3 ended after 0 tokens: the step failed: injected"
        )


def test_a_lost_device(tiny: TinyModel, log: Records) -> None:
    runners, submitted = Runners(), threading.Event()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        log.engines.append(engine)
        lose(runners[0], "decode", submitted)
        handles = [engine.submit([*PROMPT, i], PARAMS) for i in range(3)]
        submitted.set()
        for handle in handles:
            with pytest.raises(EngineError):
                handle.result()
        [line] = wait_for(log, logging.WARNING)
        assert re.fullmatch(
            r"the engine is closed: .*fell off the bus.* \(\d requests failed\)", line
        )
    assert len(log.lines(logging.WARNING)) == 1


@pytest.mark.parametrize("error", [ValueError("injected"), Panic("injected")], ids=repr)
def test_a_handler_that_raises(tiny: TinyModel, error: BaseException) -> None:
    lines: list[str] = []

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if record.funcName != "log_loaded" or isinstance(error, Exception):
                raise error

    params = replace(PARAMS, max_new_tokens=40)
    with added(Raising()):
        with Engine(tiny.artifact, kv_pages=12) as engine:
            handles = [engine.submit([*PROMPT, i], params) for i in range(6)]
            assert all(handle.result().completion_tokens == 40 for handle in handles)
            engine.generate(PROMPT, replace(PARAMS, timeout=0.0))
            assert engine.generate(PROMPT, PARAMS).completion_tokens == 12
            assert engine.stats()["pages_used"] == 0
        assert {line.split()[0] for line in lines} == {"loaded", "made", "request", "closed"}


def test_it_is_silent_by_default(tiny: TinyModel) -> None:
    """Also its warnings. A user who asks for everything sees everything."""
    program = """
import logging, sys
from sf_local import Engine, SamplingParams
if sys.argv[2] == "DEBUG":
    logging.basicConfig(level="DEBUG", stream=sys.stdout, format="%(name)s %(levelname)s %(msg)s")
else:
    logging.getLogger("sf_local").warning("a lost device")
with Engine(sys.argv[1]) as engine:
    engine.generate([5, 6], SamplingParams(timeout=0.0))
    engine.generate([5, 6], SamplingParams(max_new_tokens=1))
"""
    assert run_program(program, tiny.artifact, "") == ""
    lines = run_program(program, tiny.artifact, "DEBUG").splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["sf_local", "INFO", "loaded"],
        ["sf_local", "DEBUG", "request"],
        ["sf_local", "INFO", "closed"],
    ]
