"""Matrix products on CPU vectors: the inner loops, and the layout of what they read.

A matrix [N, K] is stored in blocks of 2 * lanes output features; a block is a stream that one task
reads from its beginning to its end. Each output adds up its products in the order of K, whatever
the number of rows computed at once, so a row comes out the same in any company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from compile.cpu.kernel import KernelBuilder, Memory, Views, lanes_of, vector_type
from compile.formats.layout import ITEM_BYTES, QUANTIZED, Parameter
from compile.formats.quantize import GROUP, ZERO
from compile.mlir.builder import Scalar
from compile.target import TILES, Vectors

PARTS = 2  # of a quantized activation: high, low
LARGEST = 127 * 128 + 63  # of its values
REGISTER_BITS = {4: "128", 8: "256", 16: "512"}  # by f32 lanes


@dataclass(frozen=True)
class Operand:
    """Elements of a float `dtype` that products read `unit` at a time: pairs for dot products."""

    dtype: str
    unit: int

    @property
    def unit_dtype(self) -> str:
        """Of memory with one unit an element."""
        return "i32" if self.unit == 2 else self.dtype

    @property
    def unit_bytes(self) -> int:
        return self.unit * ITEM_BYTES[self.dtype]

    @property
    def other(self) -> str:
        """The dtype of what it is multiplied with, one value broadcast to all lanes."""
        return "bf16" if self.unit == 2 else "f32"


def operand(dtype: str, vectors: Vectors, *lanes: int) -> Operand:
    """How vectors of these lanes are multiplied: as bf16 pairs where the CPU can."""
    is_dot = dtype == "bf16" and vectors.has_dot and all(n in REGISTER_BITS for n in lanes)
    return Operand(dtype, 2 if is_dot else 1)


@dataclass(frozen=True)
class Streams:
    """Vectors of an operand: one at each of `starts`, and again every `stride` units."""

    memory: Memory
    operand: Operand
    starts: Sequence[Scalar]
    stride: int
    lanes: int
    ahead: int = 0  # units to prefetch


def product(
    k: KernelBuilder,
    weights: Streams,
    x: Memory,
    rows: Sequence[Scalar],
    num_units: Scalar | int,
    sums: Sequence[Scalar],
) -> list[Scalar]:
    """sums[r, t] + the products of row r of `x` with stream t: f32 vectors, row by row.

    rows: where each row begins in `x`, in units.
    """
    op, lanes = weights.operand, weights.lanes

    def step(i: Scalar, *sums: Scalar) -> list[Scalar]:
        at = i * weights.stride
        if weights.ahead:
            for start in weights.starts:
                weights.memory.prefetch(start + (at + weights.ahead))
        loaded = [weights.memory.load_vector(start + at, lanes) for start in weights.starts]
        loaded = [_multiplicand(k, vector, op, lanes) for vector in loaded]
        result = []
        for r, row in enumerate(rows):
            value = k.broadcast(x.load(row + i), lanes)
            if op.unit == 2:
                value = k.bitcast(value, vector_type(2 * lanes, "bf16"))
            for t, weight in enumerate(loaded):
                total = sums[r * len(loaded) + t]
                result.append(_multiply_add(k, value, weight, total, op, lanes))
        return result

    return k.fold(0, num_units, sums, step)


def _multiplicand(k: KernelBuilder, loaded: Scalar, op: Operand, lanes: int) -> Scalar:
    if op.unit == 2:
        return k.bitcast(loaded, vector_type(2 * lanes, "bf16"))
    return loaded.to(vector_type(lanes, "f32"))


def _multiply_add(
    k: KernelBuilder, a: Scalar, b: Scalar, total: Scalar, op: Operand, lanes: int
) -> Scalar:
    if op.unit == 2:
        name = f"x86.avx512bf16.dpbf16ps.{REGISTER_BITS[lanes]}"
        return k.intrinsic(name, [total, a, b], total.dtype)
    return k.fma(a, b, total)


@dataclass(frozen=True)
class Format:
    """How matrices are stored and multiplied: "f32", "f16", "bf16", "int8" or "int4"."""

    dtype: str
    vectors: Vectors

    @property
    def is_quantized(self) -> bool:
        return self.dtype in QUANTIZED

    @cached_property
    def operand(self) -> Operand:
        assert not self.is_quantized
        return operand(self.dtype, self.vectors, self.vectors.lanes)

    @property
    def unit(self) -> int:
        """Columns that lie side by side."""
        if self.is_quantized:
            return 4 if self.vectors.has_int8_dot else 1
        return self.operand.unit

    @property
    def view_types(self) -> tuple[str, ...]:
        """Of the weights."""
        return ("i8", "i32", "f16", "f32") if self.is_quantized else (self.operand.unit_dtype,)

    @property
    def max_rows(self) -> int:
        """Of one product; groups take registers for their own sums."""
        return self.vectors.max_rows // 2 if self.is_quantized else self.vectors.max_rows

    @property
    def group_bytes(self) -> int:
        """Of 32 columns of a block: codes, scales, minima."""
        block = self.vectors.block
        return GROUP * block + 2 * block if self.dtype == "int8" else GROUP * block // 2 + 4 * block

    def parameter(self, name: str, rows: int, cols: int) -> Parameter:
        block = self.vectors.block
        if self.is_quantized:
            shape = (-(-rows // block), -(-cols // GROUP), self.group_bytes)
            return Parameter(name, shape, self.dtype, block, self.unit)
        shape4 = (-(-rows // block), -(-cols // self.unit), block, self.unit)
        return Parameter(name, shape4, self.dtype, block, self.unit)

    def block_bytes(self, cols: int) -> int:
        """Of one block of a matrix."""
        if self.is_quantized:
            return -(-cols // GROUP) * self.group_bytes
        return -(-cols // self.unit) * self.vectors.block * self.operand.unit_bytes

    @property
    def is_tiled(self) -> bool:
        """Whether matrices of whole tiles are multiplied with them; see `compile.cpu.amx`."""
        return not self.is_quantized and self.unit == 2 and self.vectors.has_tiles

    @property
    def blocks_at_once(self) -> int:
        """Of a single row's product."""
        return 1 if self.is_quantized else self.vectors.tuning.blocks

    def product(
        self, k: KernelBuilder, weights: Views, blocks: Sequence[Scalar], cols: int, x: Activations,
        rows: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """Rows of x [M, K] times blocks that begin at these bytes: of a row, two f32 vectors each.

        A single row takes `blocks_at_once`; several take one.
        """
        lanes = self.vectors.lanes
        sums = [k.scalar(0.0, vector_type(lanes, "f32"))] * (TILES * len(rows) * len(blocks))
        if self.is_quantized:
            return self._product_of_groups(k, weights, blocks[0], cols, x, rows, sums)
        op = self.operand
        firsts = [start // op.unit_bytes for start in blocks]
        streams = Streams(
            weights[op.unit_dtype], op, [first + t * lanes for first in firsts for t in (0, 1)],
            self.vectors.block, lanes,
            self.vectors.tuning.ahead // op.unit_bytes if len(rows) == 1 else 0,
        )  # fmt: skip
        starts = [row * (x.row_bytes // x.unit_bytes) for row in rows]
        return product(k, streams, x.units, starts, -(-cols // op.unit), sums)

    def _product_of_groups(
        self, k: KernelBuilder, weights: Views, start: Scalar, cols: int, x: Activations,
        rows: Sequence[Scalar], sums: Sequence[Scalar],
    ) -> list[Scalar]:  # fmt: skip
        """Whole numbers within a group, then times both scales."""
        lanes = self.vectors.lanes
        kind = vector_type(lanes, "f32")

        def group(g: Scalar, *sums: Scalar) -> list[Scalar]:
            at = start + g * self.group_bytes
            if len(rows) == 1:
                for line in range(0, self.group_bytes, 64):
                    weights["i8"].prefetch(at + (self.vectors.tuning.ahead + line))
            dots = self._dots(k, weights, at, x, rows, g)
            numbers = (at + (self.group_bytes - self._number_bytes)) // 2
            half = [numbers + t * lanes for t in range(self._number_bytes // 2 // lanes)]
            scales = [weights["f16"].load_vector(a, lanes).to(kind) for a in half]
            result = []
            for r, row in enumerate(rows):
                scale = x.scale(row, g)
                wide = k.broadcast(scale, lanes)
                total = k.broadcast(x.total(row, g).to("f32") * scale, lanes)
                for t in range(TILES):
                    value = k.fma(dots[r * TILES + t], scales[t] * wide, sums[r * TILES + t])
                    if self.dtype == "int4":
                        value = k.fma(scales[TILES + t], total, value)
                    result.append(value)
            return result

        return k.fold(0, -(-cols // GROUP), sums, group)

    @property
    def _number_bytes(self) -> int:
        return (2 if self.dtype == "int8" else 4) * self.vectors.block

    def _dots(
        self, k: KernelBuilder, weights: Views, at: Scalar, x: Activations, rows: Sequence[Scalar],
        group: Scalar,
    ) -> list[Scalar]:  # fmt: skip
        """Sums of codes, those of 8 bits less ZERO, times activations: two f32 vectors a row."""
        lanes = self.vectors.lanes
        kind, whole = vector_type(lanes, "f32"), vector_type(lanes, "i32")
        multiply = self._dots_of_quads if self.unit == 4 else self._dots_of_bytes
        parts = [
            multiply(k, weights, at, x, [x.codes_at(row, group, part) for row in rows])
            for part in range(PARTS)
        ]
        dots = [k.bits("shli", high, 7) + low for high, low in zip(*parts, strict=True)]
        if self.dtype == "int8":
            for r, row in enumerate(rows):
                offset = k.broadcast(x.total(row, group) * -ZERO, lanes)
                dots[r * TILES : (r + 1) * TILES] = [
                    dot + offset for dot in dots[r * TILES : (r + 1) * TILES]
                ]
        assert all(dot.dtype == whole for dot in dots)
        return [dot.to(kind) for dot in dots]

    def _dots_of_quads(
        self, k: KernelBuilder, weights: Views, at: Scalar, x: Activations, rows: Sequence[Scalar]
    ) -> list[Scalar]:
        """With the CPU's dot products of four bytes."""
        lanes = self.vectors.lanes
        whole, quads = vector_type(lanes, "i32"), vector_type(4 * lanes, "i8")
        name = f"x86.avx512.vpdpbusd.{REGISTER_BITS[lanes]}"
        dots = [k.scalar(0, whole)] * (TILES * len(rows))
        for i in range(GROUP // 4):
            codes = self._quads(k, weights["i32"], at // 4 + i * self._step // 4)
            codes = [k.bitcast(code, quads) for code in codes]
            for r, row in enumerate(rows):
                value = k.bitcast(k.broadcast(x.codes["i32"].load(row // 4 + i), lanes), quads)
                for t in range(TILES):
                    d = r * TILES + t
                    dots[d] = k.intrinsic(name, [dots[d], codes[t], value], whole)
        return dots

    @property
    def _step(self) -> int:
        """Bytes of the codes of one unit of columns."""
        size = self.unit * self.vectors.block
        return size if self.dtype == "int8" else size // 2

    def _quads(self, k: KernelBuilder, memory: Memory, at: Scalar) -> list[Scalar]:
        """Four codes a lane, of the block's both vectors of features."""
        lanes = self.vectors.lanes
        if self.dtype == "int8":
            return [memory.load_vector(at + t * lanes, lanes) for t in range(TILES)]
        both = memory.load_vector(at, lanes)
        low = k.scalar(0x0F0F0F0F, both.dtype)
        return [k.bits("andi", both, low), k.bits("andi", k.bits("shrui", both, 4), low)]

    def _dots_of_bytes(
        self, k: KernelBuilder, weights: Views, at: Scalar, x: Activations, rows: Sequence[Scalar]
    ) -> list[Scalar]:
        """One byte after the other, with f32's multiplier: its 24 bits hold the sums exactly."""
        lanes = self.vectors.lanes
        kind, whole = vector_type(lanes, "f32"), vector_type(lanes, "i32")

        def step(i: Scalar, *sums: Scalar) -> list[Scalar]:
            codes = []
            for t in range(TILES if self.dtype == "int8" else 1):
                loaded = weights["i8"].load_vector(at + i * self._step + t * lanes, lanes)
                codes.append(loaded.to_unsigned(whole))
            if self.dtype == "int4":
                codes = [k.bits("andi", codes[0], 15), k.bits("shrui", codes[0], 4)]
            values = [code.to(kind) for code in codes]
            wide = [k.broadcast(x.codes["i8"].load(row + i).to("f32"), lanes) for row in rows]
            return [
                k.fma(wide[d // TILES], values[d % TILES], total) for d, total in enumerate(sums)
            ]

        sums = k.fold(0, GROUP, [k.scalar(0.0, kind)] * (TILES * len(rows)), step)
        return [total.to_int(whole) for total in sums]

    def element(
        self, k: KernelBuilder, weights: Views, start: Scalar, cols: int, row: Scalar, col: Scalar
    ) -> Scalar:
        """One weight, as f32; `start` is the matrix's first byte."""
        block = self.vectors.block
        begin, n = start + row // block * self.block_bytes(cols), row % block
        if not self.is_quantized:
            op = self.operand
            memory = weights[op.unit_dtype]
            unit = memory.load(begin // op.unit_bytes + col // op.unit * block + n)
            if op.unit == 1:
                return unit.to("f32")
            # The first of a pair is in the lower half.
            shift = (k.scalar(1, "index") - col % 2).to("i32") * 16
            high = k.bits("andi", k.bits("shli", unit, shift), -65536)
            return k.bitcast(high, "f32")
        assert self.dtype == "int8"
        at = begin + col // GROUP * self.group_bytes
        code = weights["i8"].load(
            at + col % GROUP // self.unit * self._step + n * self.unit + col % self.unit
        )
        scale = weights["f16"].load((at + GROUP * block) // 2 + n)
        return (code.to_unsigned("i32") + -ZERO).to("f32") * scale.to("f32")


class Activations:
    """Rows [M, K] that matrices are multiplied with, in the form their format wants.

    Floats, or whole numbers in groups of 32 with a scale f32 and their sum i32, like llama.cpp's
    Q8_1 but of 15 bits: 7 bits would cost more accuracy than 4-bit weights. A number is 128 * high
    + low, both i8; a row is PARTS times K bytes, then its scales, then its sums.
    """

    def __init__(self, k: KernelBuilder, views: Views, format_: Format, width: int) -> None:
        self._k, self.format = k, format_
        self.row_bytes = self.bytes_of_row(format_, width)
        self._width = width
        if format_.is_quantized:
            self.codes = views.open("i8", "i32", "f32")
            return
        op = format_.operand
        views = views.open(op.other, "i32")
        self.elements, self.units = views[op.other], views["i32" if op.unit == 2 else op.other]
        self.unit_bytes = 4

    @staticmethod
    def bytes_of_row(format_: Format, width: int) -> int:
        if format_.is_quantized:
            return PARTS * width + width // GROUP * 8
        return width * ITEM_BYTES[format_.operand.other]

    @property
    def step(self) -> int:
        """Features that are stored together."""
        return GROUP if self.format.is_quantized else self.format.vectors.lanes

    def store(self, values: Sequence[Scalar], row: Scalar, feature: Scalar) -> None:
        """`step` features of a row, or fewer where they are not quantized: vectors of f32."""
        if self.format.is_quantized:
            self._store_group(values, row, feature // GROUP)
            return
        item = ITEM_BYTES[self.elements.dtype]
        at = row * (self.row_bytes // item) + feature
        for value in values:
            self.elements.store_as(value, at)
            at = at + lanes_of(value)

    def _store_group(self, values: Sequence[Scalar], row: Scalar, group: Scalar) -> None:
        k, lanes = self._k, lanes_of(values[0])
        assert lanes * len(values) == GROUP
        largest = values[0].math("absf")
        for value in values[1:]:
            largest = largest.maximum(value.math("absf"))
        scale = k.maximum(largest) / float(LARGEST)
        # 0 / 0 would not be 0: a group of zeros is divided by 1.
        one = k.scalar(1.0, "f32")
        is_zero = k.op(f"arith.cmpf oeq, {scale.name}, {k.scalar(0.0, 'f32').name} : f32", "i1")
        inverse = k.broadcast(one / is_zero.select(one, scale), lanes)
        whole = vector_type(lanes, "i32")
        total = k.scalar(0, whole)
        for i, value in enumerate(values):
            number = (value * inverse).math("roundeven").to_int(whole)
            total = total + number
            high = k.bits("shrsi", number + 64, 7)
            for part, code in enumerate((high, number - k.bits("shli", high, 7))):
                at = self.codes_at(row, group, part) + i * lanes
                self.codes["i8"].store_vector(code.to(vector_type(lanes, "i8")), at)
        self.codes["f32"].store(scale, self._number(row, group, 0))
        sum_ = k.op(f"vector.reduction <add>, {total.name} : {whole} into i32", "i32")
        self.codes["i32"].store(sum_, self._number(row, group, 1))

    def codes_at(self, row: Scalar, group: Scalar, part: int) -> Scalar:
        """Where the high or the low parts of a group begin, in bytes."""
        return row * self.row_bytes + group * GROUP + part * self._width

    def scale(self, row: Scalar, group: Scalar) -> Scalar:
        return self.codes["f32"].load(self._number(row, group, 0))

    def total(self, row: Scalar, group: Scalar) -> Scalar:
        return self.codes["i32"].load(self._number(row, group, 1))

    def _number(self, row: Scalar, group: Scalar, which: int) -> Scalar:
        start = PARTS * self._width + which * (self._width // GROUP * 4)
        return row * (self.row_bytes // 4) + group + start // 4
