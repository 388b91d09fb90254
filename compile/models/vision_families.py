"""The families of Idefics3, SmolVLM and LLaVA-1.5: a vision tower that feeds a Llama.

Their configs, names of tensors, and how images are prepared. Defaults are those of transformers'
classes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compile.models import llama
from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import VISION, hf_names
from compile.reading import (
    Numbers,
    Supported,
    Where,
    check_supported,
    corrupt,
    read_json,
    unsupported,
)
from sf_local.errors import SourceError

FAMILIES = {"idefics3": "idefics3", "smolvlm": "idefics3", "llava": "llava"}  # by model_type
NAMES = hf_names(VISION)
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
TOWERS: dict[str, dict[str, Any]] = {
    "idefics3": {
        "hidden_size": 1152,
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "llava": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "idefics3": {
        "size": {"longest_edge": 1456},
        "max_image_size": {"longest_edge": 364},
        "do_image_splitting": True,
        "resample": 1,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "llava": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}

# Anything else would be computed wrongly.
MODELS: dict[str, Supported] = {
    "idefics3": {
        "architectures": (
            [["Idefics3ForConditionalGeneration"], ["SmolVLMForConditionalGeneration"], [], None],
            "['Idefics3ForConditionalGeneration'], ['SmolVLMForConditionalGeneration']",
        ),
    },
    "llava": {
        "architectures": (
            [["LlavaForConditionalGeneration"], [], None],
            "['LlavaForConditionalGeneration']",
        ),
        "vision_feature_select_strategy": (["default", None], "'default'"),
        "projector_hidden_act": (["gelu", None], "'gelu'"),
        "multimodal_projector_bias": ([True, None], "true"),
    },
}
PLAIN_TEXT: Supported = {
    "use_resampler": ([False, None], "false"),
    "qk_layer_norms": ([False, None], "false"),
}
TOWER: Supported = {
    "hidden_act": ([*ACTIVATIONS], ", ".join(map(repr, ACTIVATIONS))),
    "num_channels": ([3, None], "3"),
}
CLIP_TOWER: Supported = {"model_type": (["clip_vision_model", None], "'clip_vision_model'")}
PROCESSOR: Supported = {
    "do_resize": ([True, None], "true"),
    "do_rescale": ([True, None], "true"),
    "do_normalize": ([True, None], "true"),
    "resample": ([*range(6)], "a filter of Pillow, 0 to 5"),
}


def hf_config(path: Path, raw: dict[str, Any]) -> tuple[LlamaConfig, VisionConfig | None]:
    """The Llama and the tower of a config.json."""
    vision = vision_config(path, raw)
    return llama.llama_config(*text_config(path, raw)), vision


def vision_config(path: Path, raw: Mapping[str, Any]) -> VisionConfig:
    """The vision tower of a config.json; raises SourceError and UnsupportedError."""
    family = FAMILIES[raw["model_type"]]
    check_supported(path, raw, MODELS[family])
    where, values = _part(path, raw, "vision_config", TOWERS[family])
    check_supported(where, values, TOWER)
    numbers = Numbers(where, values)
    num_layers, scale_factor = numbers.integer("num_hidden_layers", 12), 1
    if family == "llava":
        check_supported(where, values, CLIP_TOWER)
        num_layers = _feature_layer(path, raw, num_layers)
    else:
        scale_factor = Numbers(path, raw).integer("scale_factor", 2)
    config = VisionConfig(
        family=family,
        image_size=numbers.integer("image_size", 224),
        patch_size=numbers.integer("patch_size", 32),
        hidden_size=numbers.integer("hidden_size"),
        intermediate_size=numbers.integer("intermediate_size", 3072),
        num_layers=num_layers,
        num_heads=numbers.integer("num_attention_heads"),
        norm_eps=numbers.number("layer_norm_eps"),
        activation=ACTIVATIONS[values["hidden_act"]],
        scale_factor=scale_factor,
    )
    _check_sizes(where, config)
    return config


def text_config(path: Path, raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text_config of a config.json, as if it were a Llama's; and before it, what messages
    call it."""
    where, text = _part(path, raw, "text_config", LLAMA)
    check_supported(path, raw, PLAIN_TEXT)
    check_supported(where, text, PLAIN_TEXT)
    is_tied = raw.get("tie_word_embeddings")
    if raw["model_type"] == "llava":  # as transformers 5: of the others only the outer one counts
        is_tied = is_tied or text.get("tie_word_embeddings")
    return where, text | {
        "architectures": None,  # SmolVLM's has a private one
        "tie_word_embeddings": is_tied,
        "quantization_config": raw.get("quantization_config"),
    }


def canonical_name(name: str) -> str:
    """The name in `models.tensors` of a tensor that a folder calls `name`; else `name`.

    A tower is in model.vision_model, vision_tower.vision_model, vision_tower, or
    model.vision_tower.vision_model, depending on the model and the version of transformers that
    saved it; LLaVA's connector is in `model` or not.
    """
    prefix = r"(?:model\.)?(?:vision_(?:tower|model)\.)*(?:encoder\.layers\.(\d+)\.)?"
    found = re.fullmatch(prefix + r"(.+?)(\.weight|\.bias)?", name)
    if not found or found[2] not in NAMES:
        return llama.canonical_name(name)
    return NAMES[found[2]].format(found[1]) + (found[3] or "")


