"""What the JSON files of an artifact say: config.json and artifact.json, checked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_local.artifact.json_file import is_file_name
from sf_local.artifact.sampling_defaults import check_sampling_defaults

FORMAT_VERSION = 5  # until 4, without the sampling parameters that the model recommends
COMPILER_VERSION = "3.9.0"  # of iree-compile, whose bytecode shortfin reads
VMFB, WEIGHTS, CONFIG, MANIFEST = "model.vmfb", "weights.irpa", "config.json", "artifact.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
REPAIR = "compile the model again: sf-compile SOURCE -o FOLDER --force"  # ends error messages
NORMALIZATIONS = None, "none", "log_softmax", "softmax"  # of the logits, by the compiled model
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of the KV cache
LOGITS_BLOCK = 256  # logits for which a compiled function returns one max and one sum


@dataclass(frozen=True)
class PagedKVCache:
    """`paged_kv_cache` of config.json. A page holds `block_seq_stride` tokens of all layers."""

    attention_head_count_kv: int
    block_seq_stride: int
    device_block_count: int
    kv_cache_dtype: str
    paged_kv_block_size_elements_per_device: list[int] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """config.json: shortfin's `paged_llm_v1` parameters, field for field."""

    max_seq_len: int
    transformer_block_count: int
    attn_head_dim: int
    prefill_batch_sizes: list[int]
    decode_batch_sizes: list[int]
    paged_kv_cache: PagedKVCache
    has_prefill_position: bool = False
    module_name: str = "module"
    module_abi_version: int = 1
    logits_normalization: str | None = "none"
    top_k: int | None = None

    @property
    def page_size(self) -> int:
        """Tokens in a KV page."""
        return self.paged_kv_cache.block_seq_stride

    @property
    def page_elements(self) -> int:
        """Numbers in a KV page: keys and values of all layers and heads."""
        sizes = self.paged_kv_cache.paged_kv_block_size_elements_per_device
        return sizes[0] if sizes else self._expected_page_elements

    @property
    def page_bytes(self) -> int:
        """Size of a KV page in bytes."""
        return self.page_elements * DTYPE_BYTES[self.paged_kv_cache.kv_cache_dtype]

    @property
    def _expected_page_elements(self) -> int:
        cache = self.paged_kv_cache
        return (
            self.transformer_block_count * 2 * cache.attention_head_count_kv
            * cache.block_seq_stride * self.attn_head_dim
        )  # fmt: skip

    def check(self) -> None:
        """Raise ValueError for the first value that is not allowed, or contradicts another."""
        cache = self.paged_kv_cache
        for name in ("max_seq_len", "transformer_block_count", "attn_head_dim"):
            _positive_int(name, getattr(self, name))
        sizes = cache.paged_kv_block_size_elements_per_device
        if sizes is not None and not (isinstance(sizes, list) and len(sizes) == 1):
            raise ValueError(
                f"paged_kv_block_size_elements_per_device must be a list of one, found {sizes!r}"
            )
        for name in ("attention_head_count_kv", "block_seq_stride"):
            _positive_int(name, getattr(cache, name))
        for name in ("prefill_batch_sizes", "decode_batch_sizes"):
            sizes = getattr(self, name)
            if not isinstance(sizes, list) or not sizes or sizes != sorted(sizes):
                raise ValueError(f"{name} must be an ascending list, found {sizes!r}")
            for size in sizes:
                _positive_int(name, size)
        if self.top_k is not None:
            _positive_int("top_k", self.top_k)
        if self.logits_normalization not in NORMALIZATIONS:
            raise ValueError(
                f"logits_normalization {self.logits_normalization!r}; one of {list(NORMALIZATIONS)}"
            )
        if cache.kv_cache_dtype not in DTYPE_BYTES:
            raise ValueError(f"kv_cache_dtype {cache.kv_cache_dtype!r}; one of {list(DTYPE_BYTES)}")
        if self.page_elements != self._expected_page_elements:
            raise ValueError(
                f"paged_kv_block_size_elements_per_device is {self.page_elements}, but layers * "
                f"2 * kv heads * page size * head_dim is {self._expected_page_elements}"
            )


