"""SamplingParams refuses every value that cannot work; Request slices prompt and answer as one."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.engine.engine import Engine
from sf_local.errors import RequestError, SfLocalError
from sf_local.request.checks import shown
from sf_local.request.output import Output
from sf_local.request.params import MAX_STOPS, ResolvedParams, SamplingOptions, SamplingParams
from sf_local.request.request import Request

BAD_VALUES: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [-1, True, 1.0, math.nan, math.inf, "8", [8]]),
    ("temperature", [-0.1, math.nan, math.inf, -math.inf, True, "1", [1.0], 1j, 10**400]),
    ("top_p", [0, 0.0, -0.5, 1.0001, 2, math.nan, math.inf, True, "0.9", (0.9,)]),
    ("top_k", [0, -2, False, True, 1.5, math.nan, math.inf, "40"]),
    ("ignore_eos", [0, 1, "yes", 1.0]),
    ("return_logprob", [0, 1, "yes"]),
    ("min_new_tokens", [-1, True, 1.0, "8"]),
    ("min_p", [-0.1, 1.1, math.nan, True, "0.1"]),
    ("frequency_penalty", [-2.1, 2.1, math.nan, math.inf, True, "0.1"]),
    ("presence_penalty", [-2.1, 2.1, math.nan, math.inf, True, "0.1"]),
    ("repetition_penalty", [0, 0.0, -1, 2.1, math.nan, True, "1"]),
    ("logprob_start_len", [-2, True, 1.0, "0"]),
    ("top_logprobs_num", [-1, True, 1.0, "5", 1001]),
    ("logit_bias", [5, "1", [1], [(1, 2.0)]]),
    ("seed", [2**64, -1, True, 0.5, math.nan, "7", [7]]),
    ("stop", [5, 1.5, True, b"end", {"end"}, ["end", 5], ["end", None], [["end"]], [b"end"]]),
    ("stop", [[str(i) for i in range(MAX_STOPS + 1)]]),
    ("stop_token_ids", [5, True, "12", b"12", {5}, 1.5, [5, -1], [5, 1.0], [True], ["5"], [None]]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{str(value)[:20]}")
        for name, values in BAD_VALUES
        for value in values
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    culprits = value if name == "stop_token_ids" and isinstance(value, list) else [value]
    assert any(f"{name}={shown(culprit)}" in message for culprit in culprits)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, SfLocalError)


def test_bad_values_say_what_is_allowed() -> None:
    for params, allowed in [
        ({"max_new_tokens": -1}, "must be an integer of at least 0"),
        ({"temperature": -1}, "must be a number at least 0.0 and finite"),
        ({"top_p": 0}, "must be a number above 0.0 and at most 1.0"),
        ({"top_k": 0}, "use -1 for all tokens, or at least 1"),
        ({"top_k": -2}, "must be an integer of at least -1"),
        ({"ignore_eos": 1}, "must be True or False"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "must be an integer from 0 to 8"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias=-1 must be an integer of at least 0"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias='a' must be an integer"),
        ({"logit_bias": {7: math.nan}}, r"logit_bias\[7\]=nan must be a number at least"),
        ({"logit_bias": {7: "much"}}, r"logit_bias\[7\]='much' must be a number"),
        ({"regex": "a", "json_schema": {}}, "regex and json_schema: give one of them"),
        ({"stop": 1}, f"must be a str or at most {MAX_STOPS} of them"),
        ({"stop_token_ids": 1}, "must be a list of token ids"),
    ]:
        with pytest.raises(RequestError, match=allowed):
            SamplingParams(**params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"max_new_tokens": 0},
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"temperature": np.float64(0.5)},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 1},
        {"top_k": 10**9},
        {"min_new_tokens": 128},
        {"min_p": 0},
        {"min_p": 1.0},
        {"frequency_penalty": -2, "presence_penalty": 2.0},
        {"repetition_penalty": 2},
        {"logit_bias": {0: -10_000, 49151: 1.5}},
        {"logprob_start_len": 0, "top_logprobs_num": 1000},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"seed": None},
        {"stop": [str(i) for i in range(MAX_STOPS)]},
    ],
)
def test_values_on_the_boundary_are_taken(good: dict[str, Any]) -> None:
    params = SamplingParams(**good)
    assert all(list_of(getattr(params, name)) == list_of(v) for name, v in good.items())


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (9.9e-7, True), (1e-6, False), (1.0, False)]
)
def test_is_greedy(temperature: float, greedy: bool) -> None:
    assert ResolvedParams(temperature=temperature).is_greedy is greedy


@pytest.mark.parametrize(
    ("given_stop", "stop"),
    [
        (None, None),
        ((), ()),
        ("", ()),
        ("end", ("end",)),
        (["end"], ("end",)),
        (("b", "a"), ("b", "a")),
        (["b", "a", "b", "", "a"], ("b", "a")),
        (["", ""], ()),
    ],
)
def test_stop_becomes_a_tuple(given_stop: Any, stop: tuple[str, ...] | None) -> None:
    assert SamplingParams(stop=given_stop).stop == stop


@pytest.mark.parametrize(
    ("given_ids", "ids"),
    [(None, None), ([], ()), ([5, 0], (5, 0)), ((7,), (7,)), (range(2), (0, 1))],
)
def test_stop_token_ids_become_a_tuple(given_ids: Any, ids: tuple[int, ...] | None) -> None:
    assert SamplingParams(stop_token_ids=given_ids).stop_token_ids == ids


def test_what_is_not_given_is_none() -> None:
    """And has a value once it is resolved, unless none is one."""
    assert SamplingParams().given() == {}
    assert SamplingParams(top_k=5, stop=[], seed=0).given() == {"top_k": 5, "stop": (), "seed": 0}
    names = {field.name for field in fields(ResolvedParams)}
    optional = {"regex", "json_schema", "ebnf", "seed", "timeout"}
    assert ResolvedParams().given().keys() == names - optional
    assert ResolvedParams(**dict.fromkeys(names)) == ResolvedParams()
    with pytest.raises(RequestError, match="min_new_tokens=129 must be an integer from 0 to 128"):
        ResolvedParams(min_new_tokens=129)


def test_keyword_arguments_are_the_fields() -> None:
    options = {name: ref.__forward_arg__ for name, ref in SamplingOptions.__annotations__.items()}
    assert options.pop("max_tokens") == options["max_new_tokens"]
    assert options == {field.name: field.type for field in fields(SamplingParams)}


def test_from_dict() -> None:
    values = {"temperature": 0.5, "stop": ["a"], "seed": None}
    assert SamplingParams.from_dict(values) == SamplingParams(temperature=0.5, stop=["a"])
    assert SamplingParams.from_dict({}) == SamplingParams()
    assert SamplingParams.from_dict({"max_tokens": 8}) == SamplingParams(max_new_tokens=8)
    given = SamplingParams(top_k=5, logit_bias={3: 1.0}, json_schema={"type": "object"})
    assert SamplingParams.from_dict(given.given()) == given


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 0.5}, "temprature=0.5: there is no such parameter; did you mean temp"),
        ({"max_new_token": 5}, "did you mean max_new_tokens?"),
        ({"banana": 5}, "banana=5: there is no such parameter; use one of max_tokens, max_new"),
        ({"best_of": 5}, "best_of=5: there is no such parameter; did you mean n?"),
        ({"response_format": {}}, "did you mean json_schema?"),
        ({"stream": True}, "call `stream` or `stream_chat`"),
        ({"choices": ["a"]}, "`Engine.score` compares whole texts"),
        ({5: 5}, "5=5: there is no such parameter; use one of"),
        ({"max_tokens": 5, "max_new_tokens": 5}, "max_tokens and max_new_tokens: give one"),
        ({"max_tokens": -1}, "max_tokens=-1 must be an integer of at least 0"),
        ([("top_k", 5)], "[('top_k', 5)] must be a dict of sampling parameters"),
        (None, "None must be a dict"),
    ],
)  # fmt: skip
def test_dicts_that_are_none(values: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_dict(values)
    assert message in str(caught.value)


NUMBERS: list[tuple[str, Any, Any]] = [
    *((name, 5, np.int64) for name in ("max_new_tokens", "top_k", "seed", "n", "priority")),
    ("max_new_tokens", 5, np.uint8),
    ("top_logprobs_num", 5, np.array),
    ("temperature", 0.5, np.float32),
    ("temperature", 0.5, np.float16),
    ("temperature", 0.5, np.longdouble),
    ("top_p", 0.5, np.array),
    ("min_p", 1, np.int32),
    ("timeout", 0.25, np.float64),
    ("ignore_eos", True, np.bool_),
    ("return_logprob", False, np.array),
]


@pytest.mark.parametrize(("name", "value", "kind"), NUMBERS)
def test_numbers_of_numpy_become_pythons(name: str, value: Any, kind: Any) -> None:
    found = getattr(SamplingParams(**{name: kind(value)}), name)
    assert found == value and type(found) is type(value)


def test_numbers_of_numpy_in_lists() -> None:
    params = SamplingParams(
        stop_token_ids=list(np.array([1, 2])), logit_bias={np.int64(3): np.float32(0.5)}
    )
    assert params.stop_token_ids == (1, 2) and params.logit_bias == {3: 0.5}
    found = [*params.stop_token_ids, *params.logit_bias, *params.logit_bias.values()]
    assert [type(number) for number in found] == [int, int, int, float]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", np.float64(5)), ("max_new_tokens", np.bool_(True)),
        ("max_new_tokens", np.array([5])), ("temperature", np.float32("nan")),
        ("temperature", np.bool_(True)), ("temperature", np.complex64(1)),
        ("temperature", np.str_("1")), ("ignore_eos", np.int64(1)), ("top_k", np.array(0)),
    ],
)  # fmt: skip
def test_numbers_of_numpy_that_are_wrong(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}="):
        SamplingParams(**{name: value})


def test_params_are_values() -> None:
    stop = ["end"]
    params = SamplingParams(stop=stop)
    stop.append("more")
    assert params.stop == ("end",)
    assert params == SamplingParams(stop=("end",)) and hash(params) == hash(
        SamplingParams(stop="end")
    )
    with pytest.raises(AttributeError):
        params.seed = 3  # type: ignore[misc]


@settings(max_examples=200)
@given(st.lists(st.integers()), st.lists(st.integers()), st.integers(0, 30), st.integers(0, 30))
def test_tokens_slices_like_a_list(
    prompt: list[int], output: list[int], start: int, end: int
) -> None:
    request = Request(prompt, ResolvedParams(), 10, output_ids=output)
    whole = prompt + output
    assert request.num_tokens == len(whole)
    assert request.tokens(start, end) == whole[start:end]
    assert request.tokens(0, request.num_tokens) == whole
    assert Request(tuple(prompt), ResolvedParams(), 10).tokens(start, end) == prompt[start:end]


def test_requests_share_nothing() -> None:
    first, second = (Request([1], ResolvedParams(), 1) for _ in range(2))
    assert first != second and len({first, second}) == 2
    first.append(5)
    first.pages.append(5)
    assert second.output_ids == [] and second.pages == []


def test_reprs_leave_out_what_is_empty() -> None:
    assert repr(SamplingParams(temperature=0)) == "SamplingParams(temperature=0)"
    assert "top_k=-1" in repr(ResolvedParams())  # which tells what holds
    output = Output("Hi", [5], "length", None, 3, 1, 0, 0.5, 0.5, index=2, schema=int)
    assert repr(output) == (
        "Output(text='Hi', token_ids=[5], finish_reason='length', prompt_tokens=3, "
        "completion_tokens=1, cached_tokens=0, time_to_first_token=0.5, latency=0.5, index=2)"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(SamplingParams, max_tokens=3), "max_tokens=3: .*; did you mean max_new_tokens?"),
        (partial(Engine, "nowhere", devise="cpu"), "devise='cpu': .*; did you mean device?"),
        (partial(Engine, "nowhere", n_threads=2), "n_threads=2: .*; did you mean num_threads?"),
        (partial(Engine, model="nowhere"), "model='nowhere': .*; did you mean vmfb?"),
        (partial(Engine.from_source, "nowhere", n_ctx=64), "n_ctx=64: .*max_seq_len"),
        (partial(Engine.from_source, "nowhere", kv_memry=1), "did you mean kv_memory?"),
    ],
)
def test_arguments_that_there_are_not(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()
