"""Closing: twice, interrupted, in forked children, and while others use the engine."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import sf_local
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


@pytest.mark.parametrize("moment", ["make", "sf_local.grammar.compiler", "llguidance"])
def test_a_child_that_is_forked_during_the_first_grammar(tiny: TinyModel, moment: str) -> None:
    """While another thread makes the compiler, or imports one of its modules."""
    program = (
        BEGIN
        + """
def pause():
    if not waiting.is_set():
        waiting.set()
        time.sleep(0.5)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == state:
            pause()
sys.meta_path.insert(0, Finder())
if state == "make":
    from sf_local.grammar.compiler import GrammarCompiler
    make = GrammarCompiler.__init__
    def make_slowly(self, *arguments):
        pause()
        make(self, *arguments)
    GrammarCompiler.__init__ = make_slowly
constrained = SamplingParams(max_new_tokens=12, regex="[a-z]{10}")
engine = Engine(artifact)
thread = threading.Thread(target=engine.generate, args=([5, 6], constrained))
thread.start()
waiting.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    with Engine(artifact) as own:
        assert len(own.generate([5, 6], constrained).text) == 10
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.join()
engine.shutdown()
"""
    )
    assert run_program(program, tiny.artifact, moment) == "7\n"


def test_a_child_that_is_forked_while_a_pil_image_is_read() -> None:
    program = """
import os, signal, threading, time
from PIL import Image
from sf_local.vision.image_file import GivenImage
image, waiting = Image.new("RGB", (4, 4)), threading.Event()
class SlowImage(Image.Image):
    def load(self):
        waiting.set()
        time.sleep(0.5)
        return super().load()
slow = image.copy()
slow.__class__ = SlowImage
thread = threading.Thread(target=GivenImage(slow).pixels)
thread.start()
waiting.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(GivenImage(image).pixels().shape != (4, 4, 3))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.join()
"""
    assert run_program(program) == "0\n"


def test_no_cached_property_in_the_runtime() -> None:
    """In Python 3.11 it has one lock for all objects, which a forked child may inherit locked."""
    for path in Path(sf_local.__file__).parent.rglob("*.py"):
        assert not re.search(r"@(functools\.)?cached_property", path.read_text()), path


def test_an_answer_imports_nothing(tiny: TinyModel) -> None:
    """A child that is forked during an import in another thread waits for ever for the module."""
    program = (
        BEGIN
        + """
with Engine(artifact) as engine:
    before = {*sys.modules}
    engine.generate("abc", SamplingParams(max_new_tokens=5, top_p=0.9, stop=["none"]))
print(*{*sys.modules} - before)
"""
    )
    assert run_program(program, tiny.artifact, "") == "\n"
