"""Compiles a model for a GPU and reads which kernels IREE made of it; no GPU is needed.

IREE can leave the text of its phases and of its code behind. From these we learn which kernels a
function dispatches with which tensors, how many workgroups each has, and the chip's instructions.
"""

from __future__ import annotations

import math
import re
import resource
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from compile.formats.layout import ITEM_BYTES
from compile.gpu.emitter import LlamaEmitter
from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import decoder_tensors
from compile.options import BuildOptions, ModelOptions
from compile.target import Target, resolve_target
from compile.toolchain import iree_compile
from compile.tools.gpu_cards import MATRIX
from compile.tools.gpu_code import Code, parse
from compile.tools.gpu_dispatch import Dispatch, PagedCall, is_paged
from compile.tools.q4_k_m import q4_k_m_dtypes

SIZES = ITEM_BYTES | {"i64": 8, "i32": 4, "i8": 1}
# A kernel that picks elements, by what is in its text: it reads at most so many times what it
# writes
PICKING = {"tensor.extract ": 4, "func.func @embedding_": 1}

_PRODUCT = re.compile("_(matmul|matvec)_like_|(row|matrix)_b?f16_")  # by IREE, and ours, of floats
_TENSOR = re.compile(r"tensor<((?:[?\d]+x)*)(\w+)>(?:\{(.*)\})?")
_ITEM = re.compile(r"tensor<[^>]*>(?:\{[^}]*\})?|%[\w#]+(?:\{[^}]*\})?|\w+")  # of a list of types
_DISPATCH = re.compile(
    r"= flow\.dispatch @[\w$]+::@([\w$]+)(?:\[(.*?)\])?\((.*?)\) : \((.*?)\) -> (.*)"
)
_SUBMITTED = re.compile(
    r"stream\.cmd\.dispatch @[\w$]+::@([\w$]+)(?:\[.*?\])?(?:\((.*?) : .*?\))? \{\n(.*?)\n\s*\}",
    re.S,
)
_OPERATION = re.compile(
    r"(%\w+) = (?:arith\.constant (-?\d+) :|(hal\.buffer_view\.dim)<"
    r"|(?:arith|util)\.(\w+) (%\w+), (%\w+)"
    r"|(?:util\.(?:assume\.int|optimization_barrier)|arith\.(?:index_castui|trunci|extui))"
    r" (%\w+)\b)"
)
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": int.__add__, "subi": int.__sub__, "muli": int.__mul__, "divui": int.__floordiv__,
    "divsi": int.__floordiv__, "remui": int.__mod__, "remsi": int.__mod__,
    "minui": min, "minsi": min, "shrui": int.__rshift__, "shli": int.__lshift__, "ori": int.__or__,
    "align": lambda a, b: -(-a // b) * b,
}  # fmt: skip

Values = dict[str, int]


