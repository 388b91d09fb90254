"""Weights in, artifact folder out: convert, emit, compile, and move into place as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compile.cache import cache_dir
from compile.cpu.emitter import CpuLlamaEmitter
from compile.cpu.vision import LANES
from compile.gpu.decoder import LlamaEmitter
from compile.cpu.matmul import Tuning
from compile.options import QUANTIZED, ModelOptions
from compile.formats.quantize import GROUP
from compile.sources.open import DEMO_SHA256, Source, open_source
from compile.target import Target, resolve_target
from compile.weights import (
    DTYPES,
    WHOLE,
    check_tensors,
    type_name,
    write_weights,
)
from sf_local.artifact.open import open as artifact
from sf_local.artifact import irpa
from sf_local.artifact.open import (
    COMPILER_VERSION,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    VMFB,
    WEIGHTS,
    Manifest,
    ModelConfig,
    PagedKVCache,
    file_sha256,
    parameters_sha256,
)
from sf_local.errors import (
    ArtifactError,
    CompileError,
    OutputError,
    SourceError,
    UnsupportedError,
)
from sf_local.vision.processor import ImageSettings
from sf_local.text.tokenizer import Tokenizer

Emitter = LlamaEmitter | CpuLlamaEmitter
Progress = Callable[[str, float | None], None]  # what is being done, and which share of it
MLIR = "model.mlir"
DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
MAX_BATCH_SIZE = 256
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def _silent(stage: str, share: float | None) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What to build; raises UnsupportedError for values that cannot be built.

    None means the target's default; for max_seq_len, in tokens, the model's own context.
    target: "cpu", an AMD chip such as "gfx942", or several as "gfx942,gfx1100,cpu"; cpu: "host",
    "generic", "x86-64-v3" or "x86-64-v4". weight_dtype, kv_dtype: "f32", "f16" or "bf16".
    page_size: tokens a KV page. image_batch_sizes: tiles that are encoded together, of models that
    see: by default (1, 4), on CPUs one, between which others decode.
    row_major: matrices row by row, as GPUs have them, on a CPU too (to test that code there).
    tuning: of a CPU's kernels; see `compile.tools.tune_cpu`.
    """

    target: str = "cpu"
    cpu: str = "host"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    page_size: int = 16
    prefill_batch_sizes: tuple[int, ...] = (1, 4)
    decode_batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    image_batch_sizes: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    row_major: bool = False
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("weight_dtype", (*DTYPES, *QUANTIZED)), ("kv_dtype", DTYPES)):
            if (value := getattr(self, name)) not in (None, *allowed):
                raise UnsupportedError(f"{name}={value!r}; use one of {', '.join(allowed)}")
        if self.page_size not in PAGE_SIZES:
            raise UnsupportedError(f"page_size={self.page_size!r}; use one of {PAGE_SIZES}")
        for name in ("prefill_batch_sizes", "decode_batch_sizes", "image_batch_sizes"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            in_range = all(1 <= size <= MAX_BATCH_SIZE for size in sizes)
            if not sizes or list(sizes) != sorted(set(sizes)) or not in_range:
                raise UnsupportedError(
                    f"{name}={sizes!r}; give different sizes from 1 to {MAX_BATCH_SIZE}, ascending"
                )


def build(
    source: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    keep_mlir: bool = False,
    force: bool = False,
    progress: Progress = _silent,
) -> Path:
    """Compile `source` (a Hugging Face folder or id, a .gguf file, or "demo") into `output`.

    The folder appears whole or not at all; an existing one is replaced only with `force`. Returns
    its path. Raises CompileError.
    """
    options = options or BuildOptions()
    targets = _targets(options)
    output = Path(output).expanduser().absolute()
    _check_output(output, force)
    opened = open_source(source, lambda message: progress(message, None))
    check_tensors(opened)
    _check_images(opened)
    emitters = [_emitter(opened, options, target) for target in targets]
    weights: dict[str, str] = {}  # parameters -> the target whose file has them
    with _staging(output) as whole:
        for target, emitter in zip(targets, emitters, strict=True):
            folder = whole if len(targets) == 1 else whole / target.name
            folder.mkdir(exist_ok=True)
            opened.write_tokenizer(folder)
            _check_tokenizer(folder, opened)
            same = weights.setdefault(repr(emitter.parameters), target.name)
            if same == target.name:
                _write_weights(folder / WEIGHTS, opened, emitter, progress)
            else:
                (folder / WEIGHTS).symlink_to(Path("..", same, WEIGHTS))
            _write_model(folder, emitter, target, progress)
            if not keep_mlir:
                (folder / MLIR).unlink()
            _write_descriptions(folder, opened, emitter, target)
    return output


def demo(options: BuildOptions | None = None, *, progress: Progress = _silent) -> Path:
    """`build_once` of the demo model (SmolLM2-135M-Instruct), which need not be opened for it."""
    return _kept("demo", "smollm2", DEMO_SHA256, options or BuildOptions(), progress)


def build_once(
    source: str | Path, options: BuildOptions | None = None, *, progress: Progress = _silent
) -> Path:
    """The artifact of `source`, as `build` takes it, built once per set of inputs.

    It lies in the user's cache folder under a hash of the weights, the options, the target with its
    CPU features, the compiler and this code.
    """
    opened = open_source(source, lambda message: progress(message, None))
    name = opened.name.rpartition("/")[2]
    return _kept(source, name, opened.sha256, options or BuildOptions(), progress)


def _kept(
    source: str | Path, name: str, sha256: str, options: BuildOptions, progress: Progress
) -> Path:
    folder = cache_dir() / "artifacts" / f"{name}-{_fingerprint(sha256, options)}"
    if not _is_artifact(folder):
        build(source, folder, options, force=True, progress=progress)
    return folder


def _fingerprint(source_sha256: str, options: BuildOptions) -> str:
    """A hash of everything that a build depends on."""
    digest = hashlib.sha256(f"{source_sha256} {COMPILER_VERSION} {options}".encode())
    digest.update(repr(_targets(options)).encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *map(Path, (artifact.__file__, irpa.__file__))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _targets(options: BuildOptions) -> list[Target]:
    names = options.target.split(",")
    if len(set(names)) < len(names):
        raise UnsupportedError(f"target={options.target!r} names one twice")
    found = [resolve_target(name, options.cpu) for name in names]
    return [dataclasses.replace(target, tuning=options.tuning) for target in found]


def _check_output(output: Path, force: bool) -> None:
    """Nothing is replaced without `force`, and only an artifact or an empty folder with it."""
    if not output.exists():
        return
    if not force:
        raise OutputError(f"{output} exists already; use --force to replace it, or another folder")
    if not output.is_dir() or (any(output.iterdir()) and not _is_artifact(output)):
        raise OutputError(f"{output} is no artifact, so --force does not replace it; remove it")


def _is_artifact(folder: Path) -> bool:
    """Of one target, or of several."""
    return (folder / MANIFEST).exists() or any(folder.glob(f"*/{MANIFEST}"))


def _emitter(source: Source, options: BuildOptions, target: Target) -> Emitter:
    weight_dtype = options.weight_dtype or target.weight_dtype
    context = source.config.max_seq_len
    model = ModelOptions(
        weight_dtype=weight_dtype,
        kv_dtype=options.kv_dtype or _kv_dtype(weight_dtype, target),
        page_size=options.page_size,
        prefill_batch_sizes=options.prefill_batch_sizes,
        decode_batch_sizes=options.decode_batch_sizes,
        max_seq_len=(
            context - context % options.page_size
            if options.max_seq_len is None
            else options.max_seq_len
        ),
        image_batch_sizes=(
            (options.image_batch_sizes or target.image_batch_sizes) if source.vision else ()
        ),
    )
    if not options.page_size <= model.max_seq_len <= context:
        raise UnsupportedError(
            f"max_seq_len={model.max_seq_len}: at least a page of {options.page_size} tokens, and "
            f"at most the {context} that {source.name} was trained for"
        )
    is_quantized, head_dim = weight_dtype in QUANTIZED, source.config.head_dim
    if is_quantized and (target.vectors is None or options.row_major):
        raise UnsupportedError(
            f"weight_dtype={weight_dtype!r} is for CPUs; use f16 or bf16 for {target.name}"
        )
    if is_quantized and head_dim % GROUP:
        raise UnsupportedError(
            f"weight_dtype={weight_dtype!r}: {source.name} has head_dim {head_dim}; it must be a "
            f"multiple of {GROUP}; use bf16 or f16"
        )
    if target.vectors is None or options.row_major:
        return LlamaEmitter(source.config, model, target.tile, source.vision)
    if source.vision and source.vision.hidden_size % LANES:
        raise UnsupportedError(
            f"{source.name}: its vision tower has hidden_size {source.vision.hidden_size}; on CPUs "
            f"it must be a multiple of {LANES}"
        )
    return CpuLlamaEmitter(source.config, model, target.vectors, source.vision)


def _kv_dtype(weight_dtype: str, target: Target) -> str:
    """The default: as the weights, or what unquantized weights would be."""
    return target.weight_dtype if weight_dtype in QUANTIZED else weight_dtype


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place, or vanishes if the body fails."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            if output.exists():
                os.replace(output, Path(temporary) / "old")
            os.replace(new, output)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); free some space, or choose "
            "a folder that you may write to"
        ) from error


