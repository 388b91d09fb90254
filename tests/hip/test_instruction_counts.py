"""The way of a wave as the report of kernels works it out, beside what the interpreter executes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from compile.build import VMFB
from compile.tools.gpu_code import parse
from compile.tools.gpu_walk import walk
from tests.hip.driver import Driver, compile_code_object
from tests.hip.modules import Product, products_module
from tests.hip.test_products import RUN

# Without loops, with one, with two, with threads that have nothing to do, with split sums.
PRODUCTS = {
    "one_row": Product(1, 256, 576, False), "deep": Product(1, 64, 4096, True),
    "few_rows": Product(3, 128, 1536, False), "eight_rows": Product(8, 192, 1024, True),
    "a_prompt": Product(64, 128, 512, True), "odd": Product(33, 72, 320, False),
}  # fmt: skip


def walked(assembly: str, name: str, workgroups: int) -> int:
    """Instructions of all waves of a kernel without arguments, as of its first workgroup."""
    code = parse(assembly)[name]
    metadata = assembly[assembly.index("amdhsa.kernels:") :]
    sizes = re.findall(
        r"\.name:\s+'?([\w$]+)'?\n.*?\.reqd_workgroup_size:\n\s+- (\d+)\n\s+- (\d+)\n\s+- (\d+)",
        metadata, re.S,
    )  # fmt: skip
    x, y, z = next(map(int, size) for kernel, *size in sizes if kernel == name)
    threads = [i | j << 10 | k << 20 for k in range(z) for j in range(y) for i in range(x)]
    waves = [threads[k : k + code.lanes] for k in range(0, len(threads), code.lanes)]
    ways = [walk(code, {}, wave) for wave in waves]
    assert not any(way.unknown for way in ways)
    return workgroups * sum(sum(way.counts) for way in ways)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["gfx942", "gfx1100", "gfx1201"])
def test_a_walk_is_the_interpreters(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str
) -> None:
    """Nearly all to the instruction. What depends on registers that were spilled is counted as
    executed by all waves, and the assembly of a few kernels is not quite the object's."""
    mlir, inputs = tmp_path / "products.mlir", tmp_path / "in.npz"
    mlir.write_text(products_module("f16", PRODUCTS))
    code = compile_code_object(mlir, chip, hip_cache)
    given = {}
    for name, p in PRODUCTS.items():
        shapes = {"l": (p.rows, p.depth), "m": (p.columns, p.whole_depth), "r": (p.rows, p.columns)}
        given |= {f"{name}-{which}": np.zeros(s, np.float32) for which, s in shapes.items()}
    np.savez(inputs, **given)
    outcome = hip_driver.run(RUN, code.parent / VMFB, inputs, tmp_path / "out.npz", "f16",
                             devices=f"{chip}:512MiB", runs="machine")  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assembly = code.with_suffix(".rocmasm").read_text()
    grids = {
        call.notes["name"]: math.prod(call.notes[f"grid_{axis}"] for axis in "xyz")
        for call in outcome.of("hipModuleLaunchKernel")
    }
    executed = {call.notes["name"]: call.notes["steps"] for call in outcome.of("interpret")}
    assert len(executed) >= len(PRODUCTS)
    shares = {name: walked(assembly, name, grids[name]) / steps for name, steps in executed.items()}
    print(shares)
    assert all(0.99 <= share <= 1.07 for share in shares.values()), shares
    assert np.median(list(shares.values())) == 1, shares
