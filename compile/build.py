"""Builds artifacts: weights are converted, a module is emitted and compiled, a folder appears."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from compile.cache import cache_dir
from compile.emitters import Emitter, find_emitter
from compile.folder import (
    MLIR,
    check_images,
    check_output,
    check_space,
    check_tokenizer,
    is_artifact,
    size_text,
    staging,
    write_descriptions,
)
from compile.formats.layout import DTYPES, ITEM_BYTES, QUANTIZED
from compile.options import BuildOptions
from compile.progress import Progress, silent
from compile.sources.demo import DEMO_SHA256
from compile.sources.open import open_source
from compile.sources.source import Source
from compile.target import Target, resolve_target
from compile.toolchain import check_installed, iree_compile
from compile.weights import check_tensors, write_weights
from sf_local import artifact
from sf_local.artifact import irpa
from sf_local.artifact.manifest import COMPILER_VERSION, VMFB, WEIGHTS
from sf_local.errors import UnsupportedError

log = logging.getLogger("sf_local.compile")
CODE_FOLDERS = Path(__file__).parent, Path(artifact.__file__).parent  # that decide what is built


def build(
    source: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    keep_mlir: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Compile `source` into the folder `output`, and return its path.

    source: a Hugging Face folder or id, a .gguf file, or "demo". keep_mlir: leave model.mlir in the
    folder. force: replace an existing artifact. progress: called with each stage and its share.
    The folder appears whole or not at all. Raises CompileError.
    """
    check_installed()
    options = options or BuildOptions()
    targets = _targets(options)
    output = Path(output).expanduser().absolute()
    check_output(output, force)
    opened = open_source(source, lambda message: progress(message, None))
    check_tensors(opened)
    check_images(opened)
    emitters = [find_emitter(opened, options, target) for target in targets]
    for target, emitter in zip(targets, emitters, strict=True):
        _log_sizes(opened, options, target, emitter)
    check_space(output, sum({repr(e.parameters): _num_bytes(e) for e in emitters}.values()))
    weights: dict[str, str] = {}  # parameters -> the target whose file has them
    with staging(output, force) as whole:
        for target, emitter in zip(targets, emitters, strict=True):
            folder = whole if len(targets) == 1 else whole / target.name
            folder.mkdir(exist_ok=True)
            opened.write_tokenizer(folder)
            check_tokenizer(folder, opened)
            same = weights.setdefault(repr(emitter.parameters), target.name)
            if same == target.name:
                _write_weights(folder / WEIGHTS, opened, emitter, progress)
            else:
                (folder / WEIGHTS).symlink_to(Path("..", same, WEIGHTS))
            _write_model(folder, emitter, target, progress)
            if not keep_mlir:
                (folder / MLIR).unlink()
            write_descriptions(folder, opened, emitter, target)
    return output


def demo(options: BuildOptions | None = None, *, progress: Progress = silent) -> Path:
    """As `build_once` of "demo", SmolLM2-135M-Instruct; not even read if it is built already."""
    check_installed()
    return _kept("demo", "smollm2", DEMO_SHA256, options or BuildOptions(), progress)


def build_once(
    source: str | Path, options: BuildOptions | None = None, *, progress: Progress = silent
) -> Path:
    """The artifact of `source`, built on first use and kept in the user's cache folder.

    Its name has a hash of the weights, the options, the target with its CPU features, the compiler
    and this code. Arguments and errors are those of `build`.
    """
    check_installed()
    opened = open_source(source, lambda message: progress(message, None))
    name = opened.name.rpartition("/")[2]
    return _kept(source, name, opened.sha256, options or BuildOptions(), progress)


def _kept(
    source: str | Path, name: str, sha256: str, options: BuildOptions, progress: Progress
) -> Path:
    folder = cache_dir() / "artifacts" / f"{name}-{cache_key(sha256, options)}"
    if not is_artifact(folder):
        build(source, folder, options, force=True, progress=progress)
    return folder


def cache_key(
    source_sha256: str, options: BuildOptions, code: Sequence[Path] = CODE_FOLDERS
) -> str:
    """A hash of all that a build depends on: weights, options, targets, and the Python code of
    the folders `code`."""
    digest = hashlib.sha256(f"{source_sha256} {COMPILER_VERSION} {options}".encode())
    digest.update(repr(_targets(options)).encode())
    for path in sorted(path for folder in code for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _targets(options: BuildOptions) -> list[Target]:
    names = options.target.split(",")
    if len(set(names)) < len(names):
        raise UnsupportedError(f"target={options.target!r} names one twice")
    found = [resolve_target(name, options.cpu) for name in names]
    return [dataclasses.replace(target, tuning=options.tuning) for target in found]


def _log_sizes(source: Source, options: BuildOptions, target: Target, emitter: Emitter) -> None:
    """Say what the weights become and what they need, and warn if they grow unasked."""
    stored, model = source.weight_dtype, emitter.options
    is_inflated = stored.lower() not in DTYPES and model.weight_dtype not in QUANTIZED
    is_unasked = is_inflated and options.weight_dtype is None
    size, token = _num_bytes(emitter), emitter.page_elements * ITEM_BYTES[model.kv_dtype]
    log.log(
        logging.WARNING if is_unasked else logging.INFO,
        "%s: %s weights become %s for %s: %s on disk and in memory, where the KV cache takes %s a "
        "token%s", source.name, stored, model.weight_dtype, target.name, size_text(size),
        size_text(token / model.page_size),
        "; int8 and int4 are for CPUs, and heads of a multiple of 32" if is_unasked else "",
    )  # fmt: skip


def _num_bytes(emitter: Emitter) -> int:
    return irpa.num_bytes_together(p.num_bytes for p in emitter.parameters.values())


def _write_weights(path: Path, source: Source, emitter: Emitter, progress: Progress) -> None:
    write_weights(
        path, source, list(emitter.parameters.values()),
        lambda done, total: progress("converting weights", done / total),
    )  # fmt: skip


def _write_model(folder: Path, emitter: Emitter, target: Target, progress: Progress) -> None:
    """Write model.mlir and model.vmfb."""
    progress(f"compiling for {target.name}", None)
    (folder / MLIR).write_text(emitter.emit())
    iree_compile(folder / MLIR, folder / VMFB, target)
