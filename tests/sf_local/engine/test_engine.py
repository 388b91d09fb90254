"""The engine on a tiny model: answers, mistakes, cancellation, failures, and every way to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sf_local import Engine, Output, SamplingParams
from sf_local.artifact.open import open_artifact
from sf_local.engine.limits import limits_of
from sf_local.errors import DeviceError, EngineError, RequestError
from tests.support.answers import assert_drawn, assert_likeliest
from tests.support.reference import forward
from tests.support.running import Runners, all_at_once, assert_idle, lose
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        for prompt in (PROMPT, "abc"):  # all answers begin with the same cached pages
            engine.generate(prompt, greedy(1))
        yield engine
        assert_idle(engine)


def greedy(count: int, **rest: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True, **rest)


def oracle(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the reference, computed from scratch for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(model.config, model.weights, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_the_references(engine: Engine, tiny: TinyModel) -> None:
    output = engine.generate(PROMPT, greedy(20))
    assert output.token_ids == oracle(tiny, PROMPT, 20)
    assert output.finish_reason == "length"
    assert (output.prompt_tokens, output.completion_tokens) == (6, 20)
    assert 0 < output.time_to_first_token <= output.latency


def test_a_seed_repeats_and_another_differs(engine: Engine) -> None:
    def tokens(seed: int) -> list[int]:
        return engine.generate(PROMPT, SamplingParams(max_new_tokens=20, seed=seed)).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_deltas_concatenate_to_the_text(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=60, seed=3, ignore_eos=True)
    handle = engine.submit(PROMPT, params)
    deltas = list(handle)
    assert "".join(deltas) == handle.result().text == engine.generate(PROMPT, params).text
    assert len(deltas) > 1


def test_stop_strings_and_tokens(engine: Engine) -> None:
    free = engine.generate("abc", SamplingParams(max_new_tokens=60, seed=3, ignore_eos=True))
    stop = free.text[20:23]
    cut = engine.generate(
        "abc", SamplingParams(max_new_tokens=60, seed=3, ignore_eos=True, stop=[stop, "never"])
    )
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.matched) == ("stop", stop)
    token = free.token_ids[5]
    ended = engine.generate(
        "abc",
        SamplingParams(max_new_tokens=60, seed=3, ignore_eos=True, stop_token_ids=[token]),
    )
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert (ended.finish_reason, ended.matched) == ("stop", token)


def test_the_models_own_end_token_stops(engine: Engine, tiny: TinyModel) -> None:
    """The tiny tokenizer's </s> is id 2; a stop string that is a special token matches its id."""
    params = SamplingParams(max_new_tokens=250, seed=0)
    often = {2: 4}  # so that every random model ends some answer
    outputs = [
        engine.generate([9], SamplingParams(max_new_tokens=200, seed=s, logit_bias=often))
        for s in range(8)
    ]
    stopped = [o for o in outputs if o.finish_reason == "stop"]
    assert stopped and all(o.token_ids[-1] == 2 and o.matched == 2 for o in stopped)
    named = engine.generate(
        [9], SamplingParams(max_new_tokens=200, seed=0, ignore_eos=True, stop="</s>")
    )
    assert named.finish_reason == "length" or named.token_ids[-1] == 2
    assert params.max_new_tokens == 250


def test_stop_strings_of_special_tokens_and_text(engine: Engine) -> None:
    bias = dict.fromkeys([2, *(3 + ord(letter) for letter in "abcdefgh")], 50)  # equally likely
    for seed in range(50):
        params = SamplingParams(max_new_tokens=60, temperature=20, top_k=len(bias), seed=seed,
                                ignore_eos=True, logit_bias=bias)  # fmt: skip
        free = engine.generate([9], params)
        at = free.token_ids.index(2) if 2 in free.token_ids[2:-1] else 0
        if at >= 2 and (after := free.token_ids[at + 1]) != 2:
            break
    before = engine.tokenizer.decode(free.token_ids[:at])
    stops = [before[-2:] + "</s>", "</s>" + engine.tokenizer.decode([after])]
    for stop, text, count in zip(stops, (before[:-2], before), (at + 1, at + 2), strict=True):
        output = engine.generate([9], replace(params, stop=stop))
        assert (output.text, output.matched) == (text, stop)
        assert output.token_ids == free.token_ids[:count]
    ended = engine.generate([9], replace(params, ignore_eos=False, stop=stops[0]))
    assert (ended.text, ended.matched) == (before[:-2], stops[0])  # cut at an end token as well


