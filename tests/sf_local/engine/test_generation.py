"""Constrained answers of the engine on a tiny model: forced tokens, ends, company, preemption."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sf_local import Engine, SamplingParams
from sf_local.errors import EngineError, GrammarError, RequestError
from sf_local.grammar.mask import Mask
from tests.support.running import all_at_once
from tests.support.tiny import TinyModel

PROMPT = [5, 100, 33, 7, 250, 12]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["kind", "count", "note"],
    "additionalProperties": False,
}
RECORD = SamplingParams(max_new_tokens=120, json_schema=SCHEMA, seed=1)


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine
        stats = engine.stats()
        assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def no_jumps(tiny: TinyModel) -> Iterator[Engine]:
    """An engine that decodes forced tokens one by one."""
    with Engine(tiny.artifact, jump_forward=False) as engine:
        yield engine


def check(text: str) -> None:
    record = json.loads(text)
    assert list(record) == ["kind", "count", "note"]
    assert record["kind"] in ("cat", "dog") and 0 <= record["count"] <= 99
    assert len(record["note"]) <= 8


def steps(engine: Engine, params: SamplingParams) -> tuple[str, float]:
    before = engine.stats()["steps"]
    output = engine.generate(PROMPT, params)
    assert output.finish_reason == "stop"
    return output.text, engine.stats()["steps"] - before


def test_forced_tokens_are_not_decoded(engine: Engine, no_jumps: Engine) -> None:
    """Greedy, so that both ways give the same text."""
    params = replace(RECORD, temperature=0)
    text, jumping = steps(engine, params)
    check(text)
    forced = engine.stats()["forced_tokens"]
    assert forced > 0
    plain_text, plain = steps(no_jumps, params)
    assert plain_text == text
    assert jumping <= plain / 2
    assert no_jumps.stats()["forced_tokens"] == 0


def test_company_does_not_change_the_text(engine: Engine) -> None:
    every = [replace(RECORD, seed=seed) for seed in range(12)]
    alone = [engine.generate(PROMPT, params).text for params in every]
    for text in alone:
        check(text)
    handles = [engine.submit(PROMPT, params) for params in every]
    free = engine.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=3, ignore_eos=True))
    assert [handle.result().text for handle in handles] == alone
    assert free.result().completion_tokens == 50


def test_deltas_concatenate_to_the_text(engine: Engine) -> None:
    for seed in range(5):
        handle = engine.submit(PROMPT, replace(RECORD, seed=seed, stop=["9", 'note": "a']))
        assert "".join(handle) == handle.result().text


def test_the_limit_cuts_the_text_with_reason_length(engine: Engine) -> None:
    whole = engine.generate(PROMPT, replace(RECORD, temperature=0))
    for count in range(1, whole.completion_tokens):
        output = engine.generate(PROMPT, replace(RECORD, temperature=0, max_new_tokens=count))
        assert (output.finish_reason, output.completion_tokens) == ("length", count)
        assert whole.text.startswith(output.text)
    output = engine.generate(
        PROMPT, replace(RECORD, temperature=0, max_new_tokens=whole.completion_tokens)
    )
    assert (output.finish_reason, output.text) == ("stop", whole.text)
    assert engine.generate(PROMPT, replace(RECORD, max_new_tokens=0)).text == ""


def test_a_text_that_is_known_from_the_start(engine: Engine) -> None:
    output = engine.generate(PROMPT, SamplingParams(regex="the only answer"))
    assert (output.text, output.finish_reason) == ("the only answer", "stop")
    output = engine.generate(PROMPT, SamplingParams(regex=""))
    assert (output.text, output.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": r"[a-c]{2,4}(x|yy)\d+"},
        {"ebnf": 'start: "a" item+ "z"\nitem: /[0-9]/ | "-"'},
        {"ebnf": 'root ::= "a" item+ "z"\nitem ::= [0-9] | "-"'},
    ],
)
def test_regexes_and_grammars(engine: Engine, grammar: dict[str, Any]) -> None:
    pattern = grammar.get("regex", "a[0-9-]+z")
    ended = 0
    for seed in range(10):
        output = engine.generate(PROMPT, SamplingParams(max_new_tokens=60, seed=seed, **grammar))
        if output.finish_reason == "stop":
            assert re.fullmatch(pattern, output.text)
            ended += 1
    assert ended > 0


def test_a_stop_string_ends_a_constrained_text(engine: Engine) -> None:
    output = engine.generate(PROMPT, replace(RECORD, stop=['"count"']))
    assert (output.finish_reason, output.matched) == ("stop", '"count"')
    assert output.text in ('{"kind": "cat", ', '{"kind": "dog", ')


def test_penalties_and_logprobs_of_a_constrained_text(engine: Engine) -> None:
    """Of what cannot be otherwise the log probability is 0."""
    params = replace(RECORD, return_logprob=True, frequency_penalty=1.0, min_new_tokens=5)
    output = engine.generate(PROMPT, params)
    check(output.text)
    assert output.logprobs is not None
    assert len(output.logprobs.output) == output.completion_tokens
    assert output.logprobs.output[:5] == [0.0] * 5
    assert all(value <= 0 for value in output.logprobs.output)


def test_grammars_survive_preemption(tiny: TinyModel, engine: Engine) -> None:
    every = [replace(RECORD, seed=seed) for seed in range(6)]
    prompts = [[i + 3] * 30 for i in range(6)]
    expected = [engine.generate(p, q).text for p, q in zip(prompts, every, strict=True)]
    with Engine(tiny.artifact, kv_pages=24) as small:
        with all_at_once(small):
            handles = [small.submit(p, q) for p, q in zip(prompts, every, strict=True)]
        assert [handle.result().text for handle in handles] == expected
        assert small.stats()["preemptions"] > 0
        assert small.stats()["pages_used"] == 0


class Panic(BaseException):
    """As what Rust's panics raise, no Exception."""


