"""Activations: the rows that matrices are multiplied with, as the products read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.cpu.kernel import KernelBuilder
from compile.cpu.operands import Operand
from compile.formats.blocks import GROUP, ZERO
from compile.formats.layout import ITEM_BYTES
from compile.mlir.executable import Views
from compile.mlir.values import Scalar
from compile.mlir.vectors import lanes_of, vector_type


@dataclass(frozen=True)
class Integers:
    """How activations are integers: of 8 bits, as Q8_1 of llama.cpp, which cost more accuracy than
    4-bit weights do; or of 15.

    For dot products of bytes (is_paired=False) those of 15 bits are two parts, 128 * high + low,
    both i8. For dot products of pairs all are i16, of each four columns those of 0, 2, 1 and 3: so
    codes of four columns become two vectors of pairs by a mask and a shift.
    """

    num_bits: int
    is_paired: bool

    @property
    def largest(self) -> int:
        """The largest of them."""
        return 127 if self.num_bits == 8 else 127 * 128 + 63

    @property
    def parts(self) -> int:
        """Parts of one, which lie apart."""
        return 1 if self.is_paired or self.num_bits == 8 else 2

    @property
    def part_bytes(self) -> int:
        """Bytes of a part."""
        return 2 if self.is_paired else 1

    @property
    def num_bytes(self) -> int:
        """Bytes of one."""
        return self.parts * self.part_bytes


class Activations:
    """Rows of activations [M, K]: floats for float weights, integers for quantized ones.

    Integers come in groups of 32 with a scale. A row holds them, high parts (K bytes) before low
    parts (K bytes) if they have two, then the scales in f32, then -ZERO times the groups' sums in
    i32, then the scales times the sums in f32.

    kind: how the floats are multiplied, or what the integers are. num_offsets: sums of a group in
    i32: two, each of half of it, if there are weights whose scales are of so few columns.
    """

    def __init__(
        self, k: KernelBuilder, views: Views, kind: Operand | Integers, lanes: int, width: int,
        num_offsets: int,
    ) -> None:  # fmt: skip
        self._k, self._width, self._num_offsets = k, width, num_offsets
        self.is_quantized = isinstance(kind, Integers)
        self.step = GROUP if self.is_quantized else lanes  # features that are stored together
        self.row_bytes = self.bytes_of_row(kind, width, num_offsets)
        if isinstance(kind, Integers):
            self.integers = kind
            self.codes = views.open("i8", "i32", "f32")
            return
        views = views.open(kind.other, "i32")
        self.elements = views[kind.other]
        self.units = views["i32" if kind.other == "bf16" else kind.other]
        self.unit_bytes = 4

    @staticmethod
    def bytes_of_row(kind: Operand | Integers, width: int, num_offsets: int) -> int:
        """Bytes of a row of `width` activations."""
        if isinstance(kind, Integers):
            return kind.num_bytes * width + width // GROUP * (2 + num_offsets) * 4
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
        scale = k.largest_size(values) / float(self.integers.largest)
        # 0 / 0 is NaN, so a group of zeros is divided by 1.
        one = k.scalar(1.0, "f32")
        is_zero = k.op(f"arith.cmpf oeq, {scale.name}, {k.scalar(0.0, 'f32').name} : f32", "i1")
        inverse = k.broadcast(one / is_zero.select(one, scale), lanes)
        whole = vector_type(lanes, "i32")
        totals = [k.scalar(0, whole) for _ in range(self._num_offsets)]
        for i, value in enumerate(values):
            number = k.nearest(value * inverse)
            half = i * self._num_offsets // len(values)
            totals[half] = totals[half] + number
            for part, code in enumerate(self._parts(number)):
                at = self.codes_at(row, group, part) + i * (lanes * self.integers.part_bytes)
                self.codes["i8"].store_vector(self._bytes(code), at)
        self.codes["f32"].store(scale, self._number(row, group, 0))
        sums = [k.sum(total) for total in totals]
        for half, sum_ in enumerate(sums):
            self.codes["i32"].store(sum_ * -ZERO, self._offset_at(row, group, half))
        sum_ = sums[0] if len(sums) == 1 else sums[0] + sums[1]
        self.codes["f32"].store(sum_.to("f32") * scale, self._number(row, group, 2))

    def _parts(self, number: Scalar) -> list[Scalar]:
        """The parts of a vector of integers, i32."""
        if self.integers.parts == 1:
            return [number]
        high = self._k.bits("shrsi", number + 64, 7)
        return [high, number - self._k.bits("shli", high, 7)]

    def _bytes(self, part: Scalar) -> Scalar:
        """A vector of parts, i32, as it is stored, i8."""
        k, lanes = self._k, lanes_of(part)
        if not self.integers.is_paired:
            return part.to(vector_type(lanes, "i8"))
        order = [lane // 4 * 4 + (0, 2, 1, 3)[lane % 4] for lane in range(lanes)]
        words = k.shuffle(part, part, order).to(vector_type(lanes, "i16"))
        return k.bitcast(words, vector_type(2 * lanes, "i8"))

    def codes_at(self, row: Scalar, group: Scalar, part: int) -> Scalar:
        """The byte where the only or the high (part 0) or low (part 1) parts of a group begin."""
        group_bytes = GROUP * self.integers.part_bytes
        return row * self.row_bytes + group * group_bytes + part * self._width

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
        start = self.integers.num_bytes * self._width + before * (self._width // GROUP * 4)
        return row * (self.row_bytes // 4) + index + start // 4