def test_no_new_tokens(engine: Engine) -> None:
    output = engine.generate(PROMPT, SamplingParams(max_new_tokens=0))
    assert (output.text, output.token_ids, output.finish_reason) == ("", [], "length")


def test_the_context_ends_with_length(engine: Engine, tiny: TinyModel) -> None:
    context = tiny.config.max_seq_len
    output = engine.generate(PROMPT, greedy(10_000))
    assert output.prompt_tokens + output.completion_tokens == context
    assert output.finish_reason == "length"
    longest = engine.generate([1] * (context - 1), greedy(5))
    assert longest.completion_tokens == 1
    with pytest.raises(RequestError, match=f"{context} tokens leave no room"):
        engine.submit([1] * context)


def test_a_small_pool_ends_with_length(tiny: TinyModel) -> None:
    with Engine(tiny.artifact, kv_pages=3) as engine:
        output = engine.generate(PROMPT, greedy(100))
        assert output.prompt_tokens + output.completion_tokens == 3 * 8
        assert output.token_ids == oracle(tiny, PROMPT, 18)
        assert_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([300], "300 is no token id"),
        ([-1], "-1 is no token id"),
        (["a"], "'a' is no token id"),
        ("\ud800", "surrogate"),
        (b"abc", "must be a str"),
        ({1: 2}, "must be a str"),
        (None, "must be a str"),
    ],
)
def test_bad_prompts(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt)


def test_what_a_prepared_prompt_or_one_answer_does_not_take(engine: Engine) -> None:
    with pytest.raises(RequestError, match="images: the prompt was prepared with its own"):
        engine.submit(engine.prepare("abc"), images=[b"image"])
    with pytest.raises(RequestError, match=r"n=2: several answers .* from `samples`"):
        engine.submit("abc", SamplingParams(n=2))
    params = SamplingParams(max_new_tokens=1, logit_bias=None)  # type: ignore[arg-type]
    assert engine.generate("abc", params).completion_tokens == 1


@pytest.mark.parametrize("kv_pages", [0, -1, 1.5, True, "all"])
def test_bad_kv_pages(tiny: TinyModel, kv_pages: Any) -> None:
    with pytest.raises(RequestError, match="kv_pages"):
        Engine(tiny.artifact, kv_pages=kv_pages)


def test_unknown_device(tiny: TinyModel) -> None:
    with pytest.raises(DeviceError, match="'tpu' is unknown"):
        Engine(tiny.artifact, "tpu")


def test_many_threads(engine: Engine, tiny: TinyModel) -> None:
    """Each gets its own answer, whatever else is under way."""
    params = [SamplingParams(max_new_tokens=12, seed=i, ignore_eos=True) for i in range(48)]
    with ThreadPoolExecutor(16) as threads:
        outputs = threads.map(lambda i: engine.generate([i + 3, 9], params[i]), range(len(params)))
        for i, output in enumerate(outputs):
            assert_drawn(tiny, [i + 3, 9], output.token_ids, seed=i)


def test_cancel(engine: Engine) -> None:
    running, waiting = (engine.submit(PROMPT, greedy(240)) for _ in range(2))
    next(iter(running.deltas()))
    waiting.cancel()
    assert waiting.result().finish_reason == "abort"
    running.cancel()
    assert engine.generate(PROMPT, greedy(3)).completion_tokens == 3


def test_leaving_a_stream_cancels_it(engine: Engine) -> None:
    stream = engine.submit(PROMPT, greedy(240)).deltas()
    next(stream)
    stream.close()
    engine.generate(PROMPT, greedy(1))
    assert_idle(engine)


@pytest.mark.parametrize("stop", ["a" * 10_000, "\n" * 9_999 + "b", "never"])
def test_a_hundred_long_stops(engine: Engine, stop: str) -> None:
    stops = [f"{stop}{i}" for i in range(100)]
    free = engine.generate(PROMPT, SamplingParams(max_new_tokens=60, seed=1, ignore_eos=True))
    params = SamplingParams(max_new_tokens=60, seed=1, ignore_eos=True, stop=stops)
    handle = engine.submit(PROMPT, params)
    assert "".join(handle) == handle.result().text == free.text


