"""The count of a decode step's calls of AMD's driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.count_driver_calls import NUM_LAYERS, STEPS, count_driver_calls


@pytest.mark.slow
def test_every_launch_of_a_step_is_counted(tmp_path: Path) -> None:
    calls = count_driver_calls(tmp_path, "gfx942", "int4", ["--iree-hal-memoization=false"])
    launches = calls["hipModuleLaunchKernel"]
    assert launches > STEPS * 5 * NUM_LAYERS, "each layer has four products, and attention"
