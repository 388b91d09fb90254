"""A Hugging Face folder -> a Source: config.json, safetensors, tokenizer.json."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from compile.models.spec import LlamaConfig, RopeScaling, VisionConfig
from compile.models.vision_families import (
    FAMILIES,
    image_settings,
    is_computed,
    text_config,
    vision_config,
    vision_name,
)
from compile.sources.source import (
    Numbers,
    Progress,
    Source,
    SourceTensor,
    Supported,
    Where,
    check_supported,
    corrupt,
    map_file,
    read_json,
    unsupported,
)
from sf_local.artifact.open import file_sha256
from sf_local.errors import SourceError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # that old versions stored
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
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


def open_folder(folder: Path, name: str, progress: Progress) -> Source:
    """Open a model's folder; raises SourceError, UnsupportedError, and OSError."""
    path = folder / "config.json"
    raw = read_json(path)
    check_supported(path, raw, MODEL_TYPES)
    vision = vision_config(path, raw) if raw["model_type"] in FAMILIES else None
    where, text = text_config(path, raw) if vision else (path, raw)
    config = _config(where, text)
    files = _weight_files(folder)
    tensors = _tensors(files, config, vision)
    tokenizer, tokenizer_config = _tokenizer(folder)
    bos, eos = _special_ids(folder, text | raw, tokenizer, tokenizer_config)
    settings = image_settings(folder, raw, vision, tokenizer) if vision else None
    files += sorted([*folder.glob("*.json"), *folder.glob("*.jinja")])
    progress(f"hashing {len(files)} files of {folder}")
    hashes = "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
    sha256 = hashlib.sha256(hashes.encode()).hexdigest()
    tokenizer_json = (folder / "tokenizer.json").read_bytes()
    return Source(
        name, config, tensors, sha256, tokenizer_json, tokenizer_config, bos, eos, vision, settings
    )


def _config(path: Where, raw: dict[str, Any]) -> LlamaConfig:
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


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise SourceError(
                f"{folder}: no model.safetensors, nor an index of shards; download them, or "
                "convert other weights with transformers' save_pretrained(safe_serialization=True)"
            )
        return [single]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise corrupt(index, "an object weight_map", repr(shards))
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise corrupt(index, "file names in weight_map", repr(name))
    return [folder / name for name in sorted(set(shards.values()))]


def _tensors(
    files: list[Path], config: LlamaConfig, vision: VisionConfig | None
) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for path in files:
        _add_tensors(path, tensors)
    if config.tied_embeddings:
        tensors.pop("output.weight", None)
    return {name: t for name, t in tensors.items() if vision is None or is_computed(name, vision)}


def _add_tensors(path: Path, tensors: dict[str, SourceTensor]) -> None:
    """Add the tensors of one safetensors file."""
    mapped = map_file(path)
    try:
        with safe_open(path, framework="numpy"):
            pass  # checks the header, and that the tensors fill the file without gap or overlap
    except (SafetensorError, ValueError) as error:
        raise corrupt(path, "a safetensors file", error) from error
    start = 8 + int.from_bytes(mapped[:8], "little")
    for name, entry in json.loads(mapped[8:start]).items():
        if name == "__metadata__" or name.endswith(BUFFERS):
            continue
        canonical = _canonical_name(name)
        if name.endswith(".bias") and not canonical.startswith(("v.", "mm.")):
            raise unsupported(path, f"tensor {name}", "a Llama without biases")
        if entry["dtype"] not in DTYPES:
            raise unsupported(path, f"tensor {name} of type {entry['dtype']}", ", ".join(DTYPES))
        shape = tuple(entry["shape"])
        if canonical == "v.patch_embd.weight" and len(shape) == 4:  # [H, 3, patch, patch]
            shape = (shape[0], math.prod(shape[1:]))
        if 0 in shape or canonical in tensors:
            raise corrupt(path, "every tensor once, and not empty", f"{name} of shape {shape}")
        first, last = entry["data_offsets"]
        raw = np.frombuffer(mapped, np.uint8, last - first, start + first)
        data = raw.view(DTYPES[entry["dtype"]]).reshape(shape)  # no copy
        tensors[canonical] = SourceTensor(shape, data.__getitem__)


def _canonical_name(name: str) -> str:
    if vision := vision_name(name):
        return vision
    name = re.sub(r"(language|text)_model\.", "", name, count=1)
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    if not found or found[2] not in NAMES:
        return name
    return (f"blk.{found[1]}." if found[1] else "") + f"{NAMES[found[2]]}.weight"


def _tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """tokenizer.json, checked, and tokenizer_config.json with the chat template."""
    path, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    old_template = folder / "chat_template.json"  # of models that take images
    if not path.exists():
        raise SourceError(
            f"{path}: expected the model's tokenizer, found none; download it too, or make it of a "
            "tokenizer.model: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise corrupt(path, "a tokenizer", error) from error
    config = read_json(folder / "tokenizer_config.json")
    if template.exists():
        try:
            config["chat_template"] = template.read_text(encoding="utf-8")
        except ValueError as error:
            raise corrupt(template, "UTF-8 text", error) from error
    elif old_template.exists():
        config["chat_template"] = read_json(old_template).get("chat_template")
    return tokenizer, config


def _special_ids(
    folder: Path, raw: dict[str, Any], tokenizer: Tokenizer, tokenizer_config: dict[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """bos, and every id that either config calls eos (else the tokenizer's)."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}

    def read(key: str) -> list[Any]:
        found = [raw.get(key), generation.get(key)]  # each one id, or a list
        return [
            i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None
        ]

    bos, eos = read("bos_token_id"), read("eos_token_id")
    for token_id in [*bos, *eos]:
        if not isinstance(token_id, int):
            raise corrupt(folder / "config.json", "token ids for bos and eos", repr(token_id))
    token = tokenizer_config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token  # a dict is an AddedToken
    if not eos and isinstance(text, str) and text in tokenizer.get_vocab():
        eos = [tokenizer.token_to_id(text)]
    return bos[0] if bos else None, tuple(dict.fromkeys(eos))
