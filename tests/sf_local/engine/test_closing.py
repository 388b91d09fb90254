"""Closing: twice, interrupted, in forked children, and while others use the engine."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest

from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError, MismatchError, SfLocalError
from sf_local.model.runner import ModelRunner
from tests.support.child import run_program
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7]
PARAMS = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)

BEGIN = """
import os, signal, sys, threading, time
from sf_local import Engine, SamplingParams
from sf_local.model.runner import ModelRunner
artifact, state = sys.argv[1:]
params = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
waiting, go_on = threading.Event(), threading.Event()
class SlowRunner(ModelRunner):
    def __init__(self, *arguments):
        self.pause("initializing")
        super().__init__(*arguments)
    async def start(self):
        self.pause("starting")
        await super().start()
    def close(self):
        super().close()
        self.pause("closing")
    def pause(self, where):
        if where == state:
            waiting.set()
            go_on.wait()
"""


def test_shutdown_again_after_ctrl_c(tiny: TinyModel) -> None:
    program = (
        BEGIN
        + """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
engine = Engine(artifact, _make_runner=SlowRunner)
engine.generate([5, 6], params)
def interrupt():
    waiting.wait()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    engine.shutdown()
except KeyboardInterrupt:
    print("interrupted")
go_on.set()
engine.shutdown()
engine.shutdown(drain=True)
"""
    )
    assert run_program(program, tiny.artifact, "closing") == "interrupted\n"


@pytest.mark.parametrize(
    "state", ["open", "closed", "failed", "initializing", "starting", "closing"]
)
def test_a_child_that_is_forked(tiny: TinyModel, state: str) -> None:
    """Whatever the parent's engine does at that moment, the child makes its own and exits."""
    program = (
        BEGIN
        + """
engines = []
def use():
    engines.append(Engine(artifact, _make_runner=SlowRunner))
    engines[0].generate([5, 6], params)
    if state == "failed":
        engines[0]._replicas.workers[0].core.runner.has_ever_failed = True
    if state != "open":
        engines[0].shutdown()
thread = threading.Thread(target=use)
thread.start()
waiting.wait() if state.endswith("ing") else thread.join()
child = os.fork()
if child == 0:
    signal.alarm(20)
    [engine.shutdown() for engine in engines]
    with Engine(artifact) as engine:
        assert len(engine.generate([5, 6], params).token_ids) == 5
    sys.exit(7)
go_on.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert run_program(program, tiny.artifact, state) == "7\n"


@pytest.mark.parametrize("method", ["__init__", "start"])
@pytest.mark.parametrize("error", [MismatchError, RuntimeError, KeyboardInterrupt])
def test_the_cause_of_an_error_at_start_is_another_one(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, method: str, error: type[BaseException]
) -> None:
    """A chain of causes that leads back to itself never ends for who follows it."""

    async def start(*_: Any) -> None:
        raise error("injected")

    def init(*_: Any) -> None:
        raise error("injected")

    monkeypatch.setattr(ModelRunner, method, init if method == "__init__" else start)
    with pytest.raises((error, SfLocalError), match="injected") as raised:
        Engine(tiny.artifact)
    seen: list[BaseException | None] = [raised.value]
    while seen[-1] is not None:
        seen.append(seen[-1].__cause__)
        assert seen[-1] not in seen[:-1]


def test_the_last_replica_ends_before_one_is_chosen(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny.artifact, ["cpu", "cpu"]) as engine:
        replicas: Any = engine._replicas
        generation, check = engine._generation(PROMPT, PARAMS), replicas.check_usable

        def check_and_end() -> None:
            check()
            for worker in replicas.workers:
                worker.close()

        monkeypatch.setattr(replicas, "check_usable", check_and_end)
        with contextlib.suppress(EngineError):
            replicas.submit(generation)  # it may see the end, or not


def test_a_replica_ends_after_it_was_chosen(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one answers, also to what is meant for all of them."""
    with Engine(tiny.artifact, ["cpu", "cpu"]) as engine:
        replicas: Any = engine._replicas
        choose = replicas._router.choose

        def choose_and_end(*arguments: Any) -> int:
            chosen = int(choose(*arguments))
            if all(worker.is_usable for worker in replicas.workers):
                replicas.workers[chosen].close()
            return chosen

        monkeypatch.setattr(replicas._router, "choose", choose_and_end)
        assert engine.generate(PROMPT, PARAMS).completion_tokens == 5
        engine.flush_cache()
        for worker in replicas.workers:
            worker.close()
        with pytest.raises(EngineError, match="closed"):
            engine.generate(PROMPT, PARAMS)


def test_an_engine_that_is_dropped_is_closed_before_the_next_one_opens(tiny: TinyModel) -> None:
    closed, go_on = [], threading.Event()

    class SlowRunner(ModelRunner):
        def close(self) -> None:
            go_on.wait(30)
            super().close()
            closed.append(self)

    engine = Engine(tiny.artifact, _make_runner=SlowRunner)
    del engine  # which does not wait
    assert not closed
    go_on.set()
    with Engine(tiny.artifact):
        assert closed
