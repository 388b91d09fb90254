"""SmolVLM's architecture with random weights, as a Hugging Face folder. Its answers are noise.

Its tokens are single bytes, and words of four letters into which no prompt is split.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from peers.models import hf_name, kept
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import decoder_tensors, source_shapes, vision_tensors
from compile.models.vision_families import NAMES
from compile.tools.gpu_report import SHAPES, TOWERS

BEGIN, END, IMAGE = "<|im_start|>", "<end_of_utterance>", "<image>"
CELLS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
ADDED_TOKENS = [BEGIN, END, IMAGE, "<fake_token_around_image>", "<global-img>", *CELLS]
CHAT_TEMPLATE = (
    BEGIN + "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TOWER_NAMES = {ours: theirs for theirs, ours in NAMES.items()}


@dataclass(frozen=True)
class SmolVLM:
    """A model's two shapes. Of a picture it reads at most 4 x 4 tiles, and the whole."""

    name: str
    text: LlamaConfig
    tower: VisionConfig

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        text, tower = self.text, self.tower
        return {
            "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3",
            "image_token_id": text.vocab_size - len(ADDED_TOKENS) + ADDED_TOKENS.index(IMAGE),
            "scale_factor": tower.scale_factor, "tie_word_embeddings": text.tied_embeddings,
            "text_config": {
                "model_type": "llama", "vocab_size": text.vocab_size,
                "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
                "num_hidden_layers": text.num_layers, "num_attention_heads": text.num_heads,
                "num_key_value_heads": text.num_kv_heads, "head_dim": text.head_dim,
                "rms_norm_eps": text.rms_eps, "rope_theta": text.rope_theta,
                "max_position_embeddings": text.max_seq_len,
            },
            "vision_config": {
                "model_type": "idefics3_vision", "image_size": tower.image_size,
                "patch_size": tower.patch_size, "hidden_size": tower.hidden_size,
                "intermediate_size": tower.intermediate_size,
                "num_hidden_layers": tower.num_layers, "num_attention_heads": tower.num_heads,
                "layer_norm_eps": tower.norm_eps, "hidden_act": "gelu_pytorch_tanh",
            },
        }  # fmt: skip

    def preprocessor_config(self) -> dict[str, Any]:
        """The contents of preprocessor_config.json."""
        tile = self.tower.image_size
        return {
            "image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": True,
            "size": {"longest_edge": 4 * tile}, "max_image_size": {"longest_edge": tile},
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by Hugging Face's names."""
        text, size = source_shapes(decoder_tensors(self.text).all), self.tower.patch_size
        tower = source_shapes(vision_tensors(self.tower, self.text.hidden_size).all)
        tower["v.patch_embd.weight"] = (self.tower.hidden_size, 3, size, size)
        return {
            **{hf_name(n).replace("model.", "model.text_model."): s for n, s in text.items()},
            **{_tower_name(n): s for n, s in tower.items()},
        }


SMOLVLM_256M = SmolVLM(
    "SmolVLM-256M-random",
    SHAPES["smolvlm-256m"],
    TOWERS["smolvlm-256m"],
)
SMALL = SmolVLM(
    "SmolVLM-small-random",
    LlamaConfig(2048, 64, 128, 2, 4, 2, 16, 1e-5, 1e5, 2048, tied_embeddings=False),
    VisionConfig("idefics3", 64, 16, 64, 128, 2, 4, 1e-6, "gelu_tanh", scale_factor=2),
)


def random_smolvlm(model: SmolVLM) -> Path:
    """The folder of a model in bf16, made once and kept in the cache folder."""
    return kept(model.name, lambda path: _write(path, model))


def _write(folder: Path, model: SmolVLM) -> None:
    folder.mkdir()
    shapes = model.shapes()
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(max(map(prod, shapes.values())), np.float32) * 0.05
    numbers = numbers.astype(ml_dtypes.bfloat16)  # all tensors are of the same memory

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        is_norm = "norm" in name and name.endswith("weight")
        return np.ones(shape, numbers.dtype) if is_norm else numbers[: prod(shape)].reshape(shape)

    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(model.preprocessor_config()))
    _write_tokenizer(folder, model.text.vocab_size)


def _tower_name(name: str) -> str:
    """Hugging Face's name of "v.blk.0.ln1.weight" and the like."""
    part, _, suffix = name.rpartition(".")
    *_, layer, last = part.split(".")
    if ".blk." not in part:
        theirs = TOWER_NAMES[part]
        prefix = "model." if theirs.startswith("connector.") else "model.vision_model."
        return f"{prefix}{theirs}.{suffix}"
    return f"model.vision_model.encoder.layers.{layer}.{TOWER_NAMES[f'v.blk.{{}}.{last}']}.{suffix}"


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    words = map("".join, product(string.ascii_lowercase, repeat=4))
    tokens: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*tokens, *islice(words, vocab_size - len(tokens) - len(ADDED_TOKENS))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": END, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
