"""The first run on an AMD GPU: lists what is there, checks its numbers and measures its speed.

    first_run_on_gpu.py                     the demo model, compiled for the chip that is found
    first_run_on_gpu.py --source model.gguf --weights source int8
    first_run_on_gpu.py --source llama/ --vmfb llama-gfx942/ --device hip:1

Prints one page to paste into an issue, with a part for each type of weights. The numbers are
compared with those of the same model, compiled from the same tensor operations for the CPU. Beside
measured times stands the least that such a card needs by the machine code, and 5 us a launch.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from compile.emitters import find_emitter
from compile.formats.layout import DTYPES, QUANTIZED
from compile.gpu.emitter import LlamaEmitter
from compile.options import BuildOptions
from compile.sources.open import open_source
from compile.target import resolve_target
from compile.tools.gpu_cards import CARDS
from compile.tools.gpu_kernels import compile_emitter
from compile.tools.gpu_report import least_seconds
from sf_local.artifact.open import open_artifact
from sf_local.bench.harness import SHORT
from sf_local.bench.measurements import run as run_bench
from sf_local.bench.report import table
from sf_local.bench.roofline import decode_bytes
from sf_local.device.info import DeviceInfo, devices, find_device, hip_library
from sf_local.engine.engine import Engine
from sf_local.engine.kv_budget import GIB
from sf_local.engine.sources import from_source
from sf_local.errors import DeviceError, SfLocalError
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 5, 8, 13,",
    "Once upon a time there was a small village by the sea, and in it lived a fisherman. " * 16,
)
SOURCE, WIDTHS = "source", ("f16", "bf16", "int8", "int4")  # what --weights takes
NUM_TOKENS = 32  # of each answer
NEAR = 0.05  # in log probability: either of two tokens may follow
WRONG = 0.25  # f16 does not explain a larger difference
COARSER = 4  # times that with bf16, which has three bits less

T = TypeVar("T")


def main() -> int:
    args = _parser().parse_args()
    try:
        gpu = section("machine", lambda: machine(args.device))
        are_right = [
            run_one(args, gpu, weights) for weights in ([SOURCE] if args.vmfb else args.weights)
        ]
    except SfLocalError as error:
        print(f"\nstopped: {error}")
        return 1
    is_right = all(are_right)
    print(f"\n{'all is well' if is_right else 'THE NUMBERS ARE WRONG'}; please paste this page into"
          " an issue")  # fmt: skip
    return 0 if is_right else 1


def run_one(args: argparse.Namespace, gpu: DeviceInfo, weights: str) -> bool:
    """All of one type of weights: whether its numbers are right."""
    artifact = section(
        f"artifact, weights {weights}", lambda: compiled(args.source, weights, gpu.chip, args.vmfb)
    )
    is_right = section("numbers", lambda: compare(args.source, artifact, args.device))
    figures = section("speed", lambda: measure(artifact, args.device, args.quick))
    if gpu.chip in CARDS:
        section("least times", lambda: bounds(args.source, artifact, gpu.chip, figures))
    return is_right


def section(title: str, work: Callable[[], T]) -> T:
    """Its title comes first: a driver that fails may end the process."""
    print(f"\n{title}", flush=True)
    return work()


def say(name: str, value: object) -> None:
    print(f"  {name:18} {value}", flush=True)


# Machine


def machine(device: str) -> DeviceInfo:
    """The card that is meant; raises DeviceError where there is none."""
    for package in ("sf-local", "shortfin", "iree-base-compiler"):
        say(package, version(package))
    say("python, system", f"{platform.python_version()}, {platform.platform()}")
    gpu = find_device(device)
    if gpu.kind != "hip":
        raise DeviceError(f"device={device!r} is no GPU; use hip, or hip:N for the N-th")
    hip = ctypes.CDLL(hip_library())
    say("library", hip._name)
    say("driver, runtime", f"{_number(hip.hipDriverGetVersion)}, "
                           f"{_number(hip.hipRuntimeGetVersion)}")  # fmt: skip
    for other in devices()[1:]:
        memory = f"{(other.free_bytes() or 0) / GIB:.1f} of {other.total_bytes / GIB:.1f} GiB free"
        mark = " *" if other == gpu else ""
        say(f"{other.name}{mark}", f"{other.description}, {other.chip}, {memory}")
    return gpu


def _number(function: Callable[..., int]) -> int:
    value = ctypes.c_int()
    return 0 if function(ctypes.byref(value)) else value.value


# Artifact


def compiled(source: str, weights: str, chip: str, given: Path | None) -> Path:
    """The artifact for the card, compiled if none is given."""
    resolve_target(chip)
    path = given or from_source(
        source, target=chip, weight_dtype=None if weights == SOURCE else weights, progress=True
    )
    artifact = open_artifact(path)
    say("folder", path)
    if manifest := artifact.manifest:
        say("model", f"{manifest.source['name']}, weights {manifest.weight_dtype}, KV "
                     f"{manifest.kv_dtype}, for {manifest.target}")  # fmt: skip
        if manifest.target != chip:
            raise DeviceError(f"{path} is for {manifest.target}, and the card is a {chip}")
    say("weights", f"{sum(path.stat().st_size for path in artifact.weights) / GIB:.2f} GiB")
    return path


# Numbers


def compare(source: str, artifact: Path, device: str) -> bool:
    """Whether prompts and greedy answers are as on the CPU."""
    on_cpu = from_source(source, row_major=True, progress=True, **types_of(artifact))
    expected = answers(on_cpu, "cpu")
    say("CPU", f"{len(expected)} prompts, {NUM_TOKENS} tokens each")
    found = answers(artifact, device)
    differences = [_prompt_difference(*pair) for pair in zip(found, expected, strict=True)]
    coarser = COARSER if types_of(artifact)["weight_dtype"] == "bf16" else 1
    same = [_same_tokens(*pair, coarser * NEAR) for pair in zip(found, expected, strict=True)]
    say("prompts", f"log probabilities differ by at most {max(differences):.2g}")
    say("answers", f"{sum(n for n, _ in same)} of {len(same) * NUM_TOKENS} tokens before another")
    for (count, is_near), ours, theirs in zip(same, found, expected, strict=True):
        if count < NUM_TOKENS:
            reason = ", two almost equal" if is_near else ""
            say(f"  after {count} tokens", f"{ours.text!r}, not {theirs.text!r}{reason}")
    is_right = max(differences) <= coarser * WRONG and all(is_near for _, is_near in same)
    say("verdict", "as on the CPU" if is_right else "NOT as on the CPU")
    return is_right


def types_of(artifact: Path) -> dict[str, str | None]:
    """The options by which a source becomes what an artifact has; None where it is the default."""
    manifest = open_artifact(artifact).manifest
    if manifest is None:
        return {"weight_dtype": "f16", "kv_dtype": "f16"}
    weights = manifest.weight_dtype if manifest.weight_dtype in (*DTYPES, *QUANTIZED) else None
    return {"weight_dtype": weights, "kv_dtype": manifest.kv_dtype}


def answers(artifact: Path, device: str) -> list[Output]:
    """To all prompts at once, with the log probabilities of prompts and answers."""
    params = SamplingParams(
        max_new_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, return_logprob=True,
        logprob_start_len=0, top_logprobs_num=2,
    )  # fmt: skip
    with Engine(artifact, device, kv_memory="128MiB") as engine:
        longest = engine.max_tokens - NUM_TOKENS
        handles = [engine.submit(engine.encode(p)[:longest], params) for p in PROMPTS]
        return [handle.result() for handle in handles]


def _prompt_difference(found: Output, expected: Output) -> float:
    assert found.logprobs and expected.logprobs
    pairs = zip(found.logprobs.prompt[1:], expected.logprobs.prompt[1:], strict=True)
    return max(abs((a or 0) - (b or 0)) for a, b in pairs)


def _same_tokens(found: Output, expected: Output, near: float) -> tuple[int, bool]:
    """How many tokens are the same, and whether the next might as well have been."""
    assert expected.logprobs
    pairs = list(zip(found.token_ids, expected.token_ids, strict=True))
    count = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if count == len(pairs):
        return count, True
    (best, _), (second, token) = expected.logprobs.output_top[count]
    return count, best - second <= near and token == found.token_ids[count]


# Speed


def measure(artifact: Path, device: str, quick: bool) -> Mapping[str, Any]:
    """Print all figures of `sf-local bench`, and return them."""

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    report = run_bench(artifact, device, 1, quick=quick, progress=progress)
    print(table(report))
    figures = report["figures"]
    rate = figures["decode, 1 row"]["median"]
    num_bytes = decode_bytes(open_artifact(artifact), SHORT)
    say("decode, 1 row", f"{1e3 / rate:.2f} ms a token, for which {num_bytes / 1e9:.2f} GB are "
                         f"read: {rate * num_bytes / 1e9:.0f} GB/s")  # fmt: skip
    return figures


def bounds(source: str, artifact: Path, chip: str, figures: Mapping[str, Any]) -> None:
    """Print measured times beside the least that a card with this chip needs."""
    target, card = resolve_target(chip), CARDS[chip]
    opened = open_source(source)
    emitter = find_emitter(opened, BuildOptions(chip, **types_of(artifact)), target)
    assert isinstance(emitter, LlamaEmitter)
    report = compile_emitter(emitter, target, opened.vision)
    for name, figure in figures.items():
        found = re.fullmatch(r"(decode|prefill), (\d+) (?:rows?|tokens)", name)
        if not found or "median" not in figure:
            continue
        size = int(found[2])
        calls = (
            ("prefill_next_bs1", 1, size, size) if found[1] == "prefill"
            else (f"decode_next_bs{size}", size, 1, 2 * SHORT)
        )  # fmt: skip
        least = least_seconds(report.dispatches(*calls), report.kernels, card)
        seconds = size / figure["median"]
        say(name, f"{1e3 * seconds:.2f} ms; {card.name} needs at least {1e3 * least:.2f}, "
                  f"which is {least / seconds:.0%}")  # fmt: skip
    say("see also", "python -m compile.tools.gpu_report --help: each kernel with its least time")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the first run on an AMD GPU")
    parser.add_argument("--source", default="demo", help="as sf-compile takes it (%(default)s)")
    parser.add_argument("--weights", nargs="+", choices=(SOURCE, *WIDTHS), default=WIDTHS,
                        help="types to run in turn; those of the source are carried over by "
                        "'source' (%(default)s)")  # fmt: skip
    parser.add_argument("--vmfb", type=Path, help="an artifact of it for the card (compiled here)")
    parser.add_argument("--device", default="hip", help="hip or hip:N (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small measurements")
    return parser


if __name__ == "__main__":
    sys.exit(main())
