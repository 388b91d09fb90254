"""The command `sf-compile`, also `python -m compile`: compiles weights to an artifact folder."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from compile.build import build
from compile.formats.layout import DTYPES, QUANTIZED
from compile.options import ACTIVATIONS, BuildOptions
from compile.progress import progress_display
from compile.target import CPU_LEVELS, HIP_CHIPS
from compile.toolchain import check_installed
from sf_local.arguments import Parser
from sf_local.errors import SfLocalError

OPTIONS = {  # that are not called as the field
    "weight_dtype": "--weights", "activation_dtype": "--activations", "kv_dtype": "--kv",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command; `arguments` are those of the process by default. Returns its exit code."""
    args = _parser().parse_args(arguments)
    start = time.perf_counter()
    try:
        check_installed()
        options = BuildOptions(
            target=args.target,
            cpu=args.cpu,
            weight_dtype=args.weights,
            activation_dtype=args.activations,
            kv_dtype=args.kv,
            page_size=args.page_size,
            prefill_batch_sizes=args.prefill_batch_sizes,
            decode_batch_sizes=args.decode_batch_sizes,
            image_batch_sizes=args.image_batch_sizes,
            max_seq_len=args.max_seq_len,
        )
        output = args.output or Path(f"{model_name(args.source)}-{args.target.replace(',', '-')}")
        with _ended_as_interrupted(), progress_display() as progress:
            build(
                args.source, output, options,
                keep_mlir=args.keep_mlir, force=args.force, progress=progress,
            )  # fmt: skip
    except SfLocalError as error:
        print(f"sf-compile: {_in_options(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{output} is ready ({time.perf_counter() - start:.0f} s)")
    return 0


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """SIGTERM, and the end of the terminal, raise KeyboardInterrupt, so that what is temporary is
    removed; not if the caller ignores them, as nohup does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sf-compile",
        description="Compile Llama weights to a folder that sf_local runs.",
    )
    defaults = BuildOptions()
    parser.add_argument(
        "source",
        help='a Hugging Face folder or repo id, a .gguf file, or "demo" (SmolLM2-135M-Instruct)',
    )
    parser.add_argument("-o", "--output", type=Path, help="folder to make (default: SOURCE-TARGET)")
    parser.add_argument(
        "--target",
        default=defaults.target,
        metavar="TARGET",
        help=f"cpu (default), {', '.join(HIP_CHIPS)}; or several, with commas between",
    )
    parser.add_argument(
        "--cpu",
        default=defaults.cpu,
        metavar="LEVEL",
        help=f"for cpu: {', '.join(CPU_LEVELS)} (default: host); also with "
        "more features, e.g. x86-64-v3+avx_vnni",
    )
    parser.add_argument(
        "--weights",
        choices=[*DTYPES, *QUANTIZED],
        help="weight type (default: as the source; of floats bf16 on CPUs that have it, else f16)",
    )
    parser.add_argument(
        "--activations", choices=ACTIVATIONS,
        help="what quantized weights are multiplied with (default: bf16 on CPUs with AMX, else "
        "int16; int8 is faster, and less accurate)",
    )  # fmt: skip
    parser.add_argument("--kv", choices=list(DTYPES), help="KV cache type (default: as --weights)")
    parser.add_argument(
        "--page-size", type=int, default=defaults.page_size, help="tokens a page (%(default)s)"
    )
    for name in ("prefill_batch_sizes", "decode_batch_sizes"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_sizes, default=getattr(defaults, name),
            metavar="N,N,...", help="rows of compiled batches, ascending (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--image-batch-sizes", type=_sizes, metavar="N,N,...",
        help="tiles of images that are encoded together (default: 1,4, on CPUs 1)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seq-len", type=int, help="context in tokens (default: the model's own)"
    )
    parser.add_argument("--keep-mlir", action="store_true", help="keep model.mlir in the folder")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,4,8") from None


def _in_options(message: str) -> str:
    """An error in which fields of BuildOptions are called what their options are."""
    for field in fields(BuildOptions):
        option = OPTIONS.get(field.name, f"--{field.name.replace('_', '-')}")
        message = re.sub(rf"\b{field.name}=", f"{option}=", message)
    return message


def model_name(source: str) -> str:
    """What an output folder is called by default, but for the target."""
    return Path(source).expanduser().absolute().name.removesuffix(".gguf")


if __name__ == "__main__":
    sys.exit(main())
