"""Builds artifacts: weights are converted, a module is emitted and compiled, a folder appears."""

from __future__ import annotations

import logging
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compile.folder import (
    MLIR,
    PLAIN_MLIR,
    check_images,
    check_output,
    check_space,
    check_tokenizer,
    size_text,
    staging,
    write_descriptions,
)
from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.formats.layout import DTYPES, ITEM_BYTES
from compile.models.tensors import decoder_tensors
from compile.options import BuildOptions
from compile.progress import Progress, silent
from compile.sources.open import open_source
from compile.sources.source import Source
from compile.target import Target
from compile.toolchain import check_installed, iree_compile
from compile.weights import check_tensors, write_weights
from sf_local.artifact import irpa
from sf_local.artifact.manifest import VMFB, WEIGHTS

if TYPE_CHECKING:
    from compile.emitters import Emitter

log = logging.getLogger("sf_local.compile")


def build(
    source: str | Path | Source,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    keep_mlir: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Compile `source` into the folder `output`, and return its path.

    source: a Hugging Face folder or id, a .gguf file, "demo", or a Source. keep_mlir: leave
    model.mlir in the folder, and for GPUs model-plain.mlir, which a CPU can run. force: replace an
    existing artifact. progress: called with each stage and its share. The folder appears whole or
    not at all. Raises CompileError.
    """
    from compile.emitters import find_emitter  # 0.1 s, that only opening what is built needs not

    check_installed()
    options = options or BuildOptions()
    targets = options.targets
    output = Path(output).expanduser().absolute()
    check_output(output, force)
    if not isinstance(source, Source):
        source = open_source(source, partial(progress, share=None))
    check_tensors(source)
    check_images(source)
    emitters = [find_emitter(source, options, target) for target in targets]
    for target, emitter in zip(targets, emitters, strict=True):
        _log_sizes(source, options, target, emitter)
    check_space(output, sum({repr(e.parameters): _num_bytes(e) for e in emitters}.values()))
    weights: dict[str, str] = {}  # parameters -> the target whose file has them
    with staging(output, force) as whole:
        for target, emitter in zip(targets, emitters, strict=True):
            folder = whole if len(targets) == 1 else whole / target.name
            folder.mkdir(exist_ok=True)
            source.write_tokenizer(folder)
            check_tokenizer(folder, source)
            same = weights.setdefault(repr(emitter.parameters), target.name)
            if same == target.name:
                _write_weights(folder / WEIGHTS, source, emitter, progress)
            else:
                (folder / WEIGHTS).symlink_to(Path("..", same, WEIGHTS))
            _write_model(folder, emitter, target, progress)
            _clear_mlir(folder, emitter, keep_mlir)
            write_descriptions(folder, source, emitter, target)
    return output


def _log_sizes(source: Source, options: BuildOptions, target: Target, emitter: Emitter) -> None:
    """Say what the weights become and what they need, and warn if they grow unasked."""
    stored, model = source.weight_dtype, emitter.options
    is_inflated = stored.lower() not in DTYPES and model.weight_dtype not in BLOCK_TYPES
    is_unasked = is_inflated and options.weight_dtype is None
    size, token = _num_bytes(emitter), emitter.page_elements * ITEM_BYTES[model.kv_dtype]
    log.log(
        logging.WARNING if is_unasked else logging.INFO,
        "%s: %s for %s: %s on disk and in memory, where the KV cache takes %s a token%s",
        source.name, _conversions_text(source, emitter), target.name, size_text(size),
        size_text(token / model.page_size),
        f"; on CPUs quantized weights need heads of whole {GROUP}s" if is_unasked else "",
    )  # fmt: skip


def _conversions_text(source: Source, emitter: Emitter) -> str:
    """What matrices of each type become, such as "Q4_K weights become q4_k, Q6_K q6_k"."""
    sizes: Counter[tuple[str, str]] = Counter()
    for tensor in decoder_tensors(source.config).all:
        for name, shape in tensor.sources.items() if tensor.is_matrix else ():
            sizes[source.tensors[name].dtype, emitter.options.dtype_of(name)] += math.prod(shape)
    first, *others = (" ".join(pair) for pair, _ in sizes.most_common())
    return ", ".join([first.replace(" ", " weights become "), *others])


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


def _clear_mlir(folder: Path, emitter: Emitter, keep: bool) -> None:
    """Remove the module's text, or add the one that a CPU can run."""
    from compile.gpu.emitter import LlamaEmitter

    if not keep:
        (folder / MLIR).unlink()
    elif isinstance(emitter, LlamaEmitter):
        (folder / PLAIN_MLIR).write_text(emitter.plain().emit())
