"""Lists of prompts and chats, and iterables of any length."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sf_local import Engine, Output, SamplingParams
from sf_local.engine.many_requests import beginning
from sf_local.errors import EngineError, PromptTooLongError, RequestError
from tests.support.running import assert_idle
from tests.support.tiny import TinyModel

PARAMS = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
PROMPTS: list[Any] = ["abc", "xyz", "abd", "hello"]
CHATS: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact, reuse_answer_tokens=False) as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[str]:
    return [engine.generate(prompt, PARAMS).text for prompt in PROMPTS]


def test_lists_return_lists(engine: Engine, expected: list[str]) -> None:
    outputs = engine.generate(PROMPTS, PARAMS)
    assert [output.text for output in outputs] == expected
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert engine.generate([], PARAMS) == [] == engine.chat([], PARAMS)
    ids = [engine.encode(prompt) for prompt in PROMPTS]
    assert [output.text for output in engine.generate(ids, PARAMS)] == expected
    prepared = [engine.prepare(prompt) for prompt in PROMPTS]
    assert [output.text for output in engine.generate(prepared, PARAMS)] == expected
    for one in ([5, 6], (5, 6), [np.int64(5), 6], "ab"):
        assert isinstance(engine.generate(one, PARAMS), Output)


def test_lists_of_chats(engine: Engine) -> None:
    expected = [engine.chat(chat, PARAMS).text for chat in CHATS]
    assert [output.text for output in engine.chat(CHATS, PARAMS)] == expected
    assert isinstance(engine.chat(CHATS[0], PARAMS), Output)


def test_all_of_a_list_are_in_flight_at_once(engine: Engine) -> None:
    """All are submitted before the first answer is waited for."""
    steps = engine.stats()["steps"]
    engine.generate([[5, 6]] * 12, SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert engine.stats()["steps"] - steps < 5 * 50  # 4 rows in a call, 12 * 50 one by one


def test_parameters_of_each(engine: Engine) -> None:
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 2, 3, 4)]
    outputs = engine.generate(PROMPTS, each)
    assert [output.completion_tokens for output in outputs] == [1, 2, 3, 4]
    assert [o.completion_tokens for o in engine.chat(CHATS, each)] == [1, 2, 3, 4]
    with pytest.raises(RequestError, match="params: 3 of them for 4 items"):
        engine.generate(PROMPTS, each[:3])


def test_a_bad_item_is_its_own_error(engine: Engine, expected: list[str]) -> None:
    bad = [PROMPTS[0], "x" * 1000, PROMPTS[2], 3.5]
    results = engine.generate(bad, PARAMS, return_exceptions=True)
    good = [result.text if isinstance(result, Output) else None for result in results]
    assert good == [expected[0], None, expected[2], None]
    errors = [results[1], results[3]]
    assert all(isinstance(error, RequestError) for error in errors)
    assert [error.index for error in errors] == [1, 3]
    assert "index" not in str(errors[0])  # its place tells it
    with pytest.raises(PromptTooLongError, match=r"index 1: .*no room for an answer") as caught:
        engine.generate(bad, SamplingParams(max_new_tokens=10_000, ignore_eos=True))
    assert caught.value.index == 1  # type: ignore[attr-defined]
    for refused in (
        lambda: list(engine.map([*CHATS, "a", 3.5], PARAMS)),
        lambda: engine.chat([*CHATS, CHATS[0], "Hi"], PARAMS),
        lambda: engine.generate(["a"] * 6, [PARAMS] * 5 + [3]),
    ):
        with pytest.raises(RequestError, match=r"^index 5: "):
            refused()
    assert_idle_soon(engine)
    results = engine.chat([*CHATS, [3]], PARAMS, return_exceptions=True)
    assert isinstance(results[4], RequestError) and isinstance(results[0], Output)
    with pytest.raises(RequestError, match="return_exceptions=1 must be"):
        engine.generate(PROMPTS, PARAMS, return_exceptions=1)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="images is for one prompt"):
        engine.generate(PROMPTS, PARAMS, images=[b""])  # type: ignore[call-overload]


def assert_idle_soon(engine: Engine) -> None:
    """Once what was cancelled has ended."""
    for _ in range(500):
        if engine.stats()["running"] + engine.stats()["waiting"] == 0:
            break
        threading.Event().wait(0.01)
    assert_idle(engine)


def test_map_yields_all(engine: Engine, expected: list[str]) -> None:
    outputs = list(engine.map(PROMPTS, PARAMS, progress=False))
    assert {output.index: output.text for output in outputs} == dict(enumerate(expected))
    ordered = engine.map(iter(PROMPTS), PARAMS, ordered=True, max_in_flight=1)
    assert [output.text for output in ordered] == expected
    mixed = list(engine.map([*PROMPTS, *CHATS, [5, 6]], PARAMS, ordered=True))
    assert [output.text for output in mixed[:4]] == expected and len(mixed) == 9
    assert list(engine.map([], PARAMS)) == []


def test_map_reads_only_what_it_has_room_for(engine: Engine) -> None:
    """Of an iterable without end."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):
            yield f"{read % 7} prompt"

    results = engine.map(endless(), PARAMS, max_in_flight=3)
    for count, _ in enumerate(results, 1):
        assert read <= count + 2 * 4 * 3
        if count == 100:
            break
    results.close()  # type: ignore[attr-defined]
    assert_idle_soon(engine)


