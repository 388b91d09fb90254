"""Reads a .gguf file as a Source; its tokenizer is converted in gguf_tokenizer.py.

The header is read here and not by gguf.GGUFReader, which takes seconds for a vocabulary and can
loop forever over a damaged one.
"""

import math
import mmap
import re
import shlex
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import Groups
from compile.formats.gguf_blocks import from_gguf
from compile.models.registry import find_gguf_family
from compile.reading import corrupt, map_file, unsupported
from compile.sources.gguf_tokenizer import convert_tokenizer, special_id
from compile.sources.sampling_defaults import of_gguf
from compile.sources.source import Progress, Rows, Source, SourceTensor, check_bias
from sf_local.artifact.cache import known_sha256
from sf_local.errors import SourceError, UnsupportedError

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type id -> struct code
STRING, ARRAY = 8, 9
VERSIONS = range(1, 100)  # that exist or may come to
OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # "ggml" and others, as little-endian numbers
MMPROJ = (
    "the vision part of a model",
    "get the model's own .gguf; to show it images, its Hugging Face folder",
)
NO_MODELS = {  # by general.type or general.architecture: what it is, and what to do
    "adapter": (
        "a LoRA adapter",
        "merge it into its base model: llama-export-lora -m BASE.gguf --lora ADAPTER.gguf "
        "-o MERGED.gguf",
    ),
    "mmproj": MMPROJ,
    "clip": MMPROJ,
    "imatrix": ("an importance matrix, as llama-quantize reads it", "get the model's own .gguf"),
    "controlvector": ("a control vector", "get the model's own .gguf"),
}


def open_gguf(path: Path, progress: Progress, sha256: str | None = None) -> Source:
    """Open a file, of a known sha256 or not; raises SourceError, UnsupportedError, and OSError."""
    try:
        fields, tensors = _read_header(path)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, struct.error) as error:
        raise corrupt(path, "a GGUF file", error) from error
    family = find_gguf_family(path, fields)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = family.gguf_config(path, fields, shapes, lambda name: tensors[name].read(slice(None)))
    kept = {name: t for name, t in tensors.items() if family.is_weight(name, config, None)}
    for name, tensor in kept.items():
        check_bias(path, name, name)
        if order := family.gguf_row_order(name, config):
            kept[name] = _reordered(tensor, order)
    try:
        tokenizer, tokenizer_config = convert_tokenizer(fields)
        bos, *ends = (special_id(fields, name) for name in ("bos", "eos", "eot", "eom"))
    except (SourceError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error
    eos = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    tokenizer_json = tokenizer.to_str(pretty=True).encode()
    if sha256 is None:
        sha256 = known_sha256(path, progress)
    return Source(
        path.name, config, kept, sha256, tokenizer_json, tokenizer_config, bos, eos,
        sampling_defaults=of_gguf(path, fields),
    )  # fmt: skip


class _Cursor:
    """Reads the values of a header in order; ValueError where one ends outside the file."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.at = 0

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        start, self.at = self.at, self.at + struct.calcsize(f"<{count}{code}")
        if self.at > len(self.mapped):
            raise ValueError(f"a header that goes on behind the end, at {len(self.mapped)} bytes")
        return struct.unpack_from(f"<{count}{code}", self.mapped, start)

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
    magic, version = cursor.scalars("s", 4)[0], cursor.integer("I")
    _check_format(path, magic, version)
    tensor_count, field_count = cursor.scalars("Q", 2)
    fields = {cursor.string(): cursor.value(cursor.integer("I")) for _ in range(field_count)}
    _check_fields(path, fields, tensor_count)
    infos = {}
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.integer("I")
        infos[name] = cursor.scalars("Q", dims)[::-1], cursor.integer("I"), cursor.integer("Q")
    alignment = int(fields.get("general.alignment", 32))
    if len(infos) != tensor_count or alignment < 1:
        raise ValueError(f"{len(infos)} names of {tensor_count} tensors, aligned to {alignment}")
    start = -(-cursor.at // alignment) * alignment
    return fields, {
        name: source_tensor(path, cursor.mapped, name, shape, kind, start + offset)
        for name, (shape, kind, offset) in infos.items()
    }


def _check_format(path: Path, magic: bytes, version: int) -> None:
    """Refuse other formats than GGUF 2 and 3; raises ValueError for what is none that is known."""
    if magic in OLD_MAGICS:
        remedy = "GGUF (get a newer file, or convert the original with convert_hf_to_gguf.py)"
        raise unsupported(path, "a file of the format before GGUF", remedy)
    if magic != b"GGUF":
        raise ValueError(f"a file that begins with {magic!r}")
    if version in (2, 3):
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if min(version, swapped) not in VERSIONS:
        raise ValueError(f"GGUF version {version}")
    if swapped in VERSIONS:
        remedy = shlex.join(["gguf-convert-endian", str(path), "little"])
        raise unsupported(path, "a big-endian GGUF", f"little-endian ones (convert it: {remedy})")
    supported = "versions 2 and 3 (convert the original with today's convert_hf_to_gguf.py)"
    raise unsupported(path, f"GGUF version {version}", supported)


def _check_fields(path: Path, fields: Mapping[str, Any], tensor_count: int) -> None:
    """Refuse what is no whole model, and what would be read wrongly, before anything else."""
    if isinstance(parts := fields.get("split.count"), int) and parts > 1:
        found = f"a part of a GGUF that is split into {parts}"
        merge = shlex.join(["llama-gguf-split", "--merge", _first_part(path, parts), "WHOLE.gguf"])
        raise unsupported(path, found, f"one file (join the parts: {merge})")
    for key in ("general.type", "general.architecture"):
        value = fields.get(key)
        if isinstance(value, str) and (kind := NO_MODELS.get(value)):
            raise unsupported(path, f"{kind[0]} ({key} {value!r})", f"whole models ({kind[1]})")
    find_gguf_family(path, fields)
    if tensor_count == 0:
        supported = "whole models (get the model's own .gguf)"
        raise unsupported(path, "a vocabulary without weights", supported)


def _first_part(path: Path, parts: int) -> str:
    """The path of the first part, which llama-gguf-split takes, by the names that it gives."""
    name = re.sub(r"-\d{5}-of-\d{5}\.gguf$", f"-00001-of-{parts:05}.gguf", path.name)
    return str(path.with_name(name))


def source_tensor(
    path: Path, mapped: mmap.mmap, name: str, shape: tuple[int, ...], kind_id: int, start: int
) -> SourceTensor:
    """The tensor at byte `start` of a mapped file, of the type that GGUF numbers `kind_id`.

    Raises UnsupportedError for a type that cannot be dequantized, ValueError for a shape that the
    type's blocks do not fill.
    """
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

    return SourceTensor(shape, kind.name, read, groups)


def _reordered(tensor: SourceTensor, order: Callable[[int], NDArray[Any]]) -> SourceTensor:
    """The tensor with its rows in another order: `order(rows)` has the stored row of each."""
    groups = tensor.groups

    def stored(rows: Rows) -> NDArray[Any]:
        return np.asarray(order(tensor.shape[0])[rows])

    return replace(
        tensor,
        read=lambda rows: tensor.read(stored(rows)),
        groups=groups and (lambda rows: groups(stored(rows))),
    )
