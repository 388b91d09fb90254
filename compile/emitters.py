"""Which emitter writes a model for a target, with which options; what does not fit is refused."""

from __future__ import annotations

from compile.cpu.emitter import CpuLlamaEmitter
from compile.cpu.vision import LANES
from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.formats.gguf_blocks import GGUF_BLOCKS
from compile.formats.layout import DTYPES
from compile.gpu.emitter import LlamaEmitter
from compile.models.tensors import decoder_tensors
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
        return LlamaEmitter(source.config, model, target, source.vision)
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
        tensor_dtypes=_tensor_dtypes(source, options, weight_dtype),
    )


def _default_weight_dtype(source: Source, options: BuildOptions, target: Target) -> str:
    """That of the source, or what loses nothing of it; 16 bits where nothing narrower computes."""
    is_for_cpu = target.vectors is not None and not options.row_major
    is_wide = is_for_cpu and source.config.head_dim % GROUP
    if is_wide or source.weight_dtype.lower() in DTYPES:
        return target.weight_dtype
    return _quantized_dtype(source.weight_dtype)


def _quantized_dtype(stored: str) -> str:
    """The type of quantized weights that are stored as `stored`, one of GGUF's types."""
    return GGUF_BLOCKS[stored][0] if stored in GGUF_BLOCKS else "int8"


def _tensor_dtypes(source: Source, options: BuildOptions, weight_dtype: str) -> dict[str, str]:
    """What matrices become that do not become `weight_dtype`, where that is a quantized type."""
    if weight_dtype not in BLOCK_TYPES:
        return {}
    table = decoder_tensors(source.config)
    dtypes: dict[str, str] = {}
    for tensor in table.all:
        if not tensor.is_matrix:
            continue
        own = {name: _quantized_dtype(source.tensors[name].dtype) for name in tensor.sources}
        if options.weight_dtype is not None:
            own = dict.fromkeys(own, weight_dtype)
        elif tensor.is_interleaved and len(set(own.values())) > 1:  # each block has rows of both
            own = dict.fromkeys(own, "int8")
        dtypes |= own
    for tensor in (table.embedding, *table.head):
        # Four bits would cost the embedding, which is also the head, more than they save.
        dtypes |= {name: "int8" for name in tensor.sources if dtypes[name] == "int4"}
    return {name: dtype for name, dtype in dtypes.items() if dtype != weight_dtype}


def _activation_dtype(weight_dtype: str, options: BuildOptions, target: Target) -> str | None:
    """What quantized weights are multiplied with; None for others."""
    given, vectors = options.activation_dtype, None if options.row_major else target.vectors
    if weight_dtype not in BLOCK_TYPES or vectors is None:
        if given is not None:
            raise UnsupportedError(
                f"activation_dtype={given!r} is for quantized weights on CPUs, and these are "
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
    return target.weight_dtype if weight_dtype in BLOCK_TYPES else weight_dtype


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
    if model.weight_dtype in BLOCK_TYPES and head_dim % GROUP:
        raise UnsupportedError(
            f"weight_dtype={model.weight_dtype!r}: {source.name} has head_dim {head_dim}; it must "
            f"be a multiple of {GROUP}; use bf16 or f16"
        )
    if source.vision and source.vision.hidden_size % LANES:
        raise UnsupportedError(
            f"{source.name}: its vision tower has hidden_size {source.vision.hidden_size}; on CPUs "
            f"it must be a multiple of {LANES}"
        )
