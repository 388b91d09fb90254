"""Scores of texts that could continue a prompt: the requests that it takes, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sf_local.engine.input_processor import (
    InputProcessor,
    PromptInput,
    deadline_of,
    needs_all_logits,
    split_options,
)
from sf_local.errors import EngineError, RequestError
from sf_local.kv_cache.radix_cache import common_prefix_len
from sf_local.request.checks import shown
from sf_local.request.output import Output, Score
from sf_local.request.params import ResolvedParams, SamplingParams
from sf_local.request.prompt import Prompt
from sf_local.vision.image_file import ImageInput


def score_requests(
    inputs: InputProcessor,
    prompt: str,
    continuations: Sequence[str],
    unconditional: bool,
    params: SamplingParams | None,
    options: Mapping[str, Any],
    started_at: float,
) -> list[tuple[PromptInput, ResolvedParams]]:
    """Every continuation after the prompt, then, with `unconditional`, each alone; arguments and
    errors as for `Engine.score`. The prompt is computed once, if it is not cached.

    started_at: `time.perf_counter()` of the call.

    Raises RequestError for a continuation that adds no token.
    """
    is_list = isinstance(continuations, Sequence) and not isinstance(continuations, str)
    if not (is_list and continuations and all(isinstance(c, str) for c in continuations)):
        raise RequestError(f"choices={shown(continuations)} must be a list of str, not empty")
    if (k := inputs.artifact.config.top_k) is not None:
        raise needs_all_logits("choices", continuations, k)
    params, others = split_options(params, options)
    given, images = inputs.resolved(params), inputs.given(others.get("images", ()))
    deadline = deadline_of(given, started_at)
    prompts, starts = _prompts(inputs, prompt, continuations, images, deadline)
    scored = ResolvedParams(
        max_new_tokens=0, return_logprob=True, priority=given.priority, timeout=given.timeout
    )
    pairs = list(zip(prompts, starts, strict=True))
    requests: list[tuple[PromptInput, ResolvedParams]] = [
        (ready, replace(scored, logprob_start_len=start - 1)) for ready, start in pairs
    ]
    if unconditional:
        alone = replace(scored, logprob_start_len=0)
        requests += [(ready.ids[start:], alone) for ready, start in pairs]
    return requests


def scores(outputs: Sequence[Output], unconditional: bool) -> list[Score]:
    """What the outputs of `score_requests` say; raises EngineError if the timeout passed."""
    for output in outputs:
        if output.finish_reason != "length":
            raise EngineError(f"scoring ended early: {output.finish_reason}")
    if not unconditional:
        return [_score(output, None) for output in outputs]
    count = len(outputs) // 2
    return [_score(*pair) for pair in zip(outputs[:count], outputs[count:], strict=True)]


def _prompts(
    inputs: InputProcessor, prompt: str, continuations: Sequence[str],
    images: Sequence[ImageInput], deadline: float | None,
) -> tuple[list[Prompt], list[int]]:  # fmt: skip
    """The prompt with each continuation, and how many of its tokens are the prompt's alone."""
    before = inputs.prepare(inputs.encode(prompt), images, deadline).ids if prompt else []
    prompts = [inputs.prepare(inputs.encode(prompt, c), images, deadline) for c in continuations]
    starts = [common_prefix_len(before, ready.ids) for ready in prompts]
    for index, (ready, start) in enumerate(zip(prompts, starts, strict=True)):
        if not 0 < start < len(ready.ids):
            problem = "has no text before it" if not start else "adds no token to the prompt"
            raise RequestError(f"choices[{index}]={shown(continuations[index])} {problem}")
    return prompts, starts


def _score(given: Output, alone: Output | None) -> Score:
    assert given.logprobs is not None
    return Score(
        token_ids=list(given.logprobs.prompt_ids[1:]),
        logprobs=[value for value in given.logprobs.prompt if value is not None],
        unconditional=alone.logprobs.prompt if alone and alone.logprobs else None,
        prompt_tokens=given.prompt_tokens,
        cached_tokens=given.cached_tokens,
    )
