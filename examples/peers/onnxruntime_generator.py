"""ONNX Runtime GenAI: `onnxruntime_generator.py FOLDER TOKENS THREADS`.

Requests that run together are one batch, of prompts of one length. It has no prefix cache: a second
question goes back to where the shared prefix ends, with `rewind_to`.
"""

import json
import sys

import numpy as np
import onnxruntime_genai
from worker import seconds, serve

folder, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = onnxruntime_genai.Config(folder)
options = {"intra_op_num_threads": threads}
config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
model = onnxruntime_genai.Model(config)


def generator(rows: int, length: int) -> onnxruntime_genai.Generator:
    """One that does not stop at the model's own end tokens."""
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(
        batch_size=rows, max_length=length, min_length=length, do_sample=False
    )
    return onnxruntime_genai.Generator(model, params)


def prefilled(prompts: list[list[int]], num_new: int) -> onnxruntime_genai.Generator:
    """A generator that has the first of `num_new` tokens."""
    found = generator(len(prompts), len(prompts[0]) + num_new)
    found.append_tokens(np.array(prompts, np.int32))
    found.generate_next_token()
    return found


def finish(part: onnxruntime_genai.Generator) -> None:
    while not part.is_done():
        part.generate_next_token()


def first(prompt: list[int]) -> int:
    return int(prefilled([prompt], 2).get_next_tokens()[0])


def warm(prompt: list[int]) -> None:
    finish(prefilled([prompt], 8))


def decode(prompt: list[int], num_new: int) -> float:
    part = prefilled([prompt], num_new)
    return (num_new - 1) / seconds(lambda: finish(part))


def prefill(prompt: list[int]) -> float:
    return len(prompt) / seconds(lambda: prefilled([prompt], 1))


def together(prompts: list[list[int]], num_new: int) -> float:
    return len(prompts) * num_new / seconds(lambda: finish(prefilled(prompts, num_new)))


def cached(shared: list[int], one: list[int], other: list[int]) -> float:
    part = prefilled([shared + one], 2 + len(other))

    def ask() -> None:
        part.rewind_to(len(shared))
        part.append_tokens(np.array([other], np.int32))
        part.generate_next_token()

    return seconds(ask)


def settings() -> str:
    return (
        f"onnxruntime-genai {onnxruntime_genai.__version__}, weights asymmetric in groups of 32, "
        f"activations in 8 bits, {threads} threads, KV in f32, one batch, rewind_to"
    )


def logits(chunks: list[list[int]], path: str) -> None:
    """Token by token, for the model gives only those of the last one."""
    ids = [token for chunk in chunks for token in chunk]
    part, found = generator(1, len(ids) + 1), []
    for token in ids:
        part.append_tokens(np.array([[token]], np.int32))
        found.append(np.array(part.get_output("logits"), np.float32)[0])
    np.save(path, np.concatenate(found))


serve({f.__name__: f for f in (
    first, warm, decode, prefill, together, cached, settings, logits
)})  # fmt: skip
