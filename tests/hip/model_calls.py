"""Calls of a model's functions, for child processes whose GPU is the stand-in.

Tokens and pages are fixed: a test knows from `Plan` what was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.sampling.logits import ModelOutput
from tests.support.running import open_runner

Arrays = dict[str, npt.NDArray[Any]]
SPECIAL = 3  # tokens that stand for no byte


@dataclass(frozen=True)
class Plan:
    """What is computed: a prompt, then `steps` tokens after it one by one, then as many after each
    of `forks` others, which begin with some of the prompt's pages."""

    vocab_size: int
    page: int = 8  # tokens
    prompt: int = 21  # tokens
    steps: int = 3
    forks: int = 8

    def own(self, i: int, length: int) -> list[int]:
        """The first tokens that are the i-th fork's alone; those of i = -1 are the prompt's."""
        rng = np.random.default_rng(100 + i)
        return [int(token) for token in rng.integers(SPECIAL, self.vocab_size, length)]

    @property
    def tokens(self) -> list[int]:
        """The prompt, and what follows it."""
        return self.own(-1, self.prompt + self.steps)

    def shared(self, i: int) -> int:
        """How many of the prompt's pages the i-th fork begins with."""
        return i % (self.prompt // self.page + 1)

    def fork(self, i: int) -> list[int]:
        """All tokens of the i-th fork."""
        return self.tokens[: self.shared(i) * self.page] + self.own(i, self.steps)

    @property
    def num_pages(self) -> int:
        """All that there must be, with page 0, which is nobody's."""
        return 1 + self._num_prompt_pages + self.forks * self._num_fork_pages

    def prompt_row(self, start: int, end: int) -> Row:
        return Row(self.tokens[start:end], start, range(1, 1 + self._num_prompt_pages))

    def fork_row(self, i: int, step: int) -> Row:
        shared, begin = self.shared(i), 1 + self._num_prompt_pages + i * self._num_fork_pages
        pages = [*range(1, 1 + shared), *range(begin, begin + step // self.page + 1)]
        return Row([self.own(i, step + 1)[step]], shared * self.page + step, pages)

    @property
    def _num_prompt_pages(self) -> int:
        return -(-(self.prompt + self.steps) // self.page)

    @property
    def _num_fork_pages(self) -> int:
        return -(-self.steps // self.page)


def run_calls(artifact: Path, plan: Plan, patience: float = 300) -> Arrays:
    """Calls each function of a language model; returns what came of each.

    "prefill": logits [prompt, V]. "next": logits [1, V] after the prompt, which is computed in two
    calls if it has two pages. "one": [1, steps, V], after each token that follows. "forks":
    [forks, steps, V]. For the last three also "..._best", the best tokens, as the model says.
    """
    with open_runner(artifact, plan.num_pages, "hip", patience) as run:
        return run(lambda runner: _calls(runner, plan))


async def _calls(runner: ModelRunner, plan: Plan) -> Arrays:
    prompt, steps = plan.prompt, range(plan.steps)
    half = prompt // 2 // plan.page * plan.page
    [logits] = await runner.prefill_all([plan.prompt_row(0, prompt)])
    if half:
        await runner.prefill([plan.prompt_row(0, half)])
    results = {"prefill": logits}
    results |= _stacked("next", [await runner.prefill([plan.prompt_row(half, prompt)])])
    one = [await runner.decode([plan.prompt_row(prompt + i, prompt + i + 1)]) for i in steps]
    results |= _stacked("one", one)
    if plan.forks:
        rows = [[plan.fork_row(i, step) for i in range(plan.forks)] for step in steps]
        results |= _stacked("forks", [await runner.decode(each) for each in rows])
    return results


def _stacked(name: str, following: Sequence[ModelOutput]) -> Arrays:
    """[n, steps, V] and [n, steps]"""
    return {
        name: np.stack([each.logits for each in following], axis=1),
        f"{name}_best": np.stack([each.best for each in following], axis=1),
    }
