"""Writes a model's weights as the parameters that compiled code reads.

A source must have exactly the tensors of its config. Rows are read, converted and packed a block at
a time, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import BLOCK_TYPES, GROUP, BlockType, Groups, packed
from compile.formats.layout import DTYPES, Parameter
from compile.formats.quantize import all_finite, quantized
from compile.gpu import quantized as gpu_layout
from compile.models.rope import ROPE_BLOCK, rope_table
from compile.models.tensors import ModelTensor, model_tensors, source_shapes
from compile.sources.source import Source, SourceTensor
from sf_local.artifact import irpa
from sf_local.errors import SourceError

WHOLE = "model"  # the name of the whole archive as one parameter, which CPU code reads
BLOCK_ELEMENTS = 16 << 20  # elements that are converted at once; 64 MiB in f32
REFUSED_ROWS = 1024  # that are read at once to count what is wrong with a tensor

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Segment:
    """`num_rows` rows of a matrix: those of a source tensor from `start` on, then zeros.

    name: of the tensor and its source, for errors.
    """

    name: str
    tensor: SourceTensor
    start: int
    num_rows: int


def check_tensors(source: Source) -> None:
    """Raise SourceError unless the source has exactly the tensors of its config."""
    expected = source_shapes(model_tensors(source.config, source.vision))
    model = f"a Llama of {source.config.num_layers} layers"
    if source.vision:
        model += f" and a vision tower of {source.vision.num_layers}"
    missing = sorted(expected.keys() - source.tensors.keys())
    unknown = sorted(source.tensors.keys() - expected.keys())
    if missing or unknown:
        raise SourceError(
            f"{source.name}: the weights do not fit {model}; "
            f"missing: {_shorten(missing)}; left over: {_shorten(unknown)}"
        )
    for name, shape in expected.items():
        found = source.tensors[name].shape
        if found != shape:
            raise SourceError(
                f"{source.name}: {name} has shape {found}, but its config asks for {shape}"
            )


def write_weights(
    path: Path,
    source: Source,
    parameters: Sequence[Parameter],
    progress: Callable[[int, int], None],
) -> None:
    """Write an archive of all parameters, in their order, and of WHOLE, which spans them all.

    `progress(done, total)` counts bytes. Raises OSError, and SourceError for weights that are NaN
    or infinite, in the source or as parameters.
    """
    entries = [(p.name, type_name(p), p.num_bytes) for p in parameters]
    total = sum(num_bytes for _, _, num_bytes in entries)
    tensors = model_tensors(source.config, source.vision)
    table = {t.name: t for tensor in tensors for t in tensor.all_runs()}

    def blocks() -> Iterator[memoryview]:
        done = 0
        for parameter in parameters:
            for block in _parameter_blocks(source, table[parameter.name], parameter):
                data = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
                done += len(data)
                yield data
                progress(done, total)

    with path.open("wb") as file:
        irpa.write_archive(file, entries, blocks(), WHOLE)


def type_name(parameter: Parameter) -> str:
    """Shape and dtype as the archive has them, such as "576x1536xf16"."""
    return "x".join([*map(str, parameter.shape), parameter.dtype])


def _parameter_blocks(source: Source, tensor: ModelTensor, parameter: Parameter) -> Iterator[Array]:
    if not tensor.sources:  # the table of RoPE, which is computed
        for start in range(0, parameter.shape[0], ROPE_BLOCK):
            yield rope_table(source.config, start, min(start + ROPE_BLOCK, parameter.shape[0]))
        return
    segments = _segments(source, tensor, parameter.block)
    if len(parameter.shape) == 1:
        vector = np.concatenate([s.tensor.read(slice(None)).astype(np.float32) for s in segments])
        if not all_finite(vector):
            raise _refusal(segments[0], "f32")
        yield np.pad(vector, (0, parameter.shape[0] - len(vector)))
        return
    yield from _matrix_blocks(segments, parameter)


def _segments(source: Source, tensor: ModelTensor, block: int) -> list[Segment]:
    """The rows of source tensors that make up a parameter, one after the other.

    Of an interleaved one each block has as many rows of every part: half are gates, half are ups.
    """
    parts = [(f"{source.name}: {name}", source.tensors[name]) for name in tensor.sources]
    if not (tensor.is_interleaved and block):
        return [Segment(name, part, 0, part.shape[0]) for name, part in parts]
    step = block // len(parts)
    starts = range(0, parts[0][1].shape[0], step)
    return [Segment(name, part, start, step) for start in starts for name, part in parts]


def _matrix_blocks(segments: Sequence[Segment], parameter: Parameter) -> Iterator[Array]:
    """Rows as they are stored, some at a time; where there are blocks, whole ones."""
    rows, cols = parameter.matrix_size
    block = parameter.block or 1
    step = max(BLOCK_ELEMENTS // cols // block, 1) * block
    for start in range(0, rows, step):
        count = min(step, rows - start)
        if parameter.is_quantized:
            groups = _read_groups(segments, start, (count, cols), BLOCK_TYPES[parameter.dtype])
            for_cpu = not parameter.is_for_gpu
            yield packed(groups, block, parameter.unit) if for_cpu else gpu_layout.packed(groups)
            continue
        values = np.zeros((count, cols), DTYPES[parameter.dtype])
        _read_rows(segments, start, values, parameter.dtype)
        if parameter.block:
            unit = parameter.unit
            values = values.reshape(count // block, block, cols // unit, unit).swapaxes(1, 2)
        yield values


def _read_groups(
    segments: Sequence[Segment], start: int, shape: tuple[int, int], kind: BlockType
) -> Groups:
    """Quantized rows from `start` on; what no tensor covers is zero."""
    groups = Groups.zeros(kind, *shape)
    for segment, source, to in _overlaps(segments, start, shape[0]):
        found = _as_groups(segment.tensor, source, kind.name)
        if found is None or not found.is_finite.all():
            raise _refusal(segment, kind.name)
        groups.put(to, found)
    return groups


def _as_groups(tensor: SourceTensor, rows: slice, dtype: str) -> Groups | None:
    """Some rows, as the source has them or quantized; None if they are NaN or infinite."""
    groups = tensor.groups(rows) if tensor.groups else None
    if groups and groups.kind.name == dtype:
        return groups
    values = tensor.read(rows).astype(np.float32)
    if not all_finite(values):
        return None
    return quantized(np.pad(values, ((0, 0), (0, -values.shape[1] % GROUP))), dtype)


def _read_rows(segments: Sequence[Segment], start: int, out: Array, dtype: str) -> None:
    """Fill `out` with rows from `start` on; what no tensor covers stays zero."""
    for segment, source, to in _overlaps(segments, start, len(out)):
        rows = segment.tensor.read(source)
        with np.errstate(over="ignore"):
            out[to, : rows.shape[1]] = rows.astype(out.dtype)
        if not all_finite(out[to]):
            raise _refusal(segment, dtype)


def _refusal(segment: Segment, dtype: str) -> SourceError:
    """Why a tensor cannot be converted, with the number of its weights or groups at fault."""
    num_lost = num_too_large = 0
    largest = 0.0
    for start in range(0, segment.tensor.shape[0], REFUSED_ROWS):
        rows = slice(start, start + REFUSED_ROWS)
        values = segment.tensor.read(rows).astype(np.float32)
        num_lost += int(np.count_nonzero(~np.isfinite(values)))
        if not num_lost:
            largest = max(largest, float(np.abs(values).max()))
            num_too_large += _num_too_large(segment.tensor, rows, values, dtype)
    if num_lost:
        return SourceError(
            f"{segment.name} has {num_lost} weights that are NaN or infinite, from which no model "
            "can compute; get the file again, or from another source"
        )
    what = f"groups of {GROUP} weights" if dtype in BLOCK_TYPES else "weights"
    remedy = "f32" if dtype == "bf16" else "bf16 or f32"
    return SourceError(
        f"{segment.name} has {num_too_large} {what} too large for {dtype}: up to {largest:.3g}; "
        f"compile with sf-compile --weights {remedy}"
    )


def _num_too_large(tensor: SourceTensor, rows: slice, values: Array, dtype: str) -> int:
    """How many weights, or groups of quantized ones, are not finite as `dtype`."""
    if dtype not in BLOCK_TYPES:
        with np.errstate(over="ignore"):
            return int(np.count_nonzero(~np.isfinite(values.astype(DTYPES[dtype]))))
    groups = _as_groups(tensor, rows, dtype)
    return 0 if groups is None else int(np.count_nonzero(~groups.is_finite))


def _overlaps(
    segments: Sequence[Segment], start: int, count: int
) -> Iterator[tuple[Segment, slice, slice]]:
    """Which rows of which tensors make up `count` rows from `start` on, and where they go."""
    base = 0
    for segment in segments:
        num_rows = min(segment.num_rows, segment.tensor.shape[0] - segment.start)
        first, last = max(start, base), min(start + count, base + num_rows)
        if first < last:
            skip = segment.start - base
            yield segment, slice(first + skip, last + skip), slice(first - start, last - start)
        base += segment.num_rows


def _shorten(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