def test_a_failed_step_fails_its_requests_and_no_others(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five requests decode in calls of four and one; a call of four fails once."""
    runners = Runners()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        [runner] = runners
        decode, failures = runner.decode, []
        submitted = threading.Event()

        async def failing(rows: Any, *rest: Any) -> Any:
            submitted.wait(30)  # nobody ends before everybody runs
            if len(rows) == 4 and not failures:
                failures.append(rows)
                raise RuntimeError("injected")
            return await decode(rows, *rest)

        monkeypatch.setattr(runner, "decode", failing)
        handles = [engine.submit([*PROMPT, i], greedy(30)) for i in range(5)]
        submitted.set()
        failed = 0
        for i, handle in enumerate(handles):
            try:
                assert handle.result().token_ids == oracle(tiny, [*PROMPT, i], 30)
            except EngineError:
                failed += 1
                with pytest.raises(EngineError, match="injected"):  # whoever asks again
                    handle.result()
        assert failed == 4
        assert_idle(engine)


def test_a_native_failure_leaves_the_engine_usable(tiny: TinyModel) -> None:
    """A call with too few arguments fails inside IREE; the interpreter must still exit, too."""
    program = f"""
from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError
from sf_local.model.runner import ModelRunner
class DroppingRunner(ModelRunner):
    drops = False
    async def _call(self, name, inputs, *rest):
        inputs = dict(list(inputs.items())[:3]) if self.drops else inputs
        return await super()._call(name, inputs, *rest)
engine = Engine({str(tiny.artifact)!r}, _make_runner=DroppingRunner)
params = SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True)
expected = engine.generate([5, 6], params).token_ids
DroppingRunner.drops = True
try:
    engine.generate([5, 6], params)
    raise SystemExit("no error")
except EngineError as error:
    assert "the step failed" in str(error) and len(str(error).splitlines()) == 1
    assert "iree" not in str(error) and "iree" in str(error.__cause__)
DroppingRunner.drops = False
assert engine.generate([5, 6], params).token_ids == expected
stats = engine.stats()
assert stats["pages_used"] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lost_device_says_so_for_ever(tiny: TinyModel) -> None:
    """A call fails and the device cannot be recovered: everyone hears why, nothing hangs."""
    runners = Runners()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        all_submitted = threading.Event()
        lose(runners[0], "decode", all_submitted)
        handles = [engine.submit([*PROMPT, i], greedy(30)) for i in range(6)]
        all_submitted.set()
        for handle in handles:
            with pytest.raises(EngineError, match="fell off the bus"):
                handle.result()
        with pytest.raises(EngineError, match="fell off the bus"):
            engine.submit(PROMPT)
        assert_idle(engine)


def test_close_fails_what_is_under_way(tiny: TinyModel) -> None:
    engine = Engine(tiny.artifact)
    handles = [engine.submit(PROMPT, greedy(200)) for _ in range(3)]
    engine.shutdown()
    engine.shutdown()
    for handle in handles:
        with pytest.raises(EngineError, match="closed"):
            handle.result()
        handle.cancel()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(PROMPT)


def test_submitting_while_closing_never_hangs(tiny: TinyModel) -> None:
    engine = Engine(tiny.artifact)

    def use(i: int) -> Output | None:
        try:
            return engine.generate(PROMPT, greedy(5))
        except EngineError:
            return None

    with ThreadPoolExecutor(8) as threads:
        outputs = threads.map(use, range(64))
        next(iter(outputs))
        engine.shutdown()
        assert None in list(outputs)


def test_garbage_collection_ends_the_thread(tiny: TinyModel) -> None:
    engine: Engine | None = Engine(tiny.artifact)
    assert engine is not None
    [worker] = engine._replicas.workers
    engine = None
    gc.collect()
    assert worker._ended.wait(10)


def test_a_stream_keeps_its_engine(tiny: TinyModel) -> None:
    stream = Engine(tiny.artifact).stream(PROMPT, greedy(20))
    gc.collect()
    assert "".join(stream)


