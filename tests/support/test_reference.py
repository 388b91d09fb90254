"""The reference itself, judged by llama.cpp on the real SmolLM2."""

import json

import numpy as np
import pytest

from tests.support.reference import forward, logprobs
from tests.support.tiny import DATA

GOLDEN = DATA / "smollm2_greedy.json"  # llama.cpp, f32


@pytest.mark.model
def test_agrees_with_llama_cpp() -> None:
    source = pytest.importorskip("compile.sources.open").open_source("demo")
    weights = {name: np.asarray(t.read(slice(None))) for name, t in source.tensors.items()}
    for case in json.loads(GOLDEN.read_text())["cases"][:2]:
        prompt, generated = case["prompt_ids"], case["greedy_ids"]
        logits = forward(source.config, weights, prompt + generated[:-1], dtype=np.float32)
        steps = logprobs(logits[len(prompt) - 1 :])
        for step, top5 in zip(steps, case["top5_logprobs"], strict=True):
            ids, expected = zip(*top5, strict=True)
            np.testing.assert_allclose(step[list(ids)], expected, rtol=0, atol=0.05)
