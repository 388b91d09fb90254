"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sf_local.model.arrays import Array
from sf_local.sampling.logits import Floats

Meanwhile = Callable[[], None]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class OutputSpec:
    """What a call is for.

    scales: by which each row's logits are summed up; None for 1. num_logits: rows, from the first
    on, whose logits are needed; None for all; what sums them up is enough for the others. copy:
    else results are let go of before the next call. meanwhile: called while the device runs.
    """

    scales: Sequence[float] | None = None
    num_logits: int | None = None
    copy: bool = True
    meanwhile: Meanwhile = _nothing

    def inv_temperatures_of(self, num_rows: int) -> Floats:
        return np.array(self.scales or [1.0] * num_rows, np.float32)


DEFAULT_OUTPUTS = OutputSpec()


def fetched_results(
    results: Sequence[Any], num_rows: int, spec: OutputSpec, are_summed_up: bool
) -> list[Any]:
    """The first rows of the results, or None; the others are padding."""
    if not are_summed_up:
        return [array.view(slice(0, num_rows)) for array in results]
    logits, *sums = results
    num_logits = num_rows if spec.num_logits is None else spec.num_logits
    needed = logits.view(slice(0, num_logits)) if num_logits else None
    return [needed, *(array.view(slice(0, num_rows)) for array in sums)]


def as_float32(values: Array, copy: bool) -> Array:
    """Floats as f32; without `copy` in the same memory where possible."""
    dtype = values.dtype if values.dtype == np.int64 else np.float32
    return values.astype(dtype, copy=copy)
