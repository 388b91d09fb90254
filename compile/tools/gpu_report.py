"""`python -m compile.tools.gpu_report SHAPE`: the kernels of a GPU, in decode, prefill, vision.

It needs no GPU: it compiles a model of a known shape, without weights, and prints the kernels that
each function dispatches, with their workgroups and matrix instructions. The roofline beside each is
the time that its bytes or its operations take at least.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from compile.formats.layout import ITEM_BYTES
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import BuildOptions
from compile.target import HIP_CHIPS
from compile.tools.gpu_kernels import Dispatch, Kernel, compile_shape

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
NEGLIGIBLE = 0.05  # microseconds


@dataclass(frozen=True)
class Chip:
    """What a card does at most."""

    bandwidth: float  # bytes a second
    flops: float  # operations a second, in f16

    def seconds(self, num_bytes: int, operations: int) -> float:
        """The roofline: the least time for so much work."""
        return max(num_bytes / self.bandwidth, operations / self.flops)


MI300X = Chip(5.3e12, 1307e12)


def table(dispatches: Sequence[Dispatch], kernels: dict[str, Kernel], chip: Chip) -> list[str]:
    """Lines of text: a head, each kernel that takes time, in the order of dispatch, and the sum."""
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
    """Run the command with the arguments of the process."""
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
