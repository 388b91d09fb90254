"""Independent numpy vision towers, slow and plain, and Hugging Face folders that have them."""

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import source_shapes, vision_tensors
from tests.support.reference import (
    Array,
    Weights,
    forward,
    hf_config,
    hf_name,
    numpy_dtype,
    random_weights,
    write_json,
    write_tokenizer,
)

IDEFICS3 = VisionConfig(
    family="idefics3",
    image_size=32,
    patch_size=8,
    hidden_size=64,
    intermediate_size=72,
    num_layers=3,
    num_heads=4,
    norm_eps=1e-3,  # large enough to be seen
    activation="gelu_tanh",
    scale_factor=2,
)
LLAVA = replace(IDEFICS3, family="llava", norm_eps=2e-3, activation="quick_gelu", scale_factor=1)
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
ADDED_TOKENS = TOKENS + ROWS_AND_COLUMNS
IMAGE_TOKEN = 259
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
HF_NAMES = {
    "patch_embd": "embeddings.patch_embedding",
    "position_embd": "embeddings.position_embedding",
    "class_embd": "embeddings.class_embedding",
    "pre_ln": "pre_layrnorm",
    "post_ln": "post_layernorm",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "fc": "modality_projection.proj",
    "1": "linear_1",
    "2": "linear_2",
}


class Layout(NamedTuple):
    """What the names of tensors begin with in a folder."""

    tower: str
    connector: str
    text: str
    head: str = "lm_head."


