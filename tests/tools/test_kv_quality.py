"""How numbers are rounded to types of the KV cache."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike

from tests.tools.kv_quality import rounded_to


@pytest.mark.parametrize(
    ("dtype", "most", "least"),
    [(ml_dtypes.float8_e4m3fn, 448, 2**-9), (ml_dtypes.float8_e4m3fnuz, 240, 2**-10)],
)
def test_rounding_to_eight_bits(dtype: DTypeLike, most: float, least: float) -> None:
    """To the nearest, ties to even; what is too large becomes the largest, and NaN stays."""
    given = np.array([1e6, -1e6, np.nan, 17.0, 19.0, -1.06, least, least / 2.1], np.float32)
    found = rounded_to(dtype)(given)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [most, -most, np.nan, 16, 20, -1, least, 0])
