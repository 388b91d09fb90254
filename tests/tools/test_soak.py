"""Half a minute of the soak; the long one is run by hand."""

from __future__ import annotations

import pytest

from tests.support.tiny import TinyModel
from tests.tools.soak import soak


@pytest.mark.slow
def test_soak(tiny: TinyModel) -> None:
    report = soak(tiny.artifact, seconds=30)
    assert not report.wrong
    assert {"length", "abort", "timeout", "leave", "drop", "flush"} <= report.endings.keys()
    assert report.endings["preempted"] > 0
    half = len(report.memory) // 2
    assert max(report.memory[half:]) <= max(report.memory[:half]) + 32


def test_a_short_soak(tiny: TinyModel) -> None:
    assert not soak(tiny.artifact, seconds=3).wrong
