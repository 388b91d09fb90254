"""Folders of Idefics3, SmolVLM and LLaVA, whole and damaged, with tiny weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compile.models.llama import llama_config
from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.vision_families import text_config, vision_config
from compile.sources.open import open_source
from compile.weights import check_tensors
from sf_local.errors import SourceError, UnsupportedError
from tests.support.reference import Weights
from tests.support.tiny import TINY
from tests.support.toy_sources import refused, whole
from tests.support.vision_reference import (
    CHAT_TEMPLATE,
    IDEFICS3,
    IMAGE_TOKEN,
    LAYOUTS,
    LLAVA,
    random_model,
    write_vision_folder,
)

MODELS = {"idefics3": IDEFICS3, "llava": LLAVA}
UNTIED = replace(TINY, tied_embeddings=False)
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

# What the config.json of two models on the Hub has, but for keys that say nothing.
SMOLVLM_256M = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "idefics3",
    "scale_factor": 4,
    "text_config": {
        "_flash_attn_2_enabled": True,
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "perceiver_config": {"model_type": "vllama3", "resampler_depth": 6},
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "idefics3",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
    },
}
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def write(
    folder: Path, family: str, text: LlamaConfig = TINY, layout: str | None = None
) -> tuple[Path, Weights]:
    weights = random_model(text, MODELS[family], seed=7)
    return write_vision_folder(folder, text, MODELS[family], weights, layout=layout), weights


def change(path: Path, **values: Any) -> None:
    """Change values of a JSON file, and of the configs in it."""
    found = json.loads(path.read_text())
    for key, value in values.items():
        is_part = key in ("text_config", "vision_config") and isinstance(value, dict)
        found[key] = found[key] | value if is_part else value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", [TINY, UNTIED], ids=["tied", "untied"])
def test_folder(tmp_path: Path, layout: str, text: LlamaConfig) -> None:
    """What is computed, under canonical names; LLaVA's last layer and norm are not."""
    family = layout[: 5 if layout.startswith("llava") else None]
    folder, weights = write(tmp_path / "toy", family, text, layout)
    source = open_source(folder)
    check_tensors(source)
    assert (source.config, source.vision) == (text, MODELS[family])
    assert source.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert source.tensors[name].shape == weight.shape
        np.testing.assert_array_equal(whole(source, name), weight)
    assert (source.bos_token_id, source.eos_token_ids) == (1, (2,))
    assert source.tokenizer_config["chat_template"] == CHAT_TEMPLATE


