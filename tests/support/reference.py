"""An independent numpy Llama, slow and plain, that judges compiled code."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from compile.formats.blocks import GROUP
from compile.formats.quantize import quantized
from compile.models.spec import LlamaConfig

Weights = dict[str, np.ndarray]
Array = npt.NDArray[Any]

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def random_weights(config: LlamaConfig, seed: int) -> Weights:
    """Float32 weights `[out, in]` (norms `[H]`) in Hugging Face's rotate-half order.

    Logits come out with std near 2, attention scores too, so attention is far from uniform.
    """
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> Array:
        return rng.standard_normal((rows, cols), np.float32) * np.float32(gain / cols**0.5)

    def norm() -> Array:
        return 1 + np.float32(0.2) * rng.standard_normal(config.hidden_size, np.float32)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = {"token_embd.weight": matrix(config.vocab_size, hidden, 2.0)}
    for i in range(config.num_layers):
        layer = {
            "attn_norm": norm(),
            "attn_q": matrix(q_size, hidden, 1.4),
            "attn_k": matrix(kv_size, hidden, 1.4),
            "attn_v": matrix(kv_size, hidden),
            "attn_output": matrix(hidden, q_size),
            "ffn_norm": norm(),
            "ffn_gate": matrix(inner, hidden),
            "ffn_up": matrix(inner, hidden),
            "ffn_down": matrix(hidden, inner),
        }
        weights |= {f"blk.{i}.{name}.weight": array for name, array in layer.items()}
    weights["output_norm.weight"] = norm()
    if not config.tied_embeddings:
        weights["output.weight"] = matrix(config.vocab_size, hidden, 2.0)
    return weights


def uneven_weights(config: LlamaConfig, seed: int, spread: float = 100.0) -> Weights:
    """Weights whose matrices have rows that differ in size by up to `spread` times.

    What reads a small feature makes up for it, so that it counts as much as a large one: errors
    of small rows show in the logits.
    """
    c, weights = config, random_weights(config, seed)
    rng = np.random.default_rng(seed + 1)

    def sizes(count: int) -> Array:
        return spread ** rng.uniform(-0.5, 0.5, count)

    def scale(name: str, rows: Array | float = 1.0, cols: Array | float = 1.0) -> None:
        by_row = rows[:, None] if isinstance(rows, np.ndarray) else rows
        weights[name] = (weights[name] * by_row * cols).astype(np.float32)

    def of_queries(x: Array) -> Array:
        """[kv_heads, D] as each query head meets it: [num_heads * D]"""
        return x.reshape(c.num_kv_heads, -1).repeat(c.num_heads // c.num_kv_heads, 0).reshape(-1)

    stream = sizes(c.hidden_size)  # of the residual stream
    tokens = sizes(c.vocab_size)
    scale("token_embd.weight", tokens, stream)
    weights["output_norm.weight"] /= (stream**2 if c.tied_embeddings else stream).astype(np.float32)
    if not c.tied_embeddings:
        scale("output.weight", tokens)
    for i in range(c.num_layers):
        blk, kv_size = f"blk.{i}", c.num_kv_heads * c.head_dim
        pairs = sizes(kv_size // 2).reshape(c.num_kv_heads, -1)  # both halves of what rotates
        keys, values = np.hstack([pairs, pairs]).reshape(-1), sizes(kv_size)
        gates, ups = sizes(c.intermediate_size), sizes(c.intermediate_size)
        for norm in ("attn_norm", "ffn_norm"):
            weights[f"{blk}.{norm}.weight"] /= stream.astype(np.float32)
        scale(f"{blk}.attn_q.weight", 1 / of_queries(keys))
        scale(f"{blk}.attn_k.weight", keys)
        scale(f"{blk}.attn_v.weight", values)
        scale(f"{blk}.attn_output.weight", stream, 1 / of_queries(values))
        scale(f"{blk}.ffn_gate.weight", gates)
        scale(f"{blk}.ffn_up.weight", ups)
        scale(f"{blk}.ffn_down.weight", stream, 1 / (gates * ups))
    return weights


def rope_frequencies(config: LlamaConfig) -> Array:
    """Radians per position of each rotated pair, `[D/2]` float64."""
    freqs = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind == "factors":
        return freqs / np.asarray(scaling.factors, np.float64)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_seq_len * freqs / (2 * np.pi)  # over the original context
        keep = np.clip((turns - low) / (high - low), 0, 1)  # 0: divide by factor, 1: leave alone
        return keep * freqs + (1 - keep) * freqs / scaling.factor
    raise ValueError(f"unknown rope scaling {scaling.kind!r}")


def forward(
    config: LlamaConfig,
    weights: Weights,
    tokens: Sequence[int],
    dtype: npt.DTypeLike = np.float64,
    embeddings: Mapping[int, Array] | None = None,
    kept: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Logits `[S, V]` float64 of `tokens` `[S]` at positions 0.., computed in `dtype`.

    `embeddings` `[H]` are those of the positions that they are given for, whatever token is there.
    `kept` is what a cache makes of keys and values.
    """
    length, kv_heads, dim = len(tokens), config.num_kv_heads, config.head_dim
    angles = np.arange(length)[:, None] * rope_frequencies(config)  # [S, D/2]
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    future = np.triu(np.ones((length, length), bool), 1)  # [query, key]

    def norm(x: Array, name: str) -> Array:
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_eps)
        return x * scale * weights[f"{name}.weight"].astype(dtype)

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].astype(dtype).T

    def heads(x: Array) -> Array:  # [S, n*D] -> [kv, n/kv, S, D]
        return x.reshape(length, kv_heads, -1, dim).transpose(1, 2, 0, 3)

    def rotate(x: Array) -> Array:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(x: Array, blk: str) -> Array:
        q = rotate(heads(linear(x, f"{blk}.attn_q")))
        k = kept(rotate(heads(linear(x, f"{blk}.attn_k"))))
        v = kept(heads(linear(x, f"{blk}.attn_v")))
        scores = np.where(future, -np.inf, q @ k.swapaxes(-1, -2) / dim**0.5)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (probs / probs.sum(-1, keepdims=True)) @ v
        return linear(mixed.transpose(2, 0, 1, 3).reshape(length, -1), f"{blk}.attn_output")

    x = weights["token_embd.weight"][np.asarray(tokens)].astype(dtype)
    for position, embedding in (embeddings or {}).items():
        x[position] = embedding
    for i in range(config.num_layers):
        blk = f"blk.{i}"
        x = x + attention(norm(x, f"{blk}.attn_norm"), blk)
        y = norm(x, f"{blk}.ffn_norm")
        gate = linear(y, f"{blk}.ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{blk}.ffn_up"), f"{blk}.ffn_down")
    head = "token_embd" if config.tied_embeddings else "output"
    return linear(norm(x, "output_norm"), head).astype(np.float64)


