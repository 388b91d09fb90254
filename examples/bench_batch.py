"""How well sf-local batch shares beginnings: 2,000 prompts, 50 preambles and a small KV cache.

Prints prompt tokens that were computed, and seconds: for prompts in the order of their preambles,
in random order, and in random order without putting those with a common beginning together.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from unittest import mock

from sf_local import Engine, run_batch
from sf_local.frontend import batch_input

parser = argparse.ArgumentParser()
parser.add_argument("--vmfb", default="demo", help="artifact, or what is compiled once")
parser.add_argument("--preambles", type=int, default=50)
parser.add_argument("--prompts", type=int, default=40, help="of each preamble")
parser.add_argument("--words", type=int, default=250, help="of a preamble")
parser.add_argument("--kv-memory", default="64MiB")
args = parser.parse_args()
draw = random.Random(1)
words = ["the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "by", "with", "as", "at"]
preambles = [" ".join(draw.choices(words, k=args.words)) for _ in range(args.preambles)]
in_order = [
    json.dumps({"prompt": f"{preamble}. Question {n}:", "max_new_tokens": 4, "temperature": 0})
    for preamble in preambles
    for n in range(args.prompts)
]
shuffled = draw.sample(in_order, len(in_order))


def measure(name: str, lines: list[str], as_it_came: bool = False) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.from_source(args.vmfb, kv_memory=args.kv_memory, progress=True) as engine,
        mock.patch.object(batch_input, "MAX_BLOCKS", 0 if as_it_came else batch_input.MAX_BLOCKS),
    ):
        source = Path(folder, "in.jsonl")
        source.write_text("\n".join(lines))
        began = time.perf_counter()
        run_batch(engine, source, Path(folder, "out.jsonl"), max_in_flight=32)
        seconds, stats = time.perf_counter() - began, engine.stats()
    computed = stats["prompt_tokens"] - stats["cached_tokens"]
    print(f"{name:24} {computed:9.0f} prompt tokens computed {seconds:7.1f} s", flush=True)


measure("in order", in_order)
measure("random order", shuffled)
measure("random order, as it came", shuffled, as_it_came=True)
