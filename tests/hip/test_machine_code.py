"""The tiny Llama's machine code in the interpreter: each dispatch beside its twin, logits beside
float64, the engine's text beside the CPU's; and whether a fault would be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from compile import build
from compile.build import VMFB
from compile.folder import MLIR
from compile.formats.layout import MASKED
from compile.options import BuildOptions
from sf_local.artifact.manifest import LOGITS_BLOCK
from tests.hip.dispatches import BOUNDS, wrong_ones
from tests.hip.driver import Driver, compile_code_object
from tests.hip.machine_runs import Run, check_text, chip_of, run_beside_twins
from tests.hip.model_calls import Arrays, Plan
from tests.hip.modules import summing_module
from tests.support.reference import Array, forward, uneven_weights, write_hf_folder
from tests.support.tiny import GPU_SIZES, MACHINE_CODE_CHIPS, TINY, TINY_OPTIONS, TinyModel

PLAN = Plan(TINY.vocab_size, TINY_OPTIONS.page_size)
SEED = 11

SUMS = """
    import sys
    import iree.runtime
    import numpy as np

    vmfb, inputs, results = sys.argv[1:4]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="hip")
    given = np.load(inputs)
    np.save(results, [module.sum_up(each, given["scales"]).to_host() for each in given["logits"]])
