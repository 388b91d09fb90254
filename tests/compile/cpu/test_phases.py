"""The numbers of a kernel's phases."""

from __future__ import annotations

import re

from compile.cpu.kernel import CACHE_LINE, PHASE_COUNTERS, KernelBuilder
from compile.cpu.phases import PhaseTable
from compile.mlir.values import Scalar

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