def logprobs(logits: Array) -> Array:
    """Log softmax over the last axis, same shape."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def write_hf_folder(
    folder: Path, config: LlamaConfig, weights: Weights, dtype: str = "float32", shards: int = 1
) -> None:
    """Write a Hugging Face model folder: config, safetensors rounded to `dtype`, byte tokenizer.

    Its tokenizer maps byte b to token 3 + b, after `<unk>`, `<s>` and `</s>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(name): array.astype(numpy_dtype(dtype)) for name, array in weights.items()}
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
        total = {"total_size": sum(array.nbytes for array in tensors.values())}
        index = {"metadata": total, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    for i, file in enumerate(files):
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file, {"format": "pt"})
    write_json(folder / "config.json", hf_config(config, dtype))
    write_tokenizer(folder, config.vocab_size)


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def hf_name(name: str) -> str:
    """Hugging Face's name of a canonical tensor name."""
    *layer, part, suffix = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{HF_NAMES[part]}.{suffix}"


def hf_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """`config` as the contents of a config.json."""
    scaling, rope = config.rope_scaling, None
    if scaling is not None:
        if scaling.kind not in ("linear", "llama3"):
            raise ValueError(f"Hugging Face Llamas have no rope scaling {scaling.kind!r}")
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_tokenizer(
    folder: Path,
    vocab_size: int,
    added_tokens: Sequence[str] = (),
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Three special tokens, then 256 bytes, then special tokens that are added.
    """
    if vocab_size < 259 + len(added_tokens):
        raise ValueError(f"{259 + len(added_tokens)} tokens need a larger vocab_size")
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's byte alphabet
    others = (chr(256 + i) for i in range(256))
    alphabet = [chr(b) if b in printable else next(others) for b in range(256)]
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *added_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "chat_template": chat_template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def stored_as(name: str, weight: np.ndarray, dtype: str) -> np.ndarray:
    """A matrix [N, K] as an artifact holds it: an embedding has 8 bits in any case."""
    cols = weight.shape[1]
    padded = np.pad(weight, ((0, 0), (0, -cols % GROUP)))
    kind = "int8" if name == "token_embd.weight" else dtype
    return quantized(padded, kind).dequantized()[:, :cols]
