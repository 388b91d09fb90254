"""Activation functions, as arithmetic on MLIR values."""

from __future__ import annotations

import math
from collections.abc import Callable

from compile.mlir.values import Scalar


def activation(x: Scalar, name: str, exp: Callable[[Scalar], Scalar] | None = None) -> Scalar:
    """An approximation of GELU (Hendrycks and Gimpel 2016) of a float scalar or vector.

    name: "gelu_tanh" or "quick_gelu"; both are x times a logistic function. exp: how to compute
    exp, by default `math.exp` of MLIR.
    """
    exp = exp or (lambda y: y.math("exp"))
    if name == "gelu_tanh":
        z = (x * x * 0.044715 + 1.0) * x * (2 * math.sqrt(2 / math.pi))
    else:
        assert name == "quick_gelu", name
        z = x * 1.702
    return x / (exp(z * -1.0) + 1.0)


def gelu(x: Scalar) -> Scalar:
    """GELU of a float scalar or vector, by the error function."""
    return x * 0.5 * ((x * math.sqrt(0.5)).math("erf") + 1.0)


def gated(gate: Scalar, up: Scalar) -> Scalar:
    """silu(gate) * up, of f32 scalars."""
    return gate / ((gate * -1.0).math("exp") + 1.0) * up
