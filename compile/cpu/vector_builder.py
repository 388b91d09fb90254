"""CpuVectorBuilder: what CPUs compute of vectors in ways of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar
from compile.mlir.vectors import lanes_of, vector_type

LOG2_E = math.log2(math.e)
ROUNDING = 1.5 * 2**23  # added to an f32, it leaves the nearest integer in the lowest bits
TO_NEAREST = {4: "x86.sse2.cvtps2dq", 8: "x86.avx.cvt.ps2dq.256"}  # by lanes
EXP2 = (1.0, 0.69314697773, 0.24022242025, 0.05550733572, 0.00967151564, 0.0013264778)  # 2^f
NEAR_EXP2 = (0.999925219, 0.695833537, 0.226067159, 0.0780245233)  # for f in [0, 1)


class CpuVectorBuilder(ExecutableBuilder):
    """Writes a kernel's arithmetic on vectors.

    has_bf16: the CPU converts f32 to bf16 by an instruction (AVX512_BF16).
    """

    def __init__(self, *, has_bf16: bool = False) -> None:
        super().__init__()
        self._has_bf16 = has_bf16

    def exp(self, x: Scalar) -> Scalar:
        """exp of an f32 vector, accurate to 2 units in the last place.

        Inputs are clamped to [-87, 88], so results range from about 1e-38 to 1e38. exp(x) is
        2^n * 2^f with f in [-1/2, 1/2], where 2^f is a polynomial (as in Cephes). That takes a
        third of the operations of math.exp.
        """
        kind, whole = x.dtype, vector_type(lanes_of(x), "i32")
        low, high = (self.scalar(value, kind) for value in (-87.0, 88.0))
        x = self.larger(low, self.smaller(high, x)) * LOG2_E
        # Adding this rounds, and leaves the whole number in the lowest bits.
        shifted = x + ROUNDING
        fraction = x - (shifted - ROUNDING)
        power = self.scalar(EXP2[-1], kind)
        for coefficient in EXP2[-2::-1]:
            power = self.fma(power, fraction, self.scalar(coefficient, kind))
        exponent = self.bits("shli", self.bitcast(shifted, whole), self.scalar(23, whole))
        return self.bitcast(self.bitcast(power, whole) + exponent, kind)

    def exp2(self, x: Scalar) -> Scalar:
        """2 to the power of an f32 vector of 16, within 1 part in 13,000, by AVX-512.

        It is for what becomes bf16, of which it is a twenty-fifth of the rounding error, or an
        integer of one byte. It takes half of the operations of `exp`: 2^x is 2^n * 2^f with n the
        whole number below x, so that f lies in [0, 1), where 2^f is a polynomial (the one of least
        error).
        """
        every, now = self.scalar(-1, "i16"), self.scalar(4, "i32")  # lanes; the rounding in force
        zero, down = self.scalar(0.0, x.dtype), self.scalar(1, "i32")
        arguments = [x, down, zero, every, now]
        fraction = self.intrinsic("x86.avx512.mask.reduce.ps.512", arguments, x.dtype)
        power = self.scalar(NEAR_EXP2[-1], x.dtype)
        for coefficient in NEAR_EXP2[-2::-1]:
            power = self.fma(power, fraction, self.scalar(coefficient, x.dtype))
        arguments = [power, x, zero, every, now]
        return self.intrinsic("x86.avx512.mask.scalef.ps.512", arguments, x.dtype)

    def exp_below(self, top: Scalar) -> Callable[[Scalar], Scalar]:
        """What turns an f32 vector x of 16 into exp(x - top), as exactly as `exp2`."""
        least = self.broadcast(top * -LOG2_E, 16)
        log2_e = self.scalar(LOG2_E, least.dtype)
        return lambda x: self.exp2(self.fma(x, log2_e, least))

    def reciprocal(self, x: Scalar) -> Scalar:
        """1 / x of an f32 vector of 16, within 1 part in 16,384, by AVX-512; as `exp2`, for what
        becomes bf16 or one byte. A division takes 16 cycles."""
        arguments = [x, self.scalar(0.0, x.dtype), self.scalar(-1, "i16")]
        return self.intrinsic("x86.avx512.rcp14.ps.512", arguments, x.dtype)

    def nearest(self, x: Scalar) -> Scalar:
        """The nearest integers of an f32 vector's elements, as i32; the even one of two.

        It is one instruction, where math.roundeven becomes 40.
        """
        lanes, whole = lanes_of(x), vector_type(lanes_of(x), "i32")
        if lanes < 16:
            return self.intrinsic(TO_NEAREST[lanes], [x], whole)
        every, now = self.scalar(-1, "i16"), self.scalar(4, "i32")  # lanes; the rounding in force
        arguments = [x, self.scalar(0, whole), every, now]
        return self.intrinsic("x86.avx512.mask.cvtps2dq.512", arguments, whole)

    def largest_size(self, values: Sequence[Scalar]) -> Scalar:
        """The largest absolute value in f32 vectors; NaN if there is one.

        Without signs, floats are ordered as their bits are, NaN above infinity.
        """
        whole = vector_type(lanes_of(values[0]), "i32")
        sizes = [self.bits("andi", self.bitcast(x, whole), 0x7FFFFFFF) for x in values]
        return self.bitcast(self._reduction("maxsi", reduce(Scalar.largest, sizes)), "f32")

    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        """The larger of each pair of f32 elements, in one instruction; b's where one is NaN."""
        return b.is_below(a).select(a, b)

    def smaller(self, a: Scalar, b: Scalar) -> Scalar:
        """The smaller of each pair of f32 elements, in one instruction; b's where one is NaN."""
        return a.is_below(b).select(a, b)

    def convert(self, x: Scalar, dtype: str) -> Scalar:
        """A vector with elements of another float type."""
        kind = vector_type(lanes_of(x), dtype)
        if self._has_bf16 and (x.dtype, dtype) == (vector_type(16, "f32"), "bf16"):
            return self.intrinsic("x86.avx512bf16.cvtneps2bf16.512", [x], kind)
        return super().convert(x, dtype)

    def join(self, first: Scalar, second: Scalar) -> Scalar:
        """Two vectors of 16 f32 as one of 32 bf16."""
        name = "x86.avx512bf16.cvtne2ps2bf16.512"
        return self.intrinsic(name, [second, first], vector_type(32, "bf16"))

    def pairs(self, first: Scalar, second: Scalar) -> Scalar:
        """Two vectors of 16 f32 as 16 pairs of bf16, each an i32 whose lower half is `first`'s."""
        joined = self.join(first, second)
        woven = self.shuffle(joined, joined, [i // 2 + i % 2 * 16 for i in range(32)])
        return self.bitcast(woven, vector_type(16, "i32"))

    def largest(self, value: Scalar) -> Scalar:
        """A vector whose lanes all hold the largest element of an f32 vector that has no NaN.

        It takes a few instructions; `maximum`, which heeds NaN, takes several times as many.
        """
        lanes, step = range(lanes_of(value)), lanes_of(value) // 2
        while step:
            value = self.larger(value, self.shuffle(value, value, [i ^ step for i in lanes]))
            step //= 2
        return value
