"""The first run on an AMD GPU: lists what is there, checks its numbers and measures its speed.

    first_run_on_gpu.py                     the demo model, compiled for the chip that is found
    first_run_on_gpu.py --source llama/ --vmfb llama-gfx942/ --device hip:1

Prints one page to paste into an issue. The numbers are compared with those of the same model,
compiled from the same tensor operations for the CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from compile.target import resolve_target
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
NUM_TOKENS = 32  # of each answer
NEAR = 0.05  # in log probability: either of two tokens may follow
WRONG = 0.25  # f16 does not explain a larger difference

T = TypeVar("T")


def main() -> int:
    args = _parser().parse_args()
    try:
        gpu = section("machine", lambda: machine(args.device))
        artifact = section("artifact", lambda: compiled(args.source, gpu.chip, args.vmfb))
        is_right = section("numbers", lambda: compare(args.source, artifact, args.device))
        section("speed", lambda: measure(artifact, args.device, args.quick))
    except SfLocalError as error:
        print(f"\nstopped: {error}")
        return 1
    print(f"\n{'all is well' if is_right else 'THE NUMBERS ARE WRONG'}; please paste this page into"
          " an issue")  # fmt: skip
    return 0 if is_right else 1


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


def compiled(source: str, chip: str, given: Path | None) -> Path:
    """The artifact for the card, compiled if none is given."""
    resolve_target(chip)
    path = given or from_source(source, target=chip, progress=True)
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
    manifest = open_artifact(artifact).manifest
    dtypes = (manifest.weight_dtype, manifest.kv_dtype) if manifest else ("f16", "f16")
    on_cpu = from_source(
        source, weight_dtype=dtypes[0], kv_dtype=dtypes[1], row_major=True, progress=True
    )
    expected = answers(on_cpu, "cpu")
    say("CPU", f"{len(expected)} prompts, {NUM_TOKENS} tokens each")
    found = answers(artifact, device)
    differences = [_prompt_difference(*pair) for pair in zip(found, expected, strict=True)]
    same = [_same_tokens(*pair) for pair in zip(found, expected, strict=True)]
    say("prompts", f"log probabilities differ by at most {max(differences):.2g}")
    say("answers", f"{sum(n for n, _ in same)} of {len(same) * NUM_TOKENS} tokens before another")
    for (count, is_near), ours, theirs in zip(same, found, expected, strict=True):
        if count < NUM_TOKENS:
            reason = ", two almost equal" if is_near else ""
            say(f"  after {count} tokens", f"{ours.text!r}, not {theirs.text!r}{reason}")
    is_right = max(differences) <= WRONG and all(is_near for _, is_near in same)
    say("verdict", "as on the CPU" if is_right else "NOT as on the CPU")
    return is_right


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


def _same_tokens(found: Output, expected: Output) -> tuple[int, bool]:
    """How many tokens are the same, and whether the next might as well have been."""
    assert expected.logprobs
    pairs = list(zip(found.token_ids, expected.token_ids, strict=True))
    count = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if count == len(pairs):
        return count, True
    (best, _), (second, token) = expected.logprobs.output_top[count]
    return count, best - second <= NEAR and token == found.token_ids[count]


# Speed


def measure(artifact: Path, device: str, quick: bool) -> None:
    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    report = run_bench(artifact, device, 1, quick=quick, progress=progress)
    print(table(report))
    figures = report["figures"]
    rate = figures["decode, 1 row"]["median"]
    num_bytes = decode_bytes(open_artifact(artifact), SHORT)
    say("decode, 1 row", f"{1e3 / rate:.2f} ms a token, for which {num_bytes / 1e9:.2f} GB are "
                         f"read: {rate * num_bytes / 1e9:.0f} GB/s")  # fmt: skip
    say(
        "see also",
        "python -m compile.tools.gpu_report --help: which kernels take this time at least",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the first run on an AMD GPU")
    parser.add_argument("--source", default="demo", help="as sf-compile takes it (%(default)s)")
    parser.add_argument("--vmfb", type=Path, help="an artifact of it for the card (compiled here)")
    parser.add_argument("--device", default="hip", help="hip or hip:N (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small measurements")
    return parser


if __name__ == "__main__":
    sys.exit(main())
