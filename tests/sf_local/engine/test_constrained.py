"""Random grammars on SmolLM2 at temperature 1, eight at a time: what finishes is valid."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sf_local import Engine, SamplingParams
from sf_local.errors import GrammarError
from tests.support.grammars import regexes, schemas

pytestmark = pytest.mark.model
ROWS = 8
DEFAULT, ALL = pytest.param(1, id="some"), pytest.param(10, id="all", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with Engine(smollm2, max_running=ROWS) as engine:
        yield engine
        assert engine.stats()["pages_used"] == 0


def is_json_of(schema: Any, text: str) -> bool:
    return bool(Draft202012Validator(schema).is_valid(json.loads(text)))


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[dict[str, Any]]:
    """Grammars, as Hypothesis draws them in lists of eight."""
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=count // ROWS,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(strategy, min_size=ROWS, max_size=ROWS))
    def batch(grammars: list[dict[str, Any]]) -> None:
        found.extend(grammars)

    batch()
    return found


def run_random(
    engine: Engine, strategy: st.SearchStrategy[Any], count: int, check: Callable[[Any, str], bool]
) -> None:
    """Generate for all; a row that is done is the next one's, so that no step has few rows."""
    total: Counter[str] = Counter()
    handles = []
    for number, grammar in enumerate(drawn(strategy, count)):
        [(name, value)] = grammar.items()
        try:
            params = SamplingParams(
                max_new_tokens=256, temperature=1, top_p=1, seed=number % ROWS, **grammar
            )
            handles.append((value, engine.submit("Here is an example:\n", params)))
        except GrammarError as error:
            assert name in str(error)
            total["refused"] += 1
            print(error)
    for value, handle in handles:
        output = handle.result()
        total["finished" if output.finish_reason == "stop" else "cut"] += 1
        if output.finish_reason == "stop":
            assert check(value, output.text), (value, output.text)
    print(total)
    assert total["refused"] <= 0.1 * total.total()
    assert total["finished"] >= 0.95 * (total["finished"] + total["cut"])
    assert total.total() >= 0.9 * count


@pytest.mark.parametrize("scale", [DEFAULT, ALL])
def test_json_schemas(engine: Engine, scale: int) -> None:
    run_random(engine, schemas().map(lambda s: {"json_schema": s}), 104 * scale, is_json_of)


@pytest.mark.parametrize("scale", [DEFAULT, ALL])
def test_regexes(engine: Engine, scale: int) -> None:
    def matches(regex: str, text: str) -> bool:
        return re.fullmatch(regex, text, re.ASCII) is not None

    run_random(engine, regexes().map(lambda r: {"regex": r}), 56 * scale, matches)
