"""Scalar and TextBuilder: MLIR text, and arithmetic on SSA values that writes it.

Equal calls give equal text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32}


@dataclass(frozen=True)
class Scalar:
    """An SSA scalar or vector; arithmetic on it emits `arith` operations, element by element."""

    builder: TextBuilder
    name: str
    dtype: str

    @property
    def _is_float(self) -> bool:
        return element_type(self.dtype)[0] in "fb"

    def _binary(self, op: str, other: Scalar | float) -> Scalar:
        rhs = other if isinstance(other, Scalar) else self.builder.scalar(other, self.dtype)
        assert rhs.dtype == self.dtype, f"{op}: {self.dtype} and {rhs.dtype}"
        return self.builder.op(f"arith.{op} {self.name}, {rhs.name} : {self.dtype}", self.dtype)

    def __add__(self, other: Scalar | float) -> Scalar:
        return self._binary("addf" if self._is_float else "addi", other)

    def __sub__(self, other: Scalar | float) -> Scalar:
        return self._binary("subf" if self._is_float else "subi", other)

    def __mul__(self, other: Scalar | float) -> Scalar:
        return self._binary("mulf" if self._is_float else "muli", other)

    def __truediv__(self, other: Scalar | float) -> Scalar:
        return self._binary("divf", other)

    def __floordiv__(self, other: Scalar | int) -> Scalar:
        return self._binary("divui", other)

    def __mod__(self, other: Scalar | int) -> Scalar:
        return self._binary("remui", other)

    def maximum(self, other: Scalar | float) -> Scalar:
        """The larger of two floats; NaN if one is."""
        return self._binary("maximumf", other)

    def minimum(self, other: Scalar | int) -> Scalar:
        """The smaller of two signed integers."""
        return self._binary("minsi", other)

    def unsigned_minimum(self, other: Scalar) -> Scalar:
        """The smaller of two integers that are not negative."""
        return self._binary("minui", other)

    def clamp(self, low: int, high: Scalar) -> Scalar:
        """A signed integer, limited to low .. high."""
        return self.minimum(high)._binary("maxsi", low)

    def largest(self, other: Scalar) -> Scalar:
        """The larger of two signed integers."""
        return self._binary("maxsi", other)

    def equals(self, other: int) -> Scalar:
        """Integer `self == other`, as i1."""
        value = self.builder.scalar(other, self.dtype)
        return self.builder.op(f"arith.cmpi eq, {self.name}, {value.name} : {self.dtype}", "i1")

    def is_below(self, other: Scalar) -> Scalar:
        """Float `self < other`, as i1; false for NaN."""
        kind = mask_type(self.dtype) if self.dtype.startswith("vector") else "i1"
        return self.builder.op(f"arith.cmpf olt, {self.name}, {other.name} : {self.dtype}", kind)

    def less(self, other: Scalar) -> Scalar:
        """Signed integer `self < other`, as i1."""
        kind = mask_type(self.dtype) if self.dtype.startswith("vector") else "i1"
        return self.builder.op(f"arith.cmpi slt, {self.name}, {other.name} : {self.dtype}", kind)

    def select(self, yes: Scalar, no: Scalar) -> Scalar:
        """`yes` where this i1 is true, else `no`."""
        types = f"{self.dtype}, {yes.dtype}" if self.dtype.startswith("vector") else yes.dtype
        return self.builder.op(
            f"arith.select {self.name}, {yes.name}, {no.name} : {types}", yes.dtype
        )

    def math(self, name: str) -> Scalar:
        """A unary function of the `math` dialect: exp, sqrt, ..."""
        return self.builder.op(f"math.{name} {self.name} : {self.dtype}", self.dtype)

    def to_unsigned(self, dtype: str) -> Scalar:
        """An unsigned integer, widened by zeros; or as `index`."""
        if dtype == "index":
            return self.builder.op(f"arith.index_castui {self.name} : {self.dtype} to index", dtype)
        return self.builder.op(f"arith.extui {self.name} : {self.dtype} to {dtype}", dtype)

    def to(self, dtype: str) -> Scalar:
        """Convert between floats, between integers, integers to floats, or from and to `index`."""
        if dtype == self.dtype:
            return self
        if "index" in (dtype, self.dtype):
            op = "index_cast"
        elif not self._is_float and element_type(dtype)[0] in "fb":
            op = "sitofp"
        else:
            widen = _BITS[element_type(dtype)] > _BITS[element_type(self.dtype)]
            op = (
                ("extf" if widen else "truncf")
                if self._is_float
                else ("extsi" if widen else "trunci")
            )
        return self.builder.op(f"arith.{op} {self.name} : {self.dtype} to {dtype}", dtype)


class TextBuilder:
    """Collects lines of MLIR; `indent` is the depth of the first one."""

    def __init__(self, indent: int = 1) -> None:
        self.lines: list[str] = []
        self._count = 0
        self._indent = indent

    def text(self, module: str) -> str:
        """The lines as a module of this name."""
        return "\n".join([f"module @{module} {{", *self.lines, "}", ""])

    def emit(self, line: str) -> None:
        """Append a line."""
        self.lines.append("  " * self._indent + line)

    def fresh(self) -> str:
        """A name for an SSA value that no other has."""
        self._count += 1
        return f"%{self._count}"

    @contextmanager
    def block(self, header: str, footer: str = "}") -> Iterator[None]:
        """Indent the lines that are emitted inside, between `header` and `footer`."""
        self.emit(header)
        self._indent += 1
        yield
        self._indent -= 1
        self.emit(footer)

    def op(self, text: str, dtype: str) -> Scalar:
        """The result of an operation, of type `dtype`."""
        name = self.fresh()
        self.emit(f"{name} = {text}")
        return Scalar(self, name, dtype)

    def scalar(self, value: float, dtype: str) -> Scalar:
        """A constant; of a vector type, the same value in all lanes."""
        is_float = element_type(dtype)[0] in "fb"
        literal = f"{float(value):.9e}" if is_float else str(int(value))
        literal = f"dense<{literal}>" if dtype.startswith("vector") else literal
        return self.op(f"arith.constant {literal} : {dtype}", dtype)


def element_type(dtype: str) -> str:
    """ "f32" for "vector<16xf32>", and for "f32"."""
    return dtype.rpartition("x")[2].rstrip(">") if dtype.startswith("vector") else dtype


def mask_type(dtype: str) -> str:
    """ "vector<16xi1>" for "vector<16xf32>"."""
    return dtype.rpartition("x")[0] + "xi1>"