def test_two_threads_wait_for_one_handle(engine: Engine) -> None:
    handle = engine.submit(PROMPT, greedy(30))
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda _: handle.result(), range(4)))
    assert outputs == [outputs[0]] * 4


def test_two_engines_side_by_side(engine: Engine, tiny: TinyModel) -> None:
    with Engine(tiny.artifact) as other:
        handles = [e.submit(PROMPT, greedy(10)) for e in (engine, other)]
        assert handles[0].result().token_ids == handles[1].result().token_ids


@pytest.mark.parametrize("ending", ["pass", "del engine", "raise SystemExit(0)", "handle.result()"])
def test_interpreter_exit_is_clean(tiny: TinyModel, ending: str) -> None:
    program = f"""
import tempfile
folder = tempfile.TemporaryDirectory()  # finalizers from before shortfin run after its own
from sf_local import Engine, SamplingParams
engine = Engine({str(tiny.artifact)!r})
handle = engine.submit([5, 6], SamplingParams(max_new_tokens=200, ignore_eos=True))
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_artifact(tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(Exception, match="no such file"):
        Engine(tmp_path / "nothing")
    assert threading.active_count() == threads


def test_logits_of_padded_rows_stay_finite(tiny: TinyModel) -> None:
    """A request's pages are reused dirty by the next one; nothing of the old one leaks in."""
    with Engine(tiny.artifact, kv_pages=6) as engine:
        for _ in range(3):
            tokens = engine.generate(PROMPT, greedy(30)).token_ids
            assert len(tokens) == 30
            assert_likeliest(tiny, PROMPT, tokens)


def test_a_repeated_prompt_is_cached_to_the_token(tiny: TinyModel) -> None:
    with Engine(tiny.artifact) as engine:
        first = engine.generate(PROMPT * 4, greedy(10))
        again = engine.generate(PROMPT * 4, greedy(10))
        other = engine.generate([*PROMPT * 3, 1, 2], greedy(10))
        assert (first.cached_tokens, again.cached_tokens, other.cached_tokens) == (0, 23, 18)
        assert first.token_ids == again.token_ids == oracle(tiny, PROMPT * 4, 10)
        assert other.token_ids == oracle(tiny, [*PROMPT * 3, 1, 2], 10)
        stats = engine.stats()
        assert stats["pages_cached"] > 0 and stats["hit_rate"] > 0.5
        engine.flush_cache()
        assert engine.stats()["pages_free"] == engine.stats()["pages_total"]
        assert engine.generate(PROMPT * 4, greedy(10)).cached_tokens == 0


def test_the_page_that_a_prompt_continues_is_evicted_for_it(tiny: TinyModel) -> None:
    """In a pool that is all its own: it goes on in the very same page."""
    prompts = [[*PROMPT * 2, *[9] * n, n] for n in (3, 9, 1, 7, 2, 9, 4)]
    with Engine(tiny.artifact, kv_pages=4) as engine:
        for prompt in prompts:
            assert engine.generate(prompt, greedy(6)).token_ids == oracle(tiny, prompt, 6)


def test_forks_share_one_computation(tiny: TinyModel) -> None:
    """Eight at once with a common beginning; the cache sees it once, also while it is computed."""
    shared = [7, 8, 9] * 20
    with Engine(tiny.artifact) as engine:
        handles = [engine.submit([*shared, i], greedy(6)) for i in range(8)]
        outputs = [handle.result() for handle in handles]
        assert sorted(o.cached_tokens for o in outputs) == [0] + [60] * 7
        for i, output in enumerate(outputs):
            assert output.token_ids == oracle(tiny, [*shared, i], 6)


def test_tokens_of_answers_are_reused_on_demand(tiny: TinyModel) -> None:
    """The tiny model writes what its tokenizer would split otherwise, so history shows."""
    params = [SamplingParams(max_new_tokens=12, seed=seed) for seed in range(4)]
    for is_reused in (True, False):
        with Engine(tiny.artifact, reuse_answer_tokens=is_reused) as engine:
            prompts = ["abc" + engine.generate("abc", p).text + "!" for p in params]
            encoded = [engine.encode(prompt) for prompt in prompts]
            afresh = [engine.tokenizer.encode(prompt) for prompt in prompts]
            assert (encoded != afresh) == is_reused


