"""What weight types cost on SmolLM2: `python tests/tools/weight_quality.py`, some minutes.

Steps whose likeliest token is llama.cpp's in f32; and the perplexity of our own 4-bit quantizer on
matrices whose groups are shifted by half a group, so that the source's blocks are no help.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from compile import BuildOptions, build
from compile.formats.quantize import GROUP, quantized
from compile.sources.open import open_source
from compile.sources.source import Source, SourceTensor
from sf_local import from_source
from tests.support.perplexity import perplexity, step_logprobs
from tests.support.quantized import plain_int4
from tests.support.tiny import DATA


def agreement(dtype: str) -> str:
    cases = json.loads((DATA / "smollm2_greedy.json").read_text())["cases"]
    found = step_logprobs(from_source("demo", weight_dtype=dtype), cases)
    same = [
        logprobs.argmax(axis=-1) == case["greedy_ids"][: len(logprobs)]
        for case, logprobs in zip(cases, found, strict=True)
    ]
    return f"{sum(map(np.count_nonzero, same))} of {sum(map(len, same))}"


def cost(artifact: Path) -> str:
    """What its perplexity is above llama.cpp's in f32."""
    data = json.loads((DATA / "smollm2_perplexity.json").read_text())
    return f"{100 * (perplexity(artifact, data['ids']) / data['ppl'] - 1):+.2f}%"


def four_bits(x: np.ndarray) -> np.ndarray:
    return quantized(x, 4).dequantized()


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


def main() -> None:
    for dtype in ("bf16", "int8", "int4"):
        print(f"{dtype}: llama.cpp's token in {agreement(dtype)} steps", flush=True)
        print(f"{dtype}: perplexity {cost(from_source('demo', weight_dtype=dtype))}", flush=True)
    print(f"f32: perplexity {cost(from_source('demo', weight_dtype='f32'))}", flush=True)
    options = BuildOptions(weight_dtype="f32", prefill_batch_sizes=(1,), decode_batch_sizes=(1,))
    for change in (four_bits, plain_int4):
        with tempfile.TemporaryDirectory() as folder:
            opened = shifted(open_source("demo"), change)
            artifact = build(opened, Path(folder) / "shifted", options)
            print(f"shifted, {change.__name__}: perplexity {cost(artifact)}", flush=True)


if __name__ == "__main__":
    main()
