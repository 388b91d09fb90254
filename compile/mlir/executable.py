"""ExecutableBuilder: one kernel of our own, written with loops, vectors and plain memory.

`Builder` writes tensor operations and leaves the loops to IREE. Here the loops themselves are
written: what a workgroup loads, multiplies and stores. Nothing here depends on the device, nor on
what the kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from compile.mlir.builder import Builder, Dim, Tensor, tensor_type
from compile.mlir.values import Scalar, TextBuilder, mask_type
from compile.mlir.vectors import VectorBuilder, vector_type

Index = Scalar | int


@dataclass(frozen=True)
class Memory:
    """One-dimensional memory of elements `dtype`; indices count elements."""

    k: ExecutableBuilder
    name: str
    dtype: str
    space: str = ""  # an MLIR attribute where it is not the process's memory

    @property
    def type(self) -> str:
        """The MLIR type."""
        return f"memref<?x{self.dtype}{self.space and f', {self.space}'}>"

    def load(self, index: Index) -> Scalar:
        """The element at `index`."""
        return self.k.op(f"memref.load {self.name}[{self.k.at(index)}] : {self.type}", self.dtype)

    def store(self, value: Scalar, index: Index) -> None:
        """Store one element; its type must be that of the memory."""
        assert value.dtype == self.dtype, f"{value.dtype} into memory of {self.dtype}"
        self.k.emit(f"memref.store {value.name}, {self.name}[{self.k.at(index)}] : {self.type}")

    def load_vector(self, index: Index, lanes: int) -> Scalar:
        """Elements from `index` on, as a vector of `lanes`."""
        kind = vector_type(lanes, self.dtype)
        return self.k.op(f"vector.load {self.name}[{self.k.at(index)}] : {self.type}, {kind}", kind)

    def prefetch(self, index: Index, *, level: int = 1) -> None:
        """Ask for the cache line of an element that will be read soon. level: of the cache."""
        at = f"{self.name}[{self.k.at(index)}]"
        self.k.emit(f"memref.prefetch {at}, read, locality<{4 - level}>, data : {self.type}")

    def store_vector(self, value: Scalar, index: Index, count: Scalar | None = None) -> None:
        """Store a vector; with `count`, only its first `count` elements."""
        at = self.k.at(index)
        if count is None:
            self.k.emit(
                f"vector.store {value.name}, {self.name}[{at}] : {self.type}, {value.dtype}"
            )
            return
        mask = self.k.op(f"vector.create_mask {count.name} : {mask_type(value.dtype)}", "i1")
        self.k.emit(
            f"vector.maskedstore {self.name}[{at}], {mask.name}, {value.name} : "
            f"{self.type}, {mask_type(value.dtype)}, {value.dtype}"
        )

    def store_as(self, value: Scalar, index: Index) -> None:
        """Store a vector of floats, converted to this memory's type."""
        self.store_vector(self.k.convert(value, self.dtype), index)

    def add_atomically(self, value: int, index: Index) -> Scalar:
        """Add to an element and return its old value, in sequentially consistent order."""
        return self._change("addi", value, index)

    def set_bits_atomically(self, bits: int, index: Index) -> Scalar:
        """Set bits of an element and return its old value, in sequentially consistent order."""
        return self._change("ori", bits, index)

    def _change(self, op: str, value: int, index: Index) -> Scalar:
        operand = self.k.scalar(value, self.dtype)
        return self.k.op(
            f"memref.atomic_rmw {op} {operand.name}, {self.name}[{self.k.at(index)}] : "
            f"({self.dtype}, {self.type}) -> {self.dtype}",
            self.dtype,
        )


