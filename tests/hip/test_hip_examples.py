"""The guide's examples on SmolLM2, on a stand-in for a GPU: the same text as on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from compile import BuildOptions, build
from tests.hip.driver import Driver

pytestmark = [pytest.mark.model, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
    import runpy, sys

    sys.argv = sys.argv[1:]
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model by device, of the same code and in the same types."""
    folder = tmp_path_factory.mktemp("smollm2")
    options = {
        "weight_dtype": "f16", "prefill_batch_sizes": (1,), "decode_batch_sizes": (1, 4)
    }  # fmt: skip
    return {
        "cpu": build("demo", folder / "cpu", BuildOptions(row_major=True, **options)),
        "hip": build("demo", folder / "hip", BuildOptions("gfx1100", **options), keep_mlir=True),
    }


# Batches and streams are among the work of test_hip_model
@pytest.mark.parametrize("name", ["multi_turn", "fork", "constrained"])
def test_example(
    hip_driver: Driver, artifacts: dict[str, Path], twins_of: Callable[[Path], Path], name: str
) -> None:
    texts = []
    for device, artifact in artifacts.items():
        outcome = hip_driver.run(
            RUN,
            EXAMPLES / f"{name}.py",
            *("--vmfb", artifact, "--device", device),
            devices="gfx1100:2GiB",
            twins=twins_of(artifacts["hip"]),
            delay_us=0,
            timeout=600,
        )
        assert outcome.exit_code == 0, outcome.stderr
        assert bool(outcome.of("hipModuleLaunchKernel")) == (device == "hip")
        texts.append(re.sub(r"after \d+ ms, then \d+ tokens", "", outcome.stdout))
    assert texts[0] == texts[1] and len(texts[0]) > 20
