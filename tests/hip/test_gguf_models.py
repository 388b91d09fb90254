"""Models of GGUF files, whose matrices are of several types, as machine code: each dispatch beside
its plain form, and logits beside numpy with the numbers that gguf dequantizes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compile import BuildOptions, build
from compile.models.spec import LlamaConfig
from sf_local.artifact.manifest import WEIGHTS
from tests.hip.driver import Driver
from tests.hip.machine_runs import run_beside_twins
from tests.hip.model_calls import Plan
from tests.support.quantized import Kind, write_random_gguf
from tests.support.reference import Weights
from tests.support.tiny import GPU_SIZES, MACHINE_CODE_CHIPS
from tests.support.toy_sources import VOCAB

PLAN = Plan(VOCAB, 8)
SHAPE: tuple[Any, ...] = (VOCAB, 256, 512, 2, 4, 2, 64, 1e-5, 500.0, 64)
NARROW: tuple[Any, ...] = (VOCAB, 96, 160, 2, 3, 1, 32, 1e-5, 500.0, 64)  # no super-blocks
HOT = ("blk.1.attn_v.weight", "blk.1.ffn_down.weight")  # which _M files have in more bits


def k_m(kind: Kind) -> Callable[[str], Kind]:
    """As Q4_K_M and Q5_K_M have it."""
    return lambda name: Kind.Q6_K if name in (*HOT, "token_embd.weight") else kind


def q4_0(name: str) -> Kind:
    """An embedding of four bits would become int8, by another rounding."""
    return Kind.Q8_0 if name == "token_embd.weight" else Kind.Q4_0


def of_narrow_rows(name: str) -> Kind:
    """What Q4_K_M becomes where rows have no whole super-blocks, and Q5_1 beside it."""
    if name in (*HOT, "token_embd.weight"):
        return Kind.Q8_0
    return Kind.Q5_1 if "attn_k" in name else Kind.Q5_0


MIXTURES: dict[str, tuple[Callable[[str], Kind], LlamaConfig]] = {
    "Q4_K_M": (k_m(Kind.Q4_K), LlamaConfig(*SHAPE, tied_embeddings=True)),
    "Q5_K_M": (k_m(Kind.Q5_K), LlamaConfig(*SHAPE, tied_embeddings=False)),
    "narrow": (of_narrow_rows, LlamaConfig(*NARROW, tied_embeddings=True)),
    "Q8_0": (lambda name: Kind.Q8_0, LlamaConfig(*NARROW, tied_embeddings=False)),
    "Q4_0": (q4_0, LlamaConfig(*NARROW, tied_embeddings=True)),
}
DEFAULT = ("Q4_K_M", "gfx1100")
CHIPS = (*MACHINE_CODE_CHIPS, "gfx1201")
# One on all chips, the others on each in turn: tests of products have all types on all chips
BY_TURNS = list(zip(MIXTURES, itertools.cycle(CHIPS), strict=False))
CASES = [
    pytest.param(*case, marks=() if case == DEFAULT else pytest.mark.slow)
    for case in dict.fromkeys([*((DEFAULT[0], chip) for chip in CHIPS), *BY_TURNS])
]
TEXT = """
    import json, sys
    from sf_local.engine.engine import Engine
    from sf_local.request.params import SamplingParams

    artifact, device, prompts = sys.argv[1:]
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    with Engine(artifact, device, kv_pages=40) as engine:
        handles = [engine.submit(prompt, params) for prompt in json.loads(prompts)]
        print(json.dumps([handle.result().token_ids for handle in handles]))
"""


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
@pytest.mark.parametrize(("mixture", "chip"), BY_TURNS)
def test_greedy_text_is_the_cpus(
    hip_driver: Driver,
    model_of: Callable[[str], Model],
    twins_of: Callable[[Path], Path],
    mixture: str,
    chip: str,
) -> None:
    """With kernels of the CPU that share nothing with those of GPUs but the file."""
    model = model_of(mixture)
    prompts = json.dumps([[*range(5, 5 + n)] for n in (3, 9, 17, 17)])
    artifact = model.artifact(chip)
    outcome = hip_driver.run(
        TEXT, artifact, "hip", prompts, devices=f"{chip}:512MiB", twins=twins_of(artifact)
    )
    assert outcome.value == hip_driver.run(TEXT, model.artifact("cpu"), "cpu", prompts).value
