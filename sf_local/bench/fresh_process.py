"""What a process of its own costs: its start, its memory, its rest. `run` starts this file as one.

It imports nothing that an engine does not need. Clocks are those of `time.perf_counter`, which on
Linux all processes share.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sf_local.artifact.open import Artifact
from sf_local.engine.engine import Engine
from sf_local.request.params import SamplingParams


@dataclass(frozen=True)
class Fresh:
    """Of one process: seconds from its start to a usable engine and to its first token, and so on.

    load_seconds: of these, spent opening the engine. memory_ratio: resident memory at its peak,
    mapped weights included, over weights and KV pages, which are as many as the run needs.
    idle_share: of one core, used by the open engine while nothing was asked of it.
    """

    ready_seconds: float
    first_token_seconds: float
    load_seconds: float
    peak_bytes: int
    memory_ratio: float
    idle_share: float


def run(
    artifact: Artifact,
    device: str = "cpu",
    *,
    prompt: int = 512,
    answer: int = 64,
    idle_seconds: float = 3.0,
) -> Fresh:
    """A first token, then an answer of some tokens to a prompt of some tokens, then rest."""
    pages = -(-(prompt + answer) // artifact.config.page_size) + 1
    sizes = map(str, (pages, prompt, answer, idle_seconds))
    command = [sys.executable, "-m", __name__, str(artifact.vmfb), device, *sizes]
    started_at = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    needed = artifact.num_weight_bytes + (pages + 1) * artifact.config.page_bytes
    return Fresh(
        ready_seconds=found["ready_at"] - started_at,
        first_token_seconds=found["first_token_at"] - started_at,
        load_seconds=found["ready_at"] - found["opened_at"],
        peak_bytes=found["peak_bytes"],
        memory_ratio=found["peak_bytes"] / needed,
        idle_share=found["idle_share"],
    )


def _main(vmfb: str, device: str, pages: str, prompt: str, answer: str, idle_seconds: str) -> None:
    opened_at = time.perf_counter()
    with Engine(vmfb, device, kv_pages=int(pages)) as engine:
        ready_at = time.perf_counter()
        engine.generate([1, 2, 3], _params(1))
        first_token_at = time.perf_counter()
        engine.generate([1] * int(prompt), _params(int(answer)))
        status = Path("/proc/self/status").read_text()
        report = {
            "opened_at": opened_at,
            "ready_at": ready_at,
            "first_token_at": first_token_at,
            "peak_bytes": 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]),
            "idle_share": _idle_share(float(idle_seconds)),
        }
    print(json.dumps(report))


def _params(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


def _idle_share(seconds: float) -> float:
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds


if __name__ == "__main__":
    _main(*sys.argv[1:])
