"""Products of a matrix on GPUs, by themselves: their machine code beside numpy, at sizes that no
known model has as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from compile.build import VMFB
from compile.gpu.linear import SUBGROUP
from sf_local.errors import UnsupportedError
from tests.hip.driver import Driver, compile_code_object
from tests.hip.modules import Product, products_module

CHIPS = ("gfx90a", "gfx942", "gfx1100", "gfx1201")
DTYPES = ("f32", "f16", "bf16")
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 21, 33, 64, 100, 128)
# In bf16 on gfx90a, iree-compile's products of these are NaN unless their depth is padded.
ODD = {
    "sixteen_rows": Product(16, 48, 72, False),
    "as_in_the_tiny_llama": Product(8, 48, 72, True),
    "few_columns": Product(8, 40, 24, False),
}
RUN = """
    import sys

    import iree.runtime
    import ml_dtypes
    import numpy as np

    vmfb, inputs, results, dtype = sys.argv[1:5]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="hip")
    dtypes = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
    found = {}
    with np.load(inputs) as given:
        for name in {key.split("-")[0] for key in given}:
            lhs, matrix = (given[f"{name}-{which}"].astype(dtypes[dtype]) for which in ("l", "m"))
            found[name] = module[name](lhs, matrix, given[f"{name}-r"]).to_host()
    np.savez(results, **found)
"""


def random_products(seed: int) -> dict[str, Product]:
    """Rows as prompts and batches have, at least 64 columns, depths that are multiples of 8."""
    rng = np.random.default_rng(seed)
    return {
        f"p{k}": Product(
            int(rng.choice(ROWS)), 8 * int(rng.integers(8, 40)),
            int(rng.choice([8 * rng.integers(1, 36), 64 * rng.integers(1, 12)])),
            bool(rng.integers(2)),
        )
        for k in range(3)
    }  # fmt: skip


def wrong_products(
    driver: Driver,
    cache: Path,
    folder: Path,
    chip: str,
    dtype: str,
    products: Mapping[str, Product],
) -> list[str]:
    """Products of small whole numbers, which nothing rounds, that are not numpy's."""
    rng, given, expected = np.random.default_rng(1), {}, {}
    for name, p in products.items():
        shapes = (p.rows, p.depth), (p.columns, p.depth), (p.rows, p.columns)
        lhs, matrix, residual = (rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes)
        expected[name] = lhs @ matrix.T + (residual if p.has_residual else 0)
        matrix = np.pad(matrix, ((0, 0), (0, p.whole_depth - p.depth)))
        given |= {f"{name}-l": lhs, f"{name}-m": matrix, f"{name}-r": residual}
    mlir, inputs, results = (folder / name for name in ("products.mlir", "in.npz", "out.npz"))
    mlir.write_text(products_module(dtype, products))
    vmfb = compile_code_object(mlir, chip, cache).parent / VMFB
    np.savez(inputs, **given)
    outcome = driver.run(RUN, vmfb, inputs, results, dtype, devices=f"{chip}:512MiB",
                         runs="machine", machine="random")  # fmt: skip
    if outcome.exit_code:
        return [f"{chip} {dtype}: {outcome.stderr[-1000:]}"]
    with np.load(results) as found:
        return [
            f"{chip} {dtype} {products[name]}"
            for name, values in expected.items()
            if not np.array_equal(found[name], values)
        ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_depths_are_whole(dtype: str) -> None:
    """What iree-compile makes of other depths can be wrong."""
    text = products_module(dtype, ODD)
    depths = re.findall(rf"linalg\.generic .* ins\([^)]*x(\d+)x{dtype}>, tensor<[^)]*\) outs", text)
    assert len(depths) == len(ODD) and {int(depth) % SUBGROUP for depth in depths} == {0}


def test_a_depth_that_is_not_aligned_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"36 columns.* multiple of 8; compile .* the CPU"):
        products_module("f16", {"p": Product(8, 48, 36, False)})


def test_odd_products_on_gfx90a(hip_driver: Driver, hip_cache: Path, tmp_path: Path) -> None:
    assert wrong_products(hip_driver, hip_cache, tmp_path, "gfx90a", "bf16", ODD) == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_random_products(hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str) -> None:
    problems = []
    for seed, dtype in enumerate(DTYPES):
        products = random_products(seed)
        problems += wrong_products(hip_driver, hip_cache, tmp_path, chip, dtype, products)
    assert problems == []
