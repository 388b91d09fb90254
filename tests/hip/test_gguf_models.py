"""Models of GGUF files, whose matrices are of several types, as machine code: each dispatch beside
its plain form, and logits beside numpy with the numbers that gguf dequantizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compile import BuildOptions, build
from compile.models.spec import LlamaConfig
from sf_local.artifact.manifest import WEIGHTS
from tests.hip.driver import Driver
from tests.hip.machine_runs import check_text, run_beside_twins
from tests.hip.model_calls import Plan
from tests.support.quantized import Kind, k_m, write_random_gguf
from tests.support.reference import Weights
from tests.support.tiny import GPU_SIZES, MACHINE_CODE_CHIPS
from tests.support.toy_sources import VOCAB

PLAN = Plan(VOCAB, 8)
SHAPE: tuple[Any, ...] = (VOCAB, 256, 512, 2, 4, 2, 64, 1e-5, 500.0, 64)
NARROW: tuple[Any, ...] = (VOCAB, 96, 160, 2, 3, 1, 32, 1e-5, 500.0, 64)  # no super-blocks


def of_four_bits(name: str) -> Kind:
    """An embedding of four bits would become int8, by another rounding."""
    if name in ("token_embd.weight", "output.weight"):
        return Kind.Q8_0
    return Kind.Q4_1 if "attn_k" in name else Kind.Q4_0


def of_narrow_rows(name: str) -> Kind:
    """What Q4_K_M becomes where rows have no whole super-blocks, and Q5_1 beside it."""
    if k_m(Kind.Q4_K)(name) == Kind.Q6_K:
        return Kind.Q8_0
    return Kind.Q5_1 if "attn_k" in name else Kind.Q5_0


MIXTURES: dict[str, tuple[Callable[[str], Kind], LlamaConfig]] = {
    "Q4_K_M": (k_m(Kind.Q4_K), LlamaConfig(*SHAPE, tied_embeddings=True)),
    "Q5_K_M": (k_m(Kind.Q5_K), LlamaConfig(*SHAPE, tied_embeddings=False)),
    "narrow": (of_narrow_rows, LlamaConfig(*NARROW, tied_embeddings=True)),
    "four bits": (of_four_bits, LlamaConfig(*NARROW, tied_embeddings=False)),
}
DEFAULT = ("Q4_K_M", "gfx1100")
CHIPS = (*MACHINE_CODE_CHIPS, "gfx1201")
# One on all chips, the others on each in turn: tests of products have all types on all chips
BY_TURNS = list(zip(MIXTURES, itertools.cycle(CHIPS), strict=False))
CASES = [
    pytest.param(*case, marks=() if case == DEFAULT else pytest.mark.slow)
    for case in dict.fromkeys([*((DEFAULT[0], chip) for chip in CHIPS), *BY_TURNS])
]


@dataclass(frozen=True)
class Model:
    """A file, the numbers that its blocks stand for, and what it was compiled to by target."""

    config: LlamaConfig
    weights: Weights
    source: Path

    def artifact(self, target: str) -> Path:
        """That for a target, compiled when it is first asked for."""
        path = self.source.with_name(target)
        if not path.exists():
            options = BuildOptions(
                target, activation_dtype="int16" if target == "cpu" else None, kv_dtype="f16",
                page_size=8, **GPU_SIZES,
            )  # fmt: skip
            build(self.source, path, options, keep_mlir=target != "cpu")
        return path


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(mixture: str) -> Model:
        if mixture not in made:
            kind_of, config = MIXTURES[mixture]
            source = tmp_path_factory.mktemp(mixture) / "model.gguf"
            made[mixture] = Model(config, write_random_gguf(source, kind_of, config), source)
        return made[mixture]

    return get


@pytest.mark.parametrize(("mixture", "chip"), CASES)
def test_dispatches_and_logits(
    hip_driver: Driver,
    model_of: Callable[[str], Model],
    twins_of: Callable[[Path], Path],
    tmp_path: Path,
    mixture: str,
    chip: str,
) -> None:
    model = model_of(mixture)
    artifact = model.artifact(chip)
    if mixture.endswith("K_M"):  # of the others Q4_0 gets minima, and narrow rows much padding
        assert (artifact / WEIGHTS).stat().st_size <= 1.05 * model.source.stat().st_size
    done = run_beside_twins(
        hip_driver, artifact, twins_of(artifact), PLAN, tmp_path, "random seed=5"
    )
    done.check()
    assert done.names == set(done.dispatches)
    done.check_logits(PLAN, model.config, model.weights)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("chip", MACHINE_CODE_CHIPS)
def test_the_engines_text(
    hip_driver: Driver, model_of: Callable[[str], Model], mixture: str, chip: str
) -> None:
    """As on the CPU, whose kernels share nothing with those of GPUs but the file."""
    model = model_of(mixture)
    prompts = [[*range(21, 21 + n)] for n in (3, 9, 17, 17)]  # no token is as likely as another
    check_text(hip_driver, model.artifact(chip), model.artifact("cpu"), prompts)
