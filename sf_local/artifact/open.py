"""Artifact: the files of a compiled model, found and checked before IREE loads any of them.

An artifact is a folder of model.vmfb, weights.irpa, config.json (shortfin's paged_llm_v1),
artifact.json (our manifest), tokenizer.json and tokenizer_config.json. At every load the sizes of
all files are compared with the manifest, and the hashes of small ones; `verify` hashes everything.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sf_local.artifact import irpa
from sf_local.artifact.json_file import read_object
from sf_local.artifact.manifest import (
    COMPILER_VERSION,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    REPAIR,
    TOKENIZER_FILES,
    VMFB,
    WEIGHTS,
    Manifest,
    ModelConfig,
    PagedKVCache,
    file_sha256,
    parameters_sha256,
)
from sf_local.artifact.path_kinds import (
    as_weights,
    describe,
    is_artifact,
    is_repo_id,
    models_beside,
)
from sf_local.errors import (
    CorruptFileError,
    MismatchError,
    MissingFileError,
    TargetError,
    VersionError,
)

T = TypeVar("T")

MAX_HASHED_AT_LOAD = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class Artifact:
    """The checked files of one compiled model."""

    vmfb: Path
    weights: tuple[Path, ...]
    tokenizer: Path  # folder
    config: ModelConfig
    manifest: Manifest | None  # None for files made by amdsharktank

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.vmfb.parent.name

    @property
    def max_tokens(self) -> int:
        """The most tokens of a sequence.

        A page less than the context for code of amdsharktank, whose prefill of the whole context
        gives wrong results: it promises the compiler that there is a page less.
        """
        longest, page_size = self.config.max_seq_len, self.config.page_size
        return longest if self.manifest else (-(-longest // page_size) - 1) * page_size

    @property
    def num_weight_bytes(self) -> int:
        """Size of all weight files."""
        return sum(path.stat().st_size for path in self.weights)


def open_artifact(
    vmfb: str | Path,
    *,
    config: str | Path | None = None,
    parameters: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str | Path | None = None,
    targets: Sequence[str] = (),
) -> Artifact:
    """Find the files of an artifact, and check them against each other.

    Args:
        vmfb: the artifact's folder, or a `.vmfb` file. Files that no other argument names are
            looked for in the same folder.
        config: another config.json.
        parameters: other weights, one .irpa file or several.
        tokenizer: another folder with the tokenizer's files, or the path of its tokenizer.json.
        targets: "cpu" or chips, in order of preference, to choose from where the folder was
            compiled for several.

    Raises ArtifactError for files that are missing, corrupt, of another version or target, or do
    not fit each other.
    """
    path = find_target(vmfb, targets)
    folder = path if path.is_dir() else path.parent
    vmfb_path = _existing(path / VMFB if path.is_dir() else path)
    manifest = _read_manifest(folder / MANIFEST)
    config_path = Path(os.path.expanduser(config)) if config else folder / CONFIG
    model = read_config(config_path)
    weights = _weight_paths(parameters, folder)
    tokenizer_folder = Path(os.path.expanduser(tokenizer)) if tokenizer else folder
    if tokenizer_folder.is_file():
        tokenizer_folder = tokenizer_folder.parent
    for name in TOKENIZER_FILES:
        _existing(tokenizer_folder / name)
    tables = {name: e for p in weights for name, e in irpa.read_table(p).items()}
    artifact = Artifact(vmfb_path, weights, tokenizer_folder, model, manifest)
    if manifest:
        _check_files(folder, manifest, [vmfb_path, *weights, config_path])
        _check_config(config_path, model, manifest)
        if manifest.parameters_sha256 != parameters_sha256({n: e.type for n, e in tables.items()}):
            raise MismatchError(
                f"{weights[0]}: these weights do not fit {vmfb_path}: names or shapes differ from "
                f"what was compiled; {REPAIR}"
            )
    return artifact


def find_target(vmfb: str | Path, targets: Sequence[str] = ()) -> Path:
    """The path itself, or the subfolder to use of a folder that was compiled for several targets.

    That is the one of the first of `targets` that is there; without `targets`, of the first by
    name. Raises MissingFileError if there is no such path, and TargetError if no target is there.
    """
    path = Path(os.path.expanduser(vmfb))
    if not os.path.exists(path):
        raise _not_there(str(vmfb))
    if path.suffix == ".vmfb" or is_artifact(path):
        return path
    found = compiled_targets(path) if path.is_dir() else []
    if not found:
        if what := _no_artifact(path):
            raise MissingFileError(f"vmfb={str(vmfb)!r}: {what}")
        return path  # of whose files it is said which are missing
    for name in targets or found:
        if name in found:
            return path / name
    raise TargetError(
        f"{path}: compiled for {', '.join(found)}, not for {' or '.join(targets)}; add it with "
        f"sf-compile SOURCE -o {path} --force --target {','.join([*found, targets[0]])}"
    )


def _not_there(vmfb: str) -> MissingFileError:
    """The error for a path that does not exist; it may be meant for `from_source`."""
    what, beside = "no such file or folder", models_beside(Path(os.path.expanduser(vmfb)))
    if vmfb == "demo" or is_repo_id(vmfb):
        meant = "the demo model" if vmfb == "demo" else "the repo on Hugging Face"
        what += beside
        return MissingFileError(f"vmfb={vmfb!r}: {what}; if {meant} is meant, {_compile(vmfb)}")
    return MissingFileError(
        f"vmfb={vmfb!r}: {what}; compile one with sf-compile SOURCE -o FOLDER, or use "
        f'Engine.from_source, which takes "demo", a .gguf file, or "org/name"{beside}'
    )


def _no_artifact(path: Path) -> str | None:
    """What a path is that is no artifact for certain, with what to do; else None."""
    if weights := as_weights(path):
        return f"these are weights, no artifact; {_compile(str(weights))}"
    neither = None if path.is_dir() else "neither an artifact's folder nor a .vmfb file"
    return describe(path) or neither


def _compile(source: str) -> str:
    command = shlex.join(["sf-compile", source, "-o", "FOLDER"])
    return f"compile it with {command}, or use Engine.from_source({source!r}), which does"


def compiled_targets(vmfb: str | Path) -> list[str]:
    """The targets that an artifact was compiled for; none if there is no artifact.json."""
    path = Path(os.path.expanduser(vmfb))
    folder = path if path.is_dir() else path.parent
    several = [manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}")]
    manifest = _read_manifest(folder / MANIFEST)
    return [manifest.target] if manifest else sorted(several)


def host_cpu_features() -> frozenset[str]:
    """The features of this machine's CPU, as /proc/cpuinfo names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def check_target(manifest: Manifest, target: str) -> None:
    """Raise TargetError unless what was compiled runs on a target, "cpu" or a chip.

    Code for "cpu" may not need features that this machine's CPU lacks.
    """
    if manifest.target != target:
        raise TargetError(
            f"the artifact was compiled for {manifest.target}, not for {target}; add that with "
            f"sf-compile SOURCE -o FOLDER --force --target {manifest.target},{target}"
        )
    missing = sorted(set(manifest.cpu_features) - host_cpu_features()) if target == "cpu" else []
    if missing:
        raise TargetError(
            f"the artifact was compiled for another CPU: this one lacks {', '.join(missing)}; "
            "compile it here, or for any CPU with sf-compile --cpu generic"
        )


