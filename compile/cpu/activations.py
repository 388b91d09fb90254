"""Activations: the rows that matrices are multiplied with, as the products read them."""

from __future__ import annotations

from collections.abc import Sequence

from compile.cpu.kernel import KernelBuilder
from compile.cpu.operands import Operand
from compile.formats.blocks import GROUP, ZERO
from compile.formats.layout import ITEM_BYTES
from compile.mlir.executable import Views
from compile.mlir.values import Scalar
from compile.mlir.vectors import lanes_of, vector_type

LARGEST = {1: 127, 2: 127 * 128 + 63}  # of integers of so many bytes


class Activations:
    """Rows of activations [M, K]: floats for float weights, integers for quantized ones.

    Integers come in groups of 32 with a scale. With two parts they have 15 bits, 128 * high + low,
    both i8; one part is like Q8_1 of llama.cpp, whose 7 bits cost more accuracy than 4-bit weights
    do. A row holds its high parts (K bytes), its low parts (K bytes), then the scales in f32, then
    -ZERO times the groups' sums in i32, then the scales times the sums in f32.

    kind: how the floats are multiplied, or the number of an integer's parts. num_offsets: sums of a
    group in i32: two, each of half of it, if there are weights whose scales are of so few columns.
    """

    def __init__(
        self, k: KernelBuilder, views: Views, kind: Operand | int, lanes: int, width: int,
        num_offsets: int,
    ) -> None:  # fmt: skip
        self._k, self._width, self._num_offsets = k, width, num_offsets
        self.is_quantized = isinstance(kind, int)
        self.step = GROUP if self.is_quantized else lanes  # features that are stored together
        self.row_bytes = self.bytes_of_row(kind, width, num_offsets)
        if isinstance(kind, int):
            self.parts = kind
            self.codes = views.open("i8", "i32", "f32")
            return
        views = views.open(kind.other, "i32")
        self.elements = views[kind.other]
        self.units = views["i32" if kind.unit == 2 else kind.other]
        self.unit_bytes = 4

    @staticmethod
    def bytes_of_row(kind: Operand | int, width: int, num_offsets: int) -> int:
        """Bytes of a row of `width` activations."""
        if isinstance(kind, int):
            return kind * width + width // GROUP * (2 + num_offsets) * 4
        return width * ITEM_BYTES[kind.other]

    def store(self, values: Sequence[Scalar], row: Scalar, feature: Scalar) -> None:
        """Store f32 vectors: `step` features of a row, or fewer if they are not quantized."""
        if self.is_quantized:
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
        scale = k.maximum(largest) / float(LARGEST[self.parts])
        # 0 / 0 is NaN, so a group of zeros is divided by 1.
        one = k.scalar(1.0, "f32")
        is_zero = k.op(f"arith.cmpf oeq, {scale.name}, {k.scalar(0.0, 'f32').name} : f32", "i1")
        inverse = k.broadcast(one / is_zero.select(one, scale), lanes)
        whole = vector_type(lanes, "i32")
        totals = [k.scalar(0, whole) for _ in range(self._num_offsets)]
        for i, value in enumerate(values):
            number = (value * inverse).math("roundeven").to_int(whole)
            half = i * self._num_offsets // len(values)
            totals[half] = totals[half] + number
            codes = [number]
            if self.parts == 2:
                high = k.bits("shrsi", number + 64, 7)
                codes = [high, number - k.bits("shli", high, 7)]
            for part, code in enumerate(codes):
                at = self.codes_at(row, group, part) + i * lanes
                self.codes["i8"].store_vector(code.to(vector_type(lanes, "i8")), at)
        self.codes["f32"].store(scale, self._number(row, group, 0))
        sums = [
            k.op(f"vector.reduction <add>, {total.name} : {whole} into i32", "i32")
            for total in totals
        ]
        for half, sum_ in enumerate(sums):
            self.codes["i32"].store(sum_ * -ZERO, self._offset_at(row, group, half))
        sum_ = sums[0] if len(sums) == 1 else sums[0] + sums[1]
        self.codes["f32"].store(sum_.to("f32") * scale, self._number(row, group, 2))

    def codes_at(self, row: Scalar, group: Scalar, part: int) -> Scalar:
        """The byte where the high (part 0) or low (part 1) parts of a group begin."""
        return row * self.row_bytes + group * GROUP + part * self._width

    def scale(self, row: Scalar, group: Scalar) -> Scalar:
        """The factor of a group's integers, f32."""
        return self.codes["f32"].load(self._number(row, group, 0))

    def offset(self, row: Scalar, group: Scalar) -> Scalar:
        """What a group's integers times -ZERO are, i32."""
        halves = [self.half_offset(row, group, half) for half in range(self._num_offsets)]
        return halves[0] if len(halves) == 1 else halves[0] + halves[1]

    def half_offset(self, row: Scalar, group: Scalar, half: int) -> Scalar:
        """What half of a group's integers times -ZERO are, i32, where there are two offsets."""
        return self.codes["i32"].load(self._offset_at(row, group, half))

    def total(self, row: Scalar, group: Scalar) -> Scalar:
        """The sum of a group's activations, f32."""
        return self.codes["f32"].load(self._number(row, group, 2))

    def _offset_at(self, row: Scalar, group: Scalar, half: int) -> Scalar:
        if self._num_offsets == 1:
            return self._number(row, group, 1)
        return self._number(row, group * self._num_offsets, 1) + half

    def _number(self, row: Scalar, index: Scalar, which: int) -> Scalar:
        """Where a group's scale (which=0), offset (1) or total (2) is, in units of four bytes."""
        before = (0, 1, 1 + self._num_offsets)[which]  # numbers of a group
        start = self.parts * self._width + before * (self._width // GROUP * 4)
        return row * (self.row_bytes // 4) + index + start // 4
