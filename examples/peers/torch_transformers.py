"""transformers on torch, in bf16: `torch_transformers.py FOLDER TOKENS THREADS`."""

import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from worker import seconds, serve

torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()


@torch.inference_mode()
def evaluate(ids: list[int], cache: DynamicCache) -> int:
    """The likeliest token after `ids`, which follow what is in the cache."""
    output = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    return int(output.logits[0, -1].argmax())


def generate(token: int, count: int, cache: DynamicCache) -> None:
    for _ in range(count):
        token = evaluate([token], cache)


def warm(prompt: list[int]) -> None:
    decode(prompt, 8)


def decode(prompt: list[int], count: int) -> float:
    cache = DynamicCache(config=model.config)
    token = evaluate(prompt, cache)
    return (count - 1) / seconds(lambda: generate(token, count - 1, cache))


def prefill(prompt: list[int]) -> float:
    cache = DynamicCache(config=model.config)
    return len(prompt) / seconds(lambda: evaluate(prompt, cache))


def first(prompt: list[int]) -> int:
    return evaluate(prompt, DynamicCache(config=model.config))


def settings() -> str:
    threads = torch.get_num_threads()
    return f"transformers {transformers.__version__}, torch {torch.__version__}, {threads} threads"


serve({f.__name__: f for f in (first, warm, decode, prefill, settings)})
