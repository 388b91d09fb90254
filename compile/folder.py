"""The folder that a build makes: what it may replace, how it appears, what describes it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile.scratch import scratch_folder
from compile.sources.source import Source
from compile.target import HIP_CHIPS, Target
from compile.weights import WHOLE, type_name
from sf_local.artifact import irpa
from sf_local.artifact.manifest import (
    COMPILER_VERSION,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER_FILES,
    VMFB,
    WEIGHTS,
    ImageSettings,
    Manifest,
    ModelConfig,
    PagedKVCache,
    file_sha256,
    parameters_sha256,
)
from sf_local.errors import ArtifactError, OutputError, SourceError
from sf_local.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from compile.emitters import Emitter

MLIR = "model.mlir"  # kept on demand, and for GPUs
PLAIN_MLIR = "model-plain.mlir"  # in which our own kernels are loops that a CPU can run
ARTIFACT_FILES = {VMFB, WEIGHTS, CONFIG, MANIFEST, *TOKENIZER_FILES, MLIR}
MAX_LISTED = 5
DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # ours -> shortfin's


def check_output(output: Path, force: bool) -> None:
    """Raise OutputError if `output` must not be replaced.

    Nothing is replaced without `force`, and with it only a folder in which all is an artifact's.
    """
    with _named_errors(output):
        if not output.exists():
            return
        if not force:
            raise OutputError(
                f"{output} exists already; replace it with sf-compile --force (force=True), or use "
                "another folder"
            )
        if not output.is_dir() or (others := _no_artifacts(output)):
            what = f"holds {_listed(others)}" if output.is_dir() else "is a file"
            raise OutputError(
                f"{output} {what}, which --force does not remove; choose another folder, or move "
                "that out of the way"
            )


def check_space(output: Path, num_bytes: int) -> None:
    """Raise OutputError unless `num_bytes` are free where the folder `output` will be."""
    with _named_errors(output):
        disk = shutil.disk_usage(next(folder for folder in output.parents if folder.exists()))
    if disk.total and disk.free < num_bytes:  # some file systems do not tell
        raise OutputError(
            f"{output} needs {size_text(num_bytes)}, and {size_text(disk.free)} are free there; "
            "free some space, or choose a folder elsewhere or narrower weights (sf-compile "
            "--weights)"
        )


def _no_artifacts(folder: Path) -> list[str]:
    """What is in a folder besides the files of an artifact, or folders of several targets."""
    entries = sorted(folder.iterdir())
    if (folder / MANIFEST).exists():
        return [path.name for path in entries if not _is_of_artifact(path)]
    return [
        path.name for path in entries
        if path.name not in ("cpu", *HIP_CHIPS) or not (path / MANIFEST).exists()
        or not all(map(_is_of_artifact, path.iterdir()))
    ]  # fmt: skip


def _is_of_artifact(path: Path) -> bool:
    return path.name in ARTIFACT_FILES and not path.is_dir()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


@contextmanager
def staging(output: Path, force: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `output`, which takes its place at the end.

    If the body raises, it vanishes. Raises OutputError for what cannot be written, or must not be
    replaced.
    """
    with _named_errors(output), scratch_folder(output.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        yield new
        check_output(output, force)  # again: it has been minutes
        _replace(output, new, temporary / "old")


def _replace(output: Path, new: Path, old: Path) -> None:
    """Move `new` to `output`, and what was there to `old`; nothing has moved if that raises."""
    try:
        if output.exists():
            os.replace(output, old)
        os.replace(new, output)
    except BaseException:
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise


def size_text(num_bytes: float) -> str:
    """A number of bytes, such as "1.3 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


@contextmanager
def _named_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); free some space, or choose "
            "a folder that you may write to"
        ) from error


def check_tokenizer(folder: Path, source: Source) -> None:
    """Raise SourceError for a tokenizer that the runtime would refuse."""
    try:
        Tokenizer(folder)
    except ArtifactError as error:
        reason = str(error).replace(f"{folder}{os.sep}", "")  # which will be gone
        raise SourceError(f"{source.name}: its tokenizer cannot be used: {reason}") from error
    vocab_size = source.config.vocab_size
    for token in (source.bos_token_id, *source.eos_token_ids):
        if token is not None and not 0 <= token < vocab_size:
            raise SourceError(
                f"{source.name}: bos or eos token {token} is not in the vocabulary of {vocab_size}"
            )


def check_images(source: Source) -> None:
    """Raise SourceError for settings that the runtime would refuse."""
    try:
        if source.image_settings is not None:
            ImageSettings(**source.image_settings).check()
    except ValueError as error:
        raise SourceError(f"{source.name}: its images cannot be prepared: {error}") from error


def write_descriptions(folder: Path, source: Source, emitter: Emitter, target: Target) -> None:
    """Write config.json, then artifact.json, which holds the hashes of all other files."""
    config = _model_config(emitter)
    (folder / CONFIG).write_text(_json(dataclasses.asdict(config)))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    model, parameters = emitter.options, emitter.parameters.values()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        compiler_version=COMPILER_VERSION,
        source={
            "name": source.name,
            "sha256": source.sha256,
            "max_seq_len": source.config.max_seq_len,
        },
        target=target.name,
        device=target.device,
        cpu_features=target.cpu_features,
        weight_dtype=model.weight_dtype,
        activation_dtype=model.activation_dtype,
        kv_dtype=model.kv_dtype,
        vocab_size=source.config.vocab_size,
        hidden_size=source.config.hidden_size,
        bos_token_id=source.bos_token_id,
        eos_token_ids=source.eos_token_ids,
        sampling_defaults=source.sampling_defaults,
        functions=model.function_names,
        config=dataclasses.asdict(config),
        parameters_sha256=parameters_sha256(
            {p.name: type_name(p) for p in parameters}
            | {WHOLE: irpa.whole_type(irpa.num_bytes_together(p.num_bytes for p in parameters))}
        ),
        files=files,
        images=source.image_settings,
    )
    (folder / MANIFEST).write_text(_json(dataclasses.asdict(manifest)))


def _model_config(emitter: Emitter) -> ModelConfig:
    """The contents of config.json, as shortfin defines them."""
    config, model = emitter.config, emitter.options
    return ModelConfig(
        max_seq_len=model.max_seq_len,
        transformer_block_count=config.num_layers,
        attn_head_dim=config.head_dim,
        prefill_batch_sizes=list(model.prefill_batch_sizes),
        decode_batch_sizes=list(model.decode_batch_sizes),
        has_prefill_position=True,
        paged_kv_cache=PagedKVCache(
            attention_head_count_kv=config.num_kv_heads,
            block_seq_stride=model.page_size,
            device_block_count=-(-model.max_seq_len // model.page_size) + 1,
            kv_cache_dtype=DTYPE_NAMES[model.kv_dtype],
            paged_kv_block_size_elements_per_device=[emitter.page_elements],
        ),
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
