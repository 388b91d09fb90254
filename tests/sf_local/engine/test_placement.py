"""Threads of the CPU: how many an engine gets, and who cannot have them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from sf_local import Engine, SamplingParams, cli
from sf_local.device.cpu_threads import num_usable_cores
from sf_local.device.info import DeviceInfo, find_device
from sf_local.engine.placement import checked_num_threads
from sf_local.errors import RequestError
from tests.support.tiny import TinyModel

GPU = DeviceInfo("hip:0", "gfx942", "Card", 8 << 30)
MOST = num_usable_cores()
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)


def workers() -> set[str]:
    """IREE's threads in this process."""
    return {task for task in os.listdir("/proc/self/task") if is_worker(task)}


def is_worker(task: str) -> bool:
    try:
        with open(f"/proc/self/task/{task}/comm") as file:
            return file.read().startswith("iree-worker")
    except OSError:  # it has ended
        return False


def test_each_engine_gets_its_threads(tiny: TinyModel) -> None:
    before, counts, answers = workers(), [], []
    with Engine(tiny.artifact, num_threads=np.int64(1)) as one, Engine(tiny.artifact) as all_cores:
        for engine in one, all_cores:
            answers.append(engine.generate("abc", GREEDY).token_ids)
        counts.append(len(workers() - before))
    assert answers[0] == answers[1]
    assert counts == [1 + MOST]


@pytest.mark.parametrize("value", [0, -1, MOST + 1, True, 1.0, "2"])
def test_numbers_that_are_none(tiny: TinyModel, value: Any) -> None:
    with pytest.raises(RequestError, match=f"num_threads=.* must be an integer from 1 to {MOST}"):
        Engine(tiny.artifact, num_threads=value)


def test_not_for_a_gpu() -> None:
    devices = [find_device("cpu"), GPU]
    assert checked_num_threads(None, devices) is None
    with pytest.raises(RequestError, match=r"num_threads=1 is for the CPU, and device='hip:0'"):
        checked_num_threads(1, devices)


def test_the_command(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(tiny.artifact), "--prompt", "abc", "--num-threads"]
    assert cli.main([*arguments, "1"]) == 0
    assert capsys.readouterr().out
    assert cli.main([*arguments, "0"]) == 1
    assert "--num-threads 0 must be an integer from 1 to" in capsys.readouterr().err
