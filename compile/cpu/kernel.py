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
from compile.mlir.values import Scalar, TextBuilder, mask_type

CACHE_LINE = 16  # i32 or f32 elements
PHASE_COUNTERS = 2 * CACHE_LINE  # i32 of a phase: tasks taken, tasks done, each in its own line
SPINS = 2048  # before a workgroup sleeps: 30 to 110 us, as the CPU's pause takes 15 to 54 ns
SLEEPER = 1 << 30  # a bit of the counter of tasks done: some workgroup sleeps until it is complete
_FUTEX, _WAIT_PRIVATE, _WAKE_PRIVATE = 202, 128, 129  # Linux on x86-64
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


class KernelBuilder(VectorBuilder):
    """Writes the body of one kernel: a `binding` for each argument, then `phase` after `phase`."""

    def __init__(self, *, has_bf16: bool = False) -> None:
        super().__init__(has_bf16=has_bf16, indent=4)
        self._bindings: list[str] = []
        self._tables: dict[tuple[int, ...], str] = {}  # names by contents
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

    def constant(self) -> Scalar:
        """The dispatch's next i32 argument, as an index."""
        self.num_constants += 1
        value = self.op(
            f"hal.interface.constant.load layout(#kernel_layout) ordinal("
            f"{self.num_constants - 1}) : i32",
            "i32",
        )
        return value.to("index")

    def workgroup(self) -> Scalar:
        """The number of the workgroup that runs."""
        return self.op("hal.interface.workgroup.id[0] : index", "index")

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
                before = counters.add_atomically(1, done)
                with self.when((before - total).equals(SLEEPER - 1)):  # the last one
                    self._futex(_WAKE_PRIVATE, counters, done, self.scalar(SLEEPER, "i64"))
            self.emit(f"scf.condition({is_task.name})")
        self._wait(counters, done, total)

    def _wait(self, counters: Memory, done: Scalar, total: Scalar) -> None:
        """Spin, then sleep, until `done` counts `total` tasks.

        A thread that has a task may lose its CPU to another process for milliseconds. One that
        spins meanwhile uses up its own share of time, and then loses its CPU when the first
        goes on. Those that sleep run when it runs.
        """
        pointer, zero = self.pointer(counters, done * 4), self.scalar(0, "i32")
        result, before, spins = (Scalar(self, self.fresh(), "i32") for _ in range(3))

        def is_incomplete(value: Scalar) -> Scalar:
            return self.bits("andi", value, SLEEPER - 1).less(total)

        with self.block(
            f"{result.name} = scf.while ({before.name} = {zero.name}) : (i32) -> i32 {{", "} do {"
        ):
            value = self.op(
                f"llvm.load {pointer.name} atomic acquire {{alignment = 4 : i64}} : "
                f"!llvm.ptr -> i32",
                "i32",
            )
            self.emit(f"scf.condition({is_incomplete(value).name}) {before.name} : i32")
        self.emit(f"^bb0({spins.name}: i32):")
        with self.when(self.scalar(SPINS, "i32").less(spins)):
            value = counters.set_bits_atomically(SLEEPER, done)
            with self.when(is_incomplete(value)):
                expected = self.bits("ori", value, SLEEPER).to("i64")
                self._futex(_WAIT_PRIVATE, counters, done, expected)
        self.emit('llvm.call_intrinsic "llvm.x86.sse2.pause"() : () -> ()')
        self.emit(f"scf.yield {(spins + 1).name} : i32")
        self.emit("}")

    def _futex(self, op: int, memory: Memory, index: Scalar, value: Scalar) -> None:
        """Sleep while an i32 of memory is `value`, without a timeout; or wake up to `value`."""
        pointer = self.pointer(memory, index * 4)
        self.syscall(_FUTEX, pointer, self.scalar(op, "i64"), value, self.scalar(0, "i64"))

    def syscall(self, number: int, *arguments: Scalar) -> None:
        """A system call of Linux on x86-64, with up to four arguments, i64 or pointers."""
        operands = [self.scalar(number, "i64"), *arguments]
        registers = ("rax", "rdi", "rsi", "rdx", "r10")[: len(operands)]
        inputs = ",".join(f"{{{name}}}" for name in registers)
        self.op(
            'llvm.inline_asm has_side_effects "syscall", '
            f'"={{rax}},{inputs},~{{rcx}},~{{r11}},~{{memory}}" '
            f"{', '.join(x.name for x in operands)} : ({', '.join(x.dtype for x in operands)}) "
            "-> i64",
            "i64",
        )


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
