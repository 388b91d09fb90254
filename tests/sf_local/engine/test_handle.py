"""Handles: waiting with a limit, what a stream says at its end, and the same for asyncio."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from sf_local import AsyncStream, Engine, Handle, SamplingParams
from sf_local.engine.generation import Generation
from sf_local.engine.input_processor import InputProcessor
from sf_local.errors import EngineError, RequestError
from tests.support.child import run_program
from tests.support.running import Runners
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7]
PARAMS = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
LONG = replace(PARAMS, max_new_tokens=240)
TIMEOUT = 60  # seconds


@pytest.fixture(scope="module")
def runners() -> Runners:
    return Runners()


@pytest.fixture(scope="module")
def engine(tiny: TinyModel, runners: Runners) -> Iterator[Engine]:
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        yield engine


@contextmanager
def held(runners: Runners, after: int = 0) -> Iterator[None]:
    """The model decodes only `after` times before this block ends."""
    runner, go_on = runners[0], threading.Event()
    decode, calls = runner.decode, iter(range(1_000_000))

    async def waiting(*arguments: Any) -> Any:
        if next(calls) >= after:
            go_on.wait(TIMEOUT)
        return await decode(*arguments)

    runner.decode = waiting  # type: ignore[method-assign]
    try:
        yield
    finally:
        go_on.set()
        runner.decode = decode  # type: ignore[method-assign]


def assert_idle(engine: Engine) -> None:
    deadline = time.monotonic() + TIMEOUT
    while (stats := engine.stats())["running"] or stats["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert stats["pages_used"] == 0


def run(work: Awaitable[None]) -> None:
    """Run a coroutine; nothing is left for the event loop to complain about."""
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        await asyncio.wait_for(work, TIMEOUT)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert not complaints


def failing(patch: pytest.MonkeyPatch) -> None:
    """Let every generation with a seed of 666 fail."""
    accept = Generation.accept

    def fail(self: Generation, *arguments: Any) -> Any:
        if self.request.params.seed == 666:
            raise ValueError("injected")
        return accept(self, *arguments)

    patch.setattr(Generation, "accept", fail)


BAD = replace(LONG, seed=666)


def test_a_wait_with_a_limit(engine: Engine, runners: Runners) -> None:
    """The generation goes on, and its text can still be read from the beginning."""
    with held(runners, after=3):
        handle = engine.submit(PROMPT, PARAMS)
        for timeout in (0, 0.01, 0.01):
            with pytest.raises(TimeoutError, match=rf"timeout={timeout}: .* goes on"):
                handle.result(timeout)
            assert not handle.done() and handle.output is None
    output = handle.result(timeout=TIMEOUT)
    assert handle.done() and handle.output is output is handle.result(0)
    assert "".join(handle) == output.text
    assert output.token_ids == engine.generate(PROMPT, PARAMS).token_ids


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "5", True])
def test_limits_that_are_none(engine: Engine, timeout: Any) -> None:
    handle = engine.submit(PROMPT, PARAMS)
    with pytest.raises(RequestError, match=r"timeout=.* must be a number at least 0"):
        handle.result(timeout)
    assert handle.result(1e300).finish_reason == "length"


def test_a_stream_says_how_it_ended(engine: Engine, runners: Runners) -> None:
    expected = engine.generate(PROMPT, PARAMS)
    with held(runners, after=6):
        stream = engine.stream(PROMPT, PARAMS)
        texts = [next(stream)]
        assert stream.output is None
    texts += stream
    assert stream.output is not None
    assert "".join(texts) == stream.output.text == expected.text
    assert stream.output.finish_reason == "length"
    assert (stream.output.prompt_tokens, stream.output.completion_tokens) == (4, 12)
    assert list(stream) == []
    with held(runners):
        stream = engine.stream(PROMPT, LONG)
        stream.close()
    list(stream)
    assert stream.output is not None and stream.output.finish_reason == "abort"


def test_another_thread_waits_while_one_reads(engine: Engine) -> None:
    handle = engine.submit(PROMPT, LONG)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(handle.result()))
    thread.start()
    texts = list(handle)
    thread.join(TIMEOUT)
    assert results == [handle.output] and len(texts) > 1


def test_a_failure(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    handle, stream = engine.submit(PROMPT, BAD), engine.stream(PROMPT, BAD)
    for wait in (handle.result, lambda: handle.result(0), lambda: list(handle), stream.__next__):
        with pytest.raises(EngineError, match="injected"):
            wait()
    assert handle.done() and handle.output is None and stream.output is None
    assert_idle(engine)


def test_samples_end_with_the_first_that_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch)
    before = engine.stats()["completion_tokens"]
    with pytest.raises(EngineError, match="injected"):
        engine.samples(PROMPT, replace(LONG, seed=666, n=4))
    assert_idle(engine)
    assert engine.stats()["completion_tokens"] - before < 3 * 240


def test_a_forked_child(tiny: TinyModel) -> None:
    program = """
