"""Which emitter writes a model for a target, with which options; what does not fit is refused."""

from __future__ import annotations

from compile.cpu.emitter import CpuLlamaEmitter
from compile.cpu.vision import LANES
from compile.formats.layout import DTYPES, QUANTIZED
from compile.formats.quantize import GGUF_BLOCKS, GROUP
from compile.gpu.emitter import LlamaEmitter
from compile.options import BuildOptions, ModelOptions
from compile.sources.source import Source
from compile.target import Target
from sf_local.errors import UnsupportedError

Emitter = LlamaEmitter | CpuLlamaEmitter


def find_emitter(source: Source, options: BuildOptions, target: Target) -> Emitter:
    """The emitter of a model for a target.

    Raises UnsupportedError for options that do not fit the model or the target.
    """
    model = _model_options(source, options, target)
    _check_context(source, model)
    if target.vectors is None or options.row_major:
        if model.weight_dtype in QUANTIZED:
            raise UnsupportedError(
                f"weight_dtype={model.weight_dtype!r} is for CPUs; use f16 or bf16 for "
                f"{target.name}"
            )
        return LlamaEmitter(source.config, model, target.tile, source.vision)
    _check_cpu(source, model)
    return CpuLlamaEmitter(source.config, model, target.vectors, source.vision)


def _model_options(source: Source, options: BuildOptions, target: Target) -> ModelOptions:
    """The options with the defaults of the model and the target."""
    weight_dtype = options.weight_dtype or _default_weight_dtype(source, options, target)
    context = source.config.max_seq_len
    whole_pages = context - context % options.page_size
    return ModelOptions(
        weight_dtype=weight_dtype,
        activation_dtype=_activation_dtype(weight_dtype, options, target),
        kv_dtype=options.kv_dtype or _kv_dtype(weight_dtype, target),
        page_size=options.page_size,
        prefill_batch_sizes=options.prefill_batch_sizes,
        decode_batch_sizes=options.decode_batch_sizes,
        max_seq_len=whole_pages if options.max_seq_len is None else options.max_seq_len,
        image_batch_sizes=(
            (options.image_batch_sizes or target.image_batch_sizes) if source.vision else ()
        ),
    )


def _default_weight_dtype(source: Source, options: BuildOptions, target: Target) -> str:
    """That of the source, or what loses nothing of it; 16 bits where nothing narrower computes."""
    stored = source.weight_dtype
    is_wide = target.vectors is None or options.row_major or source.config.head_dim % GROUP
    if is_wide or stored.lower() in DTYPES:
        return target.weight_dtype
    bits, _ = GGUF_BLOCKS.get(stored, (8, 0))
    return f"int{bits}"


def _activation_dtype(weight_dtype: str, options: BuildOptions, target: Target) -> str | None:
    """What quantized weights are multiplied with; None for others."""
    given, vectors = options.activation_dtype, target.vectors
    if weight_dtype not in QUANTIZED or vectors is None:
        if given is not None:
            raise UnsupportedError(
                f"activation_dtype={given!r} is for int8 and int4 weights on CPUs, and these are "
                f"{weight_dtype} on {target.name}; leave it out"
            )
        return None
    has_tiles = vectors.has_tiles and vectors.has_int8_dot
    if given == "bf16" and not has_tiles:
        raise UnsupportedError(
            f"activation_dtype='bf16' needs a CPU with AMX, and cpu={target.cpu_level!r} has none; "
            "use int16 or int8"
        )
    return given or ("bf16" if has_tiles else "int16")


def _kv_dtype(weight_dtype: str, target: Target) -> str:
    """The default: as the weights, or what unquantized weights would be."""
    return target.weight_dtype if weight_dtype in QUANTIZED else weight_dtype


def _check_context(source: Source, model: ModelOptions) -> None:
    context = source.config.max_seq_len
    if not model.page_size <= model.max_seq_len <= context:
        raise UnsupportedError(
            f"max_seq_len={model.max_seq_len}: at least a page of {model.page_size} tokens, and "
            f"at most the {context} that {source.name} was trained for"
        )


def _check_cpu(source: Source, model: ModelOptions) -> None:
    """Refuse what the kernels of CPUs cannot compute."""
    head_dim = source.config.head_dim
    if model.weight_dtype in QUANTIZED and head_dim % GROUP:
        raise UnsupportedError(
            f"weight_dtype={model.weight_dtype!r}: {source.name} has head_dim {head_dim}; it must "
            f"be a multiple of {GROUP}; use bf16 or f16"
        )
    if source.vision and source.vision.hidden_size % LANES:
        raise UnsupportedError(
            f"{source.name}: its vision tower has hidden_size {source.vision.hidden_size}; on CPUs "
            f"it must be a multiple of {LANES}"
        )
