"""llama.cpp: `llama_cpp_python.py MODEL.gguf TOKENS THREADS`, through its C functions.

Next tokens are numpy's argmax, which costs less than llama.cpp's own sampler.
"""

import sys

import llama_cpp
import numpy as np
from worker import seconds, serve

BATCH = 512  # llama.cpp's own default
path, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.Llama(
    path, n_ctx=tokens, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, verbose=False
)
context, num_tokens = model.ctx, model.n_vocab()


def clear() -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)


def evaluate(ids: list[int]) -> int:
    """The likeliest token after `ids`, which follow what is in the cache."""
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        array = (llama_cpp.llama_token * len(part))(*part)
        batch = llama_cpp.llama_batch_get_one(array, len(part))
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed at token {start} of {len(ids)}")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, (num_tokens,)).argmax())


def generate(token: int, count: int) -> None:
    for _ in range(count):
        token = evaluate([token])


def first(prompt: list[int]) -> int:
    clear()
    return evaluate(prompt)


def warm(prompt: list[int]) -> None:
    clear()
    generate(evaluate(prompt), 7)


def decode(prompt: list[int], count: int) -> float:
    clear()
    token = evaluate(prompt)
    return (count - 1) / seconds(lambda: generate(token, count - 1))


def prefill(prompt: list[int]) -> float:
    clear()
    return len(prompt) / seconds(lambda: evaluate(prompt))


def together(prompts: list[list[int]], count: int) -> float:
    """One request after the other."""

    def run() -> None:
        for prompt in prompts:
            clear()
            generate(evaluate(prompt), count - 1)

    return len(prompts) * count / seconds(run)


def cached(shared: list[int], one: list[int], other: list[int]) -> float:
    first(shared + one)
    memory = llama_cpp.llama_get_memory(context)
    llama_cpp.llama_memory_seq_rm(memory, 0, len(shared), -1)
    return seconds(lambda: evaluate(other))


def logits(chunks: list[list[int]], path: str) -> None:
    clear()
    found, done = [], 0
    for ids in chunks:
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, done + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed at token {done}")
        values = llama_cpp.llama_get_logits(context)
        found.append(np.ctypeslib.as_array(values, (len(ids), num_tokens)).copy())
        llama_cpp.llama_batch_free(batch)
        done += len(ids)
    np.save(path, np.concatenate(found))


def settings() -> str:
    return (
        f"llama-cpp-python {llama_cpp.__version__}, {threads} threads, KV in f16, batches of "
        f"{BATCH} tokens, one request at a time"
    )


serve({f.__name__: f for f in (
    first, warm, decode, prefill, together, cached, settings, logits
)})  # fmt: skip
