"""`python -m compile.tools.tune_cpu`: finds the fastest tuning of CPU kernels on this machine.

It tries one setting of `target.Tuning` after the other: builds a model for each of its values,
measures all of them in turn in one process, and keeps the best for the next setting. The results
for the CPUs we had are in `target.py`.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

from compile.build import build
from compile.options import BuildOptions
from compile.target import Tuning, resolve_target
from sf_local.engine.engine import Engine
from sf_local.request.params import SamplingParams

VALUES = {
    "ahead": (0, 1024, 2048, 4096, 8192),
    "blocks": (1, 2, 4),
    "task_bytes": (1 << 16, 1 << 17, 1 << 18, 1 << 19),
    "row_chunk": (64, 128, 256, 512),
}
Measure = Callable[[Engine], float]


def main() -> None:
    """Run the command with the arguments of the process."""
    args = _parser().parse_args()
    target = resolve_target("cpu", args.cpu)
    assert target.vectors is not None
    best = target.vectors.tuning
    args.weights = args.weights or target.weight_dtype
    for name in args.settings:
        candidates = [replace(best, **{name: value}) for value in VALUES[name]]
        if best not in candidates:
            candidates.insert(0, best)
        print(f"\n{name}, with {best}")
        figures = compare(args, candidates)
        base = figures[candidates.index(best)]
        ratios = [[ours / theirs for ours, theirs in zip(f, base, strict=True)] for f in figures]
        for candidate, values, ratio in zip(candidates, figures, ratios, strict=True):
            cells = [f"{v:9,.0f} ({r:4.2f})" for v, r in zip(values, ratio, strict=True)]
            print(f"  {getattr(candidate, name):>8} {' '.join(cells)}", flush=True)
        best = candidates[max(range(len(candidates)), key=lambda i: math.prod(ratios[i]))]
    print(f"\n{args.weights}: {best}")


def compare(args: argparse.Namespace, candidates: Sequence[Tuning]) -> list[list[float]]:
    """Tokens a second, [candidates][measurements]: medians over rounds in which each had a turn."""
    with tempfile.TemporaryDirectory(prefix="sf-search-") as folder, ExitStack() as stack:
        engines = []
        for i, tuning in enumerate(candidates):
            options = BuildOptions(
                cpu=args.cpu, weight_dtype=args.weights, tuning=tuning, prefill_batch_sizes=(1,),
                decode_batch_sizes=(1, 8),
            )  # fmt: skip
            path = build(args.source, Path(folder) / str(i), options)
            engines.append(stack.enter_context(Engine(path, kv_memory="128MiB")))
        rounds = [[[measure(e) for measure in MEASURES.values()] for e in engines]
                  for _ in range(args.rounds + 1)]  # fmt: skip
        return [
            [median(r[e][m] for r in rounds[1:]) for m in range(len(MEASURES))]
            for e in range(len(engines))
        ]


def _decode(rows: int) -> Measure:
    def measure(engine: Engine) -> float:
        count = 64
        params = SamplingParams(max_new_tokens=count, ignore_eos=True, temperature=0)
        handles = [engine.submit(_prompt(engine, 16), params) for _ in range(rows)]
        outputs = [handle.result() for handle in handles]
        spans = [output.latency - output.time_to_first_token for output in outputs]
        return rows * (count - 1) / median(spans)

    return measure


def _prefill(engine: Engine) -> float:
    output = engine.generate(_prompt(engine, 512), SamplingParams(max_new_tokens=1))
    return 512 / output.time_to_first_token


def _prompt(engine: Engine, length: int) -> list[int]:
    return random.choices(range(engine.vocab_size), k=length)


MEASURES: dict[str, Measure] = {
    "decode 1": _decode(1), "decode 8": _decode(8), "prefill 512": _prefill,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compile.tools.tune_cpu",
        description=f"Tokens a second of {', '.join(MEASURES)}, for each value of each setting.",
    )
    parser.add_argument("settings", nargs="*", default=list(VALUES), help=f"{', '.join(VALUES)}")
    parser.add_argument("--source", default="demo", help="as sf-compile takes it (%(default)s)")
    parser.add_argument("--weights", help="weight type (default: 16 bits, as the CPU has them)")
    parser.add_argument("--cpu", default="host", help="CPU level (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    main()
