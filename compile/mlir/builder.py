"""A small MLIR text builder: tensors with named dynamic sizes, and `linalg.generic` from an einsum.

It knows MLIR's syntax and nothing of models; `llama.py` writes with it. Equal calls give equal
text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Dim = int | str  # a static size, or the SSA name of an index that holds it


@dataclass(frozen=True)
class Tensor:
    """An SSA tensor value; a `str` in `shape` is the index value of that dynamic size."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str

    @property
    def type(self) -> str:
        return tensor_type(self.shape, self.dtype)


@dataclass(frozen=True)
class Scalar:
    """An SSA scalar or vector; arithmetic on it emits `arith` operations, element by element."""

    builder: Builder
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
        return self._binary("maximumf", other)

    def minimum(self, other: Scalar | int) -> Scalar:
        return self._binary("minsi", other)

    def unsigned_minimum(self, other: Scalar) -> Scalar:
        """Of integers that are not negative, such as tokens: for reductions on GPUs.

        iree-compile 3.9.0 starts some i32 reductions from wrong numbers there: `minsi` from -1,
        `maxsi` from 0, `andi` from 1. It starts `minui` from the right one.
        """
        return self._binary("minui", other)

    def clamp(self, low: int, high: Scalar) -> Scalar:
        return self.minimum(high)._binary("maxsi", low)

    def largest(self, other: Scalar) -> Scalar:
        """Of two signed integers."""
        return self._binary("maxsi", other)

    def equals(self, other: int) -> Scalar:
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
        types = f"{self.dtype}, {yes.dtype}" if self.dtype.startswith("vector") else yes.dtype
        return self.builder.op(
            f"arith.select {self.name}, {yes.name}, {no.name} : {types}", yes.dtype
        )

    def math(self, name: str) -> Scalar:
        """A unary function of the `math` dialect: exp, sqrt, ..."""
        return self.builder.op(f"math.{name} {self.name} : {self.dtype}", self.dtype)

    def to_int(self, dtype: str) -> Scalar:
        """A float without its fraction."""
        return self.builder.op(f"arith.fptosi {self.name} : {self.dtype} to {dtype}", dtype)

    def to_unsigned(self, dtype: str) -> Scalar:
        """A wider integer, with zeros in front."""
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


_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32}


def element_type(dtype: str) -> str:
    """ "f32" for "vector<16xf32>", and for "f32"."""
    return dtype.rpartition("x")[2].rstrip(">") if dtype.startswith("vector") else dtype


def mask_type(dtype: str) -> str:
    """ "vector<16xi1>" for "vector<16xf32>"."""
    return dtype.rpartition("x")[0] + "xi1>"


def tensor_type(shape: Sequence[Dim], dtype: str) -> str:
    sizes = "".join(f"{d if isinstance(d, int) else '?'}x" for d in shape)
    return f"tensor<{sizes}{dtype}>"


