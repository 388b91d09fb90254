"""`python -m compile.tools.gpu_report SHAPE`: the kernels of a GPU, in decode, prefill, vision.

It needs no GPU: it compiles a model of a known shape, without weights, and prints the kernels that
each function dispatches. Beside each stands the least time that a card with this chip can take for
it: the largest of what its bytes take at the memory's bandwidth, what it reads and writes in LDS at
the bandwidth of LDS, and what issuing its instructions takes, as counted in its machine code. Waits
for memory, for other waves and for what an instruction needs of the one before, caches and
conflicts in LDS come on top.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence

from compile.formats.layout import ITEM_BYTES, QUANTIZED
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import BuildOptions
from compile.tools.gpu_cards import CARDS, LAUNCH_SECONDS, Card
from compile.tools.gpu_dispatch import Dispatch
from compile.tools.gpu_kernels import Kernel, compile_shape
from compile.tools.gpu_profile import Bound, Profile, Work, bound, profile

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
Q4_K_M = "q4_k_m"
NEGLIGIBLE = 0.05  # microseconds


def table(dispatches: Sequence[Dispatch], kernels: dict[str, Kernel], card: Card) -> list[str]:
    """Lines of text: a head, each kernel that takes time, in the order of dispatch, and the sums.

    Times are microseconds: of one dispatch, and of all those alike. A star stands where it cannot
    be told how often a loop is gone through, so that issuing takes longer than is said.
    """
    lines = [
        f"{'':7}{'workgroups':>14}{'MB':>9}{'memory':>9}{'lds':>8}{'issue':>9}{'bound':>9}{'all':>9}"
        f"{'launched':>10}"
    ]
    rest = 0
    sums: Counter[str] = Counter()
    for dispatch, count in Counter(dispatches).items():
        kernel = kernels[dispatch.name]
        found = profile(kernel.code, dispatch.arguments, kernel.size, card.architecture)
        least = bound(found, dispatch.workgroups, dispatch.num_bytes, card, dispatch.share)
        for name in ("memory", "lds", "issue", "seconds"):
            sums[name] += count * 1e6 * getattr(least, name)
        if count == 1 and least.seconds * 1e6 < NEGLIGIBLE and not kernel.spilled:
            rest += 1
            continue
        lines.append(_times(dispatch, count, kernel, found, least))
        lines += (f"{'':11}{line}" for line in _code(dispatch, kernel, found, least, card))
    launches = len(dispatches) * LAUNCH_SECONDS * 1e6
    lines += [
        f"{rest:4} others, once each, of less than {NEGLIGIBLE} us",
        f"{len(dispatches):4} dispatches: at least {sums['seconds']:.0f} us (by memory alone "
        f"{sums['memory']:.0f}, lds {sums['lds']:.0f}, issue {sums['issue']:.0f}); "
        f"{sums['seconds'] + launches:.0f} us with launches of {LAUNCH_SECONDS * 1e6:.0f} us each",
    ]
    return lines


def least_seconds(
    dispatches: Sequence[Dispatch], kernels: dict[str, Kernel], card: Card
) -> float:  # fmt: skip
    """The least time that all of these take together, with their launches."""
    total = len(dispatches) * LAUNCH_SECONDS
    for dispatch, count in Counter(dispatches).items():
        kernel = kernels[dispatch.name]
        found = profile(kernel.code, dispatch.arguments, kernel.size, card.architecture)
        least = bound(found, dispatch.workgroups, dispatch.num_bytes, card, dispatch.share)
        total += count * least.seconds
    return total


def _times(dispatch: Dispatch, count: int, kernel: Kernel, found: Profile, least: Bound) -> str:
    grid = f"{dispatch.workgroups} x {kernel.threads}"
    memory, lds, issue, seconds = (
        1e6 * value for value in (least.memory, least.lds, least.issue, least.seconds)
    )
    return (
        f"{count:4} x {grid:>14}{dispatch.num_bytes / 1e6:9.2f}{memory:9.2f}{lds:8.2f}"
        f"{issue:8.2f}{'*' if found.has_unknown else ' '}{seconds:9.2f}{count * seconds:9.1f}"
        f"{count * (seconds + 1e6 * LAUNCH_SECONDS):10.1f}  "
        f"{dispatch.name.split('_dispatch_')[-1]}: {least.limit}"
    )


def _code(
    dispatch: Dispatch, kernel: Kernel, found: Profile, least: Bound, card: Card
) -> Iterator[str]:
    """What the kernel's code needs and does, and each of its inner loops."""
    code, has = kernel.code, kernel.code.resources
    lds = has["group_segment_fixed_size"]
    waves = card.waves(has["next_free_vgpr"], lds, found.waves)
    loaded = found.work.load_bytes * code.lanes * dispatch.workgroups
    spilled = f", spills {kernel.spilled} bytes a thread" if kernel.spilled else ""
    yield (
        f"{has['num_vgpr']} VGPRs, {has['num_agpr']} AGPRs, {has['numbered_sgpr']} SGPRs, "
        f"{lds} bytes of LDS, {waves} waves a SIMD{spilled}; all lanes load {loaded / 1e6:.2f} MB; "
        f"a workgroup: {_text(found.work)}"
    )
    share = dispatch.operations / card.flops / least.seconds
    used = ", ".join(f"{number} {name}" for name, number in kernel.instructions.items())
    peak = f"{share:.0%} of the matrix peak; {used or 'no matrix'}"
    if dispatch.weights:
        lanes = code.lanes * dispatch.workgroups / dispatch.weights
        yield (
            f"a weight: {found.work.vector * lanes:.2f} vector and {found.work.matrix * lanes:.2f} "
            f"matrix instructions of a lane; {peak}"
        )
    elif dispatch.operations:
        less = f"; on average, a workgroup does {dispatch.share:.0%} of that"
        yield f"{peak}{less if dispatch.share < 1 else ''}"
    for loop in found.loops:
        if loop.times == 1:  # over workgroups that the grid has no room for
            continue
        times = "unknown" if loop.times is None else loop.times
        yield f"loop, times a wave: {times}; each: {_text(loop.work)}"


