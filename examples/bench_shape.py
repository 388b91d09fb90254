"""Converts a large Llama's shape with random weights, and measures load, prefill and decode.

    bench_shape.py llama-3.1-8b --weights int8 --peers FOLDER

llama.cpp does the same in turn, as in bench_peers.py, if `install_peers.sh FOLDER` has made it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median

from bench_peers import Job, Worker, our_worker, peer_worker, tokens
from peers.shapes import KINDS, SHAPES, random_gguf

from compile import BuildOptions, build
from sf_local.artifact.cache import cache_dir

MAX_TOKENS = 1024
JOBS = {
    "prefill, 512 tokens": Job("prefill", lambda rng: [tokens(512)(rng)]),
    "decode, 1 row": Job("decode", lambda rng: [tokens(16)(rng), 32]),
}


def main() -> None:
    args = _parser().parse_args()
    source = random_gguf(args.shape, args.weights)
    artifact = cache_dir() / "artifacts" / f"{args.shape}-{args.weights}"
    options = BuildOptions(weight_dtype=args.weights, max_seq_len=MAX_TOKENS)
    started_at = time.perf_counter()
    build(source, artifact, options, force=True)
    size = sum(file.stat().st_size for file in artifact.iterdir()) / 1e9
    print(f"{artifact}: {size:.1f} GB, made in {time.perf_counter() - started_at:.0f} s")
    workers: dict[str, Worker | str] = {
        "ours": our_worker(artifact, MAX_TOKENS),
        f"llama.cpp {KINDS[args.weights]}": peer_worker(
            args.peers, "llama.cpp", "llama_cpp_python.py", lambda: source, MAX_TOKENS
        ),
    }
    for name, worker in workers.items():
        if isinstance(worker, str):
            print(f"{name}: {worker}")
            continue
        worker.is_model = False  # of the capital of France it knows nothing
        try:
            start = worker.measure(Job("first", lambda rng: [], fresh=True), [[1, 2, 3]])
            rates = {job: measure(worker, JOBS[job], args.rounds) for job in JOBS}
            print(f"{name}: start to first token {start:.1f} s")
            for job, values in rates.items():
                spread = f"{min(values):.3g} to {max(values):.3g}"
                print(f"{name}: {job} {median(values):.3g} tokens/s ({spread})")
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
        finally:
            worker.close()


def measure(worker: Worker, job: Job, rounds: int) -> list[float]:
    return [worker.measure(job, job.arguments(random.Random(i))) for i in range(rounds)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="a large shape with random weights")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--weights", choices=KINDS, default="int8")
    parser.add_argument("--peers", type=Path, default=cache_dir() / "peers")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
