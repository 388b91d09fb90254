"""The simulator of the task queue, on phases that are worked out on paper; and what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from compile.tools.cpu_queue import Costs, Phase, simulate
from compile.tools.cpu_tasks import costs_of, durations


@pytest.mark.parametrize(
    ("tasks", "num_threads", "costs", "seconds"),
    [
        # 0-3, 4-6; 8-12
        pytest.param([[3, 2], [4]], 1, Costs(take=1, turn=2), 12, id="one thread"),
        # 0-3; 0-2 and 2-4
        pytest.param([[3, 2, 2]], 2, Costs(), 4, id="the first one free takes the next task"),
        # 0-3, 0-1; the first thread 3.25-4.25, the other 3.5-4.5
        pytest.param([[3, 1], [1, 1]], 2, Costs(turn=0.25, barrier=0.5), 4.5, id="barrier"),
        # 0-3, 0-1, and asleep from 2 until 5; meanwhile the first thread 3-4 and 4-7
        pytest.param([[3, 1], [1, 3]], 2, Costs(spin=1, wake=2), 7, id="a thread sleeps"),
        # 0-3, 0-1; it waits for 2 and spins, and both go on at 3: 3-4, 3-6
        pytest.param([[3, 1], [1, 3]], 2, Costs(spin=2, wake=2), 6, id="a thread spins"),
        # 0-1, 0.25-1.25, 0.5-1.5
        pytest.param([[1, 1, 1]], 3, Costs(line=0.25), 1.5, id="one increment after another"),
        # both until 2; the second increment waits for the two that have read the first by then
        pytest.param([[2, 2]], 3, Costs(read=0.5), 3, id="threads that wait read"),
    ],
)
def test_what_phases_take(
    tasks: Sequence[Sequence[float]], num_threads: int, costs: Costs, seconds: float
) -> None:
    assert simulate([Phase(t, lambda n: 1.0) for t in tasks], num_threads, costs) == seconds


@pytest.mark.parametrize(
    ("pace", "seconds"),
    [
        (lambda n: float(n), 6),  # 0-4 for the shorter one; then the other has 2 of 4 left: 4-6
        (lambda n: 1.0, 4),
    ],
)
def test_tasks_that_share_memory_slow_down(pace: Callable[[int], float], seconds: float) -> None:
    assert simulate([Phase([2, 4], pace)], 2, Costs()) == seconds


def test_what_is_read_from_a_step() -> None:
    """Threads 7 and 8; the columns are phase, task, begin, end and thread."""
    step = np.array(
        [
            [0, 0, 0.0, 4.0, 7],
            [0, 1, 0.5, 2.0, 8],
            [0, 2, 3.0, 5.0, 8],
            [4, 0, 7.0, 8.0, 8],
            [4, 1, 7.5, 9.0, 7],
        ]
    )
    assert durations([step]) == {0: [4, 1.5, 2], 4: [1, 1.5]}
    costs = costs_of([step])
    assert (costs.take, costs.turn, costs.barrier, costs.line) == (1, 2, 2.5, 0.5)
