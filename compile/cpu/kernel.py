"""KernelBuilder: one CPU executable, which is a sequence of phases.

Workgroups take the tasks of a phase from a shared counter and wait for one another at its end, so
a whole model can be one dispatch. Nothing here depends on what the kernel computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from compile.cpu.vector_builder import CpuVectorBuilder
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar, TextBuilder

CACHE_LINE = 16  # i32 or f32 elements
PHASE_COUNTERS = 2 * CACHE_LINE  # i32 of a phase: tasks taken, tasks done, each in its own line


class KernelBuilder(CpuVectorBuilder):
    """Writes the body of one kernel: a `binding` for each argument, then `phase` after `phase`."""

    def __init__(self, *, has_bf16: bool = False) -> None:
        super().__init__(has_bf16=has_bf16)
        self._tables: dict[tuple[int, ...], str] = {}  # names by contents

    def write(self, b: TextBuilder, name: str, num_workgroups: int) -> None:
        """Write the executable `name` into module `b`; define its layout as #name_layout there."""
        count = (
            f"%count = arith.constant {num_workgroups} : index",
            "%one = arith.constant 1 : index",
            "hal.return %count, %one, %one : index, index, index",
        )
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
