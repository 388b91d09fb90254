"""VectorBuilder: arithmetic on vectors of numbers, as operations of MLIR."""

from __future__ import annotations

from collections.abc import Sequence

from compile.mlir.values import Scalar, TextBuilder, element_type


class VectorBuilder(TextBuilder):
    """Writes operations on vectors of numbers."""

    def broadcast(self, value: Scalar, lanes: int) -> Scalar:
        """A vector whose lanes all hold `value`."""
        kind = vector_type(lanes, value.dtype)
        return self.op(f"vector.broadcast {value.name} : {value.dtype} to {kind}", kind)

    def bitcast(self, value: Scalar, kind: str) -> Scalar:
        """The same bits as type `kind`."""
        op = "vector.bitcast" if kind.startswith("vector") else "arith.bitcast"
        return self.op(f"{op} {value.name} : {value.dtype} to {kind}", kind)

    def bits(self, op: str, a: Scalar, b: Scalar | int) -> Scalar:
        """An operation on bits: "andi", "ori", "shli", "shrsi" or "shrui"."""
        b = b if isinstance(b, Scalar) else self.scalar(b, a.dtype)
        return self.op(f"arith.{op} {a.name}, {b.name} : {a.dtype}", a.dtype)

    def intrinsic(self, name: str, arguments: Sequence[Scalar], kind: str) -> Scalar:
        """A call of LLVM's intrinsic llvm.`name` that returns type `kind`."""
        names = ", ".join(a.name for a in arguments)
        types = ", ".join(a.dtype for a in arguments)
        return self.op(f'llvm.call_intrinsic "llvm.{name}"({names}) : ({types}) -> {kind}', kind)

    def fma(self, a: Scalar, b: Scalar, c: Scalar) -> Scalar:
        """a * b + c, rounded once."""
        return self.op(f"math.fma {a.name}, {b.name}, {c.name} : {c.dtype}", c.dtype)

    def convert(self, x: Scalar, dtype: str) -> Scalar:
        """A vector with elements of another float type."""
        return x.to(vector_type(lanes_of(x), dtype))

    def sum(self, value: Scalar, start: Scalar | None = None) -> Scalar:
        """The sum of a vector's elements, and of `start`."""
        return self._reduction("add", value, start)

    def maximum(self, value: Scalar) -> Scalar:
        """The largest element of an f32 vector."""
        return self._reduction("maximumf", value)

    def _reduction(self, kind: str, value: Scalar, start: Scalar | None = None) -> Scalar:
        names = value.name if start is None else f"{value.name}, {start.name}"
        of = element_type(value.dtype)
        return self.op(f"vector.reduction <{kind}>, {names} : {value.dtype} into {of}", of)

    def vector(self, elements: Sequence[Scalar]) -> Scalar:
        """A vector of scalars of one type."""
        names, kind = ", ".join(x.name for x in elements), elements[0].dtype
        kind = vector_type(len(elements), kind)
        return self.op(f"vector.from_elements {names} : {kind}", kind)

    def element(self, value: Scalar, lane: int) -> Scalar:
        """One element of a vector."""
        kind = element_type(value.dtype)
        return self.op(f"vector.extract {value.name}[{lane}] : {kind} from {value.dtype}", kind)

    def shuffle(self, a: Scalar, b: Scalar, lanes: Sequence[int]) -> Scalar:
        """A vector of elements of `a` and `b`; `lanes` index the concatenation of both."""
        kind = vector_type(len(lanes), element_type(a.dtype))
        return self.op(f"vector.shuffle {a.name}, {b.name} {[*lanes]} : {a.dtype}, {b.dtype}", kind)

    def transpose(self, rows: Sequence[Scalar]) -> list[Scalar]:
        """Transpose a square matrix: n vectors of n elements, n a power of two.

        Swaps submatrices beside the diagonal, the largest first (Eklundh 1972).
        """
        rows, n, size = [*rows], len(rows), len(rows) // 2
        while size:
            first = [lane if not lane & size else n + lane - size for lane in range(n)]
            second = [lane + size if not lane & size else n + lane for lane in range(n)]
            for i in (i for i in range(n) if not i & size):
                a, b = rows[i], rows[i + size]
                rows[i], rows[i + size] = self.shuffle(a, b, first), self.shuffle(a, b, second)
            size //= 2
        return rows

    def lanes_from(self, value: Scalar, lanes: int) -> Scalar:
        """value, value + 1, ...: vector<lanes x i32> of an i32."""
        kind = vector_type(lanes, "i32")
        steps = self.op(f"arith.constant dense<{list(range(lanes))}> : {kind}", kind)
        return self.broadcast(value, lanes) + steps


def vector_type(lanes: int, dtype: str) -> str:
    """ "vector<16xf32>" for 16 lanes of "f32"."""
    return f"vector<{lanes}x{dtype}>"


def lanes_of(value: Scalar) -> int:
    """The number of a vector's elements."""
    return int(value.dtype.removeprefix("vector<").partition("x")[0])
