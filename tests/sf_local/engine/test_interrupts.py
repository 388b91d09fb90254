"""Ctrl-C at any moment: KeyboardInterrupt reaches the caller, and another engine can be made."""

from __future__ import annotations

import threading

import pytest

from sf_local import Engine
from sf_local.engine import interrupts
from sf_local.engine.interrupts import Latch
from sf_local.errors import EngineError
from tests.support.child import run_program
from tests.support.tiny import TinyModel

BEGIN = """
import os, signal, sys, threading, time
from sf_local import Engine, SamplingParams
from sf_local.model.runner import ModelRunner
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
artifact, way = sys.argv[1:]
params = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
"""

AT_ANY_MOMENT = (
    BEGIN
    + """
devices = ["cpu"] * (1 + (way == "replicas"))
def use():
    if way == "with":
        with Engine(artifact, devices) as engine:
            "".join(engine.stream([5, 6], params))
        return
    engine = Engine(artifact, devices)
    engine.generate([5, 6], params)
    if way != "del":
        engine.shutdown(drain=way == "drain")
def seconds():
    begin = time.perf_counter()
    use()
    return time.perf_counter() - begin
usual = min(seconds() for _ in range(3))
for moment in range(12):
    timer = threading.Timer(usual * (moment + 0.5) / 12, interrupt)
    try:
        timer.start()
        use()
        time.sleep(9)  # on a machine that is faster now
    except KeyboardInterrupt as error:
        assert error.__context__ is None
        print("interrupted")
    with Engine(artifact) as engine:
        assert len(engine.generate([5, 6], params).token_ids) == 20
assert threading.active_count() == 1
"""
)


@pytest.mark.parametrize("way", ["shutdown", "with", "del", "replicas", "drain"])
def test_ctrl_c_at_any_moment(tiny: TinyModel, way: str) -> None:
    """While an engine loads, runs and closes; nothing else is raised or written."""
    assert run_program(AT_ANY_MOMENT, tiny.artifact, way).split() == ["interrupted"] * 12


def test_ctrl_c_while_loading_waits_for_the_device_and_a_second_one_does_not(
    tiny: TinyModel,
) -> None:
    """So that its memory is free, unless loading takes for ever."""
    program = (
        BEGIN
        + """
begun, go_on, made = threading.Event(), threading.Event(), []
def make_runner(*arguments):
    begun.set()
    go_on.wait()
    made.append(ModelRunner(*arguments))
    return made[0]
def press():
    begun.wait()
    while not caught:
        interrupt()
        time.sleep(0.1)
        if way == "once":
            go_on.set()
            return
caught = []
presses = threading.Thread(target=press)
presses.start()
try:
    Engine(artifact, _make_runner=make_runner)
except KeyboardInterrupt:
    caught.append(True)
    print("closed" if go_on.is_set() else "at once")
presses.join()
go_on.set()
with Engine(artifact) as engine:  # which waits for the other one to be closed
    assert not made[0]._program.functions
    print(len(engine.generate([5, 6], params).token_ids), threading.active_count())
"""
    )
    assert run_program(program, tiny.artifact, "once").split() == ["closed", "20", "2"]
    assert run_program(program, tiny.artifact, "often").split() == ["at", "once", "20", "2"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ctrl_c_while_a_grammar_calls_back(tiny: TinyModel, count: int) -> None:
    """llguidance drops what its calls of Python raise, or turns it into an error of its own."""
    program = (
        BEGIN
        + """
from sf_local.grammar import vocabulary
encode, calls = vocabulary._Encoder.__call__, []
def encode_and_interrupt(self, text):
    calls.append(text)
    if len(calls) == int(way):
        interrupt()
        time.sleep(0.05)
    return encode(self, text)
vocabulary._Encoder.__call__ = encode_and_interrupt
constrained = SamplingParams(regex='{"hello": [a-z]{3}}', max_new_tokens=40)
with Engine(artifact) as engine:
    try:
        engine.generate([5, 6], constrained)
        time.sleep(9)
    except KeyboardInterrupt:
        print("interrupted")
    assert len(engine.generate([5, 6], constrained).text) == 14
"""
    )
    assert run_program(program, tiny.artifact, count) == "interrupted\n"


def test_a_latch_wakes_all_who_wait() -> None:
    latch, woken = Latch(), []
    assert not latch.is_set() and not latch.wait(0.001)
    threads = [threading.Thread(target=lambda: woken.append(latch.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    latch.set()
    latch.set()
    for thread in threads:
        thread.join(30)
    assert woken == [True] * 4 and latch.is_set() and latch.wait()


def test_no_more_threads(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all is an error; one more suffices, which then does what it should have started."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "start_new_thread", refuse)
        with pytest.raises(EngineError, match="ulimit -u"):
            Engine(tiny.artifact)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert interrupts.uninterrupted(lambda: 5) == 5
        engine = Engine(tiny.artifact)
    with engine:
        assert len(engine.generate([5, 6], max_new_tokens=3, ignore_eos=True).token_ids) == 3
