"""Jinja as chat templates expect it: what reaches a template, and what a template may do."""

from __future__ import annotations

import dataclasses
import enum
import json
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_local.text.jinja import compile_template, plain_data

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


class Loud(str):
    def __str__(self) -> str:
        raise AssertionError("a template would call it")


class Half(float):
    pass


class Color(enum.IntEnum):
    RED = 3


@dataclasses.dataclass
class Point:
    x: Any
    y: Any


class Model:
    def model_dump(self) -> dict[str, Any]:
        return {"of": (1, 2)}


@given(JSON)
def test_json_is_copied_as_it_is(value: Any) -> None:
    copy = plain_data(value)
    assert copy == value and json.dumps(copy) == json.dumps(value)
    assert copy is not value or not isinstance(value, list | dict)


def test_what_is_no_json() -> None:
    """Subclasses become what they are made of, and objects what they hold or their names."""
    copy = plain_data({
        Loud("key"): [Loud("text"), Half(0.5), Color.RED, np.float32(2), (1, "b")],
        "more": [Point(1, Model()), Point, object()],
    })  # fmt: skip
    assert copy == {
        "key": ["text", 0.5, 3, 2.0, (1, "b")],
        "more": [{"x": 1, "y": {"of": (1, 2)}}, "<type>", "<object>"],
    }
    assert [type(x) for x in copy["key"]] == [str, float, int, float, tuple]
    assert {type(x) for x in copy} == {str}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ dict.fromkeys(['a', 'b'], 1) | tojson }}", '{"a": 1, "b": 1}'),
        ("{{ dict(a=1)['a'] }}", "1"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%Y') }}", "2026"),
    ],
)
def test_what_templates_may_do(text: str, expected: str) -> None:
    assert compile_template(text, lambda: datetime(2026, 1, 2)).render() == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{% set ns = namespace(_private=1) %}", "namespaces cannot hold '_private'"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "namespaces cannot hold"),
        ("{{ dict.__class__.mro() }}", "unsafe|undefined"),
    ],
)
def test_what_templates_may_not_do(text: str, error: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=error):
        compile_template(text, datetime.now).render()
