"""The obvious way to quantize, beside which ours is judged; and GGUF files of random blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from compile.formats.blocks import GROUP
from compile.formats.gguf_blocks import from_gguf
from compile.models.spec import LlamaConfig
from compile.sources.source import Source, SourceTensor
from tests.support.reference import Weights, random_weights
from tests.support.toy_sources import permuted, write_gguf

Kind = gguf.GGMLQuantizationType
# Where blocks have their f16 scale, and where their minimum, which is so many times the scale
NUMBERS: dict[Kind, tuple[int, int, float]] = {
    Kind.Q8_0: (0, 0, 0), Kind.Q4_0: (0, 0, 0), Kind.Q5_0: (0, 0, 0), Kind.Q6_K: (208, 208, 0),
    Kind.Q4_1: (0, 2, -7.5), Kind.Q5_1: (0, 2, -15.5), Kind.Q4_K: (0, 2, 7.5),
    Kind.Q5_K: (0, 2, 15.5),
}  # fmt: skip


def plain_int4(x: np.ndarray) -> np.ndarray:
    """From minimum to maximum in 15 steps, the obvious way."""
    groups = x.reshape(-1, GROUP)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = (high - low) / 15
    codes = np.rint((groups - low) / np.where(scale == 0, 1, scale))
    return (codes * scale + low).reshape(x.shape)


def random_blocks(rows: int, cols: int, kind: Kind, std: float, seed: int) -> np.ndarray:
    """Rows [rows, bytes] u8 of blocks whose weights have about this standard deviation.

    All bits are random, but for scales of either sign and minima that lead to a mean near 0.
    """
    rng = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * cols // block, block_bytes), np.uint8)
    scale_at, minimum_at, minima = NUMBERS[kind]

    def put(scales: np.ndarray) -> None:
        for at, values in ((minimum_at, scales * minima), (scale_at, scales)):
            blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8)

    scales = rng.uniform(0.5, 1.5, (len(blocks), 1)) * rng.choice([-1, 1], (len(blocks), 1))
    put(scales)
    put(scales * std / gguf.dequantize(blocks, kind).std())
    return blocks.reshape(rows, -1)


def k_m(kind: Kind) -> Callable[[str], Kind]:
    """The type of a matrix, by canonical name, in a Q4_K_M or Q5_K_M file of two layers."""
    hot = ("blk.1.attn_v.weight", "blk.1.ffn_down.weight", "token_embd.weight")
    return lambda name: Kind.Q6_K if name in hot else kind


def of_random_blocks(source: Source, kind_of: Callable[[str], Kind]) -> Source:
    """The same with random blocks of these types instead of its matrices, and as large weights."""

    def changed(name: str, tensor: SourceTensor) -> SourceTensor:
        if len(tensor.shape) == 1:
            return tensor
        kind, (rows, cols) = kind_of(name), tensor.shape
        std = float(tensor.read(slice(None)).std())
        raw = random_blocks(rows, cols, kind, std, sum(name.encode()))
        weights = gguf.dequantize(raw, kind)
        return replace(
            tensor, dtype=kind.name, read=lambda rows: weights[rows],
            groups=lambda rows: from_gguf(raw[rows], kind.name),
        )  # fmt: skip

    tensors = {name: changed(name, tensor) for name, tensor in source.tensors.items()}
    return replace(source, tensors=tensors)


def write_random_gguf(path: Path, kind_of: Callable[[str], Kind], config: LlamaConfig) -> Weights:
    """Write a Llama whose matrices are random blocks of these types, by canonical name.

    Returns the weights as gguf dequantizes them, with rows in Hugging Face's order.
    """
    weights, blocks = random_weights(config, seed=7), {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            kind = kind_of(name)
            raw = random_blocks(*weight.shape, kind, float(weight.std()), len(blocks))
            weights[name] = gguf.dequantize(raw, kind)
            heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name[6:12])
            blocks[name] = permuted(raw, heads) if heads else raw, kind
    write_gguf(
        path, extra_tensors={n: w for n, w in weights.items() if w.ndim == 1}, blocks=blocks,
        llama__block_count=config.num_layers, llama__context_length=config.max_seq_len,
        llama__embedding_length=config.hidden_size, llama__rope__freq_base=config.rope_theta,
        llama__feed_forward_length=config.intermediate_size,
        llama__attention__head_count=config.num_heads,
        llama__attention__head_count_kv=config.num_kv_heads,
        llama__attention__key_length=config.head_dim,
        llama__attention__value_length=config.head_dim,
    )  # fmt: skip
    return weights
