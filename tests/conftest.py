"""Fixtures of the three tiers: a tiny random Llama compiled once a run, and the real SmolLM2."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.hip.driver import LIBRARY, Driver, build_driver, compile_code_object, compile_twins
from tests.hip.modules import model_emitter
from tests.hip.probe import Probe
from tests.support.reference import random_weights, write_hf_folder
from tests.support.vision_reference import (
    IDEFICS3,
    LLAVA,
    forward_images,
    random_model,
    write_vision_folder,
)

from compile import BuildOptions, build, demo
from compile.build import MLIR
from compile.models.spec import LlamaConfig, VisionConfig
from compile.tools.gpu_report import SHAPES

SHARED = Path(__file__).parents[2] / "shared" / "data"
PEERS = os.environ.get("SF_LOCAL_PEERS", "")
CI = bool(os.environ.get("CI"))

TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=72,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=256,
    tied_embeddings=True,
)
TINY_OPTIONS = BuildOptions(
    weight_dtype="f32",
    kv_dtype="f32",
    page_size=8,
    prefill_batch_sizes=(1, 3),
    decode_batch_sizes=(1, 4),
    image_batch_sizes=(1, 3),
)
MACHINE_CODE = "hip/test_machine_code.py"
MACHINE_CODE_CHIPS = ("gfx942", "gfx1100")  # of the default tests
CODE_CHIPS = (*MACHINE_CODE_CHIPS, *(pytest.param(chip, marks=pytest.mark.slow)
                                     for chip in ("gfx90a", "gfx1201")))  # fmt: skip
CODE_OPTIONS = replace(
    TINY_OPTIONS, weight_dtype="f16", kv_dtype="f16", prefill_batch_sizes=(1,),
    decode_batch_sizes=(1, 8),
)  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """A compiled random Llama with the weights it was made from."""

    config: LlamaConfig
    weights: dict[str, np.ndarray]
    source: Path
    artifact: Path


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """Builds tiny models, each set of arguments once a run: make_tiny(row_major=True, num_heads=4).

    Fields of LlamaConfig and of BuildOptions, over TINY and TINY_OPTIONS; and keep_mlir.
    """
    made: dict[str, TinyModel] = {}

    def make(*, keep_mlir: bool = False, **changes: Any) -> TinyModel:
        key = repr((keep_mlir, sorted(changes.items())))
        if key not in made:
            shape = {k: v for k, v in changes.items() if k in LlamaConfig.__dataclass_fields__}
            rest = {k: v for k, v in changes.items() if k not in shape}
            config = replace(TINY, **shape)
            folder = tmp_path_factory.mktemp("tiny")
            weights = random_weights(config, seed=7)
            write_hf_folder(folder / "source", config, weights)
            options = replace(TINY_OPTIONS, **rest)
            artifact = build(folder / "source", folder / "artifact", options, keep_mlir=keep_mlir)
            made[key] = TinyModel(config, weights, folder / "source", artifact)
        return made[key]

    return make


@dataclass(frozen=True)
class SeeingModel:
    """A compiled random Llama with a vision tower, and the weights of both."""

    vision: VisionConfig
    weights: dict[str, np.ndarray]
    source: Path
    artifact: Path

    def logits(self, tokens: Sequence[int], pixels: np.ndarray) -> np.ndarray:
        """[S, V] of tokens with tiles [N, 3, size, size]."""
        return forward_images(TINY, self.vision, self.weights, tokens, pixels)


@pytest.fixture(scope="session")
def make_seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SeeingModel]:
    """Builds tiny models that see, once a run: make_seeing("llava", row_major=True).

    Fields of VisionConfig and of BuildOptions, as in `make_tiny`.
    """
    made: dict[str, SeeingModel] = {}

    def make(family: str, *, keep_mlir: bool = False, **changes: Any) -> SeeingModel:
        key = repr((family, keep_mlir, sorted(changes.items())))
        if key not in made:
            shape = {k: v for k, v in changes.items() if k in VisionConfig.__dataclass_fields__}
            rest = {k: v for k, v in changes.items() if k not in shape}
            vision = replace({"idefics3": IDEFICS3, "llava": LLAVA}[family], **shape)
            folder = tmp_path_factory.mktemp("seeing")
            weights = random_model(TINY, vision, seed=7)
            write_vision_folder(folder / "source", TINY, vision, weights)
            options = replace(TINY_OPTIONS, **rest)
            artifact = build(folder / "source", folder / "artifact", options, keep_mlir=keep_mlir)
            made[key] = SeeingModel(vision, weights, folder / "source", artifact)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[..., TinyModel]) -> TinyModel:
    return make_tiny()


@pytest.fixture(scope="session")
def hip_cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("hip")


@pytest.fixture(scope="session")
def hip_driver(hip_cache: Path) -> Driver:
    """What stands in for AMD's driver; where it cannot be built, the test skips, or fails in CI."""
    driver = build_driver(hip_cache)
    if driver is None:
        (pytest.fail if CI else pytest.skip)("no g++ to build the stand-in for AMD's driver with")
    return driver


