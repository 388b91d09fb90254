"""Scores of continuations against the reference, and what SGLang's three methods make of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sglang.lang.choices import (
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)

from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError, RequestError
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.request.output import Score
from tests.support.reference import forward, logprobs
from tests.support.running import open_runner
from tests.support.tiny import TinyModel

PROMPT = "the quick brown fox"
CHOICES = [" jumps", " sleeps over the dog", "y", " jumps over"]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine
        assert engine.stats()["pages_used"] == 0


def expected(model: TinyModel, ids: list[int], start: int) -> list[float]:
    """Log probabilities of tokens [start, end), by the reference."""
    rows = logprobs(forward(model.config, model.weights, ids))
    return [float(rows[i - 1, ids[i]]) for i in range(start, len(ids))]


def test_scores_are_the_references(engine: Engine, tiny: TinyModel) -> None:
    prompt = engine.encode(PROMPT)
    for flushed in True, False:
        if flushed:
            engine.flush_cache()
        scores = engine.score(PROMPT, CHOICES, unconditional=True)
        for choice, score in zip(CHOICES, scores, strict=True):
            ids = engine.encode(PROMPT + choice)
            assert score.token_ids == ids[len(prompt) :]
            assert score.logprobs == pytest.approx(expected(tiny, ids, len(prompt)), abs=1e-3)
            assert score.unconditional is not None
            first, *rest = score.unconditional
            assert first is None
            assert rest == pytest.approx(expected(tiny, score.token_ids, 1), abs=1e-3)
            assert score.mean == pytest.approx(np.mean(score.logprobs))


def test_the_prompt_is_computed_once(engine: Engine) -> None:
    engine.flush_cache()
    scores = engine.score(PROMPT * 5, CHOICES)
    cached = sorted(score.cached_tokens for score in scores)
    assert cached[0] == 0
    assert cached[1] >= len(engine.encode(PROMPT * 5)) - 1


def test_the_three_methods_by_hand() -> None:
    """Means -2, -1.5, -1.75; first tokens -1, -2, -1 and then -3 beats -3.5; less unconditional."""
    given = [[-1.0, -3.0], [-2.0, -1.0], [-1.0, -3.5, -0.75]]
    alone = [[None, -5.0], [None, -1.0], [None, -3.5, -0.75]]

    def decide(method: object) -> str:
        return method(  # type: ignore[operator, no-any-return]
            choices=["a", "b", "c"],
            normalized_prompt_logprobs=[float(np.mean(values)) for values in given],
            input_token_logprobs=[[(v, 0, "") for v in values] for values in given],
            output_token_logprobs=[[], [], []],
            unconditional_token_logprobs=[[(v, 0, "") for v in values] for values in alone],
        ).decision

    assert decide(token_length_normalized) == "b"
    assert decide(greedy_token_selection) == "a"
    assert decide(unconditional_likelihood_normalized) == "a"  # (-1 + 2) / 2 is the most


@pytest.mark.parametrize(
    ("prompt", "choices", "message"),
    [
        (PROMPT, ["a", ""], r"choices\[1\]='' adds no token"),
        ("", ["a"], r"choices\[0\]='a' has no text before it"),
        (PROMPT, "abc", "choices='abc' must be a list of str"),
        (PROMPT, ["a", 3], "must be a list of str"),
        (PROMPT, ["x" * 5000], "leave no room"),
        (PROMPT, ["\ud800"], "surrogate"),
    ],
)
def test_choices_that_cannot_be_scored(
    engine: Engine, prompt: str, choices: list[str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        engine.score(prompt, choices)
    assert engine.stats()["pages_used"] == 0


def test_a_timeout_is_an_error(engine: Engine) -> None:
    with pytest.raises(EngineError, match="timeout"):
        engine.score(PROMPT, CHOICES, params=SamplingParams(timeout=0.0))


def teacher_forced(artifact: Path, cases: list[tuple[list[int], int]]) -> list[list[float]]:
    """Log probabilities of token ids from a place on, of each case."""

    async def use(runner: ModelRunner) -> list[list[float]]:
        found = []
        for ids, start in cases:
            pages = list(range(1, 2 + len(ids) // runner.config.page_size))
            [logits] = await runner.prefill_all([Row(ids, 0, pages)])
            rows = logprobs(logits[start - 1 : -1])
            found.append(rows[np.arange(len(rows)), ids[start:]].tolist())
        return found

    with open_runner(artifact) as run:
        return run(use)


@pytest.mark.model
def test_smollm2_scores_what_it_would_be_forced_to_say(smollm2_f32: Path) -> None:
    """Four choices after 500 tokens, computed together over a shared prefix."""
    prompt = "The weather was fine and everybody went out to the sea again. " * 38 + "Answer:"
    choices = [" True", " False", " Unknown", "s differ from one reader to the other"]
    with Engine(smollm2_f32) as engine:
        start = len(engine.encode(prompt))
        scores = engine.score(prompt, choices)
        tokens = [engine.encode(prompt + choice) for choice in choices]
    assert 480 < start < 560
    seams = [len(ids) - len(score.token_ids) for ids, score in zip(tokens, scores, strict=True)]
    expected = teacher_forced(smollm2_f32, list(zip(tokens, seams, strict=True)))
    for score, seam, likely in zip(scores, seams, expected, strict=True):
        assert seam <= start
        assert score.logprobs == pytest.approx(likely, abs=1e-3)


@pytest.mark.model
def test_a_choice_that_merges_with_the_prompt_is_scored_as_the_tokenizer_writes_it(
    smollm2: Path,
) -> None:
    with Engine(smollm2) as engine:
        merged, whole = engine.score("Answer: Tr", ["ue", " e"])
        true = engine.encode("Answer: True")
        plain: list[Score] = engine.score("Answer:", [" True"])
    assert merged.token_ids == true[-1:] == plain[0].token_ids
    assert merged.logprobs == pytest.approx(plain[0].logprobs, abs=0.05)
    assert len(whole.token_ids) == 1


def test_scores_do_not_depend_on_earlier_answers(engine: Engine) -> None:
    """An answer may have come in other tokens than the tokenizer splits it into."""
    before = engine.score(PROMPT, CHOICES)
    ids = engine.encode(PROMPT)
    tokens = [3 + byte for byte in b"xyz"]
    engine._inputs._encode.remember(PROMPT, ids, tokens, CHOICES[0])
    assert [s.token_ids for s in engine.score(PROMPT, CHOICES)] == [s.token_ids for s in before]
