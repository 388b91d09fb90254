"""Log probabilities of prompts and answers, in any chunks, against the reference."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from sf_local import Engine, SamplingParams
from sf_local.engine import limits
from sf_local.errors import RequestError
from sf_local.request.batch import Row
from sf_local.request.output import Logprobs, TopTokens
from sf_local.sampling.logits import Floats
from sf_local.sampling.logprobs import PromptLogprobs
from tests.support.answers import assert_likeliest
from tests.support.reference import forward, logprobs
from tests.support.running import Runners, all_at_once
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12, 99, 98, 97, 96]
PARAMS = SamplingParams(
    max_new_tokens=6, temperature=0, ignore_eos=True, return_logprob=True, logprob_start_len=0,
    top_logprobs_num=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine
        assert engine.stats()["pages_used"] == 0


def exact(model: TinyModel, tokens: list[int]) -> np.ndarray:
    return logprobs(forward(model.config, model.weights, tokens))


@pytest.mark.parametrize("start", [0, 1, 7, 9])
@pytest.mark.parametrize("cached", [False, True])
def test_prompt_and_answer(engine: Engine, tiny: TinyModel, start: int, cached: bool) -> None:
    if not cached:
        engine.flush_cache()
    output = engine.generate(PROMPT, replace(PARAMS, logprob_start_len=start))
    tokens = PROMPT + output.token_ids
    rows, found = exact(tiny, tokens), output.logprobs
    assert found is not None
    assert list(found.prompt_ids) == PROMPT[start:]
    assert found.prompt[0] is None and found.prompt_top[0] is None
    wanted = [rows[i - 1, tokens[i]] for i in range(start + 1, len(tokens))]
    assert found.prompt[1:] + found.output == pytest.approx(wanted, abs=1e-4)
    places = range(start, len(tokens) - 1)
    for place, top in zip(places, found.prompt_top[1:] + found.output_top, strict=True):
        assert top is not None
        largest = pytest.approx(-np.sort(-rows[place])[:3], abs=1e-4)
        assert [value for value, _ in top] == largest
        assert [rows[place, token] for _, token in top] == largest


def test_a_long_prompt_in_chunks_beside_others(engine: Engine, tiny: TinyModel) -> None:
    """With neighbours that share the calls and want none."""
    long = np.random.default_rng(2).integers(3, 300, 240).tolist()
    plain = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
    others = [engine.submit([i, *long[:40]], plain) for i in range(6)]
    output = engine.generate(long, replace(PARAMS, logprob_start_len=17, top_logprobs_num=0))
    assert all(len(other.result().token_ids) == 4 for other in others)
    rows = exact(tiny, long)
    assert output.logprobs is not None
    wanted = [rows[i - 1, long[i]] for i in range(18, 240)]
    assert output.logprobs.prompt[1:] == pytest.approx(wanted, abs=1e-4)
    assert output.logprobs.prompt_top[1] == []


def test_they_survive_preemption(tiny: TinyModel) -> None:
    """With pages for two of five requests."""
    prompts = [[i + 3] * 20 for i in range(5)]
    params = replace(PARAMS, max_new_tokens=60)
    with Engine(tiny.artifact, kv_pages=22) as small:
        with all_at_once(small):
            handles = [small.submit(prompt, params) for prompt in prompts]
        outputs = [handle.result() for handle in handles]
        assert small.stats()["preemptions"] > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, found = prompt + output.token_ids, output.logprobs
        assert found is not None and len(found.output) == 60
        assert_likeliest(tiny, prompt, output.token_ids)
        rows = exact(tiny, tokens)
        wanted = [rows[i - 1, tokens[i]] for i in range(1, len(tokens))]
        assert found.prompt[1:] + found.output == pytest.approx(wanted, abs=1e-4)


def test_none_unless_asked_for(engine: Engine) -> None:
    assert engine.generate(PROMPT, replace(PARAMS, return_logprob=False)).logprobs is None
    found = engine.generate(PROMPT, replace(PARAMS, logprob_start_len=-1)).logprobs
    assert found is not None and found.prompt == [] and len(found.output) == 6


def test_a_start_behind_the_prompt(engine: Engine) -> None:
    with pytest.raises(RequestError, match="logprob_start_len=10: the prompt has 10 tokens"):
        engine.generate(PROMPT, replace(PARAMS, logprob_start_len=10))
    with pytest.raises(RequestError, match="top_logprobs_num=301: the model has 300"):
        engine.generate(PROMPT, replace(PARAMS, top_logprobs_num=301))


def test_chunks_may_come_twice_and_overlap() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    prompt = [1, 2, 3, 4, 5, 6]
    at_once, pieces = PromptLogprobs(prompt, 1, 0), PromptLogprobs(prompt, 1, 0)
    at_once.add(0, logits)
    for start, end in (0, 2), (1, 3), (0, 3), (3, 6):
        pieces.add(start, logits[start:end])
    assert at_once.result() == pieces.result()
    assert len(at_once.result().prompt) == 5


@pytest.mark.parametrize("regex", [None, "[a-z ]*"])
def test_the_likeliest_tokens_are_objects_only_once_they_are_read(
    engine: Engine, regex: str | None
) -> None:
    """Until then a few a token; then a float and a tuple for each, in the reader's thread."""
    prompt = np.random.default_rng(3).integers(3, 300, 150).tolist()
    params = replace(PARAMS, max_new_tokens=50, top_logprobs_num=200, regex=regex)
    engine.generate(prompt, params)
    gc.collect()
    before = sys.getallocatedblocks()
    found = engine.generate(prompt, params).logprobs
    gc.collect()
    assert found is not None
    assert sys.getallocatedblocks() - before < 20 * 200
    made = [top for top in [*found.prompt_top, *found.output_top] if top]
    assert sys.getallocatedblocks() - before > 2 * sum(map(len, made)) > 2 * 149 * 200


