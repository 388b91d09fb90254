"""Models of known shapes with random weights, as .gguf files that llama.cpp and sf-compile read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from peers.models import kept

from compile.sources.demo import demo_gguf

BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_1
KINDS = {"bf16": "F16", "int8": "Q8_0", "int4": "Q4_1"}  # of the same width
SPREAD = 0.02  # of weights, about


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
    "tinyllama-1.1b": LlamaShape(22, 2048, 5632, 32, 4, 32_000, is_tied=False),
    "llama-3.2-1b": LlamaShape(16, 2048, 8192, 32, 8, 128_256, is_tied=True),
    "llama-3.1-8b": LlamaShape(32, 4096, 14336, 32, 8, 128_256, is_tied=False),
}


def random_gguf(name: str, weights: str) -> Path:
    """The shape called `name` in F16, Q8_0 or Q4_1, made once and kept in the cache folder.

    Beside Q4_1 the embedding and the head are Q8_0, as others keep them beside 4 bits.
    """
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
    sizes, outer = shape.matrices(), "Q8_0" if kind == "Q4_1" else kind
    largest = max(rows * cols for rows, cols in sizes.values())
    numbers = {each: _random(largest, each) for each in {kind, outer}}
    for name, (rows, cols) in sizes.items():
        each = outer if name in ("token_embd", "output") else kind
        width = numbers[each].shape[-1] * cols // (1 if each == "F16" else BLOCK)
        data = numbers[each].reshape(-1)[: rows * width].reshape(rows, width)  # all of one memory
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[each])
    norms = [f"blk.{i}.{part}_norm" for i in range(shape.layers) for part in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random(count: int, kind: str) -> NDArray[np.generic]:
    """So many weights: f16 [count, 1], or blocks of bytes, [n, 34] of Q8_0, [n, 20] of Q4_1."""
    rng = np.random.default_rng(0)
    if kind == "F16":
        return (rng.standard_normal((count, 1), np.float32) * SPREAD).astype(np.float16)
    # The scale, and in Q4_1 the minimum; codes of 8 and 4 bits have a spread of 74 and 4.6
    step = SPREAD / 4.6
    head, size = ([step, -7.5 * step], 16) if kind == "Q4_1" else ([SPREAD / 74], BLOCK)
    numbers = np.frombuffer(np.float16(head).tobytes(), np.uint8)
    blocks = rng.integers(0, 256, (count // BLOCK, numbers.size + size), np.uint8)
    blocks[:, : numbers.size] = numbers
    return blocks


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """The demo's first tokens, with unused ones to fill the vocabulary."""
    known: set[str] = set()
    for field in gguf.GGUFReader(demo_gguf()).fields.values():
        if not field.name.startswith("tokenizer.") or field.name == "tokenizer.chat_template":
            continue
        value, types = field.contents(), field.types
        if field.name == "tokenizer.ggml.tokens":
            known = set(value[:vocabulary])
            value = [*value, *(f"<unused{i}>" for i in range(vocabulary - len(value)))]
            value = value[:vocabulary]
        elif field.name == "tokenizer.ggml.token_type":
            value = [*value, *[int(gguf.TokenType.UNUSED)] * (vocabulary - len(value))]
            value = value[:vocabulary]
        elif field.name == "tokenizer.ggml.merges":  # which come after the tokens
            value = [merge for merge in value if merge.replace(" ", "") in known]
        inner = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, types[0], inner)
