"""KernelBuilder: one CPU executable, written with loops, vectors and plain memory.

`compile.mlir` writes tensor operations and leaves the loops to IREE. This module writes the loops
themselves: what a workgroup loads, multiplies and stores. A kernel is a sequence of phases.
Workgroups take the tasks of a phase from a shared counter and wait for one another at its end, so
a whole model can be one dispatch. Nothing here depends on what the kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from compile.cpu.vector_builder import VectorBuilder, vector_type
from compile.formats.layout import ITEM_BYTES
from compile.mlir.values import Scalar, TextBuilder, mask_type

CACHE_LINE = 16  # i32 or f32 elements
PHASE_COUNTERS = 2 * CACHE_LINE  # i32 of a phase: tasks taken, tasks done, each in its own line
Index = Scalar | int


@dataclass(frozen=True)
class Memory:
    """One-dimensional memory of elements `dtype`; indices count elements."""

    k: KernelBuilder
    name: str
    dtype: str

    @property
    def type(self) -> str:
        """The MLIR type."""
        return f"memref<?x{self.dtype}>"

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

    def prefetch(self, index: Index) -> None:
        """Ask for the cache line of an element that will be read soon."""
        at = self.k.at(index)
        self.k.emit(f"memref.prefetch {self.name}[{at}], read, locality<3>, data : {self.type}")

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
        amount = self.k.scalar(value, self.dtype)
        return self.k.op(
            f"memref.atomic_rmw addi {amount.name}, {self.name}[{self.k.at(index)}] : "
            f"({self.dtype}, {self.type}) -> {self.dtype}",
            self.dtype,
        )


class KernelBuilder(VectorBuilder):
    """Writes the body of one kernel: a `binding` for each argument, then `phase` after `phase`."""

    def __init__(self, *, has_bf16: bool = False) -> None:
        super().__init__(has_bf16=has_bf16, indent=4)
        self._bindings: list[str] = []
        self._tables: dict[tuple[int, ...], str] = {}  # names by contents
        self._stacks: list[Stack] = []
        self.num_constants = 0

    # Interface

    def write(self, b: TextBuilder, name: str, num_workgroups: int) -> None:
        """Write the executable `name` into module `b`; define its layout as #name_layout there."""
        with b.block(f"hal.executable.source private @{name} {{"):
            with b.block(
                f"hal.executable.export public @{name} ordinal(0) layout(#{name}_layout) "
                "count(%device: !hal.device) -> (index, index, index) {"
            ):
                b.emit(f"%count = arith.constant {num_workgroups} : index")
                b.emit("%one = arith.constant 1 : index")
                b.emit("hal.return %count, %one, %one : index, index, index")
            with b.block("builtin.module {"):
                for values, table in self._tables.items():
                    b.emit(
                        f"memref.global constant @{table} : memref<{len(values)}xi64> = "
                        f"dense<{list(values)}>"
                    )
                with b.block(
                    f"func.func @{name}() attributes {{translation_info = "
                    "#iree_codegen.translation_info<pipeline = None>} {"
                ):
                    for stack in self._stacks:
                        stack.write(b)
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

    def table(self, values: Sequence[int]) -> Memory:
        """Numbers that the kernel brings along, as memory of i64."""
        name = self._tables.setdefault(tuple(values), f"table_{len(self._tables)}")
        kind = f"memref<{len(values)}xi64>"
        table = self.op(f"memref.get_global @{name} : {kind}", "")
        memory = self.op(f"memref.cast {table.name} : {kind} to memref<?xi64>", "")
        return Memory(self, memory.name, "i64")

    def stack(self) -> Stack:
        """Memory of each workgroup's own, which is its thread's stack."""
        self._stacks.append(Stack(self))
        return self._stacks[-1]

    def constant(self) -> Scalar:
        """The dispatch's next i32 argument, as an index."""
        self.num_constants += 1
        value = self.op(
            f"hal.interface.constant.load layout(#kernel_layout) ordinal("
            f"{self.num_constants - 1}) : i32",
            "i32",
        )
        return value.to("index")

    # Addresses

    def at(self, index: Index) -> str:
        """The SSA name of an index."""
        return self.as_index(index).name

    def as_index(self, index: Index) -> Scalar:
        """An index as a value."""
        return index if isinstance(index, Scalar) else self.scalar(index, "index")

    def pointer(self, memory: Memory, byte: Scalar) -> Scalar:
        """An LLVM pointer to a byte of memory."""
        base = self.op(
            f"memref.extract_aligned_pointer_as_index {memory.name} : {memory.type} -> index",
            "index",
        )
        address = (base + byte).to("i64")
        return self.op(f"llvm.inttoptr {address.name} : i64 to !llvm.ptr", "!llvm.ptr")

    # Control flow

    @contextmanager
    def loop(self, low: Index, high: Index, step: int = 1) -> Iterator[Scalar]:
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
        step: int = 1,
    ) -> list[Scalar]:
        """A for loop that carries values: `body(index, *state)` returns the next state.

        Returns the state after the last iteration.
        """
        name, variable = self.fresh(), self.fresh()
        inner = [Scalar(self, self.fresh(), s.dtype) for s in state]
        types = ", ".join(s.dtype for s in state)
        carried = ", ".join(f"{i.name} = {s.name}" for i, s in zip(inner, state, strict=True))
        with self.block(
            f"{name}:{len(inner)} = scf.for {variable} = {self.at(low)} to {self.at(high)} step "
            f"{self.at(step)} iter_args({carried}) -> ({types}) {{"
        ):
            result = body(Scalar(self, variable, "index"), *inner)
            self.emit(f"scf.yield {', '.join(r.name for r in result)} : {types}")
        return [Scalar(self, f"{name}#{i}", s.dtype) for i, s in enumerate(state)]

    @contextmanager
    def when(self, condition: Scalar) -> Iterator[None]:
        """An if without else; `condition` is an i1."""
        with self.block(f"scf.if {condition.name} {{"):
            yield

    @contextmanager
    def phase(self, counters: Memory, number: Scalar, num_tasks: Scalar) -> Iterator[Scalar]:
        """Do tasks 0 .. num_tasks - 1, each in one workgroup, and wait until all are done.

        A workgroup waits only for tasks that others have begun, so it does not matter how many
        workgroups run at once. counters: i32 [phases, PHASE_COUNTERS], zero when the kernel starts.
        Yields the task's number.
        """
        taken, done = number * PHASE_COUNTERS, number * PHASE_COUNTERS + CACHE_LINE
        total = num_tasks.to("i32")
        with self.block("scf.while : () -> () {", "} do { scf.yield }"):
            task = counters.add_atomically(1, taken)
            is_task = task.less(total)
            with self.when(is_task):
                yield task.to("index")
                counters.add_atomically(1, done)
            self.emit(f"scf.condition({is_task.name})")
        self._wait(counters, done, total)

    def _wait(self, counters: Memory, index: Scalar, total: Scalar) -> None:
        pointer = self.pointer(counters, index * 4)
        with self.block("scf.while : () -> () {", "} do {"):
            value = self.op(
                f"llvm.load {pointer.name} atomic acquire {{alignment = 4 : i64}} : "
                f"!llvm.ptr -> i32",
                "i32",
            )
            self.emit(f"scf.condition({value.less(total).name})")
        self.emit('  llvm.call_intrinsic "llvm.x86.sse2.pause"() : () -> ()')
        self.emit("  scf.yield")
        self.emit("}")