@pytest.fixture(scope="session")
def isa_probe(hip_driver: Driver) -> Probe:
    """The interpreter of machine code, for single instructions."""
    return Probe(hip_driver.folder / LIBRARY)


@pytest.fixture(scope="session")
def twins_of(hip_cache: Path) -> Callable[[Path], Path]:
    """The folder with the CPU twins of an artifact that was built with `keep_mlir`."""
    return lambda artifact: compile_twins(artifact / MLIR, hip_cache)


class CodeObjects(dict[str, Path]):
    """By chip, an .hsaco file with the kernels of a model; beside it the compiler's .rocmasm.

    One layer of SmolLM2's sizes in 16 bits: there the kernels have most forms of instructions. Each
    is compiled when it is asked for, those of the default tests at once.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        super().__init__()
        self._folder, self._cache = folder, cache

    def __missing__(self, chip: str) -> Path:
        chips = MACHINE_CODE_CHIPS if chip in MACHINE_CODE_CHIPS else (chip,)
        with ThreadPoolExecutor() as pool:
            self.update(zip(chips, pool.map(self._compile, chips), strict=True))
        return self[chip]

    def _compile(self, chip: str) -> Path:
        config = replace(SHAPES["smollm2-135m"], num_layers=1, max_seq_len=256)
        mlir = self._folder / f"{chip}.mlir"
        mlir.write_text(model_emitter(config, replace(CODE_OPTIONS, target=chip)).emit())
        return compile_code_object(mlir, chip, self._cache)


@pytest.fixture(scope="session")
def code_objects(hip_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> CodeObjects:
    return CodeObjects(tmp_path_factory.mktemp("code"), hip_cache)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo artifact, as the examples use it: in bf16 or, where the CPU lacks it, f16."""
    return demo()


@pytest.fixture(scope="session")
def smollm2_f32() -> Path:
    return demo(BuildOptions(weight_dtype="f32", prefill_batch_sizes=(1,), decode_batch_sizes=(1,)))


def shared_data(name: str) -> Path:
    """A golden file; the test skips where the development data is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing: golden data is only there in development and CI")
    return path


def peer(name: str) -> Path:
    """The Python of one of install_peers.sh's environments; the test skips where it is missing."""
    python = Path(PEERS) / name / "bin" / "python"
    if not PEERS or not python.exists():
        pytest.skip(f"no environment {name!r} in SF_LOCAL_PEERS={PEERS!r}; see install_peers.sh")
    return python


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests of machine code have failed if nothing was interpreted."""
    if _has_passed(session.config) and not Driver.num_interpreted:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _has_passed(config) or Driver.num_interpreted:
        terminalreporter.write_line(
            f"dispatches whose machine code was interpreted: {Driver.num_interpreted:,}"
        )


def _has_passed(config: pytest.Config) -> bool:
    """Whether any test of machine code has."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    passed = reporter.stats.get("passed", []) if reporter else []
    return any(MACHINE_CODE in report.nodeid for report in passed)
