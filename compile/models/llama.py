"""TODO."""

from __future__ import annotations

import re
from typing import Any

from compile.models.spec import LlamaConfig, RopeScaling
from compile.models.tensors import DECODER, hf_names
from compile.models.vision_families import FAMILIES, vision_name
from compile.reading import Numbers, Supported, Where, check_supported, corrupt, unsupported

NAMES = hf_names(DECODER)


BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # that old versions stored


MODEL_TYPES: Supported = {
    "model_type": (["llama", *FAMILIES], ", ".join(map(repr, ["llama", *FAMILIES])))
}


SUPPORTED: Supported = {  # anything else would be computed wrongly
    "model_type": (["llama"], "'llama'"),
    "architectures": ([["LlamaForCausalLM"], [], None], "['LlamaForCausalLM']"),
    "hidden_act": (["silu"], "'silu'"),
    "attention_bias": ([False, None], "false"),
    "mlp_bias": ([False, None], "false"),
    "num_local_experts": ([0, None], "models without experts"),
    "sliding_window": ([None], "full attention"),
    "partial_rotary_factor": ([1, None], "1"),
    "quantization_config": ([{}, None], "F32, F16 and BF16 weights, or a quantized .gguf"),
}


def llama_config(path: Where, raw: dict[str, Any]) -> LlamaConfig:
    """The defaults are those of transformers' LlamaConfig."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, or older
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
        rope_scaling=_rope_scaling(rope_numbers),
    )


def _rope_scaling(rope: Numbers) -> RopeScaling | None:
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise unsupported(rope.path, f"rope type {kind!r}", "'default', 'linear', 'llama3'")
    factor = rope.number("factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    trained = rope.integer("original_max_position_embeddings")
    if not 0 < low < high:
        raise corrupt(rope.path, "0 < low_freq_factor < high_freq_factor", f"{low}, {high}")
    return RopeScaling("llama3", factor, low, high, trained)


def canonical_name(name: str) -> str:
    if vision := vision_name(name):
        return vision
    name = re.sub(r"(language|text)_model\.", "", name, count=1)
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    if not found or found[2] not in NAMES:
        return name
    return f"{NAMES[found[2]].format(found[1])}.weight"
