"""`python -m compile.tools.gpu_report SHAPE`: the kernels of a GPU, in decode, prefill, vision.

Without a GPU: compiles a model of a known shape, weights aside, and reads what IREE leaves: which
kernels a function dispatches with which tensors, how many workgroups each has, and the chip's
instructions. The roofline beside each is the time that its bytes or its operations take at least.
"""

from __future__ import annotations

import argparse
import math
import re
import resource
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compile.formats.layout import ITEM_BYTES
from compile.gpu.emitter import LlamaEmitter
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import BuildOptions, ModelOptions
from compile.target import HIP_CHIPS, resolve_target
from compile.toolchain import iree_compile

SHAPES = {
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, True),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 5e5, 131072, True),
    "llama-3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 131072, False),
    "smolvlm-256m": LlamaConfig(49280, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, False),
    "llava-1.5-7b": LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, 4096, False),
}
TOWERS = {
    "smolvlm-256m": VisionConfig("idefics3", 512, 16, 768, 3072, 12, 12, 1e-6, "gelu_tanh", 4),
    "llava-1.5-7b": VisionConfig("llava", 336, 14, 1024, 4096, 23, 16, 1e-5, "quick_gelu", 1),
}
SIZES = ITEM_BYTES | {"i64": 8, "i32": 4}
MATRIX = re.compile(r"\bv_((?:mfma|smfmac|wmma|swmmac|dot\d)\w*)")
# A kernel that picks elements reads at most so many times what it writes
PICKING = {"iree_linalg_ext.gather ": 1, "tensor.extract ": 4}

NEGLIGIBLE = 0.05  # microseconds

Values = dict[str, int]


@dataclass(frozen=True)
class Chip:
    """What a card does at most: bytes and operations a second."""

    bandwidth: float
    flops: float

    def seconds(self, num_bytes: int, operations: int) -> float:
        return max(num_bytes / self.bandwidth, operations / self.flops)


MI300X = Chip(5.3e12, 1307e12)


@dataclass(frozen=True)
class Kernel:
    """threads: of a workgroup. instructions: matrix and dot instructions, with their number.

    spilled: bytes a thread that do not fit its registers.
    """

    threads: int
    workgroups: str  # IREE's text of how their number follows from a workload
    instructions: Counter[str]
    spilled: int
    picking: int | None  # of PICKING, or None if it reads its operands whole


