"""KernelBuilder: one CPU executable, which is a sequence of phases.

Workgroups take the tasks of a phase from a shared counter and wait for one another at its end, so
a whole model can be one dispatch. Nothing here depends on what the kernel computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from compile.cpu.vector_builder import CpuVectorBuilder
from compile.formats.layout import ITEM_BYTES
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar, TextBuilder

CACHE_LINE = 16  # i32 or f32 elements
PHASE_COUNTERS = 2 * CACHE_LINE  # i32 of a phase: tasks taken, tasks done, each in its own line
SPIN_CYCLES = 1 << 16  # of the time stamp counter, 16 to 33 us, before a workgroup sleeps
SLEEPER = 1 << 30  # a bit of the counter of tasks done: some workgroup sleeps until it is complete
_FUTEX, _WAIT_PRIVATE, _WAKE_PRIVATE = 202, 128, 129  # Linux on x86-64


class KernelBuilder(CpuVectorBuilder):
    """Writes the body of one kernel: a `binding` for each argument, then `phase` after `phase`."""

    def __init__(self, *, has_bf16: bool = False) -> None:
        super().__init__(has_bf16=has_bf16)
        self._tables: dict[tuple[int, ...], str] = {}  # names by contents
        self._stacks: list[Stack] = []

    def write(self, b: TextBuilder, name: str, num_workgroups: int) -> None:
        """Write the executable `name` into module `b`; define its layout as #name_layout there."""
        count = (
            f"%count = arith.constant {num_workgroups} : index",
            "%one = arith.constant 1 : index",
            "hal.return %count, %one, %one : index, index, index",
        )
        body, self.lines = self.lines, []
        for stack in self._stacks:
            stack.write()
        self.lines += body
        no_pipeline = "translation_info = #iree_codegen.translation_info<pipeline = None>"
        self.write_executable(b, name, (), count, no_pipeline)

    def table(self, values: Sequence[int]) -> Memory:
        """Numbers that the kernel brings along, as memory of i64."""
        name, kind = f"table_{len(self._tables)}", f"memref<{len(values)}xi64>"
        if (known := self._tables.setdefault(tuple(values), name)) == name:
            self._globals.append(f"memref.global constant @{name} : {kind} = dense<{list(values)}>")
        table = self.op(f"memref.get_global @{known} : {kind}", "")
        memory = self.op(f"memref.cast {table.name} : {kind} to memref<?xi64>", "")
        return Memory(self, memory.name, "i64")

    def stack(self) -> Stack:
        """Memory of each workgroup's own, which is its thread's stack."""
        self._stacks.append(Stack(self))
        return self._stacks[-1]

    def pointer(self, memory: Memory, byte: Scalar) -> Scalar:
        """An LLVM pointer to a byte of memory."""
        base = self.op(
            f"memref.extract_aligned_pointer_as_index {memory.name} : {memory.type} -> index",
            "index",
        )
        address = (base + byte).to("i64")
        return self.op(f"llvm.inttoptr {address.name} : i64 to !llvm.ptr", "!llvm.ptr")

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
        pointer, start = self.pointer(counters, done * 4), self._cycles()

        def is_incomplete(value: Scalar) -> Scalar:
            return self.bits("andi", value, SLEEPER - 1).less(total)

        with self.block("scf.while : () -> () {", "} do {"):
            value = self.op(
                f"llvm.load {pointer.name} atomic acquire {{alignment = 4 : i64}} : "
                f"!llvm.ptr -> i32",
                "i32",
            )
            self.emit(f"scf.condition({is_incomplete(value).name})")
        with self.when(self.scalar(SPIN_CYCLES, "i64").less(self._cycles() - start)):
            value = counters.set_bits_atomically(SLEEPER, done)
            with self.when(is_incomplete(value)):
                expected = self.bits("ori", value, SLEEPER).to("i64")
                self._futex(_WAIT_PRIVATE, counters, done, expected)
        self.emit('llvm.call_intrinsic "llvm.x86.sse2.pause"() : () -> ()')
        self.emit("scf.yield")
        self.emit("}")

    def _cycles(self) -> Scalar:
        """The CPU's time stamp counter."""
        return self.intrinsic("x86.rdtsc", [], "i64")

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

    def write(self) -> None:
        """Write the declarations, which stand at the beginning of the kernel."""
        k, whole, zero = self._k, f"memref<{self.num_bytes}xi8>", self._k.fresh()
        k.emit(f"{self._name} = memref.alloca() {{alignment = 64 : i64}} : {whole}")
        k.emit(f"{zero} = arith.constant 0 : index")
        for memory in self._views.values():
            count = self.num_bytes // (4 if memory.dtype == "i32" else ITEM_BYTES[memory.dtype])
            kind, view = f"memref<{count}x{memory.dtype}>", k.fresh()
            k.emit(f"{view} = memref.view {self._name}[{zero}][] : {whole} to {kind}")
            k.emit(f"{memory.name} = memref.cast {view} : {kind} to {memory.type}")
