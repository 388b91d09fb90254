"""Which files of a Hugging Face folder are read, and their hash. Needs no safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

from compile.reading import check_file, corrupt, read_json
from compile.sources.source import Progress
from sf_local.artifact.cache import known_sha256
from sf_local.artifact.json_file import is_file_name
from sf_local.artifact.path_kinds import other_weights
from sf_local.errors import SourceError

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards of its index; raises SourceError if there is neither."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        if what := other_weights(folder):
            raise SourceError(f"{folder}: {what}")
        raise SourceError(
            f"{folder}: no model.safetensors, nor an index of shards; download them, or "
            "convert other weights with transformers' save_pretrained(safe_serialization=True)"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise corrupt(index, "an object weight_map", repr(shards))
    for name in shards.values():
        if not is_file_name(name):
            raise corrupt(index, "file names in weight_map", repr(name))
    paths = [folder / name for name in sorted(set(shards.values()))]
    if missing := [path.name for path in paths if not path.exists()]:
        raise SourceError(
            f"{index}: {len(missing)} of {len(paths)} shards are missing ({missing[0]}"
            f"{', ...' if missing[1:] else ''}): download them too"
        )
    return paths


def folder_sha256(folder: Path, weights: list[Path], progress: Progress) -> str:
    """A hash of the weights and of all that describes them; raises SourceError, and OSError."""
    hashes = ""
    others = "*.json", "*.jinja", "additional_chat_templates/*.jinja"
    for path in [*weights, *sorted(path for form in others for path in folder.glob(form))]:
        check_file(path, "a file of a model")
        hashes += f"{known_sha256(path, progress)}  {path.name}\n"
    return hashlib.sha256(hashes.encode()).hexdigest()