@dataclass(frozen=True)
class Manifest:
    """artifact.json: what was compiled, for what, and from what."""

    format_version: int
    compiler_version: str
    source: Mapping[str, Any]  # name, sha256, and max_seq_len: the tokens it was trained for
    target: str  # "cpu" or a chip such as "gfx942"
    device: str  # "cpu" | "hip"
    cpu_features: Sequence[str]
    weight_dtype: str
    kv_dtype: str
    vocab_size: int
    hidden_size: int  # of an embedding
    bos_token_id: int | None
    eos_token_ids: Sequence[int]
    sampling_defaults: Mapping[str, float]  # by the names of SamplingParams
    functions: Sequence[str]
    config: Mapping[str, Any]  # the content of config.json
    parameters_sha256: str
    files: Mapping[str, Mapping[str, Any]]  # name -> size, sha256
    activation_dtype: str | None = None  # that quantized weights are multiplied with
    images: Mapping[str, Any] | None = None  # fields of ImageSettings, if the model reads images

    def check(self) -> None:
        """Raise TypeError, KeyError or ValueError for a value that is missing or not allowed."""
        for name, file in self.files.items():
            if not is_file_name(name):
                raise ValueError(f"files has {name!r}, which is no name of a file")
            _instance(f"files/{name}/size", file["size"], int)
            _instance(f"files/{name}/sha256", file["sha256"], str)
        for name in ("target", "device", "weight_dtype", "kv_dtype", "parameters_sha256"):
            _instance(name, getattr(self, name), str)
        for name, kind in (("functions", str), ("cpu_features", str), ("eos_token_ids", int)):
            _instance(name, getattr(self, name), list)
            for value in getattr(self, name):
                _instance(name, value, kind)
        if self.activation_dtype is not None:
            _instance("activation_dtype", self.activation_dtype, str)
        _positive_int("vocab_size", self.vocab_size)
        _positive_int("hidden_size", self.hidden_size)
        _instance("source", self.source["name"], str)
        _instance("source/max_seq_len", self.source.get("max_seq_len", 1), int)
        _instance("sampling_defaults", self.sampling_defaults, dict)
        check_sampling_defaults(self.sampling_defaults)
        _instance("config", self.config, dict)
        _instance("config/paged_kv_cache", self.config["paged_kv_cache"], dict)
        if self.images is not None:
            ImageSettings(**self.images).check()

    @property
    def image_batch_sizes(self) -> list[int]:
        """Numbers of tiles for which an encoder was compiled, ascending; empty without images."""
        found = (re.fullmatch(r"encode_image_bs(\d+)", name) for name in self.functions)
        return sorted(int(match[1]) for match in found if match)

    @property
    def max_tiles(self) -> int:
        """Most tiles of images that one call encodes; 0 if the model reads none."""
        return max(self.image_batch_sizes, default=0)


def parameters_sha256(types: Mapping[str, str]) -> str:
    """A hash of parameters' types by name, which tells whether weights fit a program."""
    return hashlib.sha256(json.dumps(sorted(types.items())).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, found {value!r}")


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, found {value!r}")


_MAX_IDEFICS3_SIDE = 4096  # transformers would scale larger images down once more


@dataclass(frozen=True)
class ImageSettings:
    """How a model wants its images, in values that JSON can hold.

    Attributes:
        family: "idefics3" scales an image until its longer side is resize_to; if `splits`, scales
            it to a grid of whole tiles; and adds a tile that shows all of it. "llava" scales the
            shorter side to resize_to, and crops one tile from the middle.
        tile_size: pixels along a tile's side.
        tokens_per_tile: image tokens that a tile takes in the prompt.
        image_token, image_token_id: the image token, as text and as id.
        resize_to, splits: see `family`.
        resample: the number of a Pillow filter.
        rescale, mean, std: the model reads (level * rescale - mean) / std of each pixel's red,
            green and blue levels; mean and std have one value a color.
    """

    family: str
    tile_size: int
    tokens_per_tile: int
    image_token: str
    image_token_id: int
    resize_to: int
    splits: bool
    resample: int
    rescale: float
    mean: list[float]
    std: list[float]

    def check(self) -> None:
        """Raise ValueError for the first setting that is not allowed."""
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name}={value!r} must be {rule}")
        if self.family == "llava" and self.splits:
            raise ValueError("splits=True must be False: LLaVA reads one tile of an image")
        if self.family == "llava" and self.resize_to < self.tile_size:
            raise ValueError(
                f"resize_to={self.resize_to} must be at least tile_size={self.tile_size}"
            )
        if self.family == "idefics3" and self.resize_to > _MAX_IDEFICS3_SIDE:
            raise ValueError(f"resize_to={self.resize_to} must be at most {_MAX_IDEFICS3_SIDE}")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return _is_int(value, 0) or (isinstance(value, float) and math.isfinite(value))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))


_Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words and as a check
_SIZE: _Rule = ("an int of at least 1", lambda value: _is_int(value, 1))
_RULES: dict[str, _Rule] = {
    "family": ('"idefics3" or "llava"', lambda value: value in ("idefics3", "llava")),
    "tile_size": _SIZE,
    "tokens_per_tile": _SIZE,
    "image_token": ("a str, not empty", lambda value: isinstance(value, str) and value != ""),
    "image_token_id": ("an int of at least 0", lambda value: _is_int(value, 0)),
    "resize_to": _SIZE,
    "splits": ("a bool", lambda value: isinstance(value, bool)),
    "resample": ("an int from 0 to 5", lambda value: _is_int(value, 0) and value <= 5),
    "rescale": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "mean": ("a list of 3 numbers", _are_numbers),
    "std": ("a list of 3 numbers above 0", lambda value: _are_numbers(value) and min(value) > 0),
}
