"""The family of Llama: config.json and GGUF metadata as a LlamaConfig, and names of tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from compile.models.spec import LlamaConfig, RopeScaling, VisionConfig
from compile.models.tensors import DECODER, Shape, hf_names
from compile.reading import Numbers, Supported, Where, check_supported, corrupt, unsupported

log = logging.getLogger("sf_local.compile")
NAMES = hf_names(DECODER)
ROPE_FACTORS = "rope_freqs.weight"  # the tensor by which GGUF stores Llama 3's scaling of RoPE

SUPPORTED: Supported = {  # anything else would be computed wrongly
    "model_type": (["llama"], "'llama'"),
    "architectures": ([["LlamaForCausalLM"], [], None], "['LlamaForCausalLM']"),
    "hidden_act": (["silu"], "'silu'"),
    "attention_bias": ([False, None], "false"),
    "mlp_bias": ([False, None], "false"),
    "num_local_experts": ([0, None], "models without experts"),
    "sliding_window": ([None], "full attention"),
    "partial_rotary_factor": ([1, None], "1"),
    "quantization_config": (
        [{}, None],
        "F32, F16 and BF16 weights (get the model as it was before, and quantize it with "
        "sf-compile --weights int8 or int4), or a quantized .gguf",
    ),
}
GGUF_UNSUPPORTED = (  # they would be computed wrongly
    "expert_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv",
    "embedding_scale", "residual_scale", "logit_scale",
)  # fmt: skip


def is_weight(name: str, config: LlamaConfig, vision: VisionConfig | None) -> bool:
    """Not the copy of a tied embedding, and not what the config holds already."""
    return name != ROPE_FACTORS and not (config.tied_embeddings and name == "output.weight")


# Hugging Face


def hf_config(path: Path, raw: dict[str, Any]) -> tuple[LlamaConfig, VisionConfig | None]:
    """The model of a config.json, which takes no images."""
    return llama_config(path, raw), None


def image_settings(
    folder: Path, raw: Mapping[str, Any], vision: VisionConfig | None, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """None, for a Llama takes no images."""
    return None


def llama_config(path: Where, raw: dict[str, Any]) -> LlamaConfig:
    """The Llama of a config.json, or of a part of one; defaults are transformers' LlamaConfig's.

    Raises SourceError, and UnsupportedError for other models.
    """
    # Of transformers before 5, and from it on, which reads them in this order as well
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if rope != (raw.get("rope_parameters") or rope):
        log.warning("%s: rope_scaling is used, and rope_parameters beside it are not", path)
    if not isinstance(rope, dict):
        raise corrupt(path, "an object for rope_parameters or rope_scaling", repr(rope))
    found = {"hidden_act": "silu", "partial_rotary_factor": rope.get("partial_rotary_factor")} | raw
    check_supported(path, found, SUPPORTED)
    numbers, rope_numbers = Numbers(path, raw), Numbers(path, rope)
    hidden = numbers.integer("hidden_size")
    return LlamaConfig(
        vocab_size=numbers.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=numbers.integer("intermediate_size"),
        num_layers=numbers.integer("num_hidden_layers"),
        **numbers.heads(hidden, "num_attention_heads", "num_key_value_heads", "head_dim"),
        rms_eps=numbers.number("rms_norm_eps", 1e-6),
        rope_theta=rope_numbers.number("rope_theta", numbers.number("rope_theta", 10000.0)),
        max_seq_len=numbers.integer("max_position_embeddings", 2048),
        tied_embeddings=raw.get("tie_word_embeddings") is True,
        rope_scaling=_rope_scaling(rope_numbers, numbers),
    )


def _rope_scaling(rope: Numbers, config: Numbers) -> RopeScaling | None:
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise unsupported(rope.path, f"rope type {kind!r}", "'default', 'linear', 'llama3'")
    factor = rope.number("factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    trained = _original_context(rope, config)
    if not 0 < low < high:
        raise corrupt(rope.path, "0 < low_freq_factor < high_freq_factor", f"{low}, {high}")
    return RopeScaling("llama3", factor, low, high, trained)


def _original_context(rope: Numbers, config: Numbers) -> int:
    """The context before it was extended: as in transformers 5, what stands beside RoPE's own
    numbers comes before what is among them, and the whole context is the default."""
    key = "original_max_position_embeddings"
    values = config if config.values.get(key) is not None else rope
    return values.integer(key, config.integer("max_position_embeddings", 2048))


def canonical_name(name: str) -> str:
    """The name in `models.tensors` of a tensor that a folder calls `name`; else `name`."""
    name = re.sub(r"(language|text)_model\.", "", name, count=1)
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    if not found or found[2] not in NAMES:
        return name
    return f"{NAMES[found[2]].format(found[1])}.weight"


# GGUF


def gguf_config(
    path: Path,
    fields: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    read: Callable[[str], NDArray[Any]],
) -> LlamaConfig:
    """The Llama of a GGUF's metadata and tensors; see `registry.GGUFFamily`."""
    if "token_embd.weight" not in shapes:
        raise corrupt(path, "a tensor token_embd.weight", "none")
    llama = {key[6:]: value for key, value in fields.items() if key.startswith("llama.")}
    _check_gguf(path, llama)
    numbers = Numbers(path, llama)
    hidden = numbers.integer("embedding_length")
    heads = numbers.heads(
        hidden, "attention.head_count", "attention.head_count_kv", "attention.key_length"
    )
    head_dim = heads["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if numbers.integer(key, head_dim) != head_dim:
            raise unsupported(path, f"llama.{key} {llama[key]}", f"the head size, {head_dim}")
    factors = read(ROPE_FACTORS) if ROPE_FACTORS in shapes else None
    return LlamaConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden,
        intermediate_size=numbers.integer("feed_forward_length"),
        num_layers=numbers.integer("block_count"),
        **heads,
        rms_eps=numbers.number("attention.layer_norm_rms_epsilon"),
        rope_theta=numbers.number("rope.freq_base", 10000.0),
        max_seq_len=numbers.integer("context_length"),
        tied_embeddings="output.weight" not in shapes,
        rope_scaling=_gguf_rope_scaling(numbers, head_dim, factors),
    )


