"""How well an artifact predicts a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.sampling.logits import Floats
from tests.support.reference import logprobs
from tests.support.running import open_runner

CHUNK = 512  # tokens


def step_logprobs(
    artifact: Path, cases: list[dict[str, Any]], device: str = "cpu"
) -> list[np.ndarray]:
    """Log probabilities [steps, V] of each case, with the golden tokens forced."""

    async def use(runner: ModelRunner) -> list[np.ndarray]:
        results = []
        for case in cases:
            tokens = case["prompt_ids"] + case["greedy_ids"][:-1]
            pages = list(range(1, 2 + len(tokens) // runner.config.page_size))
            logits = (await runner.prefill_all([Row(tokens, 0, pages)]))[0]
            results.append(logprobs(logits[len(case["prompt_ids"]) - 1 :]))
        return results

    with open_runner(artifact, device=device, patience=3600) as run:
        return run(use)


def text_logits(artifact: Path, ids: Sequence[int]) -> Floats:
    """Logits [T, V] f32 after each of the tokens `ids` [T]."""

    async def use(runner: ModelRunner) -> Floats:
        pages = list(range(1, 2 + len(ids) // runner.config.page_size))
        found = [
            (await runner.prefill_all([Row(chunk, start, pages)]))[0]
            for start, chunk in zip(range(0, len(ids), CHUNK), chunks(ids), strict=True)
        ]
        return np.concatenate(found)

    with open_runner(artifact, num_pages=128) as run:
        return run(use)


def chunks(ids: Sequence[int]) -> list[list[int]]:
    """A text as it is computed, by us and by peers: CHUNK tokens at once."""
    return [list(ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)]


@dataclass(frozen=True)
class Quality:
    """How near logits are to those of f32, over all positions of a text.

    divergence: mean KL divergence from f32, in nats. agreement: the share of positions with the
    same likeliest token. perplexity: of the text, by these logits.
    """

    divergence: float
    agreement: float
    perplexity: float


def quality(logits: Floats, exact: Floats, ids: Sequence[int]) -> Quality:
    """Of logits [T, V] f32 after each of the tokens `ids` [T], against those of f32."""
    divergences, same = [], 0
    for start in range(0, len(ids), CHUNK):
        found, wanted = (_double_logprobs(a[start : start + CHUNK]) for a in (logits, exact))
        divergences.append((np.exp(wanted) * (wanted - found)).sum(axis=-1))
        same += int(np.count_nonzero(found.argmax(axis=-1) == wanted.argmax(axis=-1)))
    divergence = float(np.concatenate(divergences).mean())
    return Quality(divergence, same / len(ids), _perplexity(logits, ids))


def perplexity(artifact: Path, ids: Sequence[int]) -> float:
    """Of the tokens `ids` after the first one."""
    return _perplexity(text_logits(artifact, ids), ids)


def _perplexity(logits: Floats, ids: Sequence[int]) -> float:
    losses = []
    for start in range(0, len(ids) - 1, CHUNK):
        targets = ids[start + 1 : start + 1 + CHUNK]
        found = _double_logprobs(logits[start : start + len(targets)])
        losses.append(-found[np.arange(len(targets)), targets])
    return float(np.exp(np.concatenate(losses).mean()))


def _double_logprobs(logits: Floats) -> NDArray[np.float64]:
    return logprobs(logits.astype(np.float64))
