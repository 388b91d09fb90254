"""`Engine(on_finish=...)`: each request that ends is told of once, and harm comes to nobody."""

from __future__ import annotations

import gc
import logging
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from sf_local import Engine, Output, SamplingParams
from sf_local.engine.generation import Generation
from sf_local.errors import EngineError, RequestError, SfLocalError
from tests.support.child import run_program
from tests.support.running import Runners, lose
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12]
PARAMS = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
LONG = replace(PARAMS, max_new_tokens=240)
TIMEOUT = 60  # seconds
THREAD = "sf_local-on_finish"

Call = tuple[Output | SfLocalError, SamplingParams]


class Panic(BaseException):
    """As a library in Rust raises."""


class Calls(list[Call]):
    """Keeps the calls; it sees to it that no two come at a time, and on which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self.overlapped = False
        self._lock = threading.Lock()

    def __call__(self, result: Output | SfLocalError, params: SamplingParams) -> None:
        if not self._lock.acquire(blocking=False):
            self.overlapped = True
            return
        self.append((result, params))
        self.threads.add(threading.current_thread().name)
        self._lock.release()


def test_every_request_is_told_of_once(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, calls = Generation.accept, Calls()

    def failing(self: Generation, *arguments: Any) -> Any:
        if self.request.params.seed == 666:
            raise ValueError("injected")
        return accept(self, *arguments)

    monkeypatch.setattr(Generation, "accept", failing)
    with Engine(tiny.artifact, on_finish=calls) as engine:
        expected: list[Call] = [(engine.generate(PROMPT, PARAMS), PARAMS)]
        timeout = replace(PARAMS, timeout=0.0)
        expected.append((engine.generate(PROMPT, timeout), timeout))
        handle = engine.submit(PROMPT, LONG)
        handle.cancel()
        expected.append((handle.result(), LONG))
        handle.cancel()
        bad = replace(PARAMS, seed=666)
        with pytest.raises(EngineError) as raised:
            engine.generate(PROMPT, bad)
        expected.append((raised.value, bad))
        with pytest.raises(RequestError):
            engine.generate("", PARAMS)  # which is none
        samples = engine.samples(PROMPT, replace(PARAMS, seed=5, n=3))
        engine.score("abc", ["d", "e"])
        engine.warm("abcdef")
    assert all(
        result is told and engine.resolved(given) == params
        for (told, params), (result, given) in zip(calls, expected, strict=False)
    )
    results = [result for result, _ in calls]
    assert [sum(result is sample for result in results) for sample in samples] == [1, 1, 1]
    assert sorted(p.seed for _, p in calls[4:7] if p.seed is not None) == [5, 6, 7]
    assert [p.max_new_tokens for _, p in calls[7:9]] == [0, 0]
    assert len(calls) in (9, 10)  # `warm` may not have been submitted when the engine closed
    assert calls.threads == {THREAD} and not calls.overlapped


def test_several_devices(tiny: TinyModel) -> None:
    calls = Calls()
    with Engine(tiny.artifact, ["cpu", "cpu"], on_finish=calls) as engine:
        handles = [engine.submit([i, *PROMPT], PARAMS) for i in range(20)]
        outputs = [handle.result() for handle in handles]
    assert {id(result) for result, _ in calls} == {*map(id, outputs)}
    assert len(calls) == 20 and not calls.overlapped


def test_a_slow_function_holds_up_nobody_but_shutdown(tiny: TinyModel) -> None:
    go_on, calls, is_closed = threading.Event(), Calls(), threading.Event()

    def wait(result: Output | SfLocalError, params: SamplingParams) -> None:
        go_on.wait(TIMEOUT)
        calls(result, params)

    engine = Engine(tiny.artifact, on_finish=wait)
    for _ in range(3):
        assert engine.generate(PROMPT, PARAMS).completion_tokens == 12

    def close() -> None:
        engine.shutdown(drain=True)
        is_closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    while engine._replicas.workers[0].is_usable:
        time.sleep(0.005)
    assert not calls and not is_closed.is_set()
    go_on.set()
    thread.join(TIMEOUT)
    assert is_closed.is_set() and len(calls) == 3


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), Panic("no")], ids=repr)
def test_what_it_raises_is_logged(
    tiny: TinyModel, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()

    def failing(result: Output | SfLocalError, params: SamplingParams) -> None:
        calls(result, params)
        raise error

    with Engine(tiny.artifact, on_finish=failing) as engine:
        for _ in range(2):
            assert engine.generate(PROMPT, PARAMS).completion_tokens == 12
    assert len(calls) == 2
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in records] == ["on_finish raised"] * 2
    assert all(record.exc_info and record.exc_info[1] is error for record in records)


def test_it_may_use_the_engine_and_close_it(tiny: TinyModel) -> None:
    calls, engines, is_closed = Calls(), list[Engine](), threading.Event()

    def use(result: Output | SfLocalError, params: SamplingParams) -> None:
        calls(result, params)
        if len(calls) == 1:
            assert engines[0].generate(PROMPT, PARAMS).completion_tokens == 12
            engines[0].shutdown()
            is_closed.set()

    engine = Engine(tiny.artifact, ["cpu", "cpu"], on_finish=use)
    engines.append(engine)
    engine.generate(PROMPT, PARAMS)
    assert is_closed.wait(TIMEOUT)
    engine.shutdown()
    assert len(calls) == 2


def test_an_engine_that_is_closed(tiny: TinyModel) -> None:
    """Those under way are told of before `shutdown` returns, with the error that they raise."""
    calls = Calls()
    engine = Engine(tiny.artifact, on_finish=calls)
    handles = [engine.submit([i, *PROMPT], LONG) for i in range(9)]
    engine.shutdown()
    assert len(calls) == 9
    results: list[object] = []
    for handle in handles:
        try:
            results.append(handle.result())
        except EngineError as error:
            results.append(error)
    assert {*map(id, results)} == {id(result) for result, _ in calls}


def test_a_lost_device(tiny: TinyModel) -> None:
    runners, submitted, calls = Runners(), threading.Event(), Calls()
    with Engine(tiny.artifact, on_finish=calls, _make_runner=runners) as engine:
        lose(runners[0], "decode", submitted)
        handles = [engine.submit([i, *PROMPT], PARAMS) for i in range(3)]
        submitted.set()
        for handle in handles:
            with pytest.raises(EngineError, match="off the bus"):
                handle.result()
    assert len(calls) == 3 and all("off the bus" in str(result) for result, _ in calls)


def test_it_must_be_callable(tiny: TinyModel) -> None:
    with pytest.raises(RequestError, match="on_finish=3 must be a function"):
        Engine(tiny.artifact, on_finish=3)  # type: ignore[arg-type]


def test_the_thread_ends_with_the_engine(tiny: TinyModel) -> None:
    before = threading.enumerate()
    engine = Engine(tiny.artifact, on_finish=print)
    [thread] = [t for t in threading.enumerate() if t.name == THREAD and t not in before]
    engine.shutdown()
    del engine
    gc.collect()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


PROGRAM = """
import os, sys, threading, time
from sf_local import Engine, SamplingParams
params = SamplingParams(max_new_tokens=240, temperature=0, ignore_eos=True)
def tell(result, params):
    time.sleep(0.05)
    print(type(result).__name__, flush=True)
engine = Engine(sys.argv[1], on_finish=tell)
"""


def test_a_program_that_ends(tiny: TinyModel) -> None:
    """Without shutdown, while requests are under way."""
    program = PROGRAM + "handles = [engine.submit([5, 6, i], params) for i in range(4)]\n"
    lines = run_program(program, tiny.artifact).splitlines()
    assert len(lines) == 4 and {*lines} <= {"EngineError", "Output"}


def test_a_forked_child(tiny: TinyModel) -> None:
    """It waits for no thread that it does not have, also if it has an engine of its own."""
    program = (
        PROGRAM
        + """
handle = engine.submit([5, 6], params)
child = os.fork()
if child == 0:
    threading.Timer(60, os._exit, (1,)).start()
    engine.shutdown()
    with Engine(sys.argv[1], on_finish=tell) as own:
        own.generate([5, 6], params)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
handle.result()
engine.shutdown()
"""
    )
    assert run_program(program, tiny.artifact) == "Output\n" * 2