def test_the_likeliest_tokens_take_twelve_bytes_each() -> None:
    found = PromptLogprobs(list(range(11)), 0, 1000)
    found.add(0, np.random.default_rng(0).normal(size=(10, 5000)).astype(np.float32))
    tops = [top for top in found.result().__dict__["_prompt_top"] if top]
    assert [top.ids.nbytes + top.logprobs.nbytes for top in tops] == [12_000] * 10


def test_lists_that_are_made_later_are_as_good_as_any() -> None:
    tops = [[(-0.5, 7), (-1.5, 2)], []]
    arrays = [TopTokens(np.array([-0.5, -1.5]), np.array([7, 2], np.int32))]
    arrays.append(TopTokens(np.empty(0), np.empty(0, np.int32)))

    def later() -> Logprobs:
        found = Logprobs([1, 2], [None, -0.5], output=[-0.25, 0.0])
        found.make_later("prompt_top", [None, arrays[0]])
        found.make_later("output_top", arrays)
        return found

    plain = Logprobs([1, 2], [None, -0.5], [None, tops[0]], [-0.25, 0.0], tops)
    assert later() == plain and plain == later()
    assert repr(later()) == repr(plain) and asdict(later()) == asdict(plain)
    assert replace(later(), output=[]) == replace(plain, output=[])
    for copied in copy.copy(later()), copy.deepcopy(later()), pickle.loads(pickle.dumps(later())):
        assert copied == plain
    assert later().output_top is not later().output_top and not hasattr(later(), "tops")
    found: Any = later()
    assert found.output_top is found.output_top
    found.output_top = []
    assert found.output_top == []


def test_few_logits_are_read_at_a_time(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt alone, of several at once, and only where they are wanted."""
    monkeypatch.setattr(limits, "MAX_LOGITS", 300 * 40)
    runners, lengths = Runners(), []
    long = np.random.default_rng(2).integers(3, 300, 200).tolist()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        prefill_all = runners[0].prefill_all

        async def counting(rows: Sequence[Row], *spec: Any) -> list[Floats]:
            lengths.append(sum(len(row.tokens) for row in rows))
            return await prefill_all(rows, *spec)

        monkeypatch.setattr(runners[0], "prefill_all", counting)
        engine.generate(long, replace(PARAMS, logprob_start_len=100))
        assert sum(lengths) == 100 and max(lengths) <= 48  # whole pages
        prompts = [[i, *long] for i in range(4)]
        params = [replace(PARAMS, logprob_start_len=i * 60, top_logprobs_num=0) for i in range(4)]
        handles = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
        for i, (prompt, handle) in enumerate(zip(prompts, handles, strict=True)):
            found, rows = handle.result().logprobs, exact(tiny, prompt)
            wanted = [rows[at - 1, prompt[at]] for at in range(i * 60 + 1, len(prompt))]
            assert found is not None and found.prompt[1:] == pytest.approx(wanted, abs=1e-4)
        assert max(lengths) <= 48
