"""examples/first_run_on_gpu.py, with the stand-in for AMD's driver."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hip.driver import Driver, Outcome
from tests.support.tiny import GPU_SIZES, TinyModel

SCRIPT = Path(__file__).parents[2] / "examples" / "first_run_on_gpu.py"
START = f"""
    import runpy, sys

    sys.argv[0] = {str(SCRIPT)!r}
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_card(
    hip_driver: Driver,
    make_tiny: Callable[..., TinyModel],
    twins_of: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    sizes = {"prefill_batch_sizes": (1,), "decode_batch_sizes": (1, 2, 4, 8, 16)}
    model = make_tiny(target="gfx942", keep_mlir=True, weight_dtype="int4", **sizes)

    def run(**rest: str) -> Outcome:
        return hip_driver.run(
            START, "--source", model.source, "--vmfb", model.artifact, "--device", "hip:1",
            "--quick", devices="gfx1100:1GiB,gfx942:1GiB", twins=twins_of(model.artifact),
            timeout=900, SF_LOCAL_CACHE=str(tmp_path), **rest,
        )  # fmt: skip

    outcome = run()
    assert outcome.exit_code == 0, outcome.stderr
    for line in (
        "hip:1 *            AMD Instinct MI300X, gfx942, 1.0 of 1.0 GiB free",
        "answers            128 of 128 tokens before another",
        "verdict            as on the CPU",
        "GB/s",
        "ms; MI300X needs at least",
        "weights int4, KV f32, for gfx942",
        "all is well",
    ):
        assert line in outcome.stdout


@pytest.mark.slow
def test_it_compiles_for_the_chip(
    hip_driver: Driver, make_tiny: Callable[..., TinyModel], tmp_path: Path
) -> None:
    """Without the kernels' twins nothing runs after that."""
    outcome = hip_driver.run(
        START, "--source", make_tiny().source, "--weights", "int4", devices="gfx1100:1GiB",
        timeout=500, SF_LOCAL_CACHE=str(tmp_path),
    )  # fmt: skip
    assert "weights int4, KV f16, for gfx1100" in outcome.stdout
    assert outcome.exit_code != 0 and "all is well" not in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "devices", "expected"),
    [
        ([], "", "no AMD GPU (hipErrorNoDevice)"),
        (["--device", "hip:2"], "gfx942:1GiB", "device='hip:2': there are hip:0 (gfx942"),
        (["--device", "cpu"], "gfx942:1GiB", "device='cpu' is no GPU"),
    ],
)
def test_no_card(hip_driver: Driver, arguments: list[str], devices: str, expected: str) -> None:
    outcome = hip_driver.run(START, *arguments, devices=devices)
    assert outcome.exit_code == 1
    assert "stopped: " in outcome.stdout and expected in outcome.stdout


def test_an_artifact_for_another_chip(
    hip_driver: Driver, make_tiny: Callable[..., TinyModel]
) -> None:
    artifact = make_tiny(target="gfx942", keep_mlir=True, **GPU_SIZES).artifact
    outcome = hip_driver.run(START, "--vmfb", artifact, devices="gfx1100:1GiB")
    assert outcome.exit_code == 1
    assert "is for gfx942, and the card is a gfx1100" in outcome.stdout


def test_no_driver(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60,
        env={"IREE_HIP_DYLIB_PATH": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    assert done.returncode == 1 and "libamdhip64.so cannot be loaded" in done.stdout