@pytest.mark.parametrize("error", [GrammarError("enough"), Panic("enough")])
def test_a_grammar_that_gives_up_fails_its_request_alone(
    engine: Engine, error: BaseException
) -> None:
    handles = [engine.submit(PROMPT, replace(RECORD, seed=seed)) for seed in range(3)]
    generation = engine._generation(PROMPT, RECORD)

    def give_up(mask: Any) -> None:
        raise error

    assert generation.grammar is not None
    generation.grammar.fill_mask = give_up  # type: ignore[method-assign]
    from sf_local.engine.handle import Handle

    with pytest.raises((GrammarError, EngineError), match="enough"):
        Handle(engine, engine._replicas, generation).result()
    for handle in handles:
        check(handle.result().text)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"regex": "a("}, "regex='a\\('"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": {"not": {}}}, "not at #"),
        ({"ebnf": "start: undefined"}, "ebnf"),
        ({"regex": 3}, "regex"),
        ({"json_schema": 3.5}, "json_schema"),
    ],
)
def test_bad_grammars_raise_in_the_caller(
    engine: Engine, grammar: dict[str, Any], message: str
) -> None:
    with pytest.raises(GrammarError, match=message):
        engine.submit(PROMPT, SamplingParams(**grammar))
    assert engine.stats()["waiting"] == 0


def test_one_grammar_at_most() -> None:
    with pytest.raises(RequestError, match="regex and ebnf: give one"):
        SamplingParams(regex="a", ebnf="start: /a/")


def test_an_end_token_comes_only_at_the_end(no_jumps: Engine) -> None:
    """The grammar's own end wins over ignore_eos; nothing else may end it."""
    for ignore_eos in (False, True):
        output = no_jumps.generate(PROMPT, replace(RECORD, seed=4, ignore_eos=ignore_eos))
        check(output.text)
        assert output.finish_reason == "stop"