class Builder:
    """Collects the lines of one module."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0
        self._indent = 1
        self._letters = ""

    def text(self, module: str) -> str:
        return "\n".join([f"module @{module} {{", *self.lines, "}", ""])

    def emit(self, line: str) -> None:
        self.lines.append("  " * self._indent + line)

    def fresh(self) -> str:
        self._count += 1
        return f"%{self._count}"

    @contextmanager
    def block(self, header: str, footer: str = "}") -> Iterator[None]:
        self.emit(header)
        self._indent += 1
        yield
        self._indent -= 1
        self.emit(footer)

    # Scalars and sizes

    def op(self, text: str, dtype: str) -> Scalar:
        name = self.fresh()
        self.emit(f"{name} = {text}")
        return Scalar(self, name, dtype)

    def scalar(self, value: float, dtype: str) -> Scalar:
        is_float = element_type(dtype)[0] in "fb"
        literal = f"{float(value):.9e}" if is_float else str(int(value))
        literal = f"dense<{literal}>" if dtype.startswith("vector") else literal
        return self.op(f"arith.constant {literal} : {dtype}", dtype)

    def index(self, dim: Dim) -> Scalar:
        """The index value of a size."""
        return self.scalar(dim, "index") if isinstance(dim, int) else Scalar(self, dim, "index")

    def hidden(self, value: int) -> str:
        """An index whose value the compiler does not know: kernels that differ by it are one."""
        constant = self.scalar(value, "index")
        return self.op(f"util.optimization_barrier {constant.name} : index", "index").name

    def product(self, *dims: Dim) -> Dim:
        static = math.prod(d for d in dims if isinstance(d, int))
        dynamic = [Scalar(self, d, "index") for d in dims if isinstance(d, str)]
        if not dynamic:
            return static
        total = dynamic[0]
        for factor in dynamic[1:]:
            total = total * factor
        return (total * static if static != 1 else total).name

    # Tensors

    def tensor(self, text: str, shape: Sequence[Dim], dtype: str) -> Tensor:
        return Tensor(self.op(text, dtype).name, tuple(shape), dtype)

    def empty(self, shape: Sequence[Dim], dtype: str) -> Tensor:
        dynamic = ", ".join(d for d in shape if isinstance(d, str))
        return self.tensor(f"tensor.empty({dynamic}) : {tensor_type(shape, dtype)}", shape, dtype)

    def fill(self, value: float, shape: Sequence[Dim], dtype: str) -> Tensor:
        scalar, out = self.scalar(value, dtype), self.empty(shape, dtype)
        return self.tensor(
            f"linalg.fill ins({scalar.name} : {dtype}) outs({out.name} : {out.type}) -> {out.type}",
            shape,
            dtype,
        )

    def expand(self, x: Tensor, axis: int, *sizes: Dim) -> Tensor:
        """Split dimension `axis` into `sizes`."""
        shape = (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        groups = _groups(len(x.shape), axis, len(sizes))
        sizes_text = ", ".join(str(d) for d in shape)
        return self.tensor(
            f"tensor.expand_shape {x.name} {groups} output_shape [{sizes_text}] "
            f": {x.type} into {tensor_type(shape, x.dtype)}",
            shape,
            x.dtype,
        )

    def collapse(self, x: Tensor, axis: int, count: int) -> Tensor:
        """Merge `count` dimensions from `axis` on into one."""
        merged = self.product(*x.shape[axis : axis + count])
        shape = (*x.shape[:axis], merged, *x.shape[axis + count :])
        return self.tensor(
            f"tensor.collapse_shape {x.name} {_groups(len(shape), axis, count)} "
            f": {x.type} into {tensor_type(shape, x.dtype)}",
            shape,
            x.dtype,
        )

    def multiple(self, size: Scalar, unit: int, limit: int) -> Scalar:
        """An index that is promised to be a multiple of `unit`, from `unit` to `limit`."""
        most = limit - limit % unit
        divisor = f", udiv = {unit}" if unit > 1 else ""
        return self.op(
            f"util.assume.int {size.name}<umin = {unit}, umax = {most}{divisor}> : index", "index"
        )

    def pad(self, x: Tensor, axis: int, size: Dim, value: float) -> Tensor:
        """`x` with `value` behind its entries of `axis`, until there are `size`."""
        if x.shape[axis] == size:
            return x
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        low = ", ".join("0" for _ in shape)
        if isinstance(size, int):
            more = str(size - int(x.shape[axis]))
        else:
            more = (self.index(size) - self.index(x.shape[axis])).name
        high = ", ".join(more if i == axis else "0" for i in range(len(shape)))
        fill, name = self.scalar(value, x.dtype), self.fresh()
        with self.block(
            f"{name} = tensor.pad {x.name} low[{low}] high[{high}] {{",
            f"}} : {x.type} to {tensor_type(shape, x.dtype)}",
        ):
            indices = ", ".join(f"{self.fresh()}: index" for _ in shape)
            self.emit(f"^bb0({indices}):")
            self.emit(f"tensor.yield {fill.name} : {x.dtype}")
        return Tensor(name, shape, x.dtype)

    def slice(self, x: Tensor, axis: int, start: Dim, size: Dim, *, drop: bool = False) -> Tensor:
        """`size` entries of `axis` from `start` on; `drop` removes that (unit) dimension."""
        if size == x.shape[axis] and not drop:
            return x
        offsets = ["0"] * len(x.shape)
        offsets[axis] = str(start)
        sizes = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
        shape = [d for i, d in enumerate(sizes) if not (drop and i == axis)]
        return self.tensor(
            f"tensor.extract_slice {x.name}[{', '.join(offsets)}] [{', '.join(map(str, sizes))}] "
            f"[{', '.join('1' for _ in sizes)}] : {x.type} to {tensor_type(shape, x.dtype)}",
            shape,
            x.dtype,
        )

    def extract(self, x: Tensor, *indices: Scalar) -> Scalar:
        """One element, inside a `generic` body; indices are of type `index`."""
        names = ", ".join(i.name for i in indices)
        return self.op(f"tensor.extract {x.name}[{names}] : {x.type}", x.dtype)

    def position(self, letter: str) -> Scalar:
        """The current index of the dimension `letter`, inside a `generic` body."""
        return self.op(f"linalg.index {self._letters.index(letter)} : index", "index")

    def generic(
        self,
        spec: str,
        inputs: Sequence[Tensor],
        shape: Sequence[Dim],
        dtype: str,
        body: Callable[..., Scalar],
        init: Tensor | float | None = None,
    ) -> Tensor:
        """`linalg.generic` with index maps from an einsum such as "mk,nk->mn".

        `body` takes one scalar per input and returns the output's; with `init` (a tensor, or a
        number to fill one with) it also takes the accumulator, last. Letters that the output
        lacks are reduced.
        """
        operands, output = spec.split("->")
        maps = [*operands.split(","), output] if inputs else [output]
        letters = output + "".join(dict.fromkeys(c for c in operands if c not in output + ","))
        if isinstance(init, Tensor):
            out = init
        elif init is None:
            out = self.empty(shape, dtype)
        else:
            out = self.fill(init, shape, dtype)
        name = self.fresh()
        ins = ""
        if inputs:
            ins = f"ins({', '.join(x.name for x in inputs)} : {', '.join(x.type for x in inputs)}) "
        header = (
            f"{name} = linalg.generic {{indexing_maps = [{_affine_maps(letters, maps)}], "
            f"iterator_types = [{_iterators(letters, output)}]}} "
            f"{ins}outs({out.name} : {out.type}) {{"
        )
        with self.block(header, f"}} -> {out.type}"):
            args = [Scalar(self, self.fresh(), x.dtype) for x in (*inputs, out)]
            self.emit(f"^bb0({', '.join(f'{a.name}: {a.dtype}' for a in args)}):")
            outer, self._letters = self._letters, letters
            result = body(*(args if init is not None else args[:-1]))
            self._letters = outer
            self.emit(f"linalg.yield {result.name} : {result.dtype}")
        return Tensor(name, tuple(shape), dtype)

    def contract(
        self, spec: str, lhs: Tensor, rhs: Tensor, shape: Sequence[Dim], init: Tensor | float = 0.0
    ) -> Tensor:
        """A contraction with f32 products and sums, whatever the operands' float types."""
        return self.generic(
            spec,
            [lhs, rhs],
            shape,
            "f32",
            lambda a, b, acc: acc + a.to("f32") * b.to("f32"),
            init,
        )

    def gather(self, source: Tensor, indices: Tensor) -> Tensor:
        """Rows of source [R, C] at indices [..]: [.., C]."""
        out = self.empty((*indices.shape, *source.shape[1:]), source.dtype)
        return self.tensor(
            f"iree_linalg_ext.gather dimension_map = [0] "
            f"ins({source.name}, {indices.name} : {source.type}, {indices.type}) "
            f"outs({out.name} : {out.type}) -> {out.type}",
            out.shape,
            out.dtype,
        )

    def scatter(self, updates: Tensor, indices: Tensor, dest: Tensor) -> Tensor:
        """dest [R, C] with the rows at indices [U, 1] replaced by updates [U, C]."""
        name = self.fresh()
        header = (
            f"{name} = iree_linalg_ext.scatter dimension_map = [0] unique_indices(true) "
            f"ins({updates.name}, {indices.name} : {updates.type}, {indices.type}) "
            f"outs({dest.name} : {dest.type}) {{"
        )
        with self.block(header, f"}} -> {dest.type}"):
            new, old = self.fresh(), self.fresh()
            self.emit(f"^bb0({new}: {dest.dtype}, {old}: {dest.dtype}):")
            self.emit(f"iree_linalg_ext.yield {new} : {dest.dtype}")
        return Tensor(name, dest.shape, dest.dtype)

    def attention(
        self,
        letters: str,
        spec: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        mask: Tensor | None,
        dtype: str,
    ) -> Tensor:
        """`iree_linalg_ext.attention` over the dimensions `letters`, in this order.

        `spec` names q, k, v, the additive mask if there is one, and the output.
        """
        operands, output = spec.split("->")
        q_map, k_map, v_map, *mask_map = operands.split(",")
        masks = [] if mask is None else [mask]
        sizes = dict(zip(q_map + v_map, (*q.shape, *v.shape), strict=True))
        out = self.empty([sizes[c] for c in output], dtype)
        factor = self.scalar(scale, "f32")
        name = self.fresh()
        operands_text = ", ".join([q.name, k.name, v.name, factor.name, *(x.name for x in masks)])
        types = ", ".join((q.type, k.type, v.type, "f32", *(x.type for x in masks)))
        header = (
            f"{name} = iree_linalg_ext.attention {{indexing_maps = "
            f"[{_affine_maps(letters, [q_map, k_map, v_map, '', *mask_map, output])}]}} "
            f"ins({operands_text} : {types}) outs({out.name} : {out.type}) {{"
        )
        with self.block(header, f"}} -> {out.type}"):
            score = self.fresh()
            self.emit(f"^bb0({score}: f32):")
            self.emit(f"iree_linalg_ext.yield {score} : f32")
        return Tensor(name, out.shape, dtype)


def _groups(rank: int, axis: int, count: int) -> str:
    """Reassociation where dimension `axis` of `rank` stands for `count` dimensions."""
    groups = [list(range(i, i + 1)) for i in range(axis)]
    groups.append(list(range(axis, axis + count)))
    groups += [[i + count - 1] for i in range(axis + 1, rank)]
    return str(groups)


def _affine_maps(letters: str, maps: Sequence[str]) -> str:
    domain = ", ".join(f"d{i}" for i in range(len(letters)))
    return ", ".join(
        f"affine_map<({domain}) -> ({', '.join(f'd{letters.index(c)}' for c in m)})>" for m in maps
    )


def _iterators(letters: str, output: str) -> str:
    return ", ".join('"parallel"' if c in output else '"reduction"' for c in letters)
