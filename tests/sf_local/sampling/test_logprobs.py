"""Log probabilities of prompts and answers, in any chunks, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sf_local import Engine, SamplingParams
from sf_local.errors import RequestError
from sf_local.sampling.logprobs import PromptLogprobs
from tests.support.reference import forward, logprobs
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
        assert [token for _, token in top] == np.argsort(-rows[place])[:3].tolist()
        assert [value for value, _ in top] == pytest.approx(-np.sort(-rows[place])[:3], abs=1e-4)


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
    with Engine(tiny.artifact) as roomy:
        expected = [roomy.generate(prompt, params).logprobs for prompt in prompts]
    with Engine(tiny.artifact, kv_pages=22) as small:
        handles = [small.submit(prompt, params) for prompt in prompts]
        found = [handle.result().logprobs for handle in handles]
        assert small.stats()["preemptions"] > 0
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        assert a.prompt[1:] == pytest.approx(b.prompt[1:], abs=1e-4)
        assert a.output == pytest.approx(b.output, abs=1e-4)


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