import os, sys
from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError
engine = Engine(sys.argv[1])
handle = engine.submit([5, 6], SamplingParams(max_new_tokens=200, ignore_eos=True))
child = os.fork()
if child == 0:
    for wait in (handle.done, handle.result, lambda: handle.result(0), lambda: next(iter(handle))):
        try:
            wait()
        except EngineError as error:
            assert "after os.fork()" in str(error)
        else:
            os._exit(1)
    handle.cancel()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), handle.result().completion_tokens)
"""
    assert run_program(program, tiny.artifact) == "7 200\n"


def test_asubmit(engine: Engine) -> None:
    expected = engine.generate(PROMPT, PARAMS)

    async def main() -> None:
        with pytest.raises(RequestError, match="prompt is empty"):
            await engine.asubmit("")
        with pytest.raises(RequestError, match="'x'"):
            await engine.asubmit(PROMPT, images="x")
        handle = await engine.asubmit(PROMPT, PARAMS)
        assert isinstance(handle, AsyncStream) and handle.output is None
        output = await handle.result()
        assert handle.done() and handle.output is output
        assert output.token_ids == expected.token_ids
        assert "".join([text async for text in handle]) == output.text
        stream = engine.astream(PROMPT, PARAMS)
        assert not stream.done() and stream.output is None
        assert "".join([text async for text in stream]) == expected.text
        assert stream.output is not None and stream.output.finish_reason == "length"

    run(main())


def test_tasks_share_a_stream(engine: Engine) -> None:
    """They begin one generation, though all of them find that it has not begun."""
    before = engine.stats()["completion_tokens"]

    async def main() -> None:
        stream = engine.astream(PROMPT, replace(LONG, regex="[a-z]{60}"))

        async def read() -> str:
            return "".join([text async for text in stream])

        first, second, *texts = await asyncio.gather(
            stream.result(), stream.result(), read(), read()
        )
        assert first is second is await stream.result()
        assert sum(map(len, texts)) == len(first.text)
        assert engine.stats()["completion_tokens"] - before == first.completion_tokens

    run(main())


def test_samples_and_scores_for_asyncio(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=8, seed=3, n=3)
    expected = [output.token_ids for output in engine.samples("abc", params)]
    scored = engine.score("abc", ["d", "ef"], unconditional=True)

    async def main() -> None:
        outputs, scores = await asyncio.gather(
            engine.asamples("abc", params), engine.ascore("abc", ["d", "ef"], unconditional=True)
        )
        assert [output.token_ids for output in outputs] == expected
        assert [score.token_ids for score in scores] == [score.token_ids for score in scored]
        for score, other in zip(scores, scored, strict=True):
            assert score.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert score.unconditional == pytest.approx(other.unconditional, abs=1e-4)
        with pytest.raises(RequestError, match="params=3"):
            await engine.asamples("abc", 3)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="choices"):
            await engine.ascore("abc", [])
        with pytest.raises(EngineError, match="ended early: timeout"):
            await engine.ascore("abc", ["d"], params=SamplingParams(timeout=0.0))

    run(main())


@pytest.mark.parametrize("use", ["samples", "score", "asamples", "ascore", "agenerate"])
def test_a_timeout_counts_from_the_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """By a clock on which every prompt takes 1,000 seconds to be encoded."""
    now, encode, passed = time.perf_counter, InputProcessor.encode, [0]

    def slow(*arguments: Any) -> list[int]:
        passed[0] += 1000
        return encode(*arguments)

    monkeypatch.setattr(InputProcessor, "encode", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + passed[0])
    params = replace(PARAMS, timeout=500.0, regex="[a-z]+" if use == "agenerate" else None)
    call = getattr(engine, use)
    arguments = ("abc", ["d", "ef"]) if "score" in use else ("abc",)

    def answer() -> Any:
        result = call(*arguments, params=params)
        return asyncio.run(result) if use.startswith("a") else result

    if "score" in use:
        with pytest.raises(EngineError, match="ended early: timeout"):
            answer()
        return
    outputs = [answer()] if use == "agenerate" else answer()
    for output in outputs:
        assert output.finish_reason == "timeout" and not output.token_ids
        assert output.latency >= 1000


def test_the_threads_of_asyncio_may_be_busy(tiny: TinyModel) -> None:
    """As in an app that waits in them for the answers."""

    async def main(engine: Engine) -> None:
        go_on = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, go_on.wait, TIMEOUT)
        params = replace(PARAMS, regex="[a-z]{3,5}")
        answers = asyncio.gather(
            engine.agenerate("a", params), engine.achat([{"role": "user", "content": "a"}], params),
            engine.asamples("a", params), engine.ascore("a", ["b"]),
        )  # fmt: skip
        try:
            await asyncio.wait_for(answers, TIMEOUT / 2)
        finally:
            go_on.set()
            await busy

    with Engine(tiny.artifact, chat_template="{{ messages[0].content }}") as engine:
        run(main(engine))


def test_threads_of_preparation(tiny: TinyModel) -> None:
    """They end with the engine; a forked child, which lacks them, is told so and does not wait."""
    program = """
