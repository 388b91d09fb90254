"""Models with quantized weights as machine code: each dispatch beside its plain form, and logits
beside float64 numpy on the numbers that the weights stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hip.driver import Driver
from tests.hip.machine_runs import run_beside_twins
from tests.hip.model_calls import Plan
from tests.support.reference import stored_as
from tests.support.tiny import GPU_SIZES, MACHINE_CODE_CHIPS, QUANTIZABLE, TINY, TinyModel

PLAN = Plan(TINY.vocab_size, 8)
CASES = [
    *(("int4", chip) for chip in MACHINE_CODE_CHIPS),
    *(pytest.param("int8", chip, marks=pytest.mark.slow) for chip in ("gfx942", "gfx1100")),
    *(pytest.param(dtype, "gfx1201", marks=pytest.mark.slow) for dtype in ("int4", "int8")),
]


@pytest.mark.parametrize(("dtype", "chip"), CASES)
def test_dispatches_and_logits(
    hip_driver: Driver,
    make_tiny: Callable[..., TinyModel],
    twins_of: Callable[[Path], Path],
    tmp_path: Path,
    dtype: str,
    chip: str,
) -> None:
    model = make_tiny(
        target=chip, weight_dtype=dtype, kv_dtype="f16", keep_mlir=True, **GPU_SIZES, **QUANTIZABLE
    )
    done = run_beside_twins(
        hip_driver, model.artifact, twins_of(model.artifact), PLAN, tmp_path, "random seed=5"
    )
    done.check()
    assert done.names == set(done.dispatches)
    weights = {
        name: stored_as(name, weight, dtype) if weight.ndim == 2 else weight
        for name, weight in model.weights.items()
    }
    done.check_logits(PLAN, model.config, weights)
