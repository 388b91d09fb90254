"""Models of GGUF blocks that are carried over, against the reference with what gguf dequantizes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile import BuildOptions, build
from compile.models.spec import LlamaConfig
from compile.sources.demo import demo_gguf
from compile.target import resolve_target
from sf_local.artifact.manifest import WEIGHTS
from sf_local.artifact.open import host_cpu_features, open_artifact
from sf_local.bench.roofline import prefill_flops
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from tests.support.perplexity import step_logprobs
from tests.support.quantized import Kind, write_random_gguf
from tests.support.reference import Weights, forward
from tests.support.running import open_runner
from tests.support.tiny import DATA, ONE_SIZE, peer
from tests.support.toy_sources import VOCAB

QUANTIZE = """
import ctypes, sys
import llama_cpp

params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
params.allow_requantize = True
files = (name.encode() for name in sys.argv[1:3])
sys.exit(llama_cpp.llama_model_quantize(*files, ctypes.byref(params)))
"""
PAGE = 8
SHAPE: tuple[Any, ...] = (VOCAB, 256, 512, 4, 4, 2, 64, 1e-5, 500.0, 64)


def q4_k_m(name: str) -> Kind:
    """As Q4_K_M has it: more bits for some layers' values and second half of the MLP."""
    gets_more = name.startswith(("blk.1.", "blk.3.")) and ("attn_v" in name or "ffn_down" in name)
    return Kind.Q6_K if gets_more or name == "token_embd.weight" else Kind.Q4_K


def other_types(name: str) -> Kind:
    """All others, some of them in single layers."""
    ends = {"token_embd.weight": Kind.Q4_K, "output.weight": Kind.Q5_1}
    layers = {
        "blk.0.attn_k.weight": Kind.Q5_1, "blk.2.attn_q.weight": Kind.Q8_0,
        "blk.3.ffn_down.weight": Kind.Q4_0, "blk.3.attn_output.weight": Kind.Q5_K,
    }  # fmt: skip
    return ends.get(name) or layers.get(name) or (Kind.Q5_K if "ffn" in name else Kind.Q5_0)


MIXTURES: dict[str, tuple[Callable[[str], Kind], LlamaConfig]] = {
    "Q4_K_M": (q4_k_m, LlamaConfig(*SHAPE, tied_embeddings=True)),
    "others": (other_types, LlamaConfig(*SHAPE, tied_embeddings=False)),
}
SLOW = [("host", "int16"), ("host", "int8"), ("x86-64-v3", None), ("generic", None),
        ("x86-64-v3", "int8"), ("x86-64-v3+avx_vnni", None), ("x86-64-v4", None)]  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(
    ("cpu", "activations"),
    [("host", None), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_mixtures(tmp_path: Path, mixture: str, cpu: str, activations: str | None) -> None:
    features = resolve_target("cpu", cpu).cpu_features
    if missing := set(features) - host_cpu_features():
        pytest.skip(f"this CPU lacks {missing}")
    kind_of, config = MIXTURES[mixture]
    source = tmp_path / "mixed.gguf"
    weights = write_random_gguf(source, kind_of, config)
    options = BuildOptions(
        cpu=cpu, activation_dtype=activations, kv_dtype="f32", page_size=PAGE,
        prefill_batch_sizes=(1,), decode_batch_sizes=(1, 4),
    )  # fmt: skip
    artifact = build(source, tmp_path / "artifact", options)
    manifest = open_artifact(artifact).manifest
    assert manifest is not None
    check_logits(artifact, config, weights, str(manifest.activation_dtype))
    check_sizes(artifact, source, config)


def check_logits(artifact: Path, config: LlamaConfig, weights: Weights, activations: str) -> None:
    """A prompt of 21 tokens, which is no whole tile, and as many steps of decode, the last of them
    equal to the bit in another batch."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, 2 * PAGE + 5).tolist()
    expected = forward(config, weights, tokens)

    async def use(runner: ModelRunner) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        every = (await runner.prefill_all([Row(tokens, 0, [3, 9, 4])]))[0]
        rows = [Row([token], i, [5, 10, 6]) for i, token in enumerate(tokens)]
        steps = [(await runner.decode([row])).logits[0] for row in rows]
        others = [Row([t], 0, [20 + t % 7]) for t in tokens[:3]]
        return every, np.stack(steps), (await runner.decode([*others, rows[-1]])).logits[3]

    with open_runner(artifact) as run:
        every, steps, together = run(use)
    largest = np.abs(expected).max()
    bound = {"int16": 1e-3, "bf16": 0.03, "int8": 0.06}
    in_decode = "int16" if activations == "bf16" else activations
    assert np.abs(every - expected).max() <= bound[activations] * largest
    assert np.abs(steps - expected).max() <= bound[in_decode] * largest
    np.testing.assert_array_equal(together, steps[-1])


def check_sizes(artifact: Path, source: Path, config: LlamaConfig) -> None:
    """The parameters are as large as the file, and their number is known from their types."""
    assert (artifact / WEIGHTS).stat().st_size <= 1.05 * source.stat().st_size
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    matrices = layers * hidden * (2 * heads + 3 * inner)
    padded_vocab = -(-VOCAB // 32) * 32
    found = prefill_flops(open_artifact(artifact), 1) / 2
    least = matrices + VOCAB * hidden
    assert least <= found <= matrices + padded_vocab * hidden + layers * heads


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_files_that_llama_cpp_quantized(tmp_path: Path, kind: str) -> None:
    """SmolLM2, whose rows of 576 make Q4_K_M a mixture of Q5_0, Q8_0, Q4_K and Q6_K.

    Beside the same file in f32, whose weights are those that gguf dequantizes.
    """
    golden = json.loads((DATA / "smollm2_greedy.json").read_text())["cases"][:6]
    source = tmp_path / "quantized.gguf"
    command = [peer("llama"), "-c", QUANTIZE, demo_gguf(), source, kind]
    subprocess.run(command, check=True, capture_output=True)
    found = []
    for dtype in (None, "f32"):
        activations = None if dtype else "int16"
        options = BuildOptions(
            weight_dtype=dtype, activation_dtype=activations, kv_dtype="f32", **ONE_SIZE
        )
        artifact = build(source, tmp_path / str(dtype), options)
        found.append(np.concatenate(step_logprobs(artifact, golden)))
        if dtype is None:
            assert (artifact / WEIGHTS).stat().st_size <= 1.05 * source.stat().st_size
    ours, exact = found
    assert (np.exp(exact) * (exact - ours)).sum(axis=1).mean() <= 1e-5  # KL divergence
    assert (ours.argmax(axis=1) == exact.argmax(axis=1)).mean() >= 0.99
