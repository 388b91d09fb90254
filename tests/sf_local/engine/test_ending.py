"""Whatever raises while a request ends, or on its way there: its waiter is told, and no other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import pytest

from sf_local import Engine, SamplingParams
from sf_local.engine.generation import Generation
from sf_local.engine.handle import Handle
from sf_local.errors import EngineError
from sf_local.grammar.matcher import Grammar
from sf_local.request.output import Output
from sf_local.sampling.sampler import Sampler
from tests.support.running import Runners, lose
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12]
GOOD = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
BAD = replace(GOOD, seed=666, stop=["never"])
TIMEOUT = 20  # seconds


class Panic(BaseException):
    """As a library in Rust raises."""


@pytest.fixture(scope="module", params=["cpu", ["cpu", "cpu"]], ids=["loop", "replicas"])
def engine(request: pytest.FixtureRequest, tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact, request.param) as engine:
        yield engine


def told(wait: Callable[[], object]) -> BaseException:
    """What it raises, before long."""
    errors: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            wait()
            errors.put(None)
        except BaseException as error:
            errors.put(error)

    threading.Thread(target=run, daemon=True).start()
    error = errors.get(timeout=TIMEOUT)
    assert error is not None
    return error


def idle(engine: Engine) -> None:
    """Nobody is left, no page is lost, and others are served."""
    deadline = time.monotonic() + TIMEOUT
    while (stats := engine.stats())["running"] or stats["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    assert engine.generate(PROMPT, GOOD).completion_tokens == 12


def fail(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Let a method of generations raise, of those with BAD's seed."""
    method = getattr(Generation, name)

    def failing(self: Generation, *arguments: Any) -> Any:
        if self.request.params.seed == BAD.seed:
            raise error
        return method(self, *arguments)

    patch.setattr(Generation, name, failing)


async def last(texts: Any) -> None:
    async for _ in texts:
        pass


WAITS: dict[str, Callable[[Engine, SamplingParams], object]] = {
    "result": lambda e, p: e.submit(PROMPT, p).result(),
    "stream": lambda e, p: list(e.stream(PROMPT, p)),
    "samples": lambda e, p: e.samples(PROMPT, replace(p, n=3)),
    "agenerate": lambda e, p: asyncio.run(e.agenerate(PROMPT, p)),
    "astream": lambda e, p: asyncio.run(last(e.astream(PROMPT, p))),
}


@pytest.mark.parametrize("error", [OverflowError("out of range"), Panic("out of range")], ids=repr)
@pytest.mark.parametrize("name", ["accept", "finish", "_read", "_undelivered", "_logprobs"])
@pytest.mark.parametrize("wait", WAITS)
def test_a_generation_that_raises(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait: str, name: str, error: BaseException
) -> None:
    other = engine.submit([*PROMPT, 1], GOOD)
    expected = engine.submit([*PROMPT, 1], GOOD).result().token_ids
    fail(monkeypatch, name, error)
    found = told(lambda: WAITS[wait](engine, BAD))
    assert isinstance(found, EngineError) and "the step failed: out of range" in str(found)
    assert other.result().token_ids == expected
    idle(engine)


