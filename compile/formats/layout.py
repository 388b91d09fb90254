"""The parameters of an archive: their dtypes, shapes and sizes as compiled code reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from compile.formats.blocks import BLOCK_TYPES

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
QUANTIZED = ("int8", "int4")  # what floats can be quantized to

MASKED = -1e30  # a score or logit that is hidden: finite, or a row without any other would be NaN


@dataclass(frozen=True)
class Parameter:
    """One tensor of the archive, in the layout that compiled code reads.

    A matrix [N, K] is stored row by row, or in blocks of rows, padded with zeros: floats as
    [N/block, K/unit, block, unit], quantized weights as `formats.blocks` says, and for GPUs as
    `gpu.quantized` does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int = 0  # rows; 0 if row by row
    unit: int = 1
    is_for_gpu: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored as codes and scales."""
        return self.dtype in BLOCK_TYPES

    @property
    def num_bytes(self) -> int:
        """Its size in the archive; the shape of a quantized one counts bytes."""
        return math.prod(self.shape) * (1 if self.is_quantized else ITEM_BYTES[self.dtype])

    @property
    def matrix_size(self) -> tuple[int, int]:
        """Rows and columns, padding included."""
        if not self.block:
            return self.shape[0], self.shape[1]
        unit = BLOCK_TYPES[self.dtype].columns if self.is_quantized else self.unit
        return self.shape[0] * self.block, self.shape[1] * unit
