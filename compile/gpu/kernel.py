"""Kernels of our own for GPUs: what a thread does, and the kernels of a module.

IREE makes kernels of tensor operations, too. Our own are for what it does not find: weights that
are unpacked in registers, products of few rows, attention over pages. A kernel is written twice:
as each thread of a workgroup computes it, and in plain loops, which tests compile for a CPU to
compare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.executable import ExecutableBuilder, Memory, dispatch
from compile.mlir.values import Scalar
from compile.target import Target

THREADS = 256  # of a workgroup, where a kernel does not say otherwise
WORKGROUP_MEMORY = "#gpu.address_space<workgroup>"
NO_PIPELINE = "#iree_codegen.translation_info<pipeline = None{}>"


class ThreadBuilder(ExecutableBuilder):
    """Writes what one of a workgroup's threads does.

    chip: its name. subgroup: threads that run in step, 32 or 64.
    """

    def __init__(self, chip: str, subgroup: int) -> None:
        super().__init__()
        self.chip, self.subgroup = chip, subgroup

    def thread(self) -> Scalar:
        """The number of the thread in its workgroup."""
        return self.op("gpu.thread_id x", "index")

    def barrier(self) -> None:
        """Wait until all threads of the workgroup are here, and see what they stored."""
        self.emit("gpu.barrier")

    def schedule_barrier(self) -> None:
        """Instructions are not moved across this."""
        self.emit("amdgpu.sched_barrier allow = <none>")

    def shared(self, size: int, dtype: str) -> Memory:
        """Local memory of the workgroup, for `size` elements."""
        fixed = f"memref<{size}x{dtype}, {WORKGROUP_MEMORY}>"
        memory = self.op(f"memref.alloc() : {fixed}", "")
        kind = f"memref<?x{dtype}, {WORKGROUP_MEMORY}>"
        cast = self.op(f"memref.cast {memory.name} : {fixed} to {kind}", "")
        return Memory(self, cast.name, dtype, WORKGROUP_MEMORY)

    def in_register(self, value: int) -> Scalar:
        """An i32 constant, on gfx9 in a vector register: of the three operands of an instruction,
        one at most may come from elsewhere there, so that two constants would take two of them."""
        constant = super().in_register(value)
        if not self.chip.startswith("gfx9"):
            return constant
        code = '"v_mov_b32 $0, $1", "=v,s"'
        return self.op(f"llvm.inline_asm {code} {constant.name} : (i32) -> i32", "i32")

    def shuffle_xor(self, value: Scalar, distance: int) -> Scalar:
        """The value (32 bits) of the lane whose number differs by a power of two."""
        offset, width = (self.scalar(number, "i32") for number in (distance, self.subgroup))
        found = f"{self.fresh()}"
        self.emit(
            f"{found}:2 = gpu.shuffle xor {value.name}, {offset.name}, {width.name} : {value.dtype}"
        )
        return Scalar(self, f"{found}#0", value.dtype)

    def reduce(self, kind: str, value: Scalar, threads: int | None = None) -> Scalar:
        """The sum ("add") or maximum ("maxnumf") of the values of `threads` neighbours, which all
        of them get; of all of a subgroup by default."""
        cluster = "" if threads is None else f"cluster(size = {threads})"
        return self.op(
            f"gpu.subgroup_reduce {kind} {value.name} {cluster} : ({value.dtype}) -> {value.dtype}",
            value.dtype,
        )


def dot2(k: ExecutableBuilder, a: Scalar, b: Scalar, total: Scalar) -> Scalar:
    """total + a * b in f32, of vectors of two f16 numbers: one instruction."""
    return k.intrinsic("amdgcn.fdot2", [a, b, total, k.scalar(0, "i1")], "f32")


@dataclass(frozen=True)
class Kernel(ABC):
    """A kernel: equal ones, which have equal fields, are written once a module."""

    @property
    @abstractmethod
    def name(self) -> str:
        """One that no other kernel of the module has."""

    @property
    def threads(self) -> int:
        """Of a workgroup: a multiple of the subgroup's."""
        return THREADS

    @property
    @abstractmethod
    def result(self) -> tuple[str, str]:
        """The dtype of what it writes ("i8" for several), and the least precise dtype that it
        computes in, which tells tests how far it may be from the plain form; "" if it is exact."""

    @abstractmethod
    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""

    @abstractmethod
    def write_plain(self, k: ExecutableBuilder) -> None:
        """The same in loops, for all workgroups together."""


class Kernels:
    """The kernels that a module calls.

    target: the chip. plain: write plain forms, as for a CPU.
    """

    def __init__(self, b: Builder, target: Target, *, plain: bool = False) -> None:
        self.b, self.target, self._is_plain = b, target, plain
        self._called: dict[str, Kernel] = {}

    def call(
        self, kernel: Kernel, workgroups: Sequence[Dim], constants: Sequence[Dim],
        inputs: Sequence[Tensor], changed: Sequence[Tensor] = (), outputs: Sequence[Tensor] = (),
    ) -> list[Tensor]:  # fmt: skip
        """Run a kernel; returns the tensors `changed` in place, then the outputs.

        workgroups: how many in each of three dimensions. The kernel's bindings are the inputs, the
        changed, and the outputs, whose names do not matter.
        """
        assert self._called.setdefault(kernel.name, kernel) == kernel
        workload = [self.b.index(size) for size in workgroups]
        return dispatch(self.b, kernel.name, workload, constants, inputs, changed, outputs)

    def tiles(self, size: Dim, tile: int) -> Dim:
        """How many tiles cover a size."""
        if isinstance(size, int):
            return -(-size // tile)
        return ((self.b.index(size) + (tile - 1)) // tile).name

    def write(self) -> str:
        """Write all kernels that were called into the module; returns the layouts that it needs."""
        return "".join(self._write(kernel) for kernel in self._called.values())

    def _write(self, kernel: Kernel) -> str:
        subgroup = None if self._is_plain else self.target.subgroup
        if subgroup is None:
            k, count = ExecutableBuilder(), ["%one = arith.constant 1 : index"]
            count.append("hal.return %one, %one, %one : index, index, index")
            kernel.write_plain(k)
            size = export = ""
        else:
            k = threads = ThreadBuilder(self.target.name, subgroup)
            count = ["hal.return %x, %y, %z : index, index, index"]
            kernel.write(threads)
            size = f" workgroup_size = [{kernel.threads}, 1, 1] subgroup_size = {subgroup}"
            export = (
                f"workgroup_size = [{kernel.threads} : index, 1 : index, 1 : index], "
                f"subgroup_size = {subgroup} : index"
            )
        dtype, precision = kernel.result
        function = (
            f'translation_info = {NO_PIPELINE.format(size)}, written = "{dtype}", '
            f'precision = "{precision}"'
        )
        k.write_executable(self.b, kernel.name, ("%x", "%y", "%z"), count, function, export)
        return f"#{kernel.name}_layout = {k.layout()}\n"
