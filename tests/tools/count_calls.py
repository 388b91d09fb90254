"""Counts the Python calls of a decode step: what the host does beside the model, without a clock.

`python -m tests.tools.count_calls [ARTIFACT] [--by-function]` decodes 8 rows greedily and prints
how many Python functions the worker's thread calls a step, and how many of those calls go to a
module that is not the caller's. The numbers do not depend on the machine, so they show what a
change of the engine costs where timings drown in noise. Calls of C functions are not counted; to
resume a coroutine or a generator is a call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sf_local
from sf_local import Engine, SamplingParams
from sf_local.engine.scheduler import Scheduler
from tests.support.tiny import TinyModels

ROWS, STEPS, WARM_UP = 8, 100, 10
STEP = Scheduler.next_step.__code__  # is called once a step, at its start
PACKAGE = Path(sf_local.__file__).parent
TIMEOUT = 300.0  # seconds


@dataclass
class Calls:
    """Calls on the thread that runs `start`, from the step WARM_UP on, for a number of steps."""

    steps: int
    read_stats: Callable[[], dict[str, float]]
    counts: Counter[tuple[CodeType, bool]] = field(default_factory=Counter)  # True: other module
    stats: list[dict[str, float]] = field(default_factory=list)  # at the start and at the end
    is_done: threading.Event = field(default_factory=threading.Event)
    _num_started: int = 0

    def start(self) -> None:
        sys.setprofile(self._on_event)

    def per_step(self, is_ours: bool = True) -> tuple[float, float]:
        """Calls and changes of module a step, of sf_local's functions or of all."""
        rows = [row for row in self.by_function() if row[0].startswith("sf_local") or not is_ours]
        return sum(row[1] for row in rows), sum(row[2] for row in rows)

    def by_function(self) -> list[tuple[str, float, float]]:
        """(file:function, calls a step, those from another module), the most first."""
        rows: dict[str, list[float]] = {}
        for (code, is_change), count in self.counts.items():
            row = rows.setdefault(f"{_short(code.co_filename)}:{code.co_qualname}", [0.0, 0.0])
            row[0] += count / self.steps
            row[1] += is_change * count / self.steps
        table = [(name, calls, changes) for name, (calls, changes) in rows.items()]
        return sorted(table, key=lambda row: (-row[1], row[0]))

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code, caller = frame.f_code, frame.f_back
        if code is STEP:
            self._start_step()
        if len(self.stats) == 1:
            is_change = caller is None or caller.f_code.co_filename != code.co_filename
            self.counts[code, is_change] += 1

    def _start_step(self) -> None:
        self._num_started += 1
        if self._num_started in (WARM_UP, WARM_UP + self.steps):
            self.stats.append(self.read_stats())
        if len(self.stats) == 2:
            sys.setprofile(None)
            self.is_done.set()


def count_calls(artifact: Path, rows: int = ROWS, steps: int = STEPS) -> Calls:
    """Count over decode steps of `rows` requests each; RuntimeError where a step had fewer."""
    submitted = threading.Event()
    with Engine(artifact) as engine, ThreadPoolExecutor(rows) as pool:
        calls = Calls(steps, engine.stats)

        def start() -> None:
            """All requests begin in one step."""
            submitted.wait(TIMEOUT)
            calls.start()

        engine._replicas.workers[0].ask(start)
        params = SamplingParams(WARM_UP + 2 * steps, temperature=0, ignore_eos=True)
        handles = [engine.submit([row + 1, 2, 3], params) for row in range(rows)]
        results = [pool.submit(handle.result) for handle in handles]  # so nothing is streamed
        submitted.set()
        calls.is_done.wait(TIMEOUT)
        for handle in handles:
            handle.cancel()
        for result in results:
            result.result(TIMEOUT)
    before, after = (stats["completion_tokens"] for stats in calls.stats)
    if after - before != rows * steps:
        raise RuntimeError(f"{after - before:.0f} tokens in {steps} steps are not {rows} a step")
    return calls


def tiny_artifact(folder: Path) -> Path:
    """A random model of two layers, compiled for batches of 8."""
    make = TinyModels(lambda: folder)
    return make(prefill_batch_sizes=(1, 4), decode_batch_sizes=(1, 8)).artifact


def _short(path: str) -> str:
    """A path from the folder that holds sf_local."""
    return path.removeprefix(f"{PACKAGE.parent}/")


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the Python calls of a decode step.")
    parser.add_argument("artifact", nargs="?", type=Path, help="default: a tiny random model")
    parser.add_argument("--by-function", action="store_true", help="also a table by function")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calls = count_calls(arguments.artifact or tiny_artifact(Path(folder)))
    if arguments.by_function:
        print(" calls  changes  function")
        for name, count, changes in calls.by_function():
            print(f"{count:6.1f} {changes:8.1f}  {name}")
    for of, is_ours in (("sf_local", True), ("all modules", False)):
        count, changes = calls.per_step(is_ours)
        print(f"{of}: {count:.1f} calls a step, {changes:.1f} changes of module")


if __name__ == "__main__":
    main()
