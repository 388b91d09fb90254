"""Grammars that take long: how many of them the other requests wait for in one step."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from sf_local import Engine, SamplingParams
from sf_local.engine.core import EngineCore
from sf_local.grammar import matcher
from tests.support.running import Runners, assert_idle
from tests.support.tiny import TinyModel

REGEX = "[a-z]{20,30}"


def test_slow_grammars_take_turns(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a grammar takes 0.06 s by the clock. All answers grow equally fast, and are
    what they are without that clock."""
    clock, at_steps, rows, runners = [0.0], [], [], Runners()

    def thread_time() -> float:
        clock[0] += 0.06
        return clock[0]

    params = [SamplingParams(max_new_tokens=40, regex=REGEX, seed=i) for i in range(6)]
    free = SamplingParams(max_new_tokens=100, temperature=0, ignore_eos=True)
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        wanted = [engine.generate([5, i], p).text for i, p in enumerate(params)]
        alone = engine.generate([9], free).text
        step, decode = EngineCore.step, runners[0].decode

        async def timed(core: EngineCore, *arguments: Any) -> bool:
            if len(core.scheduler.running) == 7:
                at_steps.append(clock[0])
            return await step(core, *arguments)

        async def counting(*arguments: Any) -> Any:
            if len(at_steps) > 3:
                rows.extend(row.page_ids[0] for row in arguments[0])
            return await decode(*arguments)

        monkeypatch.setattr(EngineCore, "step", timed)
        monkeypatch.setattr(runners[0], "decode", counting)
        monkeypatch.setattr(matcher, "time", SimpleNamespace(thread_time=thread_time))
        handles = [engine.submit([5, i], p) for i, p in enumerate(params)]
        assert engine.generate([9], free).text == alone
        outputs = [handle.result() for handle in handles]
        assert_idle(engine)
    assert [output.text for output in outputs] == wanted
    assert all(re.fullmatch(REGEX, text) for text in wanted)
    steps = [b - a for a, b in pairwise(at_steps[3:])]  # what they take is known by then
    assert 0.15 < max(steps) < 0.6
    counts = sorted(Counter(rows[:60]).values(), reverse=True)[1:]  # without the free one
    assert len(counts) == 6 and counts[0] - counts[-1] <= 3
