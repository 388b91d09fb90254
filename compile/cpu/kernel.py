"""KernelBuilder: one CPU executable written with loops, vectors and plain memory.

Where `mlir.py` writes tensors and leaves the loops to IREE, this writes the loops: what a workgroup
loads, multiplies and stores. Workgroups share the work of a phase by counting tasks off, and wait
for one another at its end, so a whole model is one dispatch. It knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from compile.mlir.builder import Builder, Scalar, element_type, mask_type

LINE = 16  # i32 of a cache line: counters of two phases never share one
ROUNDING = 1.5 * 2**23
EXP2 = (1.0, 0.69314697773, 0.24022242025, 0.05550733572, 0.00967151564, 0.0013264778)  # 2^f
Index = Scalar | int


@dataclass(frozen=True)
class Memory:
    """One-dimensional memory of elements `dtype`; the kernel computes all indices."""

    k: KernelBuilder
    name: str
    dtype: str

    @property
    def type(self) -> str:
        return f"memref<?x{self.dtype}>"

    def load(self, index: Index) -> Scalar:
        return self.k.op(f"memref.load {self.name}[{self.k.at(index)}] : {self.type}", self.dtype)

    def store(self, value: Scalar, index: Index) -> None:
        assert value.dtype == self.dtype, f"{value.dtype} into memory of {self.dtype}"
        self.k.emit(f"memref.store {value.name}, {self.name}[{self.k.at(index)}] : {self.type}")

    def load_vector(self, index: Index, lanes: int) -> Scalar:
        kind = vector_type(lanes, self.dtype)
        return self.k.op(f"vector.load {self.name}[{self.k.at(index)}] : {self.type}, {kind}", kind)

    def prefetch(self, index: Index) -> None:
        """Bring a cache line nearer that will be read soon."""
        at = self.k.at(index)
        self.k.emit(f"memref.prefetch {self.name}[{at}], read, locality<3>, data : {self.type}")

    def store_vector(self, value: Scalar, index: Index, count: Scalar | None = None) -> None:
        """Store a vector; with `count`, its first elements only."""
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
        """Store a vector of floats as this memory's type."""
        self.store_vector(self.k.convert(value, self.dtype), index)

    def add_atomically(self, value: int, index: Index) -> Scalar:
        """The old value; nothing before or after it is seen the other way round."""
        amount = self.k.scalar(value, self.dtype)
        return self.k.op(
            f"memref.atomic_rmw addi {amount.name}, {self.name}[{self.k.at(index)}] : "
            f"({self.dtype}, {self.type}) -> {self.dtype}",
            self.dtype,
        )