def test_map_sends_common_beginnings_together(engine: Engine) -> None:
    """Within a window, which none leaves behind."""
    sent: list[Any] = []
    submit = engine._replicas.submit

    def spy(generation: Any) -> None:
        sent.append(generation.request.prompt_ids)
        submit(generation)

    items = [f"{name} {n}" for n in range(4) for name in ("a", "b", "c")]  # 12, in windows of 8
    engine._replicas.submit = spy  # type: ignore[method-assign]
    try:
        list(engine.map(items, PARAMS, max_in_flight=2))
    finally:
        del engine._replicas.submit
    texts = [engine.tokenizer.decode(ids) for ids in sent]
    assert texts == sorted(items[:8]) + sorted(items[8:])


@pytest.mark.parametrize("ordered", [False, True])
def test_errors_of_map(engine: Engine, ordered: bool) -> None:
    bad = ["abc", 3.5, "abd"]
    results = list(engine.map(bad, PARAMS, ordered=ordered, return_exceptions=True))
    assert sorted(type(result).__name__ for result in results) == [
        "Output", "Output", "RequestError",
    ]  # fmt: skip
    with pytest.raises(RequestError, match=r"prompt=3\.5") as caught:
        list(engine.map(bad, SamplingParams(max_new_tokens=200, ignore_eos=True)))
    assert caught.value.index == 1  # type: ignore[attr-defined]
    assert_idle_soon(engine)

    def broken() -> Iterator[str]:
        yield "abc"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(engine.map(broken(), PARAMS, ordered=ordered, max_in_flight=1))
    assert_idle_soon(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": "abc"}, "items='abc' must be prompts or chats"),
        ({"items": 3}, "items=3 must be prompts or chats"),
        ({"params": 3}, "params=3 must be SamplingParams"),
        ({"ordered": 1}, "ordered=1 must be True or False"),
        ({"max_in_flight": 0}, "max_in_flight=0 must be an integer of at least 1"),
    ],
)
def test_mistakes_raise_before_the_loop(engine: Engine, arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.map(**{"items": PROMPTS} | arguments)


def test_options_are_for_messages(engine: Engine) -> None:
    with pytest.raises(RequestError, match="tool_choice is for messages"):
        list(engine.map(PROMPTS, PARAMS, tool_choice="none"))
    assert len(list(engine.map(CHATS, PARAMS, tool_choice="none"))) == 4


def test_closing_ends_a_map(tiny: TinyModel) -> None:
    engine = Engine(tiny.artifact)
    results = engine.map(itertools.repeat("abc"), PARAMS, max_in_flight=2)
    next(results)
    engine.shutdown()
    with pytest.raises(EngineError):
        list(results)
    with pytest.raises(EngineError):
        engine.map(["abc"], PARAMS)


def test_beginnings_of_all_kinds_can_be_sorted(engine: Engine) -> None:
    items = ["b", [3, 4], [1], engine.prepare("abc"), [{"role": "user", "content": "a"}], None, 5]
    assert len(sorted(map(beginning, items))) == len(items)
