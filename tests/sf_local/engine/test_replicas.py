"""Several loops as one: who gets which request, and what is left when a device is lost."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_local import Engine, SamplingParams
from sf_local.engine import replicas
from sf_local.engine.replicas import BLOCK, MAX_LEAD, Router
from sf_local.errors import DeviceError, EngineError
from tests.support.running import Runners, lose
from tests.support.tiny import TinyModel

PROMPT = list(range(3, 3 + 4 * BLOCK))
PARAMS = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)


def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    router = Router()
    first = router.choose(PROMPT, {0: 1, 1: 0})
    assert first == 1
    assert router.choose([*PROMPT, 7], {0: 0, 1: 3}) == 1
    assert router.choose([*PROMPT[: 2 * BLOCK], *PROMPT[:BLOCK]], {0: 0, 1: 3}) == 1
    assert router.choose(PROMPT[1:], {0: 0, 1: 3}) == 0


def test_but_not_if_that_one_is_too_busy_or_gone() -> None:
    router = Router()
    router.choose(PROMPT, {0: 0, 1: 5})
    assert router.choose(PROMPT, {0: MAX_LEAD, 1: 0}) == 0
    assert router.choose(PROMPT, {0: MAX_LEAD + 1, 1: 0}) == 1
    assert router.choose(PROMPT, {0: 4, 1: 4}) == 1  # which computed it last
    assert router.choose(PROMPT, {0: 4}) == 0


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "MAX_BLOCKS", 10)
    router, prompts = Router(), [random.choices(range(100), k=3 * BLOCK) for _ in range(20)]
    for prompt in prompts:
        router.choose(prompt, {0: 0})
    assert len(router._owners) == 10


@given(
    st.lists(st.integers(0, 3), max_size=80),
    st.dictionaries(st.integers(0, 4), st.integers(0, 50), min_size=1),
)
def test_the_choice_is_always_one_of_those_there(tokens: list[int], loads: dict[int, int]) -> None:
    router = Router()
    router.choose(tokens, dict.fromkeys(range(5), 0))
    chosen = router.choose(tokens, loads)
    assert loads[chosen] <= min(loads.values()) + MAX_LEAD


def test_two_replicas_answer_as_one(tiny: TinyModel) -> None:
    prompts = [[*PROMPT[:20], i, i + 1] for i in range(24)]
    with Engine(tiny.artifact) as engine:
        expected = [engine.generate(prompt, PARAMS).token_ids for prompt in prompts]
    with Engine(tiny.artifact, ["cpu", "cpu"]) as engine:
        handles = [engine.submit(prompt, PARAMS) for prompt in prompts]
        assert [handle.result().token_ids for handle in handles] == expected
        done = [worker.core.stats()["completion_tokens"] for worker in engine._replicas.workers]
        stats = engine.stats()
        assert all(done) and stats["completion_tokens"] == sum(done) == 24 * 8
        assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)
        assert stats["hit_rate"] == stats["cached_tokens"] / stats["prompt_tokens"]
        engine.flush_cache()
        assert engine.stats()["pages_cached"] == 0
        handle = engine.submit(PROMPT, SamplingParams(max_new_tokens=200, ignore_eos=True))
        handle.cancel()
        assert handle.result().finish_reason == "abort"


def test_forks_stay_together(tiny: TinyModel) -> None:
    with Engine(tiny.artifact, ["cpu", "cpu"]) as engine:
        for i in range(6):
            engine.generate([*PROMPT, i], PARAMS)
        assert engine.stats()["cached_tokens"] >= 5 * len(PROMPT)


def test_a_lost_replica_leaves_the_others(tiny: TinyModel) -> None:
    runners = Runners()
    with Engine(tiny.artifact, ["cpu", "cpu"], _make_runner=runners) as engine:
        broken, whole = engine._replicas.workers
        all_submitted = threading.Event()
        lose(runners[0], "prefill", all_submitted)
        handles = [engine.submit([i, *PROMPT], PARAMS) for i in range(2)]
        all_submitted.set()
        failures = 0
        for handle in handles:
            try:
                handle.result()
            except EngineError:
                failures += 1
        assert failures == 1
        broken._ended.wait(30)
        for i in range(4):
            assert len(engine.generate([i, *PROMPT], PARAMS).token_ids) == 8
        whole.close()
        with pytest.raises(EngineError, match=r"fell off the bus.*make a new one"):
            engine.generate(PROMPT, PARAMS)


@pytest.mark.parametrize("device", [[], (), None, 3, ["cpu", "gpu"], ["cpu", None]], ids=repr)
def test_lists_that_make_no_sense(tiny: TinyModel, device: Any) -> None:
    with pytest.raises(DeviceError, match="device="):
        Engine(tiny.artifact, device)
