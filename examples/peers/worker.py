"""The loop of every worker: it reads jobs as JSON lines and answers each with a value.

A job is `[name, arguments...]`, its reply `{"value": ...}` or `{"error": "..."}`. Whatever the
peer's libraries print goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(jobs: Mapping[str, Callable[..., Any]]) -> None:
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            reply = {"value": jobs[name](*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=REPLIES, flush=True)


def seconds(work: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def jobs_of(generate: Callable[[list[list[int]], int], list[list[int]]]) -> dict[str, Any]:
    """The jobs that need only `generate(prompts, num_new)`: the new tokens of each."""

    def first(prompt: list[int]) -> int:
        return generate([prompt], 1)[0][0]

    def warm(prompt: list[int]) -> None:
        generate([prompt], 8)

    def prefill(prompt: list[int]) -> float:
        return len(prompt) / seconds(lambda: generate([prompt], 1))

    def together(prompts: list[list[int]], num_new: int) -> float:
        return len(prompts) * num_new / seconds(lambda: generate(prompts, num_new))

    return {f.__name__: f for f in (first, warm, prefill, together)}
