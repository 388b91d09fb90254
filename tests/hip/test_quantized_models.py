"""Models with quantized weights as machine code: each dispatch beside its plain form, and logits
beside float64 numpy on the numbers that the weights stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hip.driver import Driver
from tests.hip.machine_runs import check_text, run_beside_twins
from tests.hip.model_calls import Plan
from tests.support.reference import stored_as
from tests.support.tiny import GPU_SIZES, MACHINE_CODE_CHIPS, QUANTIZABLE, TINY, TinyModel

PLAN = Plan(TINY.vocab_size, 8)
CASES = [
    *(("int4", chip) for chip in MACHINE_CODE_CHIPS),
    *(pytest.param("int8", chip, marks=pytest.mark.slow) for chip in ("gfx942", "gfx1100")),
    *(pytest.param(dtype, "gfx1201", marks=pytest.mark.slow) for dtype in ("int4", "int8")),
]


TEXTS = [
    pytest.param(dtype, chip, marks=() if dtype == "int4" else pytest.mark.slow)
    for dtype in ("int4", "int8", "f16", "bf16")
    for chip in MACHINE_CODE_CHIPS
]


def make_model(make_tiny: Callable[..., TinyModel], dtype: str, target: str) -> TinyModel:
    """A tiny model of a type; for a CPU with activations that are as exact as a GPU's."""
    is_for_cpu, is_float = target == "cpu", dtype.endswith("f16")
    return make_tiny(
        target=target, weight_dtype=dtype, kv_dtype=dtype if is_float else "f16",
        activation_dtype="int16" if is_for_cpu and not is_float else None,
        keep_mlir=not is_for_cpu, **GPU_SIZES, **QUANTIZABLE,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "chip"), CASES)
def test_dispatches_and_logits(
    hip_driver: Driver,
    make_tiny: Callable[..., TinyModel],
    twins_of: Callable[[Path], Path],
    tmp_path: Path,
    dtype: str,
    chip: str,
) -> None:
    model = make_model(make_tiny, dtype, chip)
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


@pytest.mark.parametrize(("dtype", "chip"), TEXTS)
def test_the_engines_text(
    hip_driver: Driver, make_tiny: Callable[..., TinyModel], dtype: str, chip: str
) -> None:
    """As on the CPU. In f32: test_machine_code; in other quantized types: test_gguf_models."""
    artifact, on_cpu = (make_model(make_tiny, dtype, target).artifact for target in (chip, "cpu"))
    check_text(hip_driver, artifact, on_cpu, [[*range(5, 22), i] for i in range(3)] + [[7, 8, 9]])
