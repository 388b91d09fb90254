"""What weight types cost on SmolLM2: `python tests/tools/weight_quality.py [--peers FOLDER]`.

Steps whose likeliest token is llama.cpp's in f32; KL divergence from our logits in f32, over all
positions of a text, with its perplexity; and the perplexity of our own 4-bit quantizer on matrices
whose groups are shifted by half a group, so that the source's blocks are no help. It takes some
minutes. With --peers, the folder that examples/install_peers.sh made, the divergence of every peer
of examples/bench_peers.py that is there stands beside ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from compile import BuildOptions, build
from compile.formats.blocks import GROUP
from compile.formats.quantize import quantized
from compile.options import ACTIVATIONS
from compile.sources.open import open_source
from compile.sources.source import Source, SourceTensor
from compile.target import resolve_target
from sf_local import from_source
from sf_local.sampling.logits import Floats
from tests.support.perplexity import (
    Quality,
    chunks,
    perplexity,
    quality,
    step_logprobs,
    text_logits,
)
from tests.support.quantized import plain_int4
from tests.support.tiny import DATA

EXAMPLES = Path(__file__).parents[2] / "examples"


def variants() -> Iterator[dict[str, str]]:
    """Build options of each weight type, with all activations that this CPU multiplies."""
    vectors = resolve_target("cpu").vectors
    yield from ({"weight_dtype": dtype} for dtype in ("f16", "bf16"))
    for dtype, activations in product(("int8", "int4"), ACTIVATIONS):
        if activations != "bf16" or (vectors and vectors.has_tiles):
            yield {"weight_dtype": dtype, "activation_dtype": activations}


def agreement(artifact: Path) -> str:
    cases = json.loads((DATA / "smollm2_greedy.json").read_text())["cases"]
    found = step_logprobs(artifact, cases)
    same = [
        logprobs.argmax(axis=-1) == case["greedy_ids"][: len(logprobs)]
        for case, logprobs in zip(cases, found, strict=True)
    ]
    return f"{sum(map(np.count_nonzero, same))} of {sum(map(len, same))}"


def golden_text() -> tuple[list[int], float]:
    """Token ids of a text, and its perplexity by llama.cpp in f32."""
    data = json.loads((DATA / "smollm2_perplexity.json").read_text())
    return data["ids"], data["ppl"]


def above(found: float) -> str:
    """What a perplexity is above llama.cpp's in f32."""
    return f"perplexity {100 * (found / golden_text()[1] - 1):+.2f}%"


def shown(found: Quality) -> str:
    return (
        f"KL divergence {found.divergence:.6f}, {above(found.perplexity)}, "
        f"f32's token at {found.agreement:.2%} of positions"
    )


def peers_logits(folder: Path, ids: list[int]) -> Iterator[tuple[str, Floats | str]]:
    """Name and logits [T, V] of each peer in `folder`, at each width; or why there are none.

    The name of one that gave logits ends with its settings.
    """
    sys.path.insert(0, str(EXAMPLES))
    import bench_peers

    for name, peer in bench_peers.PEERS.items():
        for kind in dict.fromkeys(peer.kinds.values()):
            worker = bench_peers.peer_of_kind(folder, name, kind)
            found = worker_logits(worker, ids)
            stated = bench_peers.settings_of({kind: worker}).values()
            yield " ".join([name, kind, *(f"({settings})" for settings in stated)]), found


def worker_logits(worker: Any, ids: list[int]) -> Floats | str:
    """Logits [T, V] of a worker of examples/bench_peers.py, which is closed; or why none."""
    if isinstance(worker, str):
        return worker
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        try:
            worker.answer("logits", chunks(ids), str(path))
            return np.load(path)
        except RuntimeError as error:
            return str(error)
        finally:
            worker.close()


def four_bits(x: np.ndarray) -> np.ndarray:
    return quantized(x, "int4").dequantized()


def shifted(source: Source, change: Callable[[np.ndarray], np.ndarray]) -> Source:
    """The layers' matrices as `change` leaves them, with groups that begin in mid-block."""

    def changed(tensor: SourceTensor) -> SourceTensor:
        def read(rows: slice) -> np.ndarray:
            moved = np.roll(tensor.read(rows).astype(np.float32), GROUP // 2, axis=1)
            return np.roll(change(moved), -GROUP // 2, axis=1)

        return replace(tensor, read=read, groups=None)

    tensors = {
        name: changed(tensor) if name.startswith("blk") and len(tensor.shape) == 2 else tensor
        for name, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what weight types cost on SmolLM2")
    parser.add_argument("--peers", metavar="FOLDER", type=Path, help="made by install_peers.sh")
    args = parser.parse_args(arguments)
    ids, _ = golden_text()
    exact = text_logits(from_source("demo", weight_dtype="f32"), ids)
    print(f"f32: {shown(quality(exact, exact, ids))}", flush=True)
    for options in variants():
        artifact, name = from_source("demo", **options), " by ".join(options.values())
        logits = text_logits(artifact, ids)
        print(f"{name}: llama.cpp's token in {agreement(artifact)} steps", flush=True)
        print(f"{name}: {shown(quality(logits, exact, ids))}", flush=True)
    for name, found in peers_logits(args.peers, ids) if args.peers else ():
        result = found if isinstance(found, str) else shown(quality(found, exact, ids))
        print(f"{name}: {result}", flush=True)
    plain = BuildOptions(weight_dtype="f32", prefill_batch_sizes=(1,), decode_batch_sizes=(1,))
    for change in (four_bits, plain_int4):
        with tempfile.TemporaryDirectory() as folder:
            opened = shifted(open_source("demo"), change)
            artifact = build(opened, Path(folder) / "shifted", plain)
            found = perplexity(artifact, ids)
            print(f"shifted, {change.__name__}: {above(found)}", flush=True)


if __name__ == "__main__":
    main()