@dataclass
class Arguments:
    """What a kernel is called with, as far as it is known: numbers behind addresses of tensors."""

    end: int  # bytes
    values: dict[int, int] = field(default_factory=dict)  # byte offset -> 32 bits

    def append(self, value: int | None) -> None:
        """Another 32 bits."""
        if value is not None:
            self.values[self.end] = value & 0xFFFFFFFF
        self.end += 4

    def with_grid(self, counts: Sequence[int], size: Sequence[int]) -> dict[int, int]:
        """All of them, with those that the compiler adds: workgroups (32 bits each of x, y, z) and
        their threads (16 bits each)."""
        start = -(-self.end // 8) * 8
        numbers = [*counts, size[0] | size[1] << 16, size[2]]
        return self.values | {start + 4 * k: number for k, number in enumerate(numbers)}


@dataclass(frozen=True)
class Kernel:
    """A kernel, as it is compiled."""

    size: tuple[int, int, int]  # threads of a workgroup
    workgroups: str  # a Python expression of their numbers (x, y, z), over the workload `w`
    picking: int | None  # of PICKING, or None if it reads its operands whole
    code: Code

    @property
    def threads(self) -> int:
        """Of a workgroup."""
        return math.prod(self.size)

    @property
    def instructions(self) -> Counter[str]:
        """Matrix instructions in its code."""
        names = (instruction.name for instruction in self.code.instructions)
        return Counter(name.removeprefix("v_") for name in names if name.startswith(MATRIX))

    @property
    def spilled(self) -> int:
        """Bytes a thread that do not fit its registers."""
        return self.code.resources["private_segment_fixed_size"]


@dataclass(frozen=True)
class Report:
    """A compiled shape."""

    config: LlamaConfig
    vision: VisionConfig | None
    options: ModelOptions
    seconds: float  # of CPU time that compiling took
    vmfb_bytes: int
    weight_bytes: int
    kernels: dict[str, Kernel]
    flow: str  # IREE's text of all functions
    stream: str  # the same later, where kernels have got their arguments

    def dispatches(self, function: str, rows: int, length: int, context: int) -> list[Dispatch]:
        """What a function dispatches for `rows` rows of `length` tokens that see `context` each."""
        pages = -(-context // self.options.page_size)
        sizes = [length] * (function.startswith("prefill") + ("_embeds" in function))
        c = self.config
        attention = 4 * rows * length * c.num_heads * c.head_dim * context
        found = self._dispatches(function, [*sizes, pages, rows * pages + 1], attention)
        call = PagedCall(c, self.options.kv_dtype, rows, length, context)
        return [call.told(d) if is_paged(d.name) else d for d in found]

    def tile_dispatches(self, num_tiles: int) -> list[Dispatch]:
        """What the function dispatches that encodes `num_tiles` tiles of images."""
        assert self.vision
        attention = 4 * num_tiles * self.vision.num_positions**2 * self.vision.hidden_size
        return self._dispatches(f"encode_image_bs{num_tiles}", [], attention)

    def _dispatches(self, function: str, sizes: Sequence[int], attention: int) -> list[Dispatch]:
        """sizes: of the function's arguments. attention: the operations of attention."""
        start = f"util.func public @{function}$async("
        body = _between(self.flow, start, "util.return")
        values = _values(body, sizes)
        given = _constants(_between(self.stream, start, "util.return"), sizes)
        found = [self._dispatch(match, values, given) for match in _DISPATCH.finditer(body)]
        return [replace(d, operations=attention) if "_attention_" in d.name else d for d in found]

    def _dispatch(
        self, match: re.Match[str], values: Values, given: dict[str, list[Arguments]]
    ) -> Dispatch:
        """Without the operations of attention. given: the arguments of each kernel's calls."""
        name, workload, arguments, types, results = match.groups()
        kernel = self.kernels[name]
        operands = dict(zip(arguments.split(", "), _ITEM.findall(types), strict=True))
        outputs = _ITEM.findall(results)
        updated = {output.split("{")[0] for output in outputs}  # in place, if an operand
        read = [_num_bytes(t, values) for a, t in operands.items() if a not in updated]
        written = sum(_num_bytes(output, values) for output in outputs)
        if is_paged(name):  # of which `dispatches` tells
            read = []
        elif updated & set(operands):
            written += sum(read)
        if kernel.picking:
            read = [min(size, kernel.picking * written) for size in read]
        operations = weights = 0
        if _PRODUCT.search(name):
            left, *rest = (_shape(t, values) for t in operands.values() if t.startswith("tensor"))
            right = next(shape for shape in rest if len(shape) > 1)  # and no norm's weight
            operations, weights = 2 * math.prod(left) * right[0], math.prod(right)
        sizes = [values[size] for size in workload.split(", ")] if workload else []
        counts = _counts(kernel.workgroups, sizes)
        return Dispatch(
            name, math.prod(counts), sum(read) + written, operations, weights,
            given[name].pop(0).with_grid(counts, kernel.size),
        )  # fmt: skip


def compile_shape(
    config: LlamaConfig, build: BuildOptions, vision: VisionConfig | None = None,
    *, is_q4_k_m: bool = False,
) -> Report:  # fmt: skip
    """Compile all functions that `sf-compile` makes for a GPU; raises CompileError.

    is_q4_k_m: weights are of the types of such a GGUF file, instead of the options'.
    """
    target = resolve_target(build.target)
    weights = "q4_k" if is_q4_k_m else build.weight_dtype or target.weight_dtype
    table = decoder_tensors(config)
    names = [name for tensor in (table.embedding, *table.head) for name in tensor.sources]
    options = ModelOptions(
        weights, build.kv_dtype or weights, build.page_size, build.prefill_batch_sizes,
        build.decode_batch_sizes, build.max_seq_len or config.max_seq_len,
        (build.image_batch_sizes or target.image_batch_sizes) if vision else (),
        tensor_dtypes=(
            q4_k_m_dtypes(config) if is_q4_k_m
            else dict.fromkeys(names, "int8") if weights == "int4" else {}
        ),
    )  # fmt: skip
    return compile_emitter(LlamaEmitter(config, options, target, vision), target, vision)


def compile_emitter(
    emitter: LlamaEmitter, target: Target, vision: VisionConfig | None = None
) -> Report:
    """Compile a model, without its weights; raises CompileError."""
    with tempfile.TemporaryDirectory(prefix="sf-kernels-") as name:
        folder = Path(name)
        (folder / "model.mlir").write_text(emitter.emit())
        started_at = _cpu_seconds()
        iree_compile(
            folder / "model.mlir", folder / "model.vmfb", target,
            f"--dump-compilation-phases-to={folder}",
            f"--iree-hal-dump-executable-intermediates-to={folder}",
        )  # fmt: skip
        seconds = _cpu_seconds() - started_at
        flow, assembly = _text(folder, "*.flow.mlir"), _text(folder, "*.rocmasm")
        return Report(
            emitter.config, vision, emitter.options, seconds,
            (folder / "model.vmfb").stat().st_size,
            sum(parameter.num_bytes for parameter in emitter.parameters.values()),
            _kernels(flow, _text(folder, "*.executable-targets.mlir"), assembly), flow,
            _text(folder, "*.stream.mlir"),
        )  # fmt: skip


def _cpu_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _text(folder: Path, pattern: str) -> str:
    [path] = folder.glob(pattern)
    return path.read_text()


def _between(text: str, start: str, end: str) -> str:
    after = text[text.index(start) :]
    return after[: after.index(end)]


def _kernels(flow: str, targets: str, assembly: str) -> dict[str, Kernel]:
    maps = dict(re.findall(r"^(#map\d*) = affine_map<\(\)\[.*?\] -> \((.*)\)>$", targets, re.M))
    exports = re.findall(
        r"hal\.executable\.export public @([\w$]+) .*? count\((.*?)\) -> .*?\{\n(.*?)hal\.return"
        r" (.*?) : .*?workgroup_size = \[(.*?)\]",
        targets, re.S,
    )  # fmt: skip
    codes = parse(assembly)
    kernels = {}
    for name, arguments, body, results, threads in exports:
        source = _between(flow, f"func.func @{name}(", "\n      }\n")
        x, y, z = map(int, re.findall(r"\d+", threads.replace(": index", "")))
        kernels[name] = Kernel(
            (x, y, z),
            _workgroups(arguments, body, results, maps),
            next((most for text, most in PICKING.items() if text in source), None),
            codes[name],
        )
    return kernels


def _workgroups(arguments: str, body: str, results: str, maps: dict[str, str]) -> str:
    """A Python expression of the three counts, over `w`, the workload."""
    names = {a: f"w[{i}]" for i, a in enumerate(re.findall(r"(%\w+): index", arguments))}
    for name, value in re.findall(r"(%\w+) = arith\.constant (\d+)", body):
        names[name] = value
    for name, operation, affine, operands in re.findall(
        r"(%\w+) = affine\.(min|apply) (#map\d*)\(\)\[(.*?)\]", body
    ):
        text = maps[affine]
        while " ceildiv " in text:
            text = re.sub(r"(s\d+|\([^()]*\)) ceildiv (\d+)", r"(-(-\1 // \2))", text)
        text = text.replace(" floordiv ", " // ").replace(" mod ", " % ")
        values = [names[operand] for operand in operands.split(", ")]
        text = re.sub(r"\bs(\d+)\b", lambda match, v=values: v[int(match[1])], text)  # type: ignore[misc]
        names[name] = f"min({text})" if operation == "min" else f"({text})"
    return ", ".join(names[result] for result in results.split(", "))


def _counts(workgroups: str, workload: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = eval(workgroups, {"__builtins__": {}, "min": min, "w": workload})
    return x, y, z


def _constants(body: str, sizes: Sequence[int]) -> dict[str, list[Arguments]]:
    """The arguments of each call of a function's kernels, as far as they are numbers."""
    values = _values(body, sizes)
    found: dict[str, list[Arguments]] = defaultdict(list)
    for name, numbers, tensors in _SUBMITTED.findall(body):
        given = Arguments(8 * len(re.findall(r"^\s*(?:ro|wo|rw) ", tensors, re.M)))
        for number in numbers.split(", ") if numbers else []:
            given.append(values.get(number))
        found[name].append(given)
    return found


def _values(body: str, sizes: Sequence[int]) -> Values:
    """The numbers that a function computes with; `sizes` are those of its arguments, in order."""
    values: Values = {}
    given = iter(sizes)
    for name, constant, is_size, operation, a, b, assumed in _OPERATION.findall(body):
        if constant:
            values[name] = int(constant)
        elif is_size:
            values[name] = next(given)
        elif assumed:
            values[name] = values[assumed]
        elif operation in _ARITHMETIC and a in values and b in values:
            values[name] = _ARITHMETIC[operation](values[a], values[b])
    return values


def _shape(kind: str, values: Values) -> list[int]:
    match = _TENSOR.fullmatch(kind)
    assert match, kind
    dynamic = iter((match[3] or "").split(", "))
    return [values[next(dynamic)] if d == "?" else int(d) for d in match[1].split("x")[:-1]]


def _num_bytes(kind: str, values: Values) -> int:
    """Of a type; 0 for what is no tensor."""
    match = _TENSOR.fullmatch(kind)
    return math.prod(_shape(kind, values)) * SIZES[match[2]] if match else 0