def _check_tokenizer(folder: Path, source: Source) -> None:
    """Raise SourceError for a tokenizer that the runtime would refuse."""
    try:
        Tokenizer(folder)
    except ArtifactError as error:
        raise SourceError(f"{source.name}: its tokenizer cannot be used: {error}") from error
    vocab_size = source.config.vocab_size
    for token in (source.bos_token_id, *source.eos_token_ids):
        if token is not None and not 0 <= token < vocab_size:
            raise SourceError(
                f"{source.name}: bos or eos token {token} is not in the vocabulary of {vocab_size}"
            )


def _check_images(source: Source) -> None:
    """Raise SourceError for settings that the runtime would refuse."""
    try:
        if source.image_settings is not None:
            ImageSettings(**source.image_settings).check()
    except ValueError as error:
        raise SourceError(f"{source.name}: its images cannot be prepared: {error}") from error


def _write_weights(path: Path, source: Source, emitter: Emitter, progress: Progress) -> None:
    write_weights(
        path, source, list(emitter.parameters.values()),
        lambda done, total: progress("converting weights", done / total),
    )  # fmt: skip


def _write_model(folder: Path, emitter: Emitter, target: Target, progress: Progress) -> None:
    """model.mlir and model.vmfb."""
    progress(f"compiling for {target.name}", None)
    (folder / MLIR).write_text(emitter.emit())
    iree_compile(folder / MLIR, folder / VMFB, target)


def iree_compile(mlir: Path, vmfb: Path, target: Target, *flags: str) -> None:
    try:
        from iree.compiler.tools.binaries import find_tool
    except ImportError as error:
        raise CompileError(
            'the compiler is not installed; run: pip install "sf-local[compile]"'
        ) from error
    command = [find_tool("iree-compile"), str(mlir), *target.flags, *flags, "-o", str(vmfb)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not vmfb.exists():
        raise CompileError(
            f"iree-compile failed for {target.name} (exit {done.returncode}): "
            f"{done.stderr.strip()[:2000]}"
        )


def _write_descriptions(folder: Path, source: Source, emitter: Emitter, target: Target) -> None:
    """config.json, then artifact.json, which holds the hashes of all other files."""
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
        source={"name": source.name, "sha256": source.sha256},
        target=target.name,
        device=target.device,
        cpu_features=target.cpu_features,
        weight_dtype=model.weight_dtype,
        kv_dtype=model.kv_dtype,
        vocab_size=source.config.vocab_size,
        hidden_size=source.config.hidden_size,
        bos_token_id=source.bos_token_id,
        eos_token_ids=source.eos_token_ids,
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