import asyncio, os, sys, threading, time
from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError
params = SamplingParams(regex="[a-z]{3,5}", max_new_tokens=8)

def prepare_threads():
    return [t for t in threading.enumerate() if t.name.startswith("sf_local-prepare")]

engine = Engine(sys.argv[1])
asyncio.run(engine.agenerate("a", params))
assert prepare_threads()
child = os.fork()
if child == 0:
    for call in (engine.agenerate("a", params), engine.asamples("a"), engine.ascore("a", ["b"])):
        try:
            asyncio.run(call)
        except EngineError as error:
            assert "after os.fork()" in str(error)
        else:
            os._exit(1)
    engine.shutdown()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
engine.shutdown()
for thread in prepare_threads():
    thread.join(60)
print(len(prepare_threads()))
try:
    asyncio.run(engine.agenerate("a", params))
except EngineError as error:
    print(error)
engine = Engine(sys.argv[1])
asyncio.run(engine.agenerate("a", params))
threads = prepare_threads()
del engine
for thread in threads:
    thread.join(60)
print(len(threads), len(prepare_threads()))
"""
    child, left, closed, collected = run_program(program, tiny.artifact).splitlines()
    assert (child, left, collected) == ("7", "0", "1 0") and "closed" in closed


async def _first(stream: AsyncStream) -> None:
    async for _ in stream:
        pass


WAITS: dict[str, Callable[[Engine, SamplingParams], Awaitable[object]]] = {
    "agenerate": lambda e, p: e.agenerate(PROMPT, p),
    "astream": lambda e, p: _first(e.astream(PROMPT, p)),
    "result": lambda e, p: e.astream(PROMPT, p).result(),
    "asamples": lambda e, p: e.asamples(PROMPT, replace(p, n=3)),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_task_that_is_cancelled(engine: Engine, runners: Runners, wait: str) -> None:
    before = engine.stats()["completion_tokens"]

    async def main() -> None:
        with held(runners, after=2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(WAITS[wait](engine, LONG), 0.2)
            task = asyncio.ensure_future(WAITS[wait](engine, LONG))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())
    assert_idle(engine)
    assert engine.stats()["completion_tokens"] - before < 100


def test_scoring_that_is_cancelled(
    engine: Engine, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, submitted = threading.Event(), threading.Event()
    prefill = runners[0].prefill_all

    async def waiting(*arguments: Any) -> Any:
        submitted.set()
        go_on.wait(TIMEOUT)
        return await prefill(*arguments)

    monkeypatch.setattr(runners[0], "prefill_all", waiting)

    async def main() -> None:
        task = asyncio.ensure_future(engine.ascore("xyz", ["a" * i for i in range(1, 9)]))
        await asyncio.to_thread(submitted.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    run(main())
    assert_idle(engine)


@pytest.mark.parametrize("wait", WAITS)
def test_a_failure_in_asyncio(engine: Engine, monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    """It is told to who waits; one of which nobody asks makes no noise."""
    failing(monkeypatch)

    async def main() -> None:
        with pytest.raises(EngineError, match="injected"):
            await WAITS[wait](engine, BAD)
        handle = await engine.asubmit(PROMPT, BAD)
        while not handle.done():
            await asyncio.sleep(0.005)
        assert handle.output is None
        with pytest.raises(EngineError, match="injected"):
            await handle.result()
        unread = await engine.asubmit(PROMPT, BAD)
        while not unread.done():
            await asyncio.sleep(0.005)

    run(main())
    assert_idle(engine)


def test_cancel(engine: Engine, runners: Runners) -> None:
    async def main() -> None:
        with held(runners):
            handle = await engine.asubmit(PROMPT, LONG)
            handle.cancel()
        assert (await handle.result()).finish_reason == "abort"
        handle.cancel()
        await handle.aclose()
        engine.astream(PROMPT).cancel()

    run(main())
    with held(runners):
        handle: Handle = engine.submit(PROMPT, LONG)
        handle.cancel()
    assert handle.result().finish_reason == "abort"
    assert_idle(engine)
