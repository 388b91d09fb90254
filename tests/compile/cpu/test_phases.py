"""The numbers of a kernel's phases, and how workgroups wait at their ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compile import build
from compile.cpu import kernel
from compile.cpu.kernel import CACHE_LINE, PHASE_COUNTERS, KernelBuilder
from compile.cpu.phases import PhaseTable
from compile.mlir.values import Scalar
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from tests.support.reference import forward
from tests.support.running import open_runner
from tests.support.tiny import ONE_SIZE, TINY_OPTIONS, TinyModel

BEFORE, LAYER, AFTER = ("set_up", "embed"), ("norm", "attend", "mlp"), ("head",)


def test_every_phase_has_a_number_of_its_own() -> None:
    k, num_layers = KernelBuilder(), 2
    table = PhaseTable(BEFORE, LAYER, AFTER, num_layers)
    before, after = table.before(k), table.after(k)
    numbers = [before[name] for name in (*BEFORE, "exit")] + [after[name] for name in AFTER]
    for i in range(num_layers):
        layer = table.layer(k.scalar(i, "index"))
        numbers += [layer[name] for name in LAYER]
    found = sorted(_value(k, number) for number in numbers)
    assert found[:-1] == list(range(len(found) - 1))
    assert (found[-1] + 1) * PHASE_COUNTERS == table.num_counters
    assert found[-1] * PHASE_COUNTERS + CACHE_LINE == table.exit_counter


def test_workgroups_that_sleep_are_woken(
    make_tiny: Callable[..., TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here whoever waits sleeps at once, as else beside other processes: in 23 phases a step."""
    monkeypatch.setattr(kernel, "SPIN_CYCLES", -1)
    tiny = make_tiny(has_code=False)
    artifact = build(tiny.source, tmp_path / "sleeps", replace(TINY_OPTIONS, **ONE_SIZE))
    tokens = np.random.default_rng(0).integers(0, 300, 8).tolist()

    async def use(runner: ModelRunner) -> np.ndarray:
        rows = [Row([token], i, [1]) for i, token in enumerate(tokens)]
        return np.stack([(await runner.decode([row])).logits[0] for row in rows])

    with open_runner(artifact) as run:
        found = run(use)
    np.testing.assert_allclose(found, forward(tiny.config, tiny.weights, tokens), atol=1e-4)


def _value(k: KernelBuilder, number: Scalar) -> int:
    """What an index is that was written with constants, sums and products."""
    values: dict[str, int] = {}
    for line in k.lines:
        name, op, operands = re.findall(r"(%\d+) = arith\.(\w+) (.*) :", line)[0]
        if op == "constant":
            values[name] = int(operands)
        else:
            a, b = (values[operand] for operand in operands.split(", "))
            values[name] = a + b if op == "addi" else a * b
    return values[number.name]
