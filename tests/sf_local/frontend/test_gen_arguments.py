"""Every argument of `sgl.gen`, on a tiny model: each has an effect, and a row in a README."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl

import sf_local
from sf_local.errors import RequestError
from tests.support.sglang_state import error_of
from tests.support.tiny import TinyModel

Backend = sf_local.ShortfinLocal
EOS = 2
README = (Path(__file__).parents[3] / "sf_local" / "README.md").read_text()


@pytest.fixture(scope="module")
def backend(tiny: TinyModel) -> Iterator[Backend]:
    with sgl.ShortfinLocal(vmfb=tiny.artifact) as backend:
        yield backend


def gen(backend: Backend, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """What `sgl.gen` gives after a short prompt, and its meta info; greedy, unless told."""
    arguments = {"temperature": 0, "max_tokens": 24} | arguments

    @sgl.function
    def program(s: Any) -> None:
        s += "abc"
        s += sgl.gen("out", **arguments)

    state = program.run(backend=backend, ignore_eos=True)
    if (error := error_of(state)) is not None:
        raise error
    return state["out"], state.get_meta_info("out")


def greedy(backend: Backend) -> str:
    return str(gen(backend)[0])


def check_name(backend: Backend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("mine", max_tokens=4) + sgl.gen(max_tokens=4)

    state = program.run(backend=backend)
    assert state.text().startswith("abc" + state["mine"]) and state.error() is None


def check_max_tokens(backend: Backend) -> None:
    for count in (0, 1, 7):
        assert gen(backend, max_tokens=count)[1]["completion_tokens"] == count


def check_min_tokens(backend: Backend) -> None:
    """End tokens, here one that would come first, are forbidden before."""
    (first,) = backend.engine.generate("abc", greedy_params(1)).token_ids
    assert gen(backend, stop_token_ids=[first])[1]["completion_tokens"] == 1
    assert gen(backend, stop_token_ids=[first], min_tokens=9)[1]["completion_tokens"] >= 9


def check_n(backend: Backend) -> None:
    texts, infos = gen(backend, n=3, temperature=1.0)
    assert len(texts) == len(infos) == len(set(texts)) == 3


def check_stop(backend: Backend) -> None:
    free = greedy(backend)
    stop = free[10:12]
    assert gen(backend, stop=stop)[0] == free[: free.index(stop)]
    assert gen(backend, stop=["no such text", stop])[0] == free[: free.index(stop)]


def check_stop_token_ids(backend: Backend) -> None:
    ids = backend.engine.generate("abc", greedy_params(24)).token_ids
    meta = gen(backend, stop_token_ids=[ids[9]])[1]
    assert meta["finish_reason"] == {"type": "stop", "matched": ids[9]}
    assert meta["completion_tokens"] == ids.index(ids[9]) + 1


def check_temperature(backend: Backend) -> None:
    seeded = backend.using(seed=1)
    assert greedy(seeded) == greedy(backend)
    assert gen(seeded, temperature=1.0)[0] != greedy(backend)


def check_narrowing(backend: Backend, **narrow: Any) -> None:
    """The narrowest choice of a sampled token is the likeliest one."""
    wide = [gen(backend.using(seed=i), temperature=1.0)[0] for i in range(2)]
    narrowed = [gen(backend.using(seed=i), temperature=1.0, **narrow)[0] for i in range(2)]
    assert narrowed == [greedy(backend)] * 2 != wide


def check_penalty(backend: Backend, **penalty: Any) -> None:
    """The greedy answer circles among few tokens; penalized, it moves on."""
    plain, penalized = (
        {
            entry[1]
            for entry in gen(backend, return_logprob=True, **rest)[1]["output_token_logprobs"]
        }
        for rest in ({}, penalty)
    )
    assert len(penalized) > 2 * len(plain)


def check_ignore_eos(backend: Backend) -> None:
    eager = backend.using(logit_bias={EOS: 1e4})
    meta = gen(eager, ignore_eos=False)[1]
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert meta["completion_tokens"] == 1
    assert gen(eager, ignore_eos=True)[1]["finish_reason"] == {"type": "length", "length": 24}


def check_return_logprob(backend: Backend) -> None:
    assert not any("logprobs" in key for key in gen(backend)[1])
    meta = gen(backend, return_logprob=True)[1]
    assert len(meta["output_token_logprobs"]) == 24 and not meta["input_token_logprobs"]
    assert "output_top_logprobs" not in meta


def check_logprob_start_len(backend: Backend) -> None:
    for start, count in ((0, 3), (2, 1), (-1, 0)):
        meta = gen(backend, return_logprob=True, logprob_start_len=start)[1]
        assert len(meta["input_token_logprobs"]) == count
    with pytest.raises(RequestError, match="logprob_start_len=3"):
        gen(backend, return_logprob=True, logprob_start_len=3)


def check_top_logprobs_num(backend: Backend) -> None:
    meta = gen(backend, return_logprob=True, top_logprobs_num=4)[1]
    assert [len(top) for top in meta["output_top_logprobs"]] == [4] * 24


def check_return_text_in_logprobs(backend: Backend) -> None:
    plain = gen(backend, return_logprob=True)[1]["output_token_logprobs"]
    meta = gen(backend, return_logprob=True, return_text_in_logprobs=True)[1]
    assert [entry[:2] for entry in meta["output_token_logprobs"]] == [e[:2] for e in plain]
    assert {text for _, _, text in plain} == {None}
    assert all(isinstance(text, str) for _, _, text in meta["output_token_logprobs"])


def check_dtype(backend: Backend) -> None:
    for dtype, read in ((int, int), ("float", float), ("bool", {"True": 1, "False": 0}.get)):
        assert read(gen(backend, dtype=dtype)[0]) is not None
    with pytest.raises(RequestError, match="dtype='date' must be int, float, str or bool"):
        gen(backend, dtype="date")


def check_choices(backend: Backend) -> None:
    text, meta = gen(backend, choices=["red", "green"])
    assert text in ("red", "green") and len(meta["input_token_logprobs"]) == 2


def check_choices_method(backend: Backend) -> None:
    method = sgl.unconditional_likelihood_normalized
    meta = gen(backend, choices=["red", "green"], choices_method=method)[1]
    assert len(meta["unconditional_token_logprobs"]) == 2


def check_regex(backend: Backend) -> None:
    pattern = r"(\d{3}-){2}[xyz]"
    assert re.fullmatch(pattern, gen(backend, regex=pattern)[0])


def check_json_schema(backend: Backend) -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}},
                         "required": ["a"], "additionalProperties": False})  # fmt: skip
    assert json.loads(gen(backend, json_schema=schema)[0])["a"] in (1, 2)


def greedy_params(count: int) -> sf_local.SamplingParams:
    return sf_local.SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


CASES: dict[str, Callable[[Backend], None]] = {
    "name": check_name,
    "max_tokens": check_max_tokens,
    "min_tokens": check_min_tokens,
    "n": check_n,
    "stop": check_stop,
    "stop_token_ids": check_stop_token_ids,
    "temperature": check_temperature,
    "top_p": lambda backend: check_narrowing(backend, top_p=1e-6),
    "top_k": lambda backend: check_narrowing(backend, top_k=1),
    "min_p": lambda backend: check_narrowing(backend, min_p=1.0),
    "frequency_penalty": lambda backend: check_penalty(backend, frequency_penalty=2.0),
    "presence_penalty": lambda backend: check_penalty(backend, presence_penalty=2.0),
    "ignore_eos": check_ignore_eos,
    "return_logprob": check_return_logprob,
    "logprob_start_len": check_logprob_start_len,
    "top_logprobs_num": check_top_logprobs_num,
    "return_text_in_logprobs": check_return_text_in_logprobs,
    "dtype": check_dtype,
    "choices": check_choices,
    "choices_method": check_choices_method,
    "regex": check_regex,
    "json_schema": check_json_schema,
}


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize("argument", inspect.signature(sgl.gen).parameters)
def test_no_argument_is_dropped(backend: Backend, argument: str) -> None:
    """One that SGLang adds fails here, until it has a case and a row."""
    assert argument in CASES, f"sgl.gen({argument}=) has no case"
    assert re.search(rf"^\|[^|]*`{argument}`[^|]*\|", README, re.M), f"no row for {argument}"
    CASES[argument](backend)
    assert backend.engine.stats()["pages_used"] == 0