class Views:
    """One binding, seen as memory of several element types: `views[dtype]`."""

    def __init__(self, k: KernelBuilder, binding: int) -> None:
        self._k, self._binding = k, binding
        self._views: dict[str, Memory] = {}

    def __getitem__(self, dtype: str) -> Memory:
        return self._views[dtype]

    def open(self, *dtypes: str) -> Views:
        """Declare views of these types; call it at the kernel's top level, before all uses."""
        self._views |= {dtype: self._k.view(self._binding, dtype) for dtype in dtypes}
        return self


class Stack:
    """Memory on the stack of the thread that runs a workgroup, seen as several element types.

    num_bytes: set it before the kernel is written. A buffer of the dispatch would need room for all
    workgroups, of which no more run than there are threads, and IREE writes zeros to all of it.
    """

    def __init__(self, k: KernelBuilder) -> None:
        self._k, self._name = k, k.fresh()
        self._views: dict[str, Memory] = {}
        self.num_bytes = 0

    def __getitem__(self, dtype: str) -> Memory:
        if dtype not in self._views:
            self._views[dtype] = Memory(self._k, self._k.fresh(), dtype)
        return self._views[dtype]

    def write(self, b: TextBuilder) -> None:
        """Write the declarations, at the beginning of the kernel."""
        whole, zero = f"memref<{self.num_bytes}xi8>", self._k.fresh()
        b.emit(f"{self._name} = memref.alloca() {{alignment = 64 : i64}} : {whole}")
        b.emit(f"{zero} = arith.constant 0 : index")
        for memory in self._views.values():
            count = self.num_bytes // (4 if memory.dtype == "i32" else ITEM_BYTES[memory.dtype])
            kind = f"memref<{count}x{memory.dtype}>"
            view = self._k.fresh()
            b.emit(f"{view} = memref.view {self._name}[{zero}][] : {whole} to {kind}")
            b.emit(f"{memory.name} = memref.cast {view} : {kind} to {memory.type}")