class KernelBuilder(Builder):
    """Writes the body of one kernel: a `binding` for each argument, then `phase` after `phase`.

    has_bf16: the CPU has instructions for such numbers (AVX512_BF16).
    """

    def __init__(self, *, has_bf16: bool = False) -> None:
        super().__init__()
        self._has_bf16 = has_bf16
        self._indent = 4
        self._bindings: list[str] = []
        self.num_constants = 0

    # Interface

    def write(self, b: Builder, name: str, num_workgroups: int) -> None:
        """The executable with this kernel; its layout is to be defined as #name_layout."""
        with b.block(f"hal.executable.source private @{name} {{"):
            with b.block(
                f"hal.executable.export public @{name} ordinal(0) layout(#{name}_layout) "
                "count(%device: !hal.device) -> (index, index, index) {"
            ):
                b.emit(f"%count = arith.constant {num_workgroups} : index")
                b.emit("%one = arith.constant 1 : index")
                b.emit("hal.return %count, %one, %one : index, index, index")
            with (
                b.block("builtin.module {"),
                b.block(
                    f"func.func @{name}() attributes {{translation_info = "
                    "#iree_codegen.translation_info<pipeline = None>} {"
                ),
            ):
                b.lines += [line.replace("#kernel_", f"#{name}_") for line in self.lines]
                b.emit("return")

    def layout(self) -> str:
        """#hal.pipeline.layout of all that was bound."""
        bindings = ", ".join(
            f"#hal.pipeline.binding<storage_buffer{flags}>" for flags in self._bindings
        )
        return f"#hal.pipeline.layout<constants = {self.num_constants}, bindings = [{bindings}]>"

    def binding(self, *, read_only: bool = False) -> int:
        """The next argument, or result, of the dispatch."""
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
        """The next i32 argument, as an index."""
        self.num_constants += 1
        value = self.op(
            f"hal.interface.constant.load layout(#kernel_layout) ordinal("
            f"{self.num_constants - 1}) : i32",
            "i32",
        )
        return value.to("index")

    def workgroup(self) -> Scalar:
        return self.op("hal.interface.workgroup.id[0] : index", "index")

    # Values

    def at(self, index: Index) -> str:
        return index.name if isinstance(index, Scalar) else self.scalar(index, "index").name

    def broadcast(self, value: Scalar, lanes: int) -> Scalar:
        kind = vector_type(lanes, value.dtype)
        return self.op(f"vector.broadcast {value.name} : {value.dtype} to {kind}", kind)

    def bitcast(self, value: Scalar, kind: str) -> Scalar:
        op = "vector.bitcast" if kind.startswith("vector") else "arith.bitcast"
        return self.op(f"{op} {value.name} : {value.dtype} to {kind}", kind)

    def bits(self, op: str, a: Scalar, b: Scalar | int) -> Scalar:
        """andi, shli, shrsi or shrui."""
        b = b if isinstance(b, Scalar) else self.scalar(b, a.dtype)
        return self.op(f"arith.{op} {a.name}, {b.name} : {a.dtype}", a.dtype)

    def intrinsic(self, name: str, arguments: Sequence[Scalar], kind: str) -> Scalar:
        names = ", ".join(a.name for a in arguments)
        types = ", ".join(a.dtype for a in arguments)
        return self.op(f'llvm.call_intrinsic "llvm.{name}"({names}) : ({types}) -> {kind}', kind)

    def fma(self, a: Scalar, b: Scalar, c: Scalar) -> Scalar:
        """a * b + c"""
        return self.op(f"math.fma {a.name}, {b.name}, {c.name} : {c.dtype}", c.dtype)

    def exp(self, x: Scalar) -> Scalar:
        """exp of an f32 vector, to 2 units in the last place; below -87 it is about 1e-38, above 88
        about 1e38.

        2^n * 2^f with f from -1/2 to 1/2, of which a polynomial is enough (after Cephes). That is a
        third of the operations of math.exp.
        """
        kind, whole = x.dtype, vector_type(lanes_of(x), "i32")
        low, high = (self.scalar(value, kind) for value in (-87.0, 88.0))
        x = self.larger(low, self.smaller(high, x)) * math.log2(math.e)
        # Adding this rounds, and leaves the whole number in the lowest bits.
        shifted = x + ROUNDING
        fraction = x - (shifted - ROUNDING)
        power = self.scalar(EXP2[-1], kind)
        for coefficient in EXP2[-2::-1]:
            power = self.fma(power, fraction, self.scalar(coefficient, kind))
        exponent = self.bits("shli", self.bitcast(shifted, whole), self.scalar(23, whole))
        return self.bitcast(self.bitcast(power, whole) + exponent, kind)

    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        """Of each pair of elements; b's where one is not a number, which takes one instruction."""
        return b.is_below(a).select(a, b)

    def smaller(self, a: Scalar, b: Scalar) -> Scalar:
        """As `larger`."""
        return a.is_below(b).select(a, b)

    def convert(self, x: Scalar, dtype: str) -> Scalar:
        """A vector with elements of another float type."""
        kind = vector_type(lanes_of(x), dtype)
        if self._has_bf16 and (x.dtype, dtype) == (vector_type(16, "f32"), "bf16"):
            return self.intrinsic("x86.avx512bf16.cvtneps2bf16.512", [x], kind)
        return x.to(kind)

    def sum(self, value: Scalar) -> Scalar:
        return self._reduction("add", value)

    def maximum(self, value: Scalar) -> Scalar:
        return self._reduction("maximumf", value)

    def _reduction(self, kind: str, value: Scalar) -> Scalar:
        return self.op(f"vector.reduction <{kind}>, {value.name} : {value.dtype} into f32", "f32")

    def element(self, value: Scalar, lane: int) -> Scalar:
        kind = element_type(value.dtype)
        return self.op(f"vector.extract {value.name}[{lane}] : {kind} from {value.dtype}", kind)

    def shuffle(self, a: Scalar, b: Scalar, lanes: Sequence[int]) -> Scalar:
        """Elements of two vectors, counted through both."""
        kind = vector_type(len(lanes), element_type(a.dtype))
        return self.op(f"vector.shuffle {a.name}, {b.name} {[*lanes]} : {a.dtype}, {b.dtype}", kind)

    def transpose(self, rows: Sequence[Scalar]) -> list[Scalar]:
        """n vectors of n elements as the columns of them, n a power of two.

        Blocks beside the diagonal change places, the largest first (Eklundh 1972).
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

    def pointer(self, memory: Memory, byte: Scalar) -> Scalar:
        """To a byte of memory."""
        base = self.op(
            f"memref.extract_aligned_pointer_as_index {memory.name} : {memory.type} -> index",
            "index",
        )
        address = (base + byte).to("i64")
        return self.op(f"llvm.inttoptr {address.name} : i64 to !llvm.ptr", "!llvm.ptr")

    # Control flow

    @contextmanager
    def loop(self, low: Index, high: Index, step: int = 1) -> Iterator[Scalar]:
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
        """The state after `body(index, *state)` for each index."""
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
        with self.block(f"scf.if {condition.name} {{"):
            yield

    @contextmanager
    def phase(self, counters: Memory, number: Scalar, num_tasks: Scalar) -> Iterator[Scalar]:
        """Do tasks 0 .. num_tasks - 1, each by one workgroup, and wait until all are done.

        A workgroup waits only for tasks that others have begun, so it does not matter how many run
        at once. Counters [phases, 2 lines] start at zero: tasks taken, tasks done.
        """
        taken, done = number * (2 * LINE), number * (2 * LINE) + LINE
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
    """One binding as memory of whatever type is asked for."""

    def __init__(self, k: KernelBuilder, binding: int) -> None:
        self._k, self._binding = k, binding
        self._views: dict[str, Memory] = {}

    def __getitem__(self, dtype: str) -> Memory:
        return self._views[dtype]

    def open(self, *dtypes: str) -> Views:
        """To be called where all uses can see them: at the beginning of the kernel."""
        self._views |= {dtype: self._k.view(self._binding, dtype) for dtype in dtypes}
        return self


def vector_type(lanes: int, dtype: str) -> str:
    return f"vector<{lanes}x{dtype}>"


def lanes_of(value: Scalar) -> int:
    return int(value.dtype.removeprefix("vector<").partition("x")[0])
