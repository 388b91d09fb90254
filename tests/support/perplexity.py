"""How well an artifact predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from tests.support.reference import logprobs
from tests.support.running import open_runner


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
