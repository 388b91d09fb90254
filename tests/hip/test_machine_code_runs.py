"""Larger models than the tiny one: some of what tests/tools/run_machine_code.py runs."""

from __future__ import annotations

import pytest

from tests.hip.driver import Driver
from tests.tools.run_machine_code import Case, pairs, run_cases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "chip"),
    [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in pairs(some=True)],
)
def test_a_run(hip_driver: Driver, case: Case, chip: str) -> None:
    [result] = run_cases([(case, chip)], lambda result: None)
    assert not result.problems
    assert result.dispatches
