"""What a worker does while there is nothing to compute."""

from __future__ import annotations

import threading

import pytest

from sf_local import Engine, SamplingParams
from sf_local.engine import worker
from sf_local.engine.core import EngineCore
from tests.support.tiny import TinyModel

PARAMS = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)


def test_memory_is_asked_for_once_no_request_comes_soon(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not between requests of a loop, which would wait for it; and until there is enough."""
    missing, is_done = [1, 2], threading.Event()

    def ask_ahead(core: EngineCore) -> bool:
        if missing:
            missing.pop()
            return True
        is_done.set()
        return False

    monkeypatch.setattr(EngineCore, "ask_ahead", ask_ahead)
    monkeypatch.setattr(worker, "SOON", 60.0)
    with Engine(tiny.artifact) as engine:
        for first in range(5, 8):
            engine.generate([first, 6], PARAMS)
        engine.flush_cache()
        assert len(missing) == 2
        monkeypatch.setattr(worker, "SOON", 0.01)
        engine.generate([8, 6], PARAMS)
        assert is_done.wait(60)
        monkeypatch.setattr(worker, "SOON", 60.0)
        assert engine.generate([9, 6], PARAMS).completion_tokens == 5  # wakes it, and it may end
