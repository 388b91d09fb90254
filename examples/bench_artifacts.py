"""Prefill and decode of several artifacts of one model, in turn, so that load slows all alike."""

import argparse
import random
from contextlib import ExitStack
from statistics import median

from sf_local import Engine

parser = argparse.ArgumentParser()
parser.add_argument("artifacts", nargs="+", help="folders, or what is compiled once")
parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048], help="in tokens")
parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16], help="that decode together")
parser.add_argument("--answer", type=int, default=64, help="in tokens")
parser.add_argument("--rounds", type=int, default=9)
args = parser.parse_args()
draw = random.Random(0)


def prefill(engine: Engine, length: int) -> float:
    engine.flush_cache()
    prompt = [draw.randrange(engine.vocab_size) for _ in range(length)]
    output = engine.generate(prompt, max_tokens=1, temperature=0, ignore_eos=True)
    return length / output.time_to_first_token


def decode(engine: Engine, rows: int) -> float:
    prompts = [[draw.randrange(engine.vocab_size) for _ in range(16)] for _ in range(rows)]
    outputs = engine.generate(prompts, max_tokens=args.answer, temperature=0, ignore_eos=True)
    spans = [output.latency - output.time_to_first_token for output in outputs]
    return rows * (args.answer - 1) / median(spans)


with ExitStack() as stack:
    engines = [stack.enter_context(Engine.from_source(path)) for path in args.artifacts]
    print("tokens/s, median (least to most), over the first", *args.artifacts, sep=" | ")
    for measure, sizes in ((prefill, args.prompts), (decode, args.rows)):
        for size in sizes:
            rounds = [[measure(engine, size) for engine in engines] for _ in range(args.rounds)]
            rates = list(zip(*rounds, strict=True))
            first = median(rates[0])
            cells = [
                f"{median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f}), {median(r) / first:.2f}"
                for r in rates
            ]
            print(f"{measure.__name__} {size}", *cells, sep=" | ", flush=True)