@pytest.mark.parametrize("name", ["write", "finish", "_read"])
def test_an_error_behind_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first one is told."""
    fail(monkeypatch, "accept", ValueError("the first"))
    fail(monkeypatch, name, ValueError("the second"))
    assert "the first" in str(told(lambda: engine.generate(PROMPT, BAD)))
    idle(engine)


def finished(engine: Engine, generation: Generation) -> Output:
    return Handle(engine, engine._replicas, generation).result()


@pytest.mark.parametrize("name", ["push", "flush"])
def test_a_detokenizer_that_raises(engine: Engine, name: str) -> None:
    generation = engine._generation(PROMPT, GOOD)

    def failing(*_: Any) -> str:
        raise OverflowError("can't convert negative int to unsigned")

    setattr(generation._detokenizer, name, failing)
    assert "negative int" in str(
        told(lambda: Handle(engine, engine._replicas, generation).result())
    )
    idle(engine)


def test_a_text_that_cannot_be_remembered(engine: Engine) -> None:
    generation = engine._generation("abc", GOOD)
    generation.remember = lambda *_: 1 / 0
    assert "division by zero" in str(
        told(lambda: Handle(engine, engine._replicas, generation).result())
    )
    idle(engine)


def test_scores(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    take_logits = Generation.take_logits

    def failing(self: Generation, position: int, logits: Any) -> None:
        if self.request.prompt_ids[-1] == 3 + ord("!"):
            raise MemoryError("no room for logits")
        take_logits(self, position, logits)

    monkeypatch.setattr(Generation, "take_logits", failing)
    assert "no room" in str(told(lambda: engine.score("abc", ["d", "e!", "f"])))
    assert len(engine.score("abc", ["d", "e"])) == 2
    idle(engine)


def test_a_callback_that_raises(engine: Engine) -> None:
    """It ends its generation, of which nobody hears."""
    generation = engine._generation(PROMPT, replace(GOOD, max_new_tokens=200))
    calls, has_ended = [], threading.Event()

    def deliver(item: Any) -> None:
        calls.append(item)
        if isinstance(item, EngineError):
            has_ended.set()
        raise RuntimeError("injected")

    generation.deliver, generation.is_streamed = deliver, True
    engine._replicas.submit(generation)
    assert has_ended.wait(60)
    idle(engine)
    assert len(calls) == 2 and isinstance(calls[1], EngineError)
    assert generation.request.finish_reason == "abort"


def test_an_event_loop_that_is_closed(engine: Engine) -> None:
    """Its generations end, for whom nobody waits."""
    loop = asyncio.new_event_loop()
    texts = engine.astream(PROMPT, replace(GOOD, max_new_tokens=240))
    loop.run_until_complete(anext(texts))
    loop.close()
    before = engine.stats()["completion_tokens"]
    idle(engine)
    assert engine.stats()["completion_tokens"] - before < 200


class Unspeakable(Exception):
    """What cannot even be told."""

    def __str__(self) -> str:
        raise ValueError("it has no message")


HOST_WORK: dict[str, tuple[type, str, dict[str, Any]]] = {
    "text": (Generation, "_read", {}),
    "a delta": (Generation, "write", {}),
    "a token": (Generation, "accept", {}),
    "a prompt's logprobs": (Generation, "take_logits", {"logprob_start_len": 0}),
    "an answer's logprobs": (Generation, "_logprobs", {}),
    "a mask": (Grammar, "fill_mask", {"regex": "[a-f]{40}"}),
    "a grammar's token": (Grammar, "accept", {"regex": "[a-f]{40}"}),
    "forced tokens": (Grammar, "forced", {"regex": "abcdef[a-f]{40}"}),
    "a draw": (Sampler, "draw", {"temperature": 1}),
    "penalties": (Sampler, "change", {"presence_penalty": 1}),
}


@pytest.mark.parametrize("error", [Panic("no"), Unspeakable(), MemoryError()], ids=repr)
@pytest.mark.parametrize("place", HOST_WORK)
def test_host_work_that_raises_costs_others_nothing(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    """Neither their answers, nor the device, nor the cache."""
    owner, name, options = HOST_WORK[place]
    method, runners = getattr(owner, name), Runners()

    def failing(self: Any, *arguments: Any) -> Any:
        params = self.request.params if owner is Generation else getattr(self, "params", BAD)
        if params.seed == BAD.seed:
            raise error
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, failing)
    prompts = [[*PROMPT, i] for i in range(3)]
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        alone = [engine.generate(prompt, GOOD).token_ids for prompt in prompts]
        others = [engine.submit(prompt, GOOD) for prompt in prompts]
        bad = replace(BAD, return_logprob="logprobs" in place, **options)
        assert "the step failed: " in str(told(engine.submit([9] * 8, bad).result))
        assert [other.result().token_ids for other in others] == alone
        assert not runners[0].has_ever_failed
        assert engine.generate(prompts[0], GOOD).cached_tokens == len(PROMPT)
        idle(engine)


@pytest.mark.parametrize("place", ["scheduler", "sampler", "cache"])
def test_parts_that_raise(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def failing(*_: Any) -> Any:
        raise ValueError("injected")

    with Engine(tiny.artifact) as engine:
        [worker] = engine._replicas.workers
        core: Any = worker.core
        with monkeypatch.context() as patch:
            if place == "scheduler":
                patch.setattr(core.scheduler, "add", failing)
            elif place == "sampler":
                patch.setattr("sf_local.sampling.sampler._next", failing)
            else:
                patch.setattr(core.cache, "evict", failing)
                engine.flush_cache()  # which ends the worker
            assert "injected" in str(told(lambda: engine.generate(PROMPT, GOOD)))
        if place != "cache":
            idle(engine)


def test_a_loop_that_ends_tells_all_though_some_raise(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners, submitted = Runners(), threading.Event()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        lose(runners[0], "decode", submitted)
        fail(monkeypatch, "_read", ValueError("injected"))
        handles = [engine.submit([*PROMPT, i], p) for i in range(2) for p in (BAD, GOOD)]
        submitted.set()
        for handle in handles:
            assert isinstance(told(handle.result), EngineError)
        assert engine._replicas.workers[0]._ended.wait(TIMEOUT)


def test_replicas_close_though_one_raises(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny.artifact, ["cpu", "cpu"])
    first, second = engine._replicas.workers
    close = first.close

    def failing() -> None:
        close()
        raise RuntimeError("injected")

    monkeypatch.setattr(first, "close", failing)
    handles = [engine.submit([i, *PROMPT], replace(GOOD, max_new_tokens=200)) for i in range(4)]
    with pytest.raises(RuntimeError, match="injected"):
        engine.shutdown()
    assert second._ended.is_set()
    for handle in handles:
        assert isinstance(told(handle.result), EngineError)