@dataclass(frozen=True)
class Dispatch:
    """One call of a kernel."""

    name: str
    workgroups: int
    num_bytes: int
    operations: int


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

    def dispatches(self, function: str, rows: int, length: int, context: int) -> list[Dispatch]:
        """Of a function called for rows of `length` tokens that see `context` tokens each."""
        pages = -(-context // self.options.page_size)
        sizes = [length] * (function.startswith("prefill") + ("_embeds" in function))
        attention = 4 * rows * length * self.config.num_heads * self.config.head_dim * context
        return self._dispatches(function, [*sizes, pages, rows * pages + 1], attention)

    def tile_dispatches(self, num_tiles: int) -> list[Dispatch]:
        """Of what encodes so many tiles at once."""
        assert self.vision
        attention = 4 * num_tiles * self.vision.num_positions**2 * self.vision.hidden_size
        return self._dispatches(f"encode_image_bs{num_tiles}", [], attention)

    def _dispatches(self, function: str, sizes: Sequence[int], attention: int) -> list[Dispatch]:
        """attention: its operations."""
        body = _between(self.flow, f"util.func public @{function}$async(", "util.return")
        values = _values(body, sizes)
        found = [self._dispatch(match, values) for match in _DISPATCH.finditer(body)]
        return [replace(d, operations=attention) if "_attention_" in d.name else d for d in found]

    def _dispatch(self, match: re.Match[str], values: Values) -> Dispatch:
        """Without the operations of attention."""
        name, workload, arguments, types, results = match.groups()
        kernel = self.kernels[name]
        operands = dict(zip(arguments.split(", "), _ITEM.findall(types), strict=True))
        outputs = _ITEM.findall(results)
        updated = {output.split("{")[0] for output in outputs}  # in place, if an operand
        read = [_num_bytes(t, values) for a, t in operands.items() if a not in updated]
        written = sum(_num_bytes(output, values) for output in outputs)
        if updated & set(operands):
            written += sum(read)
        if kernel.picking:
            read = [min(size, kernel.picking * written) for size in read]
        operations = 0
        if "_matmul_like_" in name or "_matvec_like_" in name:
            tensors = [t for t in operands.values() if t.startswith("tensor")]
            left, right = (_shape(t, values) for t in tensors[:2])
            operations = 2 * math.prod(left) * right[0]
        sizes = [values[size] for size in workload.split(", ")] if workload else []
        return Dispatch(name, _count(kernel.workgroups, sizes), sum(read) + written, operations)


_TENSOR = re.compile(r"tensor<((?:[?\d]+x)*)(\w+)>(?:\{(.*)\})?")
_ITEM = re.compile(r"tensor<[^>]*>(?:\{[^}]*\})?|%[\w#]+(?:\{[^}]*\})?|\w+")  # of a list of types
_DISPATCH = re.compile(
    r"= flow\.dispatch @[\w$]+::@([\w$]+)(?:\[(.*?)\])?\((.*?)\) : \((.*?)\) -> (.*)"
)
_OPERATION = re.compile(
    r"(%\w+) = (?:arith\.constant (-?\d+) :|(hal\.buffer_view\.dim)<"
    r"|arith\.(\w+) (%\w+), (%\w+)|util\.(?:assume\.int|optimization_barrier) (%\w+)\b)"
)
_ARITHMETIC = {
    "addi": int.__add__, "subi": int.__sub__, "muli": int.__mul__, "divui": int.__floordiv__,
    "divsi": int.__floordiv__, "remui": int.__mod__, "remsi": int.__mod__,
}  # fmt: skip


def compile_shape(
    config: LlamaConfig, build: BuildOptions, vision: VisionConfig | None = None
) -> Report:
    """All functions that `sf-compile` makes for a GPU."""
    target = resolve_target(build.target)
    weights = build.weight_dtype or target.weight_dtype
    options = ModelOptions(
        weights, build.kv_dtype or weights, build.page_size, build.prefill_batch_sizes,
        build.decode_batch_sizes, build.max_seq_len or config.max_seq_len,
        (build.image_batch_sizes or target.image_batch_sizes) if vision else (),
    )  # fmt: skip
    emitter = LlamaEmitter(config, options, target.tile, vision)
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
            config, vision, options, seconds, (folder / "model.vmfb").stat().st_size,
            sum(parameter.num_bytes for parameter in emitter.parameters.values()),
            _kernels(flow, _text(folder, "*.executable-targets.mlir"), assembly), flow,
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
    kernels = {}
    for name, arguments, body, results, threads in exports:
        code = _between(assembly, f"\n{name}:", "\n.Lfunc_end")
        source = _between(flow, f"func.func @{name}(", "\n      }\n")
        [spilled] = re.findall(rf"\.set {re.escape(name)}\.private_seg_size, (\d+)", assembly)
        kernels[name] = Kernel(
            math.prod(map(int, re.findall(r"\d+", threads.replace(": index", "")))),
            _workgroups(arguments, body, results, maps),
            Counter(MATRIX.findall(code)),
            int(spilled),
            next((most for text, most in PICKING.items() if text in source), None),
        )
    return kernels


def _workgroups(arguments: str, body: str, results: str, maps: dict[str, str]) -> str:
    """A Python expression over `w`, the workload: the product of the three counts."""
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
    return " * ".join(names[result] for result in results.split(", "))


def _count(workgroups: str, workload: Sequence[int]) -> int:
    return int(eval(workgroups, {"__builtins__": {}, "min": min, "w": workload}))


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


# What is printed


def table(dispatches: Sequence[Dispatch], kernels: dict[str, Kernel], chip: Chip) -> list[str]:
    """A line for each kernel that takes time, in the order of their first dispatch; and a sum."""
    lines = [f"{'':7}{'workgroups':>12}{'instructions':>28}{'MB':>9}{'us':>8}{'all':>9}"]
    rest, total = 0, 0.0
    for dispatch, count in Counter(dispatches).items():
        kernel = kernels[dispatch.name]
        microseconds = chip.seconds(dispatch.num_bytes, dispatch.operations) * 1e6
        total += count * microseconds
        if count == 1 and microseconds < NEGLIGIBLE and not kernel.spilled:
            rest += 1
            continue
        grid = f"{dispatch.workgroups} x {kernel.threads}"
        used = ", ".join(f"{number} {i}" for i, number in kernel.instructions.items())
        spilled = f", spills {kernel.spilled} bytes a thread" if kernel.spilled else ""
        lines.append(
            f"{count:4} x {grid:>12}{used:>28}{dispatch.num_bytes / 1e6:9.2f}{microseconds:8.2f}"
            f"{count * microseconds:9.1f}  {dispatch.name.split('_dispatch_')[1]}{spilled}"
        )
    lines.append(f"{rest:4} others, once each, of less than {NEGLIGIBLE} us")
    lines.append(f"{len(dispatches):4} dispatches: at least {total:.0f} us")
    return lines


def main() -> None:
    args = _parser().parse_args()
    config, vision = SHAPES[args.shape], TOWERS.get(args.shape)
    chip = Chip(args.bandwidth, args.flops)
    max_seq_len = min(args.max_seq_len, config.max_seq_len)
    build = BuildOptions(
        args.target, weight_dtype=args.weights, kv_dtype=args.kv, max_seq_len=max_seq_len
    )
    report = compile_shape(config, build, vision)
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * ITEM_BYTES[args.kv]
    print(
        f"{args.shape} in {args.weights} for {args.target}: compiled in {report.seconds:.0f} s of "
        f"one CPU, {report.vmfb_bytes / 1e6:.1f} MB of code\n"
        f"weights {report.weight_bytes / 1e9:.2f} GB; KV {token / 1024:.1f} KiB a token, "
        f"{token * max_seq_len / 1e9:.2f} GB for {max_seq_len}"
    )
    for rows in args.rows:
        print(f"\ndecode, {rows} rows that see {args.context} tokens each")
        step = report.dispatches(f"decode_next_bs{rows}", rows, 1, args.context)
        print("\n".join(table(step, report.kernels, chip)))
    print(f"\nprefill of {args.prompt} tokens")
    prefill = report.dispatches("prefill_next_bs1", 1, args.prompt, args.prompt)
    print("\n".join(table(prefill, report.kernels, chip)))
    for num_tiles in report.options.image_batch_sizes:
        print(f"\n{num_tiles} tiles of images")
        print("\n".join(table(report.tile_dispatches(num_tiles), report.kernels, chip)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compile.tools.gpu_report",
        description="Kernels of a decode step, of prefill and of a vision tower: how many of each,"
        " workgroups x threads, matrix instructions in its code, bytes, roofline of one and all.",
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--target", choices=HIP_CHIPS, default="gfx942", help="(%(default)s)")
    parser.add_argument("--weights", choices=("f16", "bf16"), default="f16", help="(%(default)s)")
    parser.add_argument("--kv", choices=("f16", "bf16"), default="f16", help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", choices=BuildOptions().decode_batch_sizes,
                        default=[1, 8], help="of a decode step (%(default)s)")  # fmt: skip
    parser.add_argument("--context", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--max-seq-len", type=int, default=8192, help="tokens (%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=MI300X.bandwidth,
                        help="bytes a second (of an MI300X: %(default).3g)")  # fmt: skip
    parser.add_argument("--flops", type=float, default=MI300X.flops,
                        help="a second, in f16 (of an MI300X: %(default).4g)")  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