def test_image_settings(tmp_path: Path) -> None:
    common = {"tile_size": 32, "image_token": "<image>", "image_token_id": IMAGE_TOKEN}
    assert open_source(write(tmp_path / "idefics3", "idefics3")[0]).image_settings == common | {
        "family": "idefics3", "tokens_per_tile": 4, "resize_to": 96, "splits": True,
        "resample": 1, "rescale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    assert open_source(write(tmp_path / "llava", "llava")[0]).image_settings == common | {
        "family": "llava", "tokens_per_tile": 16, "resize_to": 32, "splits": False,
        "resample": 3, "rescale": 1 / 255,
        "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def test_smolvlm_256m() -> None:
    path = Path(CONFIG)
    assert vision_config(path, SMOLVLM_256M) == VisionConfig(
        "idefics3", 512, 16, 768, 3072, 12, 12, 1e-6, "gelu_tanh", scale_factor=4
    )
    assert vision_config(path, SMOLVLM_256M).tokens_per_tile == 64
    assert llama_config(*text_config(path, SMOLVLM_256M)) == LlamaConfig(
        49280, 576, 1536, 30, 9, 3, 64, 1e-5, 100000.0, 8192, tied_embeddings=False
    )


def test_llava_7b() -> None:
    path = Path(CONFIG)
    assert vision_config(path, LLAVA_7B) == VisionConfig(
        "llava", 336, 14, 1024, 4096, 23, 16, 1e-5, "quick_gelu", scale_factor=1
    )
    assert vision_config(path, LLAVA_7B).tokens_per_tile == 576
    assert llama_config(*text_config(path, LLAVA_7B)) == LlamaConfig(
        32064, 4096, 11008, 32, 32, 32, 128, 1e-5, 10000.0, 4096, tied_embeddings=False
    )


@pytest.mark.parametrize(("layer", "count"), [(-1, 4), (-2, 3), (-4, 1), (1, 1), (4, 4)])
def test_feature_layers(tmp_path: Path, layer: int, count: int) -> None:
    folder, _ = write(tmp_path / "toy", "llava")
    change(folder / CONFIG, vision_feature_layer=layer)
    source = open_source(folder)
    check_tensors(source)
    assert source.vision == replace(LLAVA, num_layers=count)


@pytest.mark.parametrize(
    ("family", "outer", "inner", "is_tied"),
    [
        ("idefics3", False, True, False),
        ("idefics3", True, False, True),
        ("llava", None, True, True),
        ("llava", True, False, True),
        ("llava", False, False, False),
    ],
)
def test_who_ties(
    tmp_path: Path, family: str, outer: bool | None, inner: bool, is_tied: bool
) -> None:
    """As transformers 5 does; a head that is stored though tied, and equal, is left out."""
    folder, _ = write(tmp_path / "toy", family, UNTIED)
    weights = load_file(folder / "model.safetensors")
    [head] = [name for name in weights if name.endswith("lm_head.weight")]
    [embeddings] = [name for name in weights if name.endswith("embed_tokens.weight")]
    save_file(weights | {head: weights[embeddings]}, folder / "model.safetensors")
    change(folder / CONFIG, tie_word_embeddings=outer, text_config={"tie_word_embeddings": inner})
    source = open_source(folder)
    check_tensors(source)
    assert source.config.tied_embeddings == is_tied
    assert ("output.weight" in source.tensors) != is_tied


def test_smolvlm_is_idefics3(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "toy", "idefics3")
    change(
        folder / CONFIG,
        model_type="smolvlm",
        architectures=["SmolVLMForConditionalGeneration"],
        vision_config={"model_type": "smolvlm_vision"},
    )
    change(folder / PROCESSOR, image_processor_type="SmolVLMImageProcessorFast")
    assert open_source(folder).vision == IDEFICS3


def test_processor_of_transformers_5(tmp_path: Path) -> None:
    """Which then has the settings of images; before, it had others."""
    folder, _ = write(tmp_path / "toy", "idefics3")
    expected, path = open_source(folder).image_settings, folder / "processor_config.json"
    path.write_text('{"image_seq_len": 4}')
    assert open_source(folder).image_settings == expected
    path.write_text(json.dumps({"image_processor": json.loads((folder / PROCESSOR).read_text())}))
    (folder / PROCESSOR).unlink()
    assert open_source(folder).image_settings == expected
    path.write_text('{"image_processor": [1]}')
    refused(folder, SourceError, "processor_config.json", "an object image_processor")
    path.unlink()
    refused(folder, SourceError, PROCESSOR, "download it too")


def test_defaults_of_processors(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "toy", "idefics3")
    (folder / PROCESSOR).write_text('{"max_image_size": {"longest_edge": 32}}')
    found = open_source(folder).image_settings
    assert found and (found["resize_to"], found["splits"], found["resample"]) == (1456, True, 1)


def test_old_chat_template(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "toy", "llava")
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    assert open_source(folder).tokenizer_config["chat_template"] == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert open_source(folder).tokenizer_config["chat_template"] == "new"


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("llava", {"model_type": "llava_next"}, ["'llama', 'idefics3', 'smolvlm', 'llava'"]),
        ("llava", {"architectures": ["Other"]}, ["['Other']", "LlavaForConditionalGeneration"]),
        ("idefics3", {"architectures": ["Other"]}, ["['Other']", "SmolVLMForConditional"]),
        ("idefics3", {"use_resampler": True}, ["use_resampler True"]),
        ("idefics3", {"text_config": {"use_resampler": True}}, ["text_config: use_resampler"]),
        ("idefics3", {"text_config": {"qk_layer_norms": True}}, ["qk_layer_norms True"]),
        ("llava", {"text_config": {"model_type": "mistral"}}, ["text_config: model_type 'mistr"]),
        ("llava", {"text_config": {"attention_bias": True}}, ["text_config: attention_bias"]),
        ("llava", {"quantization_config": {"bits": 4}}, ["quantization_config {'bits': 4}"]),
        ("llava", {"vision_feature_select_strategy": "full"}, ["'full'", "'default'"]),
        ("llava", {"vision_feature_layer": [-2, -5]}, ["vision_feature_layer [-2, -5]"]),
        ("llava", {"vision_feature_layer": -5}, ["vision_feature_layer -5", "-1 to -4"]),
        ("llava", {"vision_feature_layer": 0}, ["vision_feature_layer 0"]),
        ("llava", {"multimodal_projector_bias": False}, ["multimodal_projector_bias False"]),
        ("llava", {"projector_hidden_act": "relu"}, ["projector_hidden_act 'relu'"]),
        ("llava", {"vision_config": {"model_type": "siglip_vision_model"}}, ["'siglip_vision"]),
        ("llava", {"vision_config": {"hidden_act": "gelu"}}, ["hidden_act 'gelu'", "quick_gelu"]),
        ("idefics3", {"vision_config": {"hidden_act": "relu"}}, ["hidden_act 'relu'"]),
        ("idefics3", {"vision_config": {"num_channels": 1}}, ["num_channels 1"]),
        ("idefics3", {"vision_config": {"image_size": 7}}, ["image_size 7 with patch_size 8"]),
        ("idefics3", {"vision_config": {"num_attention_heads": 5}}, ["hidden_size 64 with 5"]),
        ("idefics3", {"scale_factor": 3}, ["4 patches across with scale_factor 3"]),
    ],
)
def test_models_refused_by_name(
    tmp_path: Path, family: str, values: dict[str, Any], words: list[str]
) -> None:
    folder, _ = write(tmp_path / "toy", family)
    change(folder / CONFIG, **values)
    refused(folder, UnsupportedError, CONFIG, *words)


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("idefics3", {"do_resize": False}, ["do_resize False"]),
        ("llava", {"do_rescale": False}, ["do_rescale False"]),
        ("llava", {"do_normalize": False}, ["do_normalize False"]),
        ("llava", {"do_center_crop": False}, ["do_center_crop False"]),
        ("llava", {"do_pad": True}, ["do_pad True"]),
        ("llava", {"crop_size": {"height": 24, "width": 32}}, ["'height': 24", "width of 32"]),
        ("llava", {"crop_size": None}, ["crop_size None"]),
        ("llava", {"size": {"height": 32, "width": 32}}, ["size {'height': 32", "shortest_edge"]),
        ("llava", {"size": {"shortest_edge": 31}}, ["'shortest_edge': 31", "at least 32"]),
        ("idefics3", {"size": 96}, ["size 96", "longest_edge"]),
        ("idefics3", {"max_image_size": {"longest_edge": 64}}, ["64", "longest_edge of 32"]),
        ("idefics3", {"do_image_splitting": "yes"}, ["do_image_splitting 'yes'"]),
        ("idefics3", {"resample": 6}, ["resample 6"]),
        ("llava", {"image_processor_type": "LlavaNextImageProcessor"}, ["'LlavaNextImage", "CLIP"]),
    ],
)
def test_processors_refused_by_name(
    tmp_path: Path, family: str, values: dict[str, Any], words: list[str]
) -> None:
    folder, _ = write(tmp_path / "toy", family)
    change(folder / PROCESSOR, **values)
    refused(folder, UnsupportedError, PROCESSOR, *words)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (CONFIG, {"vision_config": None}, ["an object vision_config"]),
        (CONFIG, {"text_config": [1]}, ["an object text_config"]),
        (CONFIG, {"vision_config": {"hidden_size": "64"}}, ["vision_config: ", "hidden_size"]),
        (CONFIG, {"vision_config": {"layer_norm_eps": 0}}, ["layer_norm_eps"]),
        (CONFIG, {"text_config": {"hidden_size": None}}, ["text_config: ", "hidden_size"]),
        (CONFIG, {"scale_factor": 0}, ["scale_factor"]),
        (CONFIG, {"image_token_id": 299}, ["an image token", "299"]),
        (CONFIG, {"image_token_id": 10**17}, ["an image token"]),
        (PROCESSOR, {"size": {"longest_edge": -1}}, ["longest_edge"]),
        (PROCESSOR, {"rescale_factor": "1"}, ["rescale_factor"]),
        (PROCESSOR, {"image_mean": 0.5}, ["three numbers for image_mean"]),
        (PROCESSOR, {"image_mean": [0, 0, "1"]}, ["three numbers for image_mean"]),
        (PROCESSOR, {"image_std": [0.5, 0.5]}, ["three numbers for image_std"]),
        (PROCESSOR, {"image_std": [0.5, 0.5, 0]}, ["three numbers for image_std"]),
    ],
)
def test_damaged_settings(
    tmp_path: Path, file: str, values: dict[str, Any], words: list[str]
) -> None:
    folder, _ = write(tmp_path / "toy", "idefics3")
    change(folder / file, **values)
    refused(folder, SourceError, file, "download it again", *words)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "toy", "idefics3")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = "model.text_model.layers.0.self_attn.q_proj.bias"
    patches, tower = "model.vision_model.embeddings.patch_embedding.weight", "model.vision_model."

    def refused_with(change: Weights, error: type[Exception], *words: str) -> None:
        changed = {name: array for name, array in (tensors | change).items() if array.size}
        save_file(changed, path)
        refused(folder, error, *words)

    one, none = np.ones(48, np.float32), np.ones(0, np.float32)
    refused_with({bias: one}, UnsupportedError, bias, "without biases")
    refused_with({f"{tower}head.probe": one}, SourceError, f"left over: {tower}head.probe")
    refused_with({f"{tower}encoder.layers.3.mlp.fc1.bias": one}, SourceError, "v.blk.3.ffn_up.bias")
    refused_with({patches: none}, SourceError, "missing: v.patch_embd.weight", "tower of 3")
    refused_with({patches: tensors[patches][:, :2].copy()}, SourceError, "(64, 128)", "(64, 192)")
    refused_with({patches: tensors[patches].reshape(64, -1)[0]}, SourceError, "v.patch_embd.weight")
    twice = {f"model.vision_tower.{patches.removeprefix(tower)}": tensors[patches]}
    refused_with(twice, SourceError, "every tensor once")
    stored = {f"{tower}embeddings.position_ids": np.arange(16)[None]}
    save_file(tensors | stored, path)
    check_tensors(open_source(folder))
