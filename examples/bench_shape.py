"""Converts a Llama's shape with random weights, and measures load, prefill and decode.

    bench_shape.py llama-3.1-8b --weights int8 --peers FOLDER

llama.cpp and OpenVINO GenAI do the same in turn, as in bench_peers.py, as far as
`install_peers.sh FOLDER` has made them; --without leaves one out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench_peers import (
    NUM_CORES,
    PEERS,
    Job,
    Row,
    Worker,
    measure,
    our_worker,
    peer_worker,
    python_of,
    results,
    settings_of,
    text,
    tokens,
)
from peers import conversions, models
from peers.shapes import KINDS, SHAPES, random_gguf

from compile import BuildOptions, build
from compile.options import ACTIVATIONS
from sf_local.artifact.cache import cache_dir

MAX_TOKENS = 1024
COMPARED = "llama.cpp", "OpenVINO GenAI"
JOBS = {
    "prefill, 512 tokens": Job("prefill", lambda rng: [tokens(512)(rng)]),
    "decode, 1 row": Job("decode", lambda rng: [tokens(16)(rng), 32]),
    "start to first token": Job("first", lambda rng: [[1, 2, 3]], fresh=True),
}


def main() -> None:
    args = _parser().parse_args()
    source = random_gguf(args.shape, args.weights)
    name = "-".join(filter(None, (args.shape, args.weights, args.activations)))
    artifact = cache_dir() / "artifacts" / name
    options = BuildOptions(
        weight_dtype=args.weights, activation_dtype=args.activations, max_seq_len=MAX_TOKENS
    )
    started_at = time.perf_counter()
    build(source, artifact, options, force=True)
    size = sum(file.stat().st_size for file in artifact.iterdir()) / 1e9
    print(f"{artifact}: {size:.1f} GB, made in {time.perf_counter() - started_at:.0f} s")
    workers = _workers(artifact, source, args)
    ours, *theirs = workers
    table = [
        Row(work, job, ours, name, unit="s" if job.fresh else "tokens/s")
        for name in theirs or [""]
        for work, job in JOBS.items()
    ]
    try:
        measured = measure(table, workers, args.rounds, lambda line: print(line, file=sys.stderr))
    finally:
        for worker in workers.values():
            if not isinstance(worker, str):
                worker.close()
    print(text(results(table, measured)))
    print("\n".join(f"{name}: {stated}" for name, stated in settings_of(workers).items()))
    print(f"{NUM_CORES} cores, {args.rounds} rounds")


def _workers(artifact: Path, source: Path, args: argparse.Namespace) -> dict[str, Worker | str]:
    """Ours and the peers, by name; or why one is missing."""
    kinds = {name: PEERS[name].kinds[args.weights] for name in COMPARED}
    python = python_of(args.peers, "OpenVINO GenAI")
    files = {
        "llama.cpp": lambda: source,
        "OpenVINO GenAI": lambda: conversions.openvino(
            python, kinds["OpenVINO GenAI"], models.as_folder(source)
        ),
    }
    workers: dict[str, Worker | str] = {f"ours {args.weights}": our_worker(artifact, MAX_TOKENS)}
    for name, file in files.items():
        if name not in args.without:
            workers[f"{name} {kinds[name]}"] = peer_worker(
                args.peers, name, PEERS[name].script, file, MAX_TOKENS
            )
    for worker in workers.values():
        if not isinstance(worker, str):
            worker.is_demo = False
    return workers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the shape of a Llama with random weights")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--weights", choices=KINDS, default="int8")
    parser.add_argument("--activations", choices=ACTIVATIONS)
    parser.add_argument("--peers", type=Path, default=cache_dir() / "peers")
    parser.add_argument("--without", choices=COMPARED, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
