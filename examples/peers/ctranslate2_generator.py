"""CTranslate2: `ctranslate2_generator.py FOLDER TOKENS THREADS`.

Requests that run together are one batch. Its prefix cache is `static_prompt`, which the caller
names. It has no f16 or bf16 on CPUs, and no 4 bits.
"""

import json
import sys
import time
from pathlib import Path

import ctranslate2
import numpy as np
from worker import jobs_of, seconds, serve

folder, threads = sys.argv[1], int(sys.argv[3])
model = ctranslate2.Generator(
    folder, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
)
names = json.loads((Path(folder) / "vocabulary.json").read_text())


def generate(prompts: list[list[int]], num_new: int, **options: object) -> list[list[int]]:
    results = model.generate_batch(
        [[names[token] for token in prompt] for prompt in prompts],
        max_length=num_new, min_length=num_new, include_prompt_in_result=False, **options,
    )  # fmt: skip
    answers = [result.sequences_ids[0] for result in results]
    assert all(len(ids) == num_new for ids in answers)
    return answers


def decode(prompt: list[int], num_new: int) -> float:
    times: list[float] = []
    generate([prompt], num_new, callback=lambda step: times.append(time.perf_counter()))
    return (len(times) - 1) / (times[-1] - times[0])


def cached(shared: list[int], one: list[int], other: list[int]) -> float:
    prefix = [names[token] for token in shared]
    generate([one], 1, static_prompt=prefix)
    return seconds(lambda: generate([other], 1, static_prompt=prefix))


def settings() -> str:
    return (
        f"ctranslate2 {ctranslate2.__version__}, {model.compute_type}, a scale a row, {threads} "
        "threads, KV in f32, one batch, static_prompt"
    )


def logits(chunks: list[list[int]], path: str) -> None:
    """Of all chunks at once, for it keeps no cache between two calls."""
    found = model.forward_batch([[token for ids in chunks for token in ids]])
    np.save(path, np.array(found.to(ctranslate2.DataType.float32))[0])


serve(jobs_of(generate) | {f.__name__: f for f in (decode, cached, settings, logits)})
