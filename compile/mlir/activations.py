"""TODO."""

from __future__ import annotations

import math
from collections.abc import Callable

from compile.mlir.builder import Scalar


def activation(x: Scalar, name: str, exp: Callable[[Scalar], Scalar] | None = None) -> Scalar:
    """GELU in its approximations by tanh, or by a logistic function ("quick"); both are x times a
    logistic function (Hendrycks and Gimpel 2016)."""
    exp = exp or (lambda y: y.math("exp"))
    if name == "gelu_tanh":
        z = (x * x * 0.044715 + 1.0) * x * (2 * math.sqrt(2 / math.pi))
    else:
        assert name == "quick_gelu"
        z = x * 1.702
    return x / (exp(z * -1.0) + 1.0)


def gelu(x: Scalar) -> Scalar:
    return x * 0.5 * ((x * math.sqrt(0.5)).math("erf") + 1.0)