class ExecutableBuilder(VectorBuilder):
    """Writes the body of a kernel: a `binding` for each buffer, then what it does."""

    def __init__(self) -> None:
        super().__init__(indent=4)
        self._bindings: list[str] = []
        self._globals: list[str] = []
        self.num_constants = 0

    # Interface

    def in_register(self, value: int) -> Scalar:
        """An i32 constant; some chips want it in a vector register."""
        return self.scalar(value, "i32")

    def write_executable(
        self, b: TextBuilder, name: str, workload: Sequence[str], count: Sequence[str],
        function: str, export: str = "",
    ) -> None:  # fmt: skip
        """Write the executable `name` into module `b`; define its layout as #name_layout there.

        workload: names of indices that a dispatch gives. count: lines that return the number of
        workgroups in each of three dimensions, as they follow from the workload. function, export:
        attributes of the function and of its export.
        """
        given = "".join(f", {size}: index" for size in workload)
        with b.block(f"hal.executable.source private @{name} {{"):
            with b.block(
                f"hal.executable.export public @{name} ordinal(0) layout(#{name}_layout) "
                f"count(%device: !hal.device{given}) -> (index, index, index) {{",
                f"}}{export and f' attributes {{{export}}}'}",
            ):
                for line in count:
                    b.emit(line)
            with b.block("builtin.module {"):
                for line in self._globals:
                    b.emit(line)
                with b.block(f"func.func @{name}() attributes {{{function}}} {{"):
                    b.lines += [line.replace("#kernel_", f"#{name}_") for line in self.lines]
                    b.emit("return")

    def layout(self) -> str:
        """The attribute #hal.pipeline.layout of all bindings and constants."""
        bindings = ", ".join(
            f"#hal.pipeline.binding<storage_buffer{flags}>" for flags in self._bindings
        )
        return f"#hal.pipeline.layout<constants = {self.num_constants}, bindings = [{bindings}]>"

    def binding(self, *, read_only: bool = False) -> int:
        """The number of the dispatch's next buffer, an argument or a result."""
        self._bindings.append(", ReadOnly" if read_only else "")
        return len(self._bindings) - 1

    def view(self, binding: int, dtype: str) -> Memory:
        """A binding as memory of `dtype`."""
        size = self.scalar(1 << 48, "index")
        zero = self.scalar(0, "index")
        return Memory(
            self,
            self.op(
                f"hal.interface.binding.subspan layout(#kernel_layout) binding({binding}) "
                f"alignment(64) offset({zero.name}) : memref<?x{dtype}>{{{size.name}}}",
                "",
            ).name,
            dtype,
        )

    def constant(self) -> Scalar:
        """The dispatch's next i32 argument, as an index."""
        self.num_constants += 1
        value = self.op(
            f"hal.interface.constant.load layout(#kernel_layout) ordinal("
            f"{self.num_constants - 1}) : i32",
            "i32",
        )
        return value.to("index")

    def workgroup(self, axis: int = 0) -> Scalar:
        """The number of the workgroup that runs, in one of three dimensions."""
        return self.op(f"hal.interface.workgroup.id[{axis}] : index", "index")

    # Addresses

    def at(self, index: Index) -> str:
        """The SSA name of an index."""
        return self.as_index(index).name

    def as_index(self, index: Index) -> Scalar:
        """An index as a value."""
        return index if isinstance(index, Scalar) else self.scalar(index, "index")

    # Control flow

    @contextmanager
    def loop(self, low: Index, high: Index, step: Index = 1) -> Iterator[Scalar]:
        """A for loop from `low` to `high`, exclusive; yields the loop variable, an index."""
        variable = self.fresh()
        with self.block(
            f"scf.for {variable} = {self.at(low)} to {self.at(high)} step {self.at(step)} {{"
        ):
            yield Scalar(self, variable, "index")

    def fold(
        self,
        low: Index,
        high: Index,
        state: Sequence[Scalar],
        body: Callable[..., Sequence[Scalar]],
        step: Index = 1,
    ) -> list[Scalar]:
        """A for loop that carries values: `body(index, *state)` returns the next state.

        The index has the type of the bounds. Returns the state after the last iteration.
        """
        name, variable = self.fresh(), self.fresh()
        inner = [Scalar(self, self.fresh(), s.dtype) for s in state]
        types = ", ".join(s.dtype for s in state)
        carried = ", ".join(f"{i.name} = {s.name}" for i, s in zip(inner, state, strict=True))
        kind = next((x.dtype for x in (low, high) if isinstance(x, Scalar)), "index")

        def at(x: Index) -> str:
            return (x if isinstance(x, Scalar) else self.scalar(x, kind)).name

        with self.block(
            f"{name}:{len(inner)} = scf.for {variable} = {at(low)} to {at(high)} step "
            f"{at(step)} iter_args({carried}) -> ({types}) "
            f"{'' if kind == 'index' else f': {kind} '}{{"
        ):
            result = body(Scalar(self, variable, kind), *inner)
            self.emit(f"scf.yield {', '.join(r.name for r in result)} : {types}")
        return [Scalar(self, f"{name}#{i}", s.dtype) for i, s in enumerate(state)]

    @contextmanager
    def when(self, condition: Scalar) -> Iterator[None]:
        """An if without else; `condition` is an i1."""
        with self.block(f"scf.if {condition.name} {{"):
            yield

    def choose(
        self, condition: Scalar, yes: Callable[[], Sequence[Scalar]],
        no: Callable[[], Sequence[Scalar]], dtypes: Sequence[str],
    ) -> list[Scalar]:  # fmt: skip
        """What `yes()` gives where an i1 is true, else what `no()` gives; both of these types."""
        name, types = self.fresh(), ", ".join(dtypes)
        with self.block(f"{name}:{len(dtypes)} = scf.if {condition.name} -> ({types}) {{", ""):
            self.emit(f"scf.yield {', '.join(value.name for value in yes())} : {types}")
        with self.block("} else {"):
            self.emit(f"scf.yield {', '.join(value.name for value in no())} : {types}")
        return [Scalar(self, f"{name}#{i}", dtype) for i, dtype in enumerate(dtypes)]


