"""Format: how a matrix is stored for a CPU, and its product with a few rows.

A matrix [N, K] is stored in blocks of 2 * lanes output features. A block is a stream that one task
reads from its beginning to its end. Each output adds up its products in the order of K, whatever
the number of rows computed at once, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from compile.cpu.activations import Activations, Integers
from compile.cpu.kernel import KernelBuilder
from compile.cpu.operands import Ahead, Operand, Streams, operand, product
from compile.cpu.quantized_blocks import UNIT, QuantizedBlocks
from compile.cpu.quantized_element import element
from compile.cpu.quantized_matmul import QuantizedProduct
from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.formats.layout import Parameter
from compile.mlir.executable import Views
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from compile.target import VECTORS_PER_BLOCK, Vectors


@dataclass(frozen=True)
class Format:
    """How matrices are stored and multiplied.

    dtype: "f32", "f16", "bf16", or a type of `compile.formats.blocks`. activation_dtype: what
    integer weights are multiplied with: integers of one byte ("int8") or two ("int16"); or, after a
    block has become floats, "bf16" in AMX tiles, which is several times as fast for many rows.
    "f32": pairs of bf16 weights become f32.
    has_half_sums: integers have a sum for every 16, as q6_k needs it. What reads the same
    activations has the same of both.
    """

    dtype: str
    vectors: Vectors
    activation_dtype: str = "int16"
    has_half_sums: bool = False

    @property
    def expands(self) -> bool:
        """Whether integer weights become floats before they are multiplied."""
        return self.is_quantized and self.activation_dtype == "bf16"

    @property
    def is_quantized(self) -> bool:
        """Whether weights are integers in groups with scales."""
        return self.dtype in BLOCK_TYPES

    @property
    def takes_integers(self) -> bool:
        """Whether activations are integers, too."""
        return self.is_quantized and not self.expands

    @cached_property
    def operand(self) -> Operand:
        """How float weights are multiplied."""
        assert not self.takes_integers
        dtype = "bf16" if self.expands else self.dtype
        found = operand(dtype, self.vectors, self.vectors.lanes)
        return replace(found, splits=found.unit == 2 and self.activation_dtype == "f32")

    @cached_property
    def quantized(self) -> QuantizedBlocks:
        """How integer weights are multiplied."""
        assert self.is_quantized
        return QuantizedBlocks(BLOCK_TYPES[self.dtype], self.vectors)

    @property
    def unit(self) -> int:
        """Columns that lie side by side."""
        return UNIT if self.is_quantized else self.operand.unit

    @property
    def view_types(self) -> tuple[str, ...]:
        """Element types by which the products read the weights."""
        return ("i8", "i32", "f16", "f32") if self.is_quantized else (self.operand.unit_dtype,)

    @property
    def max_rows(self) -> int:
        """Rows of one product; groups take registers for sums of their own."""
        return self.vectors.max_rows // 2 if self.is_quantized else self.vectors.max_rows

    @property
    def uses_amx(self) -> bool:
        """Whether matrices of whole AMX tiles are multiplied with them; see `compile.cpu.amx`."""
        return self.expands or (not self.is_quantized and self.unit == 2 and self.vectors.has_tiles)

    @property
    def blocks_at_once(self) -> int:
        """Blocks of one product with a single row."""
        return 1 if self.is_quantized else self.vectors.tuning.blocks

    def parameter(self, name: str, rows: int, cols: int) -> Parameter:
        """The archive's entry of a matrix [rows, cols]."""
        block = self.vectors.block
        if self.is_quantized:
            quantized = self.quantized
            shape = (-(-rows // block), -(-cols // quantized.columns), quantized.stored_bytes)
            return Parameter(name, shape, self.dtype, block, self.unit)
        shape4 = (-(-rows // block), -(-cols // self.unit), block, self.unit)
        return Parameter(name, shape4, self.dtype, block, self.unit)

    def block_bytes(self, cols: int) -> int:
        """Bytes of one block of a matrix of `cols` columns."""
        if self.is_quantized:
            return -(-cols // self.quantized.columns) * self.quantized.stored_bytes
        return -(-cols // self.unit) * self.vectors.block * self.operand.unit_bytes

    @property
    def step_columns(self) -> int:
        """Columns of a block that one step of a product reads."""
        return GROUP if self.is_quantized else self.unit

    def activation_bytes(self, width: int) -> int:
        """Bytes of a row of `width` activations, as `activations` stores it."""
        return Activations.bytes_of_row(self._activation_kind, width, self._num_offsets)

    def activations(self, k: KernelBuilder, views: Views, width: int) -> Activations:
        """Rows of `width` activations that matrices of this format are multiplied with."""
        kind, lanes = self._activation_kind, self.vectors.lanes
        return Activations(k, views, kind, lanes, width, self._num_offsets)

    @property
    def _num_offsets(self) -> int:
        return 2 if self.has_half_sums else 1

    @property
    def _activation_kind(self) -> Operand | Integers:
        """How floats are multiplied, or what integers are."""
        if not self.takes_integers:
            return self.operand
        num_bits = 8 if self.activation_dtype == "int8" else 15
        return Integers(num_bits, is_paired=not self.vectors.has_int8_dot)

    def product(
        self, k: KernelBuilder, weights: Views, blocks: Sequence[Scalar], cols: int, x: Activations,
        rows: Sequence[Scalar], ahead: Ahead | None = None,
    ) -> list[Scalar]:  # fmt: skip
        """Rows of x [M, K] times blocks that begin at these bytes: of a row, two f32 vectors each.

        A single row takes up to `blocks_at_once` blocks; several rows take one.
        """
        lanes = self.vectors.lanes
        zero = k.scalar(0.0, vector_type(lanes, "f32"))
        sums = [zero] * (VECTORS_PER_BLOCK * len(rows) * len(blocks))
        if self.is_quantized:
            integers = QuantizedProduct(k, self.quantized, weights, x, rows, ahead)
            return integers.add(blocks[0], cols, sums)
        op = self.operand
        firsts = [start // op.unit_bytes for start in blocks]
        streams = Streams(
            weights[op.unit_dtype], op, [first + t * lanes for first in firsts for t in (0, 1)],
            self.vectors.block, lanes,
            self.vectors.tuning.ahead // op.unit_bytes if len(rows) == 1 else 0,
        )  # fmt: skip
        starts = [row * (x.row_bytes // x.unit_bytes) for row in rows]
        return product(k, streams, x.units, starts, -(-cols // op.unit), sums, ahead)

    def element(
        self, k: KernelBuilder, weights: Views, start: Scalar, cols: int, row: Scalar, col: Scalar
    ) -> Scalar:
        """One weight, as f32; start: the matrix's first byte."""
        block = self.vectors.block
        begin, n = start + row // block * self.block_bytes(cols), row % block
        if self.is_quantized:
            return element(k, self.quantized, weights, begin, n, col)
        op = self.operand
        unit = weights[op.unit_dtype].load(begin // op.unit_bytes + col // op.unit * block + n)
        if op.unit == 1:
            return unit.to("f32")
        # The first of a pair of bf16 is in the lower half. Shifted up, it is an f32.
        shift = (k.scalar(1, "index") - col % 2).to("i32") * 16
        high = k.bits("andi", k.bits("shli", unit, shift), -65536)
        return k.bitcast(high, "f32")