"""


@pytest.fixture(scope="module", params=MACHINE_CODE_CHIPS)
def chip(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make_uneven(
    make_tiny: Callable[..., TinyModel],
    twins_of: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], TinyModel]:
    """The tiny model for a chip with weights whose rows differ in size by 100 times."""
    made: dict[str, TinyModel] = {}

    def compile_all(chip: str) -> None:
        twins_of(make_tiny(target=chip, keep_mlir=True, **GPU_SIZES).artifact)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_all, MACHINE_CODE_CHIPS))

    def make(chip: str) -> TinyModel:
        if chip not in made:
            model = make_tiny(target=chip, keep_mlir=True, **GPU_SIZES)
            weights = uneven_weights(TINY, SEED)
            made[chip] = with_weights(model, weights, tmp_path_factory.mktemp("uneven"))
        return made[chip]

    def with_weights(model: TinyModel, weights: dict[str, Array], folder: Path) -> TinyModel:
        """The code is the same, and is not compiled again."""
        write_hf_folder(folder / "source", model.config, weights)
        options = BuildOptions(
            **vars(TINY_OPTIONS) | {"target": chip_of(model.artifact)} | GPU_SIZES
        )
        artifact = build(folder / "source", folder / "artifact", options, keep_mlir=True)
        assert (artifact / MLIR).read_bytes() == (model.artifact / MLIR).read_bytes()
        return TinyModel(model.config, weights, folder / "source", artifact)

    return make


@pytest.fixture
def run(
    hip_driver: Driver,
    twins_of: Callable[[Path], Path],
    make_uneven: Callable[[str], TinyModel],
    tmp_path: Path,
) -> Callable[..., Run]:
    """run(chip, words for the interpreter, plan)"""

    def run(chip: str, machine: str, plan: Plan = PLAN) -> Run:
        artifact = make_uneven(chip).artifact
        return run_beside_twins(hip_driver, artifact, twins_of(artifact), plan, tmp_path, machine)

    return run


# Right


ORDERS = [("gfx942", "forward"), ("gfx942", "random seed=3"), ("gfx1100", "backward"),
          ("gfx1100", "random seed=4")]  # fmt: skip


@pytest.mark.parametrize(("chip", "order"), ORDERS)
def test_each_dispatch_and_the_logits(
    run: Callable[..., Run], make_uneven: Callable[[str], TinyModel], chip: str, order: str
) -> None:
    done = run(chip, order)
    done.check()
    assert done.names == set(done.dispatches) == set(done.differences)
    check_logits(done.results, make_uneven(chip))


def check_logits(logits: Arrays, model: TinyModel) -> None:
    """All are as float64 has them, each token's beside the largest of that token's; and the best
    token is the first of the largest."""
    main = forward(model.config, model.weights, PLAN.tokens)
    forks = [forward(model.config, model.weights, PLAN.fork(i)) for i in range(PLAN.forks)]
    after = np.stack([rows[-PLAN.steps :] for rows in forks])
    largest = np.abs(np.concatenate([main, *after])).max(axis=0)  # [V]
    assert largest.max() > 50 * largest.min()
    expected = {
        "prefill": main[: PLAN.prompt],
        "next": main[None, PLAN.prompt - 1 : PLAN.prompt],
        "one": main[None, PLAN.prompt :],
        "forks": after,
    }
    for name, values in expected.items():
        apart = np.abs(logits[name] - values) / largest
        assert apart.max() <= BOUNDS["f32"], name
        if name != "prefill":
            assert np.array_equal(logits[f"{name}_best"], logits[name].argmax(axis=-1)), name


def test_the_engines_text(
    hip_driver: Driver, make_tiny: Callable[..., TinyModel], chip: str
) -> None:
    """Of several at once, some with a cached prefix: as on the CPU."""
    prompts = [[*range(5, 22), i] for i in range(3)] + [[7, 8, 9]]

    model = make_tiny(target=chip, keep_mlir=True, **GPU_SIZES)
    check_text(hip_driver, model.artifact, make_tiny(row_major=True).artifact, prompts)


# The best token


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(300, 8), (49_152, 8), (128_256, 1)])
def test_the_best_token(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, vocab_size: int, num_rows: int
) -> None:
    """It is the first of the largest logits, wherever they are."""
    mlir, results = tmp_path / "sums.mlir", tmp_path / "sums.npy"
    mlir.write_text(summing_module(chip, vocab_size, num_rows))
    vmfb = compile_code_object(mlir, chip, hip_cache).parent / VMFB
    given = hard_logits(vocab_size).reshape(-1, num_rows, vocab_size)  # of each call
    scales = np.linspace(0.5, 2, num_rows, dtype=np.float32)
    np.savez(tmp_path / "given.npz", logits=given, scales=scales)
    outcome = hip_driver.run(SUMS, vmfb, tmp_path / "given.npz", results, runs="machine",
                             devices=f"{chip}:512MiB")  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.of("interpret")
    for sums, logits in zip(np.load(results), given, strict=True):
        check_sums(sums, logits, scales)


def hard_logits(vocab_size: int) -> Array:
    """Eight rows [8, V]: ties, and maxima in the first, the last and the partial block."""
    rng = np.random.default_rng(SEED)
    rows = rng.standard_normal((8, vocab_size)).astype(np.float32)
    last = vocab_size - 1
    in_last_block = last // LOGITS_BLOCK * LOGITS_BLOCK
    rows[1] -= 100  # all negative
    rows[2] = -3.5  # all equal
    rows[3, [0, last]] = 9  # the first and the last
    rows[4] = -np.inf
    rows[4, [LOGITS_BLOCK - 1, LOGITS_BLOCK]] = -50  # at an edge of blocks
    rows[5, last] = 9
    rows[6, [in_last_block, in_last_block + 1]] = 9
    rows[7, [in_last_block - 1, in_last_block]] = 9
    rows[7] -= 1000
    return rows


def check_sums(sums: Array, logits: Array, scales: Array) -> None:
    num_blocks = sums.shape[1] // 2
    padding = ((0, 0), (0, num_blocks * LOGITS_BLOCK - logits.shape[1]))
    blocks = np.pad(logits, padding, constant_values=MASKED).reshape(len(logits), num_blocks, -1)
    maxima = np.maximum(blocks.max(axis=2), np.float32(MASKED))
    assert sums[:, 0].tolist() == logits.argmax(axis=1).tolist()
    assert np.array_equal(sums[:, 1 : 1 + num_blocks], maxima)
    above = (blocks - maxima[:, :, None].astype(np.float64)) * scales[:, None, None]
    np.testing.assert_allclose(sums[:, 1 + num_blocks :], np.exp(above).sum(axis=2), rtol=1e-5)


# What would be seen

SHORT = Plan(TINY.vocab_size, TINY_OPTIONS.page_size, prompt=9, steps=1, forks=0)
WRONG = [("gfx942", "ignore_barriers no_race_check"), ("gfx942", "swap_operands=v_sub_f32"),
         ("gfx1100", "ignore_barriers no_race_check"), ("gfx1100", "swap_operands=v_sub_f32"),
         ("gfx1100", "swap_lanes=1")]  # fmt: skip


@pytest.mark.parametrize(("chip", "sabotage"), WRONG)
def test_wrong_numbers_are_seen(run: Callable[..., Run], chip: str, sabotage: str) -> None:
    done = run(chip, sabotage, SHORT)
    assert done.outcome.exit_code == 0 and wrong_ones(done.differences.values())
    with pytest.raises(AssertionError):
        done.check()


@pytest.mark.parametrize(("sabotage", "reason"), [("ignore_barriers", "barrier between"),
                                                  ("ignore_waits", "is pending from")])  # fmt: skip
def test_what_is_too_early_ends_the_launch(
    run: Callable[..., Run], chip: str, sabotage: str, reason: str
) -> None:
    outcome = run(chip, sabotage, SHORT).outcome
    assert outcome.exit_code != 0
    assert "stand-in for libamdhip64" in outcome.stderr and reason in outcome.stderr