def verify(artifact: Artifact) -> None:
    """Hash every file that artifact.json lists.

    Raises CorruptFileError for one that has changed, MissingFileError for one that is not there, or
    if there is no artifact.json.
    """
    if artifact.manifest is None:
        raise MissingFileError(
            f"{artifact.vmfb.parent / MANIFEST}: there are no hashes to verify without it"
        )
    for name, expected in artifact.manifest.files.items():
        _check_hash(_existing(artifact.vmfb.parent / name), str(expected["sha256"]))


def read_config(path: Path) -> ModelConfig:
    """Read and check config.json; raises MissingFileError or CorruptFileError."""
    data = _read_json(path)
    try:
        cache = _from_dict(PagedKVCache, data.get("paged_kv_cache"))
        model = _from_dict(ModelConfig, data | {"paged_kv_cache": cache})
        model.check()
    except (TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a paged_llm_v1 config: {error}; {REPAIR}") from error
    return model


def _read_manifest(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    data = _read_json(path)
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        target = data.get("target")
        raise VersionError(
            f"{path}: format_version {version!r}, this sf_local reads {FORMAT_VERSION}; {REPAIR}"
            + (f" --target {target}" if isinstance(target, str) else "")
        )
    try:
        manifest = _from_dict(Manifest, data)
        manifest.check()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a manifest: {error}; {REPAIR}") from error
    if manifest.compiler_version != COMPILER_VERSION:
        raise VersionError(
            f"{path}: compiled by iree-compile {manifest.compiler_version}, but shortfin runs only "
            f"what {COMPILER_VERSION} made; {REPAIR}"
        )
    return manifest


def _check_files(folder: Path, manifest: Manifest, paths: Sequence[Path]) -> None:
    """Compare the sizes of files in `folder` with artifact.json, and the hashes of small ones."""
    for path in [*paths, *(folder / name for name in TOKENIZER_FILES)]:
        expected = manifest.files.get(path.name) if path.parent == folder else None
        if expected is None or not path.exists():
            continue
        size = path.stat().st_size
        if size != expected["size"]:
            raise CorruptFileError(
                f"{path}: {expected['size']} bytes expected, {size} found; copy it again, or "
                f"{REPAIR}"
            )
        if size <= MAX_HASHED_AT_LOAD:
            _check_hash(path, str(expected["sha256"]))


def _check_hash(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise CorruptFileError(
            f"{path}: changed since it was compiled: sha256 {expected} expected, {found} found; "
            f"{REPAIR}"
        )


def _check_config(path: Path, config: ModelConfig, manifest: Manifest) -> None:
    """Raise MismatchError if config.json differs from the one the VMFB was compiled with."""
    found = asdict(config)
    for part in (found, found["paged_kv_cache"]):
        made = manifest.config if part is found else manifest.config["paged_kv_cache"]
        for name, value in part.items():
            free = name in ("paged_kv_cache", "device_block_count") or value is None
            if not free and value != made.get(name):
                raise MismatchError(
                    f"{path}: {name} is {value!r}, but the VMFB was compiled with "
                    f"{made.get(name)!r}; {REPAIR}"
                )


def _weight_paths(
    parameters: str | Path | Sequence[str | Path] | None, folder: Path
) -> tuple[Path, ...]:
    if parameters is None:
        return (_existing(folder / WEIGHTS),)
    if isinstance(parameters, (str, Path)):
        parameters = [parameters]
    if not parameters:
        raise MissingFileError(f"parameters={parameters!r}: name at least one .irpa file")
    return tuple(_existing(Path(os.path.expanduser(p))) for p in parameters)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MissingFileError(f"{path}: the file is missing from the artifact; {REPAIR}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(_existing(path))
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"{path}: not readable as JSON ({error}); {REPAIR}") from error


def _from_dict(kind: Callable[..., T], data: Any) -> T:
    """A dataclass from a JSON object; raises TypeError for unknown or missing keys."""
    if not isinstance(data, dict):
        raise TypeError(f"an object was expected, found {data!r}")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(data.keys() - known):
        raise TypeError(f"unknown keys: {', '.join(unknown)}")
    return kind(**data)