def test_samples_are_remembered(tiny: TinyModel) -> None:
    """So that a prompt that goes on after one, as SGLang's do, has its tokens."""
    with Engine(tiny.artifact) as engine:
        [output] = engine.samples("abc", SamplingParams(5, regex="[a-z]{5}"))
        known = engine._inputs._encode._longest_known("abc" + output.text)
        assert known == [*engine.encode("abc"), *output.token_ids]


def test_samples_encode_their_prompt_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = type(engine.tokenizer).encode
    monkeypatch.setattr(
        type(engine.tokenizer),
        "encode",
        lambda self, text: encoded.append(text) or encode(self, text),
    )
    engine.samples("abc", SamplingParams(max_new_tokens=2, n=8))
    assert encoded == ["abc"]
    for wrong in ({"n": 2}, 3):
        with pytest.raises(RequestError, match=r"params=.* must be SamplingParams"):
            engine.samples("abc", wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"params=.* must be SamplingParams"):
            engine.score("abc", ["d"], params=wrong)  # type: ignore[arg-type]


def test_samples_of_one_prompt(tiny: TinyModel) -> None:
    with Engine(tiny.artifact) as engine:
        params = SamplingParams(max_new_tokens=12, seed=5, n=4, ignore_eos=True)
        outputs = engine.samples(PROMPT * 4, params)
        assert len({tuple(o.token_ids) for o in outputs}) == 4
        assert sum(o.cached_tokens for o in outputs) >= 3 * 23
        for answers in outputs, engine.samples(PROMPT * 4, params):
            for i, output in enumerate(answers):
                assert_drawn(tiny, PROMPT * 4, output.token_ids, seed=5 + i)