LAYOUTS = {
    "idefics3": Layout("model.vision_model.", "model.connector.", "model.text_model."),
    "llava": Layout(  # transformers 4
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "llava5": Layout(  # transformers 5
        "vision_tower.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "llava_in_memory": Layout(  # from transformers 4.52 on, and what other tools save
        "model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model."
    ),
}


def random_vision_weights(config: VisionConfig, text_hidden: int, seed: int) -> Weights:
    """Float32 weights by their canonical names.

    Attention is far from uniform, and embeddings are about as large as those of tokens.
    """
    rng = np.random.default_rng(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Array:
        values = rng.standard_normal(shape, np.float32)
        if "ln" in name and name.endswith("weight"):
            return 1 + np.float32(0.2) * values
        gain = 1.4 if "attn_q" in name or "attn_k" in name else 1.0
        return values * np.float32(0.2 if len(shape) == 1 else gain / shape[1] ** 0.5)

    shapes = source_shapes(vision_tensors(config, text_hidden).all)
    stems = [name.rpartition(".")[0] for name in shapes]

    def place(name: str) -> tuple[int, int]:
        """The order in which seeds draw numbers: embeddings, layers, others; bias after weight."""
        if "embd" in name or "mm.fc" in name:
            return 0, 0
        return 1 if ".blk." in name else 2, stems.index(name.rpartition(".")[0])

    return {name: weight(name, shapes[name]) for name in sorted(shapes, key=place)}


def encode(
    config: VisionConfig, weights: Weights, pixels: Array, dtype: npt.DTypeLike = np.float64
) -> Array:
    """Embeddings [N, tokens_per_tile, text hidden] float64 of `pixels` [N, 3, S, S]."""
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    count, size, across = len(pixels), config.patch_size, config.image_size // config.patch_size

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: Array) -> Array:  # [N, P, H] -> [N, heads, P, D]
        return x.reshape(count, x.shape[1], config.num_heads, -1).swapaxes(1, 2)

    def attention(x: Array, blk: str) -> Array:
        q, k, v = (heads(linear(x, f"{blk}.attn_{part}")) for part in "qkv")
        scores = q @ k.swapaxes(-1, -2) / (config.hidden_size / config.num_heads) ** 0.5
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (probs / probs.sum(-1, keepdims=True)) @ v
        return linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{blk}.attn_out")

    # [N, 3, rows, size, columns, size] -> [N, rows * columns, 3 * size * size]
    seen = pixels[:, :, : across * size, : across * size].astype(dtype)
    patches = seen.reshape(count, 3, across, size, across, size)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(count, across * across, -1)
    x = linear(patches, "v.patch_embd")
    if config.family == "llava":
        first = np.broadcast_to(weights["v.class_embd"], (count, 1, config.hidden_size))
        x = np.concatenate([first, x], axis=1)
    x = x + weights["v.position_embd.weight"]
    if config.family == "llava":
        x = norm(x, "v.pre_ln")
    for i in range(config.num_layers):
        blk = f"v.blk.{i}"
        x = x + attention(norm(x, f"{blk}.ln1"), blk)
        y = linear(norm(x, f"{blk}.ln2"), f"{blk}.ffn_up")
        x = x + linear(ACTIVATIONS[config.activation](y), f"{blk}.ffn_down")
    if config.family == "llava":
        return linear(gelu(linear(x[:, 1:], "mm.1")), "mm.2").astype(np.float64)
    scale = config.scale_factor  # a token is of scale x scale patches, row by row
    x = norm(x, "v.post_ln").reshape(count, across // scale, scale, across // scale, scale, -1)
    x = x.swapaxes(2, 3).reshape(count, (across // scale) ** 2, -1)
    return linear(x, "mm.fc").astype(np.float64)


def quick_gelu(x: Array) -> Array:
    return x / (1 + np.exp(-1.702 * x))


def gelu_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    return x / 2 * (1 + np.vectorize(math.erf)(x / 2**0.5).astype(x.dtype))


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


def forward_images(
    text: LlamaConfig,
    config: VisionConfig,
    weights: Weights,
    tokens: Sequence[int],
    pixels: Array,
    dtype: npt.DTypeLike = np.float64,
) -> Array:
    """Logits [S, V] float64 of `tokens` [S], those that are IMAGE_TOKEN standing for `pixels`.

    `weights` are those of both models, `pixels` [N, 3, S, S].
    """
    rows = encode(config, weights, pixels, dtype).reshape(-1, text.hidden_size)
    positions = [i for i, token in enumerate(tokens) if token == IMAGE_TOKEN]
    return forward(text, weights, tokens, dtype, dict(zip(positions, rows, strict=True)))


def random_model(text: LlamaConfig, config: VisionConfig, seed: int) -> Weights:
    """The weights of a Llama and its vision tower."""
    return random_weights(text, seed) | random_vision_weights(config, text.hidden_size, seed + 1)


def write_vision_folder(
    folder: Path,
    text: LlamaConfig,
    config: VisionConfig,
    weights: Weights,
    dtype: str = "float32",
    layout: str | None = None,
) -> Path:
    """Write a Hugging Face model folder, and return it; `layout` is one of LAYOUTS.

    LLaVA's has what is not computed, too: a last layer and a norm, all of it not a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = LAYOUTS[layout or config.family]
    if config.family == "llava":
        last, norm = f"v.blk.{config.num_layers}.", {"v.post_ln.weight", "v.post_ln.bias"}
        first = {name: array for name, array in weights.items() if name.startswith("v.blk.0.")}
        unused = {name.replace("v.blk.0.", last): array.shape for name, array in first.items()}
        unused |= dict.fromkeys(norm, (config.hidden_size,))
        weights = weights | {name: np.full(shape, np.nan) for name, shape in unused.items()}
    tensors = {vision_hf_name(name, names): array for name, array in weights.items()}
    patches = vision_hf_name("v.patch_embd.weight", names)
    tensors[patches] = tensors[patches].reshape(-1, 3, config.patch_size, config.patch_size)
    stored = {name: array.astype(numpy_dtype(dtype)) for name, array in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", vision_hf_config(text, config, dtype))
    write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    write_json(folder / "processor_config.json", processor_config(config))
    write_tokenizer(folder, text.vocab_size, ADDED_TOKENS, CHAT_TEMPLATE)
    return folder


def vision_hf_name(name: str, layout: Layout) -> str:
    """Hugging Face's name of a canonical tensor name."""
    found = re.fullmatch(r"(v|mm)\.(?:blk\.(\d+)\.)?(\w+)(\.weight|\.bias)?", name)
    if not found:
        plain = hf_name(name)
        return plain.replace("model.", layout.text, 1).replace("lm_head.", layout.head, 1)
    prefix = layout.connector if found[1] == "mm" else layout.tower
    prefix += f"encoder.layers.{found[2]}." if found[2] else ""
    return prefix + HF_NAMES[found[3]] + (found[4] or "")


def vision_hf_config(text: LlamaConfig, config: VisionConfig, dtype: str) -> dict[str, Any]:
    """Both configs as the contents of a config.json."""
    is_llava = config.family == "llava"
    common = {
        "model_type": config.family,
        "text_config": hf_config(text, dtype),
        "tie_word_embeddings": text.tied_embeddings,
        "vision_config": {
            "model_type": "clip_vision_model" if is_llava else "idefics3_vision",
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers + is_llava,
            "num_attention_heads": config.num_heads,
            "layer_norm_eps": config.norm_eps,
            "hidden_act": "quick_gelu" if is_llava else "gelu_pytorch_tanh",
        },
    }
    if is_llava:
        return common | {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": IMAGE_TOKEN,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
    return common | {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": config.scale_factor,
    }


def preprocessor_config(config: VisionConfig) -> dict[str, Any]:
    """The contents of a preprocessor_config.json; Idefics3's images are split up to 3 x 3 tiles."""
    size = config.image_size
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "rescale_factor": 1 / 255,
    }
    if config.family == "llava":
        return common | {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": size, "width": size},
            "do_center_crop": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": {"shortest_edge": size},
        }
    return common | {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": True,
        "do_pad": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": size},
        "resample": 1,
        "size": {"longest_edge": 3 * size},
    }


def processor_config(config: VisionConfig) -> dict[str, Any]:
    """The contents of a processor_config.json."""
    if config.family == "idefics3":
        return {"processor_class": "Idefics3Processor", "image_seq_len": config.tokens_per_tile}
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }


def ask_transformers(
    python: Path, folder: Path, prompts: Sequence[Mapping[str, npt.ArrayLike]]
) -> list[dict[str, Array]]:
    """What `vision_peer.py` makes of each prompt."""
    with tempfile.TemporaryDirectory() as work:
        files = [Path(work) / f"{i}.npz" for i in range(len(prompts))]
        for file, arrays in zip(files, prompts, strict=True):
            np.savez(file, **arrays)
        script = Path(__file__).with_name("vision_peer.py")
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": work}  # else a folder that stays
        command = [python, script, folder, *files]
        subprocess.run(command, check=True, timeout=300, env=environment)
        return [dict(np.load(file.with_suffix(".out.npz"))) for file in files]
