"""Counts the calls of AMD's driver that a decode step makes, on the stand-in for it.

`python -m tests.tools.count_driver_calls [--target CHIP] [--weights TYPE] [FLAG ...]` compiles a
tiny Llama of four layers, decodes one row, and prints how often a step calls each function of the
driver. FLAGs go to iree-compile, so that ways of recording a step's launches can be compared:
`python -m tests.tools.count_driver_calls -- --iree-hal-memoization=false`. Launches, fills and
copies are the same each time; waits for events depend on what was done first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from compile.folder import PLAIN_MLIR
from compile.toolchain import iree_compile
from tests.hip.driver import build_driver, compile_twins
from tests.support.tiny import GPU_SIZES, QUANTIZABLE, TinyModels

NUM_LAYERS, WARM_UP, STEPS = 4, 16, 10
GENERATE = """
    import sys

    from sf_local import Engine
    from tests.hip import control

    with Engine(sys.argv[1], device="hip") as engine:
        deltas = engine.stream([1, 2, 3], max_tokens=40, temperature=0, ignore_eos=True)
        for i, delta in enumerate(deltas):
            control.mark(str(i))
"""


def count_driver_calls(
    folder: Path, chip: str, weights: str, flags: Sequence[str] = ()
) -> Counter[str]:
    """Calls of each function of the driver in STEPS decode steps of one row."""
    with patch.object(
        import_module("compile.build"), "iree_compile", lambda *rest: iree_compile(*rest, *flags)
    ):
        model = TinyModels(lambda: folder)(
            target=chip, weight_dtype=weights, kv_dtype="f16", num_layers=NUM_LAYERS,
            keep_mlir=True, **QUANTIZABLE, **GPU_SIZES,
        )  # fmt: skip
    driver = build_driver(folder)
    if driver is None:
        raise SystemExit("g++ builds the stand-in, and is not installed: apt-get install g++")
    twins = compile_twins(model.artifact / PLAIN_MLIR, folder)
    outcome = driver.run(GENERATE, model.artifact, devices=f"{chip}:512MiB", twins=twins)
    assert outcome.exit_code == 0, outcome.stderr
    steps = range(WARM_UP, WARM_UP + STEPS)
    return Counter(call.function for i in steps for call in outcome.after(str(i)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.count_driver_calls", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--target", default="gfx942")
    parser.add_argument("--weights", default="f16")
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of iree-compile, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calls = count_driver_calls(Path(folder), options.target, options.weights, options.flags)
    for function, count in calls.most_common():
        sys.stdout.write(f"{count / STEPS:8.1f} {function}\n")
    sys.stdout.write(f"{calls.total() / STEPS:8.1f} in all\n")


if __name__ == "__main__":
    main()
