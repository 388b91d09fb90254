"""How near a GPU's distributions of next tokens are to the CPU's, from artifacts of one source:
`python tests/tools/gpu_quality.py [--source demo] [--chip gfx1100] [--weights int4]`.

Mean KL divergence in nats over golden text, and the share of steps with the same likeliest token.
The GPU is the stand-in for AMD's driver, which runs the plain forms of our kernels and the CPU
twins of IREE's. Ends with 1 if the divergence is above 1e-3. It takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from compile import BuildOptions, build
from compile.folder import PLAIN_MLIR
from tests.hip.driver import Driver, build_driver, compile_twins
from tests.support.tiny import DATA, ONE_SIZE

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "hip"  # as the tests have it
GOLDEN = DATA / "smollm2_greedy.json"
MOST = 1e-3  # nats
STEPS = """
    import json, sys
    from pathlib import Path

    import numpy as np
    from tests.support.perplexity import step_logprobs

    artifact, device, cases, found = sys.argv[1:]
    steps = step_logprobs(Path(artifact), json.loads(cases), device)
    np.save(found, np.concatenate(steps))
"""


def run(driver: Driver, folder: Path, args: argparse.Namespace) -> bool:
    """Print what was found; whether it is near enough."""
    cases = json.dumps(json.loads(GOLDEN.read_text())["cases"][: args.cases])
    found = []
    for target in ("cpu", args.chip):
        is_gpu = target != "cpu"
        options = BuildOptions(
            target, weight_dtype=args.weights, kv_dtype="f16", max_seq_len=1024, **ONE_SIZE
        )
        artifact = build(args.source, folder / target, options, keep_mlir=is_gpu)
        outcome = driver.run(
            STEPS, artifact, "hip" if is_gpu else "cpu", cases, folder / f"{target}.npy",
            devices=f"{args.chip}:4GiB", timeout=3600,
            twins=compile_twins(artifact / PLAIN_MLIR, CACHE) if is_gpu else None,
        )  # fmt: skip
        if outcome.exit_code:
            sys.exit(outcome.stderr)
        found.append(np.load(folder / f"{target}.npy").astype(np.float64))
    on_cpu, on_gpu = found
    divergence = float((np.exp(on_cpu) * (on_cpu - on_gpu)).sum(axis=1).mean())
    same = (on_cpu.argmax(axis=1) == on_gpu.argmax(axis=1)).mean()
    print(
        f"{args.source} for {args.chip}, weights {args.weights or 'of the source'}: KL divergence "
        f"{divergence:.2g} nats over {len(on_cpu)} steps, {same:.1%} with the same likeliest token"
    )
    return divergence <= MOST


def main() -> int:
    parser = argparse.ArgumentParser(description="a GPU's distributions beside the CPU's")
    parser.add_argument("--source", default="demo", help="with SmolLM2's tokens (%(default)s)")
    parser.add_argument("--chip", default="gfx1100", help="(%(default)s)")
    parser.add_argument("--weights", help="a type (that of the source)")
    parser.add_argument("--cases", type=int, help="of the golden texts (all)")
    driver = build_driver(CACHE)
    if driver is None:
        sys.exit("no g++ to build the stand-in for AMD's driver with")
    with tempfile.TemporaryDirectory(prefix="gpu-quality-") as folder:
        return 0 if run(driver, Path(folder), parser.parse_args()) else 1


if __name__ == "__main__":
    sys.exit(main())
