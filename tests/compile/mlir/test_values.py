"""Arithmetic on SSA values."""

from __future__ import annotations

import pytest

from compile.mlir.builder import Builder


def test_mixed_types_are_refused() -> None:
    b = Builder()
    with pytest.raises(AssertionError, match="f32 and i64"):
        _ = b.scalar(1, "f32") + b.scalar(1, "i64")
