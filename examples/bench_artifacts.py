"""Prefill and decode of several artifacts of one model, in turn, so that load slows all alike.

With --busy 2 each is also measured beside two processes that only count.
"""

import argparse
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

from sf_local import Engine

parser = argparse.ArgumentParser()
parser.add_argument("artifacts", nargs="+", help="folders, or what is compiled once")
parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512, 2048], help="in tokens")
parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16], help="that decode together")
parser.add_argument("--answer", type=int, default=64, help="in tokens")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--busy", type=int, default=0, help="processes that only count")
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


@contextmanager
def busy(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(name: str, rate: Callable[[Engine, int], float], size: int) -> None:
    """Print a row for an idle machine and, if asked, one for a busy one; rounds take turns."""
    counts = [0, args.busy] if args.busy else [0]
    rounds: dict[int, list[list[float]]] = {count: [] for count in counts}
    for _ in range(args.rounds):
        for count in counts:
            with busy(count):
                rounds[count].append([rate(engine, size) for engine in engines])
    idle = [median(rates) for rates in zip(*rounds[0], strict=True)]
    for count in counts:
        cells = []
        for rates, alone in zip(zip(*rounds[count], strict=True), idle, strict=True):
            middle = median(rates)
            cell = f"{middle:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            against = f"time x {alone / middle:.2f}" if count else f"{middle / idle[0]:.2f}"
            cells.append(f"{cell}, {against}")
        print(
            f"{name} {size}" + (f" beside {count}" if count else ""), *cells, sep=" | ", flush=True
        )


with ExitStack() as stack:
    engines = [stack.enter_context(Engine.from_source(path)) for path in args.artifacts]
    print("tokens/s, median (least to most), over the first", *args.artifacts, sep=" | ")
    for length in args.prompts:
        measure("prefill", prefill, length)
    for rows in args.rows:
        measure("decode", decode, rows)