@pytest.mark.parametrize("error", [ValueError("injected"), Panic("injected")])
def test_a_mistake_harms_nobody_else(engine: Engine, error: BaseException) -> None:
    """Neither a token that does not exist, nor a sampler that fails."""
    other = engine.submit(PROMPT, SamplingParams(max_new_tokens=200, seed=1, ignore_eos=True))
    with pytest.raises(RequestError, match="stop_token_ids: 60000 is no token id"):
        engine.generate(PROMPT, SamplingParams(stop_token_ids=[60000], min_new_tokens=1))
    bad = engine._generation(PROMPT, SamplingParams(frequency_penalty=1.0))

    def fail(*_: Any) -> None:
        raise error

    bad.sampler.change = fail  # type: ignore[method-assign]
    from sf_local.engine.handle import Handle

    with pytest.raises(EngineError, match="injected"):
        Handle(engine, engine._replicas, bad).result()
    assert other.result().completion_tokens == 200


@pytest.mark.parametrize("regex", ["abc def", "", "abc[xy]"])
def test_logprobs_of_a_prompt_before_forced_tokens(engine: Engine, regex: str) -> None:
    engine.flush_cache()
    params = SamplingParams(regex=regex, return_logprob=True, logprob_start_len=0)
    output = engine.generate(PROMPT, params)
    assert re.fullmatch(regex, output.text) and output.logprobs is not None
    assert len(output.logprobs.prompt) == len(output.logprobs.prompt_ids) == len(PROMPT)
    assert all(value is not None for value in output.logprobs.prompt[1:])


def test_a_timeout_cuts_the_logprobs_of_a_prompt(engine: Engine) -> None:
    params = SamplingParams(return_logprob=True, logprob_start_len=0, timeout=0.0)
    output = engine.generate(PROMPT, params)
    assert output.finish_reason == "timeout" and output.logprobs is not None
    assert len(output.logprobs.prompt) == len(output.logprobs.prompt_ids)


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_any_temperature_keeps_to_the_grammar(engine: Engine, temperature: float) -> None:
    for rest in {"frequency_penalty": 1.0}, {"top_k": 10}, {}:
        params = SamplingParams(
            temperature=temperature, regex="[ab]+c", max_new_tokens=40, seed=1, **rest
        )
        assert re.fullmatch("[ab]*c?", engine.generate(PROMPT, params).text)


def test_min_new_tokens_and_the_end_of_a_grammar(engine: Engine) -> None:
    """The end waits, also where it is no stop; where the grammar allows nothing else, it wins."""
    params = SamplingParams(
        regex="[a-z]*", ignore_eos=True, min_new_tokens=6, logit_bias={2: 100.0}, seed=1
    )
    output = engine.generate(PROMPT, params)
    assert (len(output.text), output.finish_reason) == (6, "stop")
    ends = engine.encode("ab")
    params = SamplingParams(regex="[ab]{6}", stop_token_ids=ends, min_new_tokens=3, seed=1)
    output = engine.generate(PROMPT, params)
    assert (output.completion_tokens, output.finish_reason) == (4, "stop")


@pytest.mark.parametrize("grammar", [{"regex": r"[a-c]{2,4}(x|yy)\d+"}, {"json_schema": SCHEMA}])
def test_one_token_is_allowed_just_where_the_mask_has_it(
    engine: Engine, grammar: dict[str, Any]
) -> None:
    """Of all tokens, special ones and ends included, at every point of a text."""
    chance = random.Random(0)
    state = engine._generation(PROMPT, SamplingParams(**grammar)).grammar
    assert state is not None
    for _ in range(30):
        mask = Mask(state)
        single = [token for token in range(engine.vocab_size) if mask.has(token)]
        tokens = mask.tokens().tolist()
        assert single == tokens
        state.accept(chance.choice(tokens))
        if state.is_complete:
            break
