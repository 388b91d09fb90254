"""What both emitters share: options, parameters, and the numbers that they agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compile.formats.quantize import GROUP

ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
QUANTIZED = ("int8", "int4")  # in groups, on CPUs
MASKED = -1e30  # finite: a row without any valid position must not become NaN
SUMMARY = 256  # tokens of a summarized block of logits


@dataclass(frozen=True)
class ModelOptions:
    """What is compiled: dtypes ("f32" | "f16" | "bf16"), tokens a page, batch sizes, context."""

    weight_dtype: str
    kv_dtype: str
    page_size: int
    prefill_batch_sizes: tuple[int, ...]
    decode_batch_sizes: tuple[int, ...]
    max_seq_len: int
    image_batch_sizes: tuple[int, ...] = ()  # tiles of images; none without a vision tower

    @property
    def calls(self) -> list[tuple[str, int]]:
        """Functions of the language model and their batch sizes: with each of the ABI's, the one
        that sums logits up."""
        prefills = ["prefill", "prefill_embeds"] if self.image_batch_sizes else ["prefill"]
        kinds = [(name, self.prefill_batch_sizes) for name in prefills]
        kinds.append(("decode", self.decode_batch_sizes))
        return [
            (f"{name}{kind}", size) for name, sizes in kinds for size in sizes
            for kind in ("", "_next")
        ]  # fmt: skip

    @property
    def function_names(self) -> list[str]:
        images = [("encode_image", size) for size in self.image_batch_sizes]
        return [f"{name}_bs{size}" for name, size in [*self.calls, *images]]


@dataclass(frozen=True)
class Parameter:
    """One tensor of the archive, in the layout the compiled code reads.

    A matrix [N, K] is stored row by row, or in blocks of rows, padded with zeros: floats
    [N/block, K/unit, block, unit], quantized weights as `quantize.packed` says.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int = 0  # rows; 0 if row by row
    unit: int = 1

    @property
    def is_quantized(self) -> bool:
        return self.dtype in QUANTIZED

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (1 if self.is_quantized else ITEM_BYTES[self.dtype])

    @property
    def matrix_size(self) -> tuple[int, int]:
        """Rows and columns, padding included."""
        if not self.block:
            return self.shape[0], self.shape[1]
        unit = GROUP if self.is_quantized else self.unit
        return self.shape[0] * self.block, self.shape[1] * unit
