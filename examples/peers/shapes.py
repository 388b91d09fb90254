"""Models of known shapes with random weights, as .gguf files that llama.cpp and sf-compile read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from peers.models import kept

from compile.sources.demo import demo_gguf

BLOCK = 32  # numbers that share a scale in Q8_0
KINDS = {"bf16": "F16", "int8": "Q8_0"}  # of the same width


@dataclass(frozen=True)
class LlamaShape:
    """What a Llama's tensors measure."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool

    def matrices(self) -> dict[str, tuple[int, int]]:
        kv_width = self.hidden // self.heads * self.kv_heads
        sizes = {"token_embd": (self.vocabulary, self.hidden)}
        if not self.is_tied:
            sizes["output"] = sizes["token_embd"]
        for i in range(self.layers):
            sizes |= {
                f"blk.{i}.attn_q": (self.hidden, self.hidden),
                f"blk.{i}.attn_k": (kv_width, self.hidden),
                f"blk.{i}.attn_v": (kv_width, self.hidden),
                f"blk.{i}.attn_output": (self.hidden, self.hidden),
                f"blk.{i}.ffn_gate": (self.inner, self.hidden),
                f"blk.{i}.ffn_up": (self.inner, self.hidden),
                f"blk.{i}.ffn_down": (self.hidden, self.inner),
            }
        return sizes


SHAPES = {
    "llama-3.2-1b": LlamaShape(16, 2048, 8192, 32, 8, 128_256, is_tied=True),
    "llama-3.1-8b": LlamaShape(32, 4096, 14336, 32, 8, 128_256, is_tied=False),
}


def random_gguf(name: str, weights: str) -> Path:
    """The shape called `name` in F16 or Q8_0, made once and kept in the cache folder."""
    kind = KINDS[weights]
    return kept(f"{name}.{kind}.gguf", lambda path: _write(path, SHAPES[name], kind))


def _write(path: Path, shape: LlamaShape, kind: str) -> None:
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, shape.vocabulary)
    sizes = shape.matrices()
    numbers = _random(max(rows * cols for rows, cols in sizes.values()), kind)
    for name, (rows, cols) in sizes.items():
        width = numbers.shape[-1] * cols // (BLOCK if kind == "Q8_0" else 1)
        data = numbers.reshape(-1)[: rows * width].reshape(rows, width)  # all of the same memory
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    norms = [f"blk.{i}.{part}_norm" for i in range(shape.layers) for part in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random(count: int, kind: str) -> NDArray[np.generic]:
    """So many weights of a spread of about 0.02: f16 [count, 1], or blocks of bytes [n, 34]."""
    rng = np.random.default_rng(0)
    if kind == "F16":
        return (rng.standard_normal((count, 1), np.float32) * 0.02).astype(np.float16)
    blocks = rng.integers(0, 256, (count // BLOCK, 2 + BLOCK), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.02 / 74).tobytes(), np.uint8)
    return blocks


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """The demo's, with unused tokens to fill the vocabulary."""
    for field in gguf.GGUFReader(demo_gguf()).fields.values():
        if not field.name.startswith("tokenizer.") or field.name == "tokenizer.chat_template":
            continue
        value, types = field.contents(), field.types
        if field.name == "tokenizer.ggml.tokens":
            value = [*value, *(f"<unused{i}>" for i in range(vocabulary - len(value)))]
        elif field.name == "tokenizer.ggml.token_type":
            value = [*value, *[int(gguf.TokenType.UNUSED)] * (vocabulary - len(value))]
        inner = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, types[0], inner)
