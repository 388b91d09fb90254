"""The count of a decode step's calls, with fewer rows and steps."""

from __future__ import annotations

from tests.support.tiny import TinyModel
from tests.tools.count_calls import count_calls


def test_every_step_is_counted(tiny: TinyModel) -> None:
    counted = count_calls(tiny.artifact, rows=4, steps=20)
    (calls, changes), every = counted.per_step(), counted.per_step(is_ours=False)
    assert every[0] > calls > changes > 0
    table = {name: calls for name, calls, _ in counted.by_function()}
    assert table["sf_local/engine/scheduler.py:Scheduler.next_step"] == 1


def test_the_count_is_the_same_again(tiny: TinyModel) -> None:
    first, second = (count_calls(tiny.artifact, rows=4, steps=20) for _ in range(2))
    assert first.per_step() == second.per_step()
