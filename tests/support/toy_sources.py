"""Toy Llamas on disk, as a Hugging Face folder and as a GGUF file, for the tests of sources."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from compile.models.llama import canonical_name
from compile.models.spec import LlamaConfig
from compile.sources.open import Source, open_source
from compile.weights import check_tensors
from tests.support.toy_tokenizers import byte_level_fields

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 2, 4, 2, 8, 32, 64
FIELDS = byte_level_fields(words=("ab",))
VOCAB = len(FIELDS["tokenizer.ggml.tokens"])
CONFIG = LlamaConfig(
    VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 1e-5, 500.0, 64, tied_embeddings=True
)
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def hf_weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def wide_weights() -> dict[str, np.ndarray]:
    """Of heads of 32, as int8 and int4 need them."""
    weights, rows = hf_weights(), {"q": 32 * HEADS, "k": 32 * KV_HEADS, "v": 32 * KV_HEADS}
    rng = np.random.default_rng(1)
    for i in range(LAYERS):
        for name, count in rows.items():
            shape = (count, HIDDEN)
            values = rng.standard_normal(shape).astype(np.float32)
            weights[f"model.layers.{i}.self_attn.{name}_proj.weight"] = values
        name = f"model.layers.{i}.self_attn.o_proj.weight"
        weights[name] = rng.standard_normal((HIDDEN, 32 * HEADS)).astype(np.float32)
    return weights


def write_folder(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    save_file(hf_weights() if weights is None else weights, folder / "model.safetensors")
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos = {"content": "<s>", "lstrip": False}
    template = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": bos, "eos_token": "</s>", "chat_template": template})
    )
    return folder


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf's permute."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_gguf(
    path: Path,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    arch: str = "llama",
    extra_tensors: dict[str, np.ndarray] | None = None,
    blocks: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    **extra: Any,
) -> Path:
    """A toy Llama; `blocks` are tensors as bytes, `extra` metadata keys with "__" for "."."""
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500.0,
    }
    fields |= {key: value for key, value in FIELDS.items() if key.startswith("tokenizer")}
    fields |= {key.replace("__", "."): value for key, value in extra.items()}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    blocks = blocks or {}
    for name, (raw, kind) in blocks.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    for name, weight in (gguf_weights() | (extra_tensors or {})).items():
        if name in blocks:
            continue
        if weight.ndim == 2 and quant != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(weight, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wide_gguf(path: Path, quant: gguf.GGMLQuantizationType) -> Path:
    """As write_gguf, of `wide_weights`, whose rows are in the order of Hugging Face."""
    tensors = {canonical_name(name): value for name, value in wide_weights().items()}
    sizes = {"llama__attention__key_length": 32, "llama__attention__value_length": 32}
    return write_gguf(path, quant, extra_tensors=tensors, **sizes)


def gguf_weights() -> dict[str, np.ndarray]:
    weights = {canonical_name(name): value for name, value in hf_weights().items()}
    for i in range(LAYERS):
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            key = f"blk.{i}.{name}.weight"
            weights[key] = permuted(weights[key], heads)
    return weights


def whole(source: Source, name: str) -> np.ndarray:
    return source.tensors[name].read(slice(None))


def refused(source: Any, error: type[Exception], *words: str) -> None:
    """Opening and checking it, as a build does, fails and says all of `words`."""
    with pytest.raises(error) as caught:
        check_tensors(open_source(source))
    for word in words:
        assert word in str(caught.value), str(caught.value)
