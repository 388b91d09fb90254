"""The engine on a tiny model: answers, mistakes, cancellation, failures, and every way to end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from reference import forward

from sf_local import Engine, SamplingParams
from sf_local.engine import Output
from sf_local.errors import DeviceError, EngineError, RequestError

PROMPT = [5, 100, 33, 7, 250, 12]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine
        assert_idle(engine)


def assert_idle(engine: Engine) -> None:
    """No request owns a page."""
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["pages_used"] == 0


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
    outputs = [engine.generate([9], SamplingParams(max_new_tokens=200, seed=s)) for s in range(8)]
    stopped = [o for o in outputs if o.finish_reason == "stop"]
    assert stopped and all(o.token_ids[-1] == 2 and o.matched == 2 for o in stopped)
    named = engine.generate(
        [9], SamplingParams(max_new_tokens=200, seed=0, ignore_eos=True, stop="</s>")
    )
    assert named.finish_reason == "length" or named.token_ids[-1] == 2
    assert params.max_new_tokens == 250


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


@pytest.mark.parametrize("kv_pages", [0, -1, 1.5, True, "all"])
def test_bad_kv_pages(tiny: TinyModel, kv_pages: Any) -> None:
    with pytest.raises(RequestError, match="kv_pages"):
        Engine(tiny.artifact, kv_pages=kv_pages)


def test_unknown_device(tiny: TinyModel) -> None:
    with pytest.raises(DeviceError, match="'tpu' is unknown"):
        Engine(tiny.artifact, "tpu")


def test_many_threads(engine: Engine) -> None:
    """Each gets its own answer, whatever else is under way."""
    params = [SamplingParams(max_new_tokens=12, seed=i, ignore_eos=True) for i in range(48)]
    alone = [engine.generate([i + 3, 9], p).token_ids for i, p in enumerate(params)]
    with ThreadPoolExecutor(16) as threads:
        together = threads.map(
            lambda i: engine.generate([i + 3, 9], params[i]).token_ids, range(len(params))
        )
        assert list(together) == alone


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


def test_a_failed_step_fails_its_requests_and_no_others(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five requests decode in calls of four and one; a call of four fails once."""
    with Engine(tiny.artifact) as engine:
        runner = engine._loop._runner
        decode, failures = runner.decode, []

        async def failing(rows: Any) -> Any:
            if len(rows) == 4 and not failures:
                failures.append(rows)
                raise RuntimeError("injected")
            return await decode(rows)

        monkeypatch.setattr(runner, "decode", failing)
        handles = [engine.submit([*PROMPT, i], greedy(30)) for i in range(5)]
        for i, handle in enumerate(handles):
            if i < 4:
                for _ in range(2):  # and whoever asks again
                    with pytest.raises(EngineError, match="injected"):
                        handle.result()
            else:
                assert handle.result().token_ids == oracle(tiny, [*PROMPT, i], 30)
        assert_idle(engine)


def test_a_native_failure_leaves_the_engine_usable(tiny: TinyModel) -> None:
    """A call with too few arguments fails inside IREE; the interpreter must still exit, too."""
    program = f"""
from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError
engine = Engine({str(tiny.artifact)!r})
params = SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True)
expected = engine.generate([5, 6], params).token_ids
functions = engine._loop._runner._functions
good, functions["decode_bs1"] = functions["decode_bs1"], functions["prefill_bs1"]
shuffled = engine._loop._runner._call
async def drop_one(name, inputs):
    if functions[name] is functions["prefill_bs1"]:
        inputs.popitem()
    return await shuffled(name, inputs)
engine._loop._runner._call = drop_one
try:
    engine.generate([5, 6], params)
    raise SystemExit("no error")
except EngineError as error:
    assert "the step failed" in str(error)
engine._loop._runner._call = shuffled
functions["decode_bs1"] = good
assert engine.generate([5, 6], params).token_ids == expected
stats = engine.stats()
assert stats["pages_used"] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


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
    loop = engine._loop
    engine = None
    gc.collect()
    assert loop._ended.wait(10)


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
        tokens = [engine.generate(PROMPT, greedy(30)).token_ids for _ in range(3)]
        assert tokens[0] == tokens[1] == tokens[2]
        assert np.array(tokens).shape == (3, 30)