def _text(work: Work) -> str:
    loads = ", ".join(f"{number:.0f} x {size} B" for size, number in sorted(work.loads.items()))
    return (
        f"loads {loads or 'none'}, {work.vector:.0f} vector ({work.vector_cycles:.0f} cycles), "
        f"{work.matrix:.0f} matrix ({work.matrix_cycles:.0f}), {work.lds_bytes:.0f} B LDS, "
        f"{work.barriers:.0f} barriers"
    )


def main() -> None:
    """Run the command with the arguments of the process."""
    args = _parser().parse_args()
    config, vision = SHAPES[args.shape], TOWERS.get(args.shape)
    card = CARDS[args.target]
    max_seq_len = min(args.max_seq_len, config.max_seq_len)
    is_q4_k_m = args.weights == Q4_K_M
    build = BuildOptions(
        args.target, weight_dtype=None if is_q4_k_m else args.weights, kv_dtype=args.kv,
        max_seq_len=max_seq_len,
    )  # fmt: skip
    report = compile_shape(config, build, vision, is_q4_k_m=is_q4_k_m)
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * ITEM_BYTES[args.kv]
    print(
        f"{args.shape} in {args.weights} for {args.target}, on {card.name}: compiled in "
        f"{report.seconds:.0f} s of one CPU, {report.vmfb_bytes / 1e6:.1f} MB of code\n"
        f"weights {report.weight_bytes / 1e9:.2f} GB; KV {token / 1024:.1f} KiB a token, "
        f"{token * max_seq_len / 1e9:.2f} GB for {max_seq_len}"
    )
    for rows in args.rows:
        print(f"\ndecode, {rows} rows that see {args.context} tokens each")
        step = report.dispatches(f"decode_next_bs{rows}", rows, 1, args.context)
        print("\n".join(table(step, report.kernels, card)))
    print(f"\nprefill of {args.prompt} tokens")
    prefill = report.dispatches("prefill_next_bs1", 1, args.prompt, args.prompt)
    print("\n".join(table(prefill, report.kernels, card)))
    for num_tiles in report.options.image_batch_sizes:
        print(f"\n{num_tiles} tiles of images")
        print("\n".join(table(report.tile_dispatches(num_tiles), report.kernels, card)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compile.tools.gpu_report",
        description="Kernels of a decode step, of prefill and of a vision tower: how many of each,"
        " workgroups x threads, what their code needs and does, and the least time of each.",
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--target", choices=CARDS, default="gfx942", help="(%(default)s)")
    parser.add_argument("--weights", choices=("f16", "bf16", *QUANTIZED, Q4_K_M),
                        default="f16", help="or of such a GGUF file (%(default)s)")  # fmt: skip
    parser.add_argument("--kv", choices=("f16", "bf16"), default="f16", help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", choices=BuildOptions().decode_batch_sizes,
                        default=[1, 8], help="of a decode step (%(default)s)")  # fmt: skip
    parser.add_argument("--context", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--max-seq-len", type=int, default=8192, help="tokens (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