def _check_gguf(path: Path, llama: Mapping[str, Any]) -> None:
    for key in GGUF_UNSUPPORTED:
        if value := llama.get(key):
            raise unsupported(path, f"llama.{key} {value!r}", "models without it")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        if isinstance(llama.get(key), list):
            raise unsupported(path, f"llama.{key} that differs by layer", "layers of one shape")


def _gguf_rope_scaling(
    llama: Numbers, head_dim: int, factors: NDArray[Any] | None
) -> RopeScaling | None:
    kind = llama.values.get("rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear"):
        raise unsupported(llama.path, f"rope scaling {kind!r}", f"'none', 'linear', {ROPE_FACTORS}")
    factor = 1.0
    if kind == "linear":
        factor = llama.number("rope.scaling.factor", llama.number("rope.scale_linear", 1.0))
    if factors is None:
        return None if factor == 1.0 else RopeScaling("linear", factor)
    factors = factors * factor
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        expected = f"{head_dim // 2} positive divisors in {ROPE_FACTORS}"
        raise corrupt(llama.path, expected, f"shape {factors.shape}")
    return RopeScaling("factors", 1.0, factors=tuple(factors.tolist()))


def gguf_row_order(name: str, config: LlamaConfig) -> Callable[[int], NDArray[Any]] | None:
    """Of queries and keys: GGUF stores a head's rows as (j, half), for RoPE on neighbours, where
    we have (half, j)."""
    permuted = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
    heads = permuted.get(name.split(".", 2)[-1])
    if heads is None:
        return None
    return lambda rows: np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
