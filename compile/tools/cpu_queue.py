"""Simulates the tasks of a CPU kernel's phases on any number of threads; times are seconds.

`compile.cpu.kernel` has the real thing: threads take task after task of a phase from a counter,
and wait at its end until all tasks are done.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Phase:
    """Tasks, with the time that each takes alone. pace(n): how many times as long they take while
    n threads have a task."""

    tasks: Sequence[float]
    pace: Callable[[int], float]


@dataclass(frozen=True)
class Costs:
    """What lies between tasks.

    take: for a thread between two tasks of a phase. turn: for the thread that did a phase's last
    task, until its next one. barrier: from a phase's last task until a thread that spins begins its
    next one. spin: how long a thread that waits spins, before it sleeps. wake: from the last task
    until it goes on. line: until a counter can be increased again, as its cache line has to move.
    read: by which each thread that waits delays the counter of tasks done, whose line it reads.
    """

    take: float = 0.0
    turn: float = 0.0
    barrier: float = 0.0
    spin: float = inf
    wake: float = 0.0
    line: float = 0.0
    read: float = 0.0


def simulate(phases: Sequence[Phase], num_threads: int, costs: Costs) -> float:
    """How long the phases take in all."""
    ready, end = [0.0] * num_threads, 0.0
    for phase in phases:
        ready, end = _run(phase, costs, ready)
    return end


def _run(phase: Phase, costs: Costs, ready: Sequence[float]) -> tuple[list[float], float]:
    """When each thread begins the next phase, and when all tasks are done of this one, which they
    reach at `ready`."""
    coming = [(time, thread) for thread, time in enumerate(ready)]
    heapq.heapify(coming)
    work: dict[int, float] = {}  # that threads have yet to do
    idle: dict[int, float] = {}  # since when threads wait
    left, now, taken, end, last = deque(phase.tasks), 0.0, -inf, -inf, 0
    while coming or work:
        pace = phase.pace(len(work)) if work else 1.0
        done = now + min(work.values()) * pace if work else inf
        take = max(coming[0][0], taken + costs.line) if coming else inf
        step = (min(done, take) - now) / pace
        work = {thread: seconds - step for thread, seconds in work.items()}
        now = min(done, take)
        if done < take:
            last = min(work, key=work.__getitem__)
            del work[last]
            end = max(now, end + costs.line + costs.read * len(idle))
            heapq.heappush(coming, (end + costs.take, last))
            continue
        taken, thread = take, heapq.heappop(coming)[1]
        if left:
            work[thread] = left.popleft()
        else:
            idle[thread] = taken

    def begins(thread: int) -> float:
        if thread == last:
            return end + costs.turn
        is_asleep = end - idle[thread] > costs.spin
        return max(idle[thread], end + (costs.wake if is_asleep else costs.barrier))

    return [begins(thread) for thread in range(len(ready))], end
