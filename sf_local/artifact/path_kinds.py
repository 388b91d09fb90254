"""What a path is that is neither an artifact nor weights that are read: errors say it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sf_local.artifact.json_file import read_object
from sf_local.artifact.manifest import CONFIG, MANIFEST, VMFB, WEIGHTS

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER = "adapter_config.json"
MAX_LISTED = 5
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # what such names begin with
OTHER_FORMATS = {  # by suffix: in words, and whether transformers can convert it
    ".bin": ("pickles of PyTorch", True),
    ".pt": ("pickles of PyTorch", True),
    ".pth": ("pickles of PyTorch", True),
    ".onnx": ("ONNX", False),
    ".h5": ("HDF5 of TensorFlow", False),
    ".msgpack": ("MessagePack of Flax", False),
}


def is_repo_id(text: str) -> bool:
    """Whether a text can be a repo on Hugging Face, such as "org/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None


def as_weights(path: Path) -> Path | None:
    """The source that can be compiled which is meant by a path: a .gguf file, a Hugging Face
    folder, or the folder around one of its files; None for anything else, artifacts included."""
    folder = path if path.is_dir() else path.parent
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if path.suffix == ".vmfb" or is_artifact(folder) or not (folder / CONFIG).is_file():
        return None
    return folder if path.exists() and other_weights(folder) is None else None


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds what only artifacts have."""
    return any((folder / name).exists() for name in (MANIFEST, VMFB, WEIGHTS))


def is_compiled(folder: Path) -> bool:
    """Whether a folder is an artifact, or has one for each of several targets."""
    targets = [manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}")]
    return is_artifact(folder) or any(re.fullmatch(r"cpu|gfx\w+", name) for name in targets)


def describe(path: Path) -> str | None:
    """What a path is that is no model, and what to give for it; None if it is not known."""
    if path.is_dir():
        return other_weights(path) or _models_inside(path)
    if not path.exists():
        return None
    if is_artifact(path.parent):
        return f"a file of an artifact; give its folder, {path.parent}"
    if (path.parent / CONFIG).is_file():
        return other_weights(path.parent) or f"a file of a model; give its folder, {path.parent}"
    return _other_format([path]) or (
        "one file of a model; give a folder with its config.json and tokenizer.json as well"
        if path.suffix == ".safetensors" else None
    )  # fmt: skip


def models_beside(path: Path) -> str:
    """Which models are in the folder where a path is not: the end of an error, or nothing."""
    found: dict[str, list[Path]] = {"compiled": [], "weights": []}
    for entry in _entries(path.parent):
        with suppress(OSError):  # it must not be read
            if is_compiled(entry):
                found["compiled"].append(entry)
            elif as_weights(entry) == entry:
                found["weights"].append(entry)
    told = "; ".join(f"{kind}: {_listed(paths)}" for kind, paths in found.items() if paths)
    return f" (there are {told})" if told else ""


def other_weights(folder: Path) -> str | None:
    """Which weights a folder holds in place of safetensors, and what to do; None for others."""
    if any((folder / name).exists() for name in SAFETENSORS):
        return None
    if (folder / ADAPTER).exists():
        return _adapter(folder)
    if found := sorted(folder.glob("*.gguf")):
        return f"a folder of .gguf files; give one: {_listed(found)}"
    return _other_format(_entries(folder))


def _adapter(folder: Path) -> str:
    try:
        base = read_object(folder / ADAPTER).get("base_model_name_or_path") or "BASE"
    except (OSError, ValueError):
        base = "BASE"
    return (
        f"a PEFT adapter of {base}, no whole model; merge them first, with the package peft: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()"
        f".save_pretrained('MERGED') and AutoTokenizer.from_pretrained({base!r})"
        ".save_pretrained('MERGED'); then compile that: sf-compile MERGED -o FOLDER"
    )


def _other_format(paths: list[Path]) -> str | None:
    for suffix, (name, is_convertible) in OTHER_FORMATS.items():
        found = [p for p in paths if p.suffix == suffix and not p.name.startswith(NO_WEIGHTS)]
        if not found:
            continue
        folder, remedy = found[0].parent, "get the model as safetensors or .gguf"
        if is_convertible and (folder / CONFIG).exists():
            remedy = (
                f"convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r})"
            )
        names = _listed([path.name for path in found])
        return f"weights as {name} ({names}), which is not read; {remedy}"
    return None


def _models_inside(folder: Path) -> str | None:
    inside = [
        path for path in _entries(folder)
        if path.is_dir() and (is_artifact(path) or (path / CONFIG).exists())
    ]  # fmt: skip
    return f"a folder of models; give one: {_listed(inside)}" if inside else None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # it must not be read
        return []


def _listed(paths: Sequence[object]) -> str:
    more = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
    return ", ".join(map(str, paths[:MAX_LISTED])) + more
