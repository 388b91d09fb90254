"""A .gguf file -> a Source; its tokenizer is converted in gguf_tokenizer.py.

The header is read here, for gguf.GGUFReader takes seconds for a vocabulary and can loop forever
over a damaged one.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from compile.formats.quantize import Groups, from_gguf
from compile.models.spec import LlamaConfig, RopeScaling
from compile.reading import Numbers, corrupt, map_file, unsupported
from compile.sources.gguf_tokenizer import convert_tokenizer, special_id
from compile.sources.source import Progress, Rows, Source, SourceTensor
from sf_local.artifact.manifest import file_sha256
from sf_local.errors import SourceError, UnsupportedError

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type id -> struct code
STRING, ARRAY = 8, 9
UNSUPPORTED = (  # they would be computed wrongly
    "expert_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv",
    "embedding_scale", "residual_scale", "logit_scale",
)  # fmt: skip


def open_gguf(path: Path, progress: Progress, sha256: str | None = None) -> Source:
    """Open a file, of a known sha256 or not; raises SourceError, UnsupportedError, and OSError."""
    try:
        fields, tensors = _read_header(path)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, struct.error) as error:
        raise corrupt(path, "a GGUF file", error) from error
    config = _config(path, fields, tensors)
    tensors.pop("rope_freqs.weight", None)  # now in the config
    permuted = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            raise unsupported(path, f"tensor {name}", "a Llama without biases")
        if heads := permuted.get(name.split(".", 2)[-1]):
            tensors[name] = _unpermuted(tensor, heads)
    try:
        tokenizer, tokenizer_config = convert_tokenizer(fields)
        bos, *ends = (special_id(fields, name) for name in ("bos", "eos", "eot", "eom"))
    except (SourceError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error
    eos = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    tokenizer_json = tokenizer.to_str(pretty=True).encode()
    if sha256 is None:
        progress(f"hashing {path}")
        sha256 = file_sha256(path)
    return Source(path.name, config, tensors, sha256, tokenizer_json, tokenizer_config, bos, eos)


class _Cursor:
    """Reads the values of a header in order; struct.error where one ends outside the file."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.at = 0

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.mapped, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return values

    def integer(self, code: str) -> int:
        return int(self.scalars(code, 1)[0])

    def string(self) -> str:
        return str(self.scalars("s", self.integer("Q"))[0], "utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalars(SCALARS[kind], 1)[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        inner, count = self.integer("I"), self.integer("Q")
        if inner in SCALARS:
            return list(self.scalars(SCALARS[inner], count))
        return [self.value(inner) for _ in range(count)]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, SourceTensor]]:
    """Metadata key -> plain Python value, and the tensors as the file has them."""
    cursor = _Cursor(map_file(path))
    magic, version = cursor.integer("I"), cursor.integer("I")
    if magic != gguf.GGUF_MAGIC or version not in (2, 3):
        raise ValueError(f"magic {magic:#x} version {version}, not a little-endian version 2 or 3")
    tensor_count, field_count = cursor.scalars("Q", 2)
    fields = {cursor.string(): cursor.value(cursor.integer("I")) for _ in range(field_count)}
    _check_fields(path, fields)
    infos = {}
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.integer("I")
        infos[name] = cursor.scalars("Q", dims)[::-1], cursor.integer("I"), cursor.integer("Q")
    alignment = int(fields.get("general.alignment", 32))
    if len(infos) != tensor_count or alignment < 1:
        raise ValueError(f"{len(infos)} names of {tensor_count} tensors, aligned to {alignment}")
    start = -(-cursor.at // alignment) * alignment
    return fields, {
        name: _tensor(path, cursor.mapped, name, shape, kind, start + offset)
        for name, (shape, kind, offset) in infos.items()
    }


def _check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise unsupported(path, f"general.architecture {architecture!r}", "'llama'")
    if fields.get("split.count", 0) > 1:
        found = f"part of a GGUF split into {fields['split.count']}"
        raise unsupported(path, found, "one file (join them: llama-gguf-split --merge)")
    for key in UNSUPPORTED:
        if value := fields.get(f"llama.{key}"):
            raise unsupported(path, f"llama.{key} {value!r}", "models without it")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        if isinstance(fields.get(f"llama.{key}"), list):
            raise unsupported(path, f"llama.{key} that differs by layer", "layers of one shape")


def _tensor(
    path: Path, mapped: mmap.mmap, name: str, shape: tuple[int, ...], kind_id: int, start: int
) -> SourceTensor:
    try:
        kind = gguf.GGMLQuantizationType(kind_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)  # so that it fails now
    except (ValueError, NotImplementedError) as error:
        supported = "F32, F16, BF16 and the quantized types of gguf.dequantize"
        raise unsupported(path, f"the type of tensor {name} ({error})", supported) from None
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"tensor {name} of shape {list(shape)} in blocks of {block}")
    packed = (*shape[:-1], shape[-1] // block * block_bytes)
    raw = np.frombuffer(mapped, np.uint8, math.prod(packed), start).reshape(packed)

    def read(rows: Rows) -> NDArray[Any]:
        if len(shape) == 1:
            return np.asarray(gguf.dequantize(raw, kind))[rows]
        return np.asarray(gguf.dequantize(np.ascontiguousarray(raw[rows]), kind))

    def groups(rows: Rows) -> Groups | None:
        return from_gguf(raw[rows], kind.name) if len(shape) == 2 else None

    return SourceTensor(shape, read, groups)


def _unpermuted(tensor: SourceTensor, heads: int) -> SourceTensor:
    """GGUF has a head's rows as (j, half), for RoPE on neighbours; we want (half, j)."""

    groups = tensor.groups

    def order(rows: Rows) -> NDArray[Any]:
        every = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return np.asarray(every[rows])

    return SourceTensor(
        tensor.shape,
        lambda rows: tensor.read(order(rows)),
        groups and (lambda rows: groups(order(rows))),
    )


def _config(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
) -> LlamaConfig:
    if "token_embd.weight" not in tensors:
        raise corrupt(path, "a tensor token_embd.weight", "none")
    llama = {key[6:]: value for key, value in fields.items() if key.startswith("llama.")}
    numbers = Numbers(path, llama)
    hidden = numbers.integer("embedding_length")
    heads = numbers.heads(
        hidden, "attention.head_count", "attention.head_count_kv", "attention.key_length"
    )
    head_dim = heads["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if numbers.integer(key, head_dim) != head_dim:
            raise unsupported(path, f"llama.{key} {llama[key]}", f"the head size, {head_dim}")
    return LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=numbers.integer("feed_forward_length"),
        num_layers=numbers.integer("block_count"),
        **heads,
        rms_eps=numbers.number("attention.layer_norm_rms_epsilon"),
        rope_theta=numbers.number("rope.freq_base", 10000.0),
        max_seq_len=numbers.integer("context_length"),
        tied_embeddings="output.weight" not in tensors,
        rope_scaling=_rope_scaling(numbers, head_dim, tensors.get("rope_freqs.weight")),
    )


def _rope_scaling(llama: Numbers, head_dim: int, freqs: SourceTensor | None) -> RopeScaling | None:
    kind = llama.values.get("rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear"):
        supported = "'none', 'linear', rope_freqs.weight"
        raise unsupported(llama.path, f"rope scaling {kind!r}", supported)
    factor = 1.0
    if kind == "linear":
        factor = llama.number("rope.scaling.factor", llama.number("rope.scale_linear", 1.0))
    if freqs is None:
        return None if factor == 1.0 else RopeScaling("linear", factor)
    factors = freqs.read(slice(None)) * factor
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        expected = f"{head_dim // 2} positive divisors in rope_freqs.weight"
        raise corrupt(llama.path, expected, f"shape {factors.shape}")
    return RopeScaling("factors", 1.0, factors=tuple(factors.tolist()))
