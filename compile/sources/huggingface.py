"""Reads a Hugging Face folder as a Source: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from compile.models.registry import HuggingFaceFamily, find_hf_family
from compile.models.spec import LlamaConfig
from compile.reading import corrupt, map_file, read_json, unsupported
from compile.sources.hf_files import INDEX, folder_sha256, weight_files
from compile.sources.hf_tokenizer import open_tokenizer
from compile.sources.sampling_defaults import of_generation_config
from compile.sources.source import Progress, Source, SourceTensor, check_bias

log = logging.getLogger("sf_local.compile")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # that old transformers stored


def open_folder(folder: Path, name: str, progress: Progress) -> Source:
    """Open a model's folder; raises SourceError, UnsupportedError, and OSError."""
    path = folder / "config.json"
    raw = read_json(path)
    family = find_hf_family(path, raw)
    config, vision = family.hf_config(path, raw)
    files = weight_files(folder)
    if files == [folder / "model.safetensors"] and (folder / INDEX).exists():
        log.warning("%s: model.safetensors is read, and the shards beside it are not", folder)
    tensors = _tensors(files, family)
    config = _untied(folder, config, tensors)
    tensors = {n: t for n, t in tensors.items() if family.is_weight(n, config, vision)}
    found = open_tokenizer(folder)
    text = raw["text_config"] if vision else {}
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    bos, eos = _special_ids(folder, text | raw, generation)
    settings = family.image_settings(folder, raw, vision, found.tokenizer)
    sha256 = folder_sha256(folder, files, progress)
    return Source(
        name, config, tensors, sha256, found.tokenizer_json, found.config, bos, eos, vision,
        settings, of_generation_config(path, generation),
    )  # fmt: skip


def _tensors(files: list[Path], family: HuggingFaceFamily) -> dict[str, SourceTensor]:
    """All tensors by canonical name, but for buffers."""
    tensors: dict[str, SourceTensor] = {}
    for path in files:
        _add_tensors(path, family, tensors)
    return tensors


def _untied(folder: Path, config: LlamaConfig, tensors: dict[str, SourceTensor]) -> LlamaConfig:
    """The config, untied if there is a head with other weights than the embeddings, as in
    transformers; a head without embeddings becomes these."""
    head, embeddings = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if not config.tied_embeddings or head is None:
        return config
    if embeddings is None:
        tensors["token_embd.weight"] = tensors.pop("output.weight")
        return config
    if _are_equal(head, embeddings):
        return config
    log.warning(
        "%s: config.json says tie_word_embeddings, but lm_head.weight differs from the embeddings "
        "and is used", folder,
    )  # fmt: skip
    return replace(config, tied_embeddings=False)


def _are_equal(one: SourceTensor, other: SourceTensor, rows: int = 1024) -> bool:
    parts = (slice(start, start + rows) for start in range(0, one.shape[0], rows))
    return one.shape == other.shape and all(
        np.array_equal(one.read(part), other.read(part)) for part in parts
    )


def _add_tensors(path: Path, family: HuggingFaceFamily, tensors: dict[str, SourceTensor]) -> None:
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
        canonical = family.canonical_name(name)
        check_bias(path, name, canonical)
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
        tensors[canonical] = SourceTensor(shape, entry["dtype"], data.__getitem__)


def _special_ids(
    folder: Path, raw: dict[str, Any], generation: dict[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """bos, and every id that either config calls eos."""

    def read(key: str) -> list[Any]:
        found = [raw.get(key), generation.get(key)]  # each one id, or a list
        return [
            i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None
        ]

    bos, eos = read("bos_token_id"), read("eos_token_id")
    for token_id in [*bos, *eos]:
        if not isinstance(token_id, int):
            raise corrupt(folder / "config.json", "token ids for bos and eos", repr(token_id))
    return bos[0] if bos else None, tuple(dict.fromkeys(eos))
