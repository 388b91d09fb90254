"""Builder: MLIR tensor operations as text, with `linalg.generic` from an einsum.

It depends on MLIR's syntax only, not on what is computed. Equal calls give equal text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compile.mlir.values import Scalar, TextBuilder

Dim = int | str  # a static size, or the SSA name of an index that holds it


@dataclass(frozen=True)
class Tensor:
    """An SSA tensor value; a `str` in `shape` is the index value of that dynamic size."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str

    @property
    def type(self) -> str:
        """The MLIR type."""
        return tensor_type(self.shape, self.dtype)


def tensor_type(shape: Sequence[Dim], dtype: str) -> str:
    """ "tensor<4x?xf32>" for shape (4, "%n")."""
    sizes = "".join(f"{d if isinstance(d, int) else '?'}x" for d in shape)
    return f"tensor<{sizes}{dtype}>"


class Builder(TextBuilder):
    """Writes tensor operations; sizes and shapes may be dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self._letters = ""  # of the `generic` whose body is being written

    # Sizes

    def index(self, dim: Dim) -> Scalar:
        """A size as a value of type `index`."""
        return self.scalar(dim, "index") if isinstance(dim, int) else Scalar(self, dim, "index")

    def hidden(self, value: int) -> str:
        """An index that the compiler cannot see, so that it makes one kernel for all values."""
        constant = self.scalar(value, "index")
        return self.op(f"util.optimization_barrier {constant.name} : index", "index").name

    def product(self, *dims: Dim) -> Dim:
        """The product of sizes."""
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
        """The result of an operation, a tensor."""
        return Tensor(self.op(text, dtype).name, tuple(shape), dtype)

    def empty(self, shape: Sequence[Dim], dtype: str) -> Tensor:
        """A tensor without contents."""
        dynamic = ", ".join(d for d in shape if isinstance(d, str))
        return self.tensor(f"tensor.empty({dynamic}) : {tensor_type(shape, dtype)}", shape, dtype)

    def fill(self, value: float, shape: Sequence[Dim], dtype: str) -> Tensor:
        """A tensor whose entries are all `value`."""
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
        """Pad `x` with `value` at the end of `axis`, to `size` entries."""
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
        """`size` entries of `axis` from `start` on; with `drop`, without that dimension of 1."""
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
        """One element of `x`, inside a `generic` body; indices are of type `index`."""
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
        number to fill one with) it takes the accumulator, too, last. Letters that are missing in
        the output are reduced.
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
        """A contraction in f32, whatever the operands' float types; `spec` is an einsum."""
        return self.generic(
            spec,
            [lhs, rhs],
            shape,
            "f32",
            lambda a, b, acc: acc + a.to("f32") * b.to("f32"),
            init,
        )

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

        `spec` is an einsum of q, k, v and, if there is one, the additive mask. scale: of scores.
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
    """MLIR's reassociation indices: dimension `axis` of `rank` stands for `count` dimensions."""
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