def is_weight(name: str, config: LlamaConfig, vision: VisionConfig | None) -> bool:
    """As of a Llama; and not what follows LLaVA's feature layer, from which patches are taken."""
    assert vision is not None
    layer = re.match(r"v\.blk\.(\d+)\.", name)
    follows = int(layer[1]) >= vision.num_layers if layer else name.startswith("v.post_ln.")
    return llama.is_weight(name, config, vision) and not (vision.family == "llava" and follows)


def image_settings(
    folder: Path, raw: Mapping[str, Any], vision: VisionConfig | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The fields of sf_local's ImageSettings, from the processor's config in `folder`.

    raw: the contents of config.json. Raises SourceError, and UnsupportedError for images that are
    prepared in other ways.
    """
    assert vision is not None
    path, found = _processor(folder)
    values = PROCESSORS[vision.family] | found
    check_supported(path, values, PROCESSOR | _tiles(vision))
    token_id, token = _image_token(folder / "config.json", raw, tokenizer)
    return {
        "family": vision.family,
        "tile_size": vision.image_size,
        "tokens_per_tile": vision.tokens_per_tile,
        "image_token": token,
        "image_token_id": token_id,
        "resize_to": _resize_to(path, values["size"], vision),
        "splits": vision.family == "idefics3" and bool(values["do_image_splitting"]),
        "resample": int(values["resample"]),
        "rescale": Numbers(path, values).number("rescale_factor", 1 / 255),
        "mean": _channels(path, values, "image_mean"),
        "std": _channels(path, values, "image_std"),
    }


def _part(
    path: Path, raw: Mapping[str, Any], key: str, defaults: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    part = raw.get(key)
    if not isinstance(part, dict):
        raise corrupt(path, f"an object {key}", repr(part))
    return f"{path} {key}", defaults | part


def _feature_layer(path: Path, raw: Mapping[str, Any], num_layers: int) -> int:
    """How many layers LLaVA computes; its features may be counted from the end, -1 being all."""
    layer = raw.get("vision_feature_layer", -2)
    if type(layer) is not int or not 0 < abs(layer) <= num_layers:
        found = f"vision_feature_layer {layer!r}"
        raise unsupported(path, found, f"one layer, 1 to {num_layers} or -1 to -{num_layers}")
    return layer if layer > 0 else num_layers + 1 + layer


def _check_sizes(where: Where, config: VisionConfig) -> None:
    if config.image_size < config.patch_size:
        found = f"image_size {config.image_size} with patch_size {config.patch_size}"
        raise unsupported(where, found, "at least one patch")
    for number, divisor, text in (
        (config.hidden_size, config.num_heads, "hidden_size {} with {} heads"),
        (config.patches_across, config.scale_factor, "{} patches across with scale_factor {}"),
    ):
        if number % divisor:
            raise unsupported(where, text.format(number, divisor), "a multiple")


def _processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings: transformers 5 has them in the processor's."""
    path = folder / "processor_config.json"
    values = read_json(path).get("image_processor") if path.exists() else None
    if values is None:
        path = folder / "preprocessor_config.json"
        if not path.exists():
            raise SourceError(
                f"{path}: expected how images are prepared, found none; download it too"
            )
        values = read_json(path)
    if not isinstance(values, dict):
        raise corrupt(path, "an object image_processor", repr(values))
    return path, values


def _tiles(config: VisionConfig) -> Supported:
    """What the processor must say of how images are cut into tiles."""
    size = config.image_size
    if config.family == "idefics3":
        return {
            "image_processor_type": _classes("Idefics3", "SmolVLM"),
            "max_image_size": ([{"longest_edge": size}], f"a longest_edge of {size}"),
            "do_image_splitting": ([True, False], "true, false"),
        }
    return {
        "image_processor_type": _classes("CLIP", "Llava"),
        "do_center_crop": ([True, None], "true"),
        "crop_size": ([{"height": size, "width": size}], f"a height and a width of {size}"),
        "do_pad": ([False, None], "false"),
    }


def _classes(*models: str) -> tuple[list[Any], str]:
    names = [f"{model}ImageProcessor" for model in models]
    variants = [name + kind for name in names for kind in ("", "Fast", "Pil")]
    return [*variants, None], ", ".join(names)


def _resize_to(path: Path, size: object, config: VisionConfig) -> int:
    """The side that images are scaled to first: LLaVA's shorter one, Idefics3's longer one."""
    is_llava = config.family == "llava"
    edge, least = ("shortest_edge", config.image_size) if is_llava else ("longest_edge", 1)
    if not isinstance(size, dict) or size.keys() != {edge}:
        raise unsupported(path, f"size {size!r}", f"a {edge}")
    pixels = Numbers(path, size).integer(edge)
    if pixels < least:
        raise unsupported(path, f"size {size!r}", f"a {edge} of at least {least}")
    return pixels


def _image_token(path: Path, raw: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, str]:
    default = 32000 if raw["model_type"] == "llava" else 128257
    numbers = Numbers(path, raw)
    token_id = numbers.integer("image_token_id", numbers.integer("image_token_index", default))
    token = {i: text for text, i in tokenizer.get_vocab().items()}.get(token_id)
    if token is None:
        raise corrupt(path, "an image token that tokenizer.json has", token_id)
    return token_id, token


def _channels(path: Path, values: Mapping[str, Any], key: str) -> list[float]:
    """A number each for red, green and blue; above 0 for image_std."""
    found, least = values[key], 0 if key == "image_std" else -1e18
    is_list = isinstance(found, list) and len(found) == 3
    if not is_list or not all(type(x) in (int, float) and least < x < 1e18 for x in found):
        raise corrupt(path, f"three numbers for {key}", repr(found))
    return [float(x) for x in found]
