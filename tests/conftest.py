"""Fixtures of the three tiers: a tiny random Llama compiled once a run, and the real SmolLM2."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from compile.folder import PLAIN_MLIR
from compile.target import resolve_target
from compile.tools.gpu_report import SHAPES
from sf_local import from_source
from tests.hip.driver import LIBRARY, Driver, build_driver, compile_code_object, compile_twins
from tests.hip.modules import model_emitter
from tests.hip.probe import Probe
from tests.support import compile_once
from tests.support.tiny import (
    CI,
    CODE_OPTIONS,
    MACHINE_CODE_CHIPS,
    SeeingModel,
    SeeingModels,
    TinyModel,
    TinyModels,
)

MACHINE_CODE = "hip/test_machine_code.py"


def pytest_configure(config: pytest.Config) -> None:
    """Compile nothing twice, in any process of the run; `--cache-clear` begins anew.

    And no test of properties fails because the machine is busy: neither by a deadline, nor because
    its inputs take long to draw.
    """
    compile_once.install(config.cache.mkdir("compiled"))
    settings.register_profile(
        "without a clock", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("without a clock")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`, a worker that is done takes tests from the end of what another has left.

    So tests of one file stay together, whose models and engines are then made once.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    return TinyModels(lambda: tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def make_seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SeeingModel]:
    return SeeingModels(lambda: tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[..., TinyModel]) -> TinyModel:
    return make_tiny()


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """Variables by which Ray leaves its token and its sessions in a folder that is removed. The
    folder's path is short, as paths of sockets must be."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield {"HOME": folder, "RAY_TMPDIR": folder}


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
    return lambda artifact: compile_twins(artifact / PLAIN_MLIR, hip_cache)


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
def make_smollm2() -> Callable[..., Path]:
    """make_smollm2(weight_dtype="int8") is the demo artifact with these options of a build.

    It is kept in the user's cache; one worker builds it while others wait.
    """
    return partial(from_source, "demo")


@pytest.fixture(scope="session")
def smollm2(make_smollm2: Callable[..., Path]) -> Path:
    """The demo artifact in bf16 or, where the CPU lacks it, f16."""
    return make_smollm2(weight_dtype=resolve_target("cpu").weight_dtype)


@pytest.fixture(scope="session")
def smollm2_f32(make_smollm2: Callable[..., Path]) -> Path:
    """Of eight rows, as golden tokens are compared, which read the weights once for all."""
    return make_smollm2(weight_dtype="f32", prefill_batch_sizes=(1,), decode_batch_sizes=(1, 8))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: count what it interpreted."""
    Driver.num_interpreted += node.workeroutput.get("num_interpreted", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests of machine code have failed if nothing was interpreted."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["num_interpreted"] = Driver.num_interpreted
        return
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