class Views:
    """One binding, seen as memory of several element types: `views[dtype]`."""

    def __init__(self, k: ExecutableBuilder, binding: int) -> None:
        self._k, self._binding = k, binding
        self._views: dict[str, Memory] = {}

    def __getitem__(self, dtype: str) -> Memory:
        return self._views[dtype]

    def open(self, *dtypes: str) -> Views:
        """Declare views of these types; call it at the kernel's top level, before all uses."""
        self._views |= {dtype: self._k.view(self._binding, dtype) for dtype in dtypes}
        return self


def dispatch(
    b: Builder, name: str, workload: Sequence[Scalar], constants: Sequence[Dim],
    inputs: Sequence[Tensor], changed: Sequence[Tensor], outputs: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Call the executable `name`; returns the tensors `changed` in place, then the outputs.

    constants: sizes, which the kernel gets as i32. outputs: types only, their names do not matter.
    """
    numbers = [b.index(d).to("i32") for d in constants]
    arguments = [*inputs, *changed]
    operands = ", ".join([*(x.name for x in numbers), *(x.name for x in arguments)])
    types = ", ".join(["i32"] * len(numbers) + [_sized(x) for x in arguments])
    results = ", ".join([*(_in_place(x) for x in changed), *(_sized(t) for t in outputs)])
    sizes = ", ".join(size.name for size in workload)
    result = b.fresh()
    b.emit(
        f"{result}:{len(changed) + len(outputs)} = flow.dispatch @{name}::@{name}"
        f"{sizes and f'[{sizes}]'}({operands}) : ({types}) -> ({results})"
    )
    return [Tensor(f"{result}#{i}", t.shape, t.dtype) for i, t in enumerate([*changed, *outputs])]


def _sized(x: Tensor) -> str:
    """A tensor's type with the sizes of its dynamic dimensions."""
    dynamic = ", ".join(d for d in x.shape if isinstance(d, str))
    return tensor_type(x.shape, x.dtype) + (f"{{{dynamic}}}" if dynamic else "")


def _in_place(x: Tensor) -> str:
    """A dispatch's result that is its argument `x`, changed in place."""
    dynamic = ", ".join(d for d in x.shape if isinstance(d, str))
    return x.name + (f"{{{dynamic}}}" if dynamic else "")
