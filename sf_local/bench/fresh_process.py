"""What a new process with an engine costs: its start, its memory, and its CPU time when idle.

`run` starts this module as that process, so it imports nothing that an engine does not need. Times
of both processes can be compared: on Linux all processes share the clock of `time.perf_counter`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sf_local.artifact.open import Artifact
from sf_local.engine.engine import Engine
from sf_local.model.huge_weights import MOVER
from sf_local.request.params import SamplingParams


@dataclass(frozen=True)
class Fresh:
    """Costs of one process.

    Attributes:
        ready_seconds: from its start to a usable engine.
        first_token_seconds: from its start to the first token.
        load_seconds: the part of `ready_seconds` that opening the engine took.
        peak_bytes: resident memory at its peak, mapped weights included.
        memory_ratio: `peak_bytes` over weights and KV pages, of which there are as many as the
            run needs.
        idle_share: of one core, used by the open engine without requests, once its weights have
            moved to huge pages.
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
    num_threads: int | None = None,
    prompt: int = 512,
    answer: int = 64,
    idle_seconds: float = 3.0,
) -> Fresh:
    """Start a process that opens `artifact` and measure it.

    It generates one token, then `answer` tokens after a prompt of `prompt` tokens, and is idle for
    `idle_seconds`.

    Raises:
        subprocess.CalledProcessError: the process failed; it has printed why.
    """
    pages = -(-(prompt + answer) // artifact.config.page_size) + 1
    sizes = map(str, (pages, prompt, answer, idle_seconds, num_threads or ""))
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


def _main(
    vmfb: str, device: str, pages: str, prompt: str, answer: str, idle_seconds: str, threads: str
) -> None:
    opened_at = time.perf_counter()
    num_threads = int(threads) if threads else None
    with Engine(vmfb, device, kv_pages=int(pages), num_threads=num_threads) as engine:
        ready_at = time.perf_counter()
        engine.generate([1, 2, 3], _params(1))
        first_token_at = time.perf_counter()
        engine.generate([1] * int(prompt), _params(int(answer)))
        idle_share = _idle_share(float(idle_seconds))
        status = Path("/proc/self/status").read_text()
        report = {
            "opened_at": opened_at,
            "ready_at": ready_at,
            "first_token_at": first_token_at,
            "peak_bytes": 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]),
            "idle_share": idle_share,
        }
    print(json.dumps(report))


def _params(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


def _idle_share(seconds: float) -> float:
    for thread in threading.enumerate():
        if thread.name == MOVER:  # its work is done once, and is not what an idle engine takes
            thread.join()
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds


if __name__ == "__main__":
    _main(*sys.argv[1:])
