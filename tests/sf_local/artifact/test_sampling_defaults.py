"""What an artifact may recommend is what SamplingParams takes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sf_local import SamplingParams
from sf_local.artifact.sampling_defaults import RULES, check_sampling_default
from sf_local.errors import RequestError

VALUES: list[Any] = [
    -(10**400), -1.5, -1, -0.5, 0, 0.0, 1e-9, 0.5, 1, 1.0, 1.5, 2, 2.5, 50, 10**400, math.nan,
    math.inf, -math.inf, True, False, "1", [1], {},
]  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_what_is_allowed(name: str) -> None:
    def is_taken(value: Any) -> bool:
        try:
            SamplingParams(**{name: value})
        except RequestError:
            return False
        return not (name == "max_new_tokens" and value == 0)  # an answer of no tokens

    def is_allowed(value: Any) -> bool:
        try:
            check_sampling_default(name, value)
        except ValueError as error:
            assert str(error).startswith(f"{name}={value!r} must be ")
            return False
        return True

    assert [is_allowed(value) for value in VALUES] == [is_taken(value) for value in VALUES]


def test_other_parameters() -> None:
    with pytest.raises(ValueError, match="'top_z' is none of max_new_tokens, temperature"):
        check_sampling_default("top_z", 1)
