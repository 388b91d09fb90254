"""What types of the KV cache cost on SmolLM2: `python tests/tools/kv_quality.py`.

Keys, after their rotation, and values are rounded as they are stored; all else is f32, in numpy.
KL divergence from f32 over all positions of the golden text, its perplexity, and steps whose
likeliest token is llama.cpp's. It takes some minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

sys.path.insert(0, str(Path(__file__).parents[2]))

from compile.sources.open import open_source
from tests.support.perplexity import quality
from tests.support.reference import Array, forward
from tests.support.tiny import DATA

TYPES = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
}


def rounded_to(dtype: DTypeLike) -> Callable[[Array], Array]:
    """To the nearest number of a type, and to its largest what is larger."""
    most = float(ml_dtypes.finfo(dtype).max)
    return lambda x: np.clip(x, -most, most).astype(dtype).astype(x.dtype)


def main() -> None:
    source = open_source("demo")
    weights = {
        name: tensor.read(slice(None)).astype(np.float32) for name, tensor in source.tensors.items()
    }
    ids = json.loads((DATA / "smollm2_perplexity.json").read_text())["ids"]
    cases = json.loads((DATA / "smollm2_greedy.json").read_text())["cases"]

    def logits(tokens: list[int], kept: Callable[[Array], Array]) -> Array:
        return forward(source.config, weights, tokens, np.float32, kept=kept).astype(np.float32)

    exact = logits(ids, lambda x: x)
    perplexity = quality(exact, exact, ids).perplexity
    for name, dtype in TYPES.items():
        kept = rounded_to(dtype)
        found = quality(logits(ids, kept), exact, ids)
        same = []
        for case in cases:
            steps = logits(case["prompt_ids"] + case["greedy_ids"][:-1], kept)
            likeliest = steps[len(case["prompt_ids"]) - 1 :].argmax(axis=-1)
            same += list(likeliest == case["greedy_ids"])
        print(
            f"{name}: KL divergence {found.divergence:.2g}, "
            f"perplexity {100 * (found.perplexity / perplexity - 1):+.2f}%, "
            f"f32's token at {found.agreement:.2%} of positions, "
            f"llama.cpp's in {sum(same)} of {len(same)} steps",
            flush=True,
        )


if __name__ == "__main__":
    main()
