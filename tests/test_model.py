"""The real SmolLM2 against llama.cpp's greedy tokens, logprobs and perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_data
from reference import logprobs
from running import open_runner

from sf_local.engine import Engine
from sf_local.request import SamplingParams
from sf_local.runner import ModelRunner, Row

pytestmark = pytest.mark.model
TIE = 0.05  # llama.cpp's KV cache is f16: nearer than this, either token may follow


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(shared_data("smollm2_greedy.json").read_text())[
        "cases"
    ]
    assert len(cases) == 16
    return cases


def step_logprobs(artifact: Path, cases: list[dict[str, Any]]) -> list[np.ndarray]:
    """Log probabilities [steps, V] of each case, with the golden tokens forced."""

    async def use(runner: ModelRunner) -> list[np.ndarray]:
        results = []
        for case in cases:
            tokens = case["prompt_ids"] + case["greedy_ids"][:-1]
            pages = list(range(1, 2 + len(tokens) // runner.config.page_size))
            logits = (await runner.prefill_all([Row(tokens, 0, pages)]))[0]
            results.append(logprobs(logits[len(case["prompt_ids"]) - 1 :]))
        return results

    with open_runner(artifact) as run:
        return run(use)


def first_tie(case: dict[str, Any]) -> int:
    """The first step whose two likeliest tokens are nearly equal, or the number of steps."""
    for i, ((_, first), (_, second), *_) in enumerate(case["top5_logprobs"]):
        if first - second <= TIE:
            return i
    return len(case["greedy_ids"])


def test_f32_follows_llama_cpp(smollm2_f32: Path, golden: list[dict[str, Any]]) -> None:
    """Tokens up to the first near-tie, through prefill and decode of the engine."""
    with Engine(smollm2_f32) as engine:
        for case in golden:
            steps = len(case["greedy_ids"])
            output = engine.generate(
                case["prompt_ids"], SamplingParams(temperature=0, max_new_tokens=steps)
            )
            end = first_tie(case)
            assert output.token_ids[:end] == case["greedy_ids"][:end], case["prompt"]


def test_f32_logprobs_are_llama_cpps(smollm2_f32: Path, golden: list[dict[str, Any]]) -> None:
    """The five likeliest of every step within 0.05."""
    for case, found in zip(golden, step_logprobs(smollm2_f32, golden), strict=True):
        assert len(found) == len(case["top5_logprobs"])
        for i, top in enumerate(case["top5_logprobs"]):
            for token, expected in top:
                assert abs(found[i, token] - expected) <= 0.05, (case["prompt"], i, token)


def test_bf16_agrees_on_the_likeliest_token(smollm2: Path, golden: list[dict[str, Any]]) -> None:
    """At least 98% of the golden steps, each with the golden tokens before it."""
    found = np.concatenate([x.argmax(axis=1) for x in step_logprobs(smollm2, golden)])
    expected = np.concatenate([case["greedy_ids"] for case in golden])
    assert len(expected) == 572
    assert (found == expected).mean() >= 0.98


def perplexity(artifact: Path, ids: list[int]) -> float:
    async def use(runner: ModelRunner) -> float:
        pages = list(range(1, 2 + len(ids) // runner.config.page_size))
        losses = []
        for start in range(0, len(ids) - 1, 512):
            chunk = ids[start : min(start + 512, len(ids) - 1)]
            logits = (await runner.prefill_all([Row(chunk, start, pages)]))[0]
            targets = ids[start + 1 : start + 1 + len(chunk)]
            losses.append(-logprobs(logits)[np.arange(len(chunk)), targets])
        return float(np.exp(np.concatenate(losses).mean()))

    with open_runner(artifact, num_pages=128) as run:
        return run(use)


def test_perplexity(smollm2: Path, smollm2_f32: Path) -> None:
    """Within 0.2% of llama.cpp's for f32, 1% for bf16."""
    data = json.loads(shared_data("smollm2_perplexity.json").read_text())
    assert perplexity(smollm2_f32, data["ids"]) == pytest.approx(data["ppl"], rel=0.002)
    assert perplexity(smollm2, data["ids"]) == pytest.approx(data["ppl"], rel=0.01)