def test_preempted_requests_lose_nothing(tiny: TinyModel) -> None:
    """Sixteen requests of up to 60 tokens in 12 pages: they take turns, and all come out right."""
    with Engine(tiny.artifact, kv_pages=12) as engine:
        prompts = [[*PROMPT, i, 3 * i] for i in range(16)]
        with all_at_once(engine):
            handles = [engine.submit(p, greedy(50)) for p in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            deltas = "".join(handle)
            ids = handle.result().token_ids
            assert len(ids) == 50
            assert_likeliest(tiny, prompt, ids)
            assert handle.result().text == deltas
        assert engine.stats()["preemptions"] > 0
        assert_idle(engine)


def test_a_timeout_counts_from_the_call(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from when the prompt has been encoded, its grammar compiled, its images decoded."""
    encode, clock = type(engine.tokenizer).encode, [0.0]

    def slow(tokenizer: Any, text: str) -> list[int]:
        clock[0] += 100
        return encode(tokenizer, text)

    real = time.perf_counter
    monkeypatch.setattr(type(engine.tokenizer), "encode", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: real() + clock[0])
    output = engine.generate("abc", greedy(240, timeout=50.0))
    assert (output.finish_reason, output.token_ids) == ("timeout", [])
    assert output.latency >= 100


def test_a_timeout_ends_with_the_text_so_far(engine: Engine) -> None:
    late = engine.generate(PROMPT, greedy(10_000, timeout=0.0))
    assert (late.finish_reason, late.token_ids) == ("timeout", [])
    output = engine.generate(PROMPT, greedy(240, timeout=0.02))
    assert output.finish_reason == "timeout" and len(output.token_ids) < 240
    assert engine.generate(PROMPT, greedy(3, timeout=100.0)).finish_reason == "length"


def test_priority_goes_first(tiny: TinyModel) -> None:
    """With room for one request at a time, the last one in is the second one out."""
    with Engine(tiny.artifact, kv_pages=4) as engine:
        order: list[int] = []
        handles = [
            engine.submit([*PROMPT * 2, i], greedy(15, priority=priority))
            for i, priority in enumerate([0, 0, 0, 5])
        ]

        def wait(i: int) -> None:
            handles[i].result()
            order.append(i)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(wait, range(4)))
        assert order.index(3) <= 1


def test_dropping_a_handle_cancels(engine: Engine) -> None:
    handle = engine.submit(PROMPT, greedy(240))
    next(handle.deltas())
    del handle
    gc.collect()
    engine.generate(PROMPT, greedy(1))
    assert_idle(engine)


def test_asyncio(engine: Engine, tiny: TinyModel) -> None:
    async def main() -> None:
        outputs = await asyncio.gather(
            *(engine.agenerate([*PROMPT, i], greedy(8)) for i in range(10))
        )
        for i, output in enumerate(outputs):
            assert output.token_ids == oracle(tiny, [*PROMPT, i], 8)
        text = "".join([delta async for delta in engine.astream([*PROMPT, 3], greedy(8))])
        assert text == outputs[3].text
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.agenerate(PROMPT, greedy(240)), 0.01)
        with pytest.raises(RequestError):
            await engine.agenerate("")

    asyncio.run(main())
    engine.generate(PROMPT, greedy(1))
    assert_idle(engine)


def test_a_stream_that_is_awaited(engine: Engine) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match="prompt is empty"):
            await engine.astream("")
        stream = await engine.astream(PROMPT, greedy(8))
        assert "".join([text async for text in stream]) == engine.generate(PROMPT, greedy(8)).text
        assert [text async for text in stream] == []
        await engine.astream(PROMPT, greedy(240))  # dropped
        task = asyncio.create_task(anext(engine.astream(PROMPT, SamplingParams(regex="x" * 99))))
        await asyncio.sleep(0)
        task.cancel()
        stream = await engine.astream(PROMPT, greedy(240))
        await stream.aclose()
        assert (await stream.result()).finish_reason == "abort"

    asyncio.run(main())
    gc.collect()
    engine.generate(PROMPT, greedy(1))
    assert_idle(engine)


def test_slow_preparations_leave_the_event_loop_free(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts and grammars are prepared in another thread."""
    generation = type(engine._inputs).generation
    threads: list[int] = []

    def spy(*args: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return generation(*args, **options)

    monkeypatch.setattr(type(engine._inputs), "generation", spy)

    async def main() -> None:
        for prompt, params in (
            (PROMPT, SamplingParams(4, regex="[a-z]+")),
            (PROMPT, SamplingParams(4, json_schema="{}")),
            (PROMPT, SamplingParams(4, ebnf='start: "a"')),
            ("long " * 1000, SamplingParams(4)),
        ):
            with contextlib.suppress(RequestError):  # the context has no room for the last one
                await engine.agenerate(prompt, params)
        assert threading.get_ident() not in threads and len(threads) == 4

    asyncio.run(main())


def test_drain_finishes_what_is_under_way(tiny: TinyModel) -> None:
    engine = Engine(tiny.artifact)
    handles = [engine.submit([*PROMPT, i], greedy(30)) for i in range(6)]
    engine.shutdown(drain=True)
    assert [len(handle.result().token_ids) for handle in handles] == [30] * 6
    with pytest.raises(EngineError, match="closed"):
        engine.submit(PROMPT)


def test_use_after_fork(tiny: TinyModel) -> None:
    """The child gets an error and exits cleanly; the parent goes on."""
    program = f"""
import os, sys
from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError
engine = Engine({str(tiny.artifact)!r})
params = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
before = engine.generate([5, 6], params).token_ids
child = os.fork()
if child == 0:
    try:
        engine.generate([5, 6], params)
    except EngineError as error:
        assert "os.fork()" in str(error)
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert engine.generate([5, 6], params).token_ids == before
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("wait", ["handle.result()", "list(handle)"])
def test_ctrl_c_returns_at_once(tiny: TinyModel, wait: str) -> None:
    """The generation would take minutes; KeyboardInterrupt ends it and the process."""
    program = f"""
import os, signal, threading
import time
from sf_local import Engine, SamplingParams
from sf_local.model.runner import ModelRunner
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job inherits ignored
class SlowRunner(ModelRunner):
    async def prefill(self, *arguments):
        time.sleep(0.5)
        return await super().prefill(*arguments)
    async def decode(self, *arguments):
        time.sleep(0.5)
        return await super().decode(*arguments)
engine = Engine({str(tiny.artifact)!r}, _make_runner=SlowRunner)
handle = engine.submit([5, 6], SamplingParams(max_new_tokens=240, ignore_eos=True))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize(
    ("memory", "pages"), [(20_000, 9), ("16KiB", 8), ("0.5MiB", 256), ("100 KiB", 50)]
)
def test_kv_memory(tiny: TinyModel, memory: int | str, pages: int) -> None:
    """A page of the tiny model takes 2 KiB."""
    with Engine(tiny.artifact, kv_memory=memory) as engine:
        assert engine.stats()["pages_total"] == pages


def test_kv_memory_by_default_holds_the_largest_batch(tiny: TinyModel) -> None:
    with Engine(tiny.artifact) as engine:
        assert engine.stats()["pages_total"] == 4 * 256 // 8


def test_an_engine_is_no_artifact(engine: Engine) -> None:
    for given in (engine, None, 3):
        with pytest.raises(RequestError, match=r"vmfb=.* must be the path of an artifact"):
            Engine(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "size",
    [
        {"kv_memory": "lots"},
        {"kv_memory": "1Gb"},
        {"kv_memory": 100},
        {"kv_memory": "0%"},
        {"kv_memory": "900TiB"},
        {"kv_memory": True},
        {"kv_pages": 10**12},
        {"kv_pages": 5, "kv_memory": "1GiB"},
    ],
    ids=str,
)
def test_bad_kv_sizes(tiny: TinyModel, size: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="kv_"):
        Engine(tiny.artifact, **size)


# Limits of a step


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_running", None)]
    + [(name, value) for name in ("prefill_tokens", "max_running")
       for value in (0, -1, 1.5, "8", True)],
    ids=repr,
)  # fmt: skip
def test_limits_that_make_no_sense(tiny: TinyModel, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}=.* must be an integer of at least 1"):
        Engine(tiny.artifact, **{name: value})


def test_small_models_on_a_cpu_prefill_more_of_a_single_prompt(tiny: TinyModel) -> None:
    artifact = open_artifact(tiny.artifact)
    assert artifact.manifest  # of a GPU where these tests run with its code
    artifact = replace(artifact, manifest=replace(artifact.manifest, device="cpu"))
    on_gpu = replace(artifact, manifest=replace(artifact.manifest, device="hip"))
    count = (1 << 30) // artifact.num_weight_bytes + 1
    large = replace(artifact, weights=artifact.weights * count)
    assert limits_of(artifact).most_prefill_tokens == 2 * limits_of(artifact).prefill_tokens
    for others in (limits_of(artifact, 256), limits_of(on_gpu), limits_of(large)):
        assert others.most_prefill_tokens == others.prefill_tokens == 256


@pytest.mark.parametrize("prefill_tokens", [1, 3, 1000])
def test_a_prompt_in_steps_of_any_size(tiny: TinyModel, prefill_tokens: int) -> None:
    prompt = PROMPT * 5
    with Engine(tiny.artifact, prefill_tokens=prefill_tokens) as engine:
        assert engine.stats()["prefill_tokens"] == prefill_tokens
        assert engine.generate(prompt, greedy(3)).token_ids == oracle(tiny, prompt, 3)
        assert engine.stats()["steps"] == -(-len(prompt) // prefill_tokens) + 2
        assert_idle(engine)


def test_so_many_requests_run_at_a_time(tiny: TinyModel) -> None:
    runners = Runners()
    with Engine(tiny.artifact, max_running=2, _make_runner=runners) as engine:
        decode, sizes = runners[0].decode, []

        async def counted(rows: Any, *rest: Any) -> Any:
            sizes.append(len(rows))
            return await decode(rows, *rest)

        runners[0].decode = counted  # type: ignore[method-assign]
        handles = [engine.submit([*PROMPT, i], greedy(10)) for i in range(5)]
        for i, handle in enumerate(handles):
            assert handle.result().token_ids == oracle(tiny, [*PROMPT, i], 10)
        assert max(sizes) == 2 == engine.stats()["max_running"]
        assert_idle(engine)


def test_an_option_that_does_not_exist(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"picture='cat.png': there is no such parameter; use"):
        engine.generate(PROMPT, greedy(3), picture="cat.png")  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="jump_forward=1 must be True or False"):
        Engine("nowhere", jump_forward=1)  # type: ignore[arg-type]
    assert_idle(engine)
