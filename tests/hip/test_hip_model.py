"""The tiny Llama on a stand-in for a GPU: answers, traffic, memory, and every way to fail."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.hip.driver import Driver, Outcome
from tests.hip.failures import LOST, between, check_failure
from tests.support.tiny import GPU_SIZES, SUPER_BLOCKS, TinyModel

PROMPT = list(range(5, 16))

RUN = """
    import json, sys
    from tests.hip.control import fail, mark, memory
    from sf_local.device import device as devices
    from sf_local.engine.engine import Engine
    from sf_local.errors import SfLocalError
    from sf_local.request.params import SamplingParams

    artifact, device, cpu_artifact = sys.argv[1:4]
    prompt = json.loads(sys.argv[4])
    PARAMS = SamplingParams(max_new_tokens=24, temperature=1, seed=3, ignore_eos=True)

    def answer(engine):
        return engine.generate(prompt, PARAMS).token_ids

    def greedy(count, **rest):
        return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True, **rest)
"""
ANSWER = (
    RUN
    + """
    with Engine(artifact, device, kv_pages=40) as engine:
        print(json.dumps([answer(engine), answer(engine)]))
"""
)
WORK = (
    RUN
    + """
    import random

    rng = random.Random(1)
    prompts = [prompt[: rng.randrange(3, 11)] + [rng.randrange(3, 300)] for _ in range(8)]
    many = [*prompts, *([*prompt * 4, i] for i in range(6))]
    with Engine(artifact, device, kv_pages=24) as engine:  # too few for all of them
        handles = [engine.submit(p, PARAMS if i % 2 else greedy(24)) for i, p in enumerate(many)]
        results = [handle.result().token_ids for handle in handles]
        assert engine.stats()["preemptions"] and engine.stats()["hit_rate"]
        results += [output.token_ids for output in engine.samples(prompt, SamplingParams(
            max_new_tokens=8, seed=5, n=3, ignore_eos=True))]
        results.append("".join(engine.stream("abc", greedy(16))))
        for constraint in ({"regex": "(ab|cd)+[0-9]{3}"}, {"json_schema": '{"type": "boolean"}'}):
            results.append(engine.generate("abc", SamplingParams(
                max_new_tokens=20, temperature=1, seed=1, **constraint)).text)
        scores = engine.score("the quick", [" brown", " fox", " fix"])
        results.append(max(range(3), key=lambda i: sum(scores[i].logprobs)))
        logprobs = engine.generate(prompt, greedy(4, return_logprob=True, logprob_start_len=0,
                                                  top_logprobs_num=2)).logprobs
        results.append([round(value, 3) for value in logprobs.output])
        print(json.dumps(results))
"""
)


@pytest.fixture(scope="module", params=["gfx942", "gfx1100"])
def chip(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cpu_artifact(make_tiny: Callable[..., TinyModel]) -> Path:
    """The same model for the CPU."""
    return make_tiny(row_major=True).artifact


@pytest.fixture(scope="module")
def run_model(
    hip_driver: Driver,
    make_tiny: Callable[..., TinyModel],
    twins_of: Callable[[Path], Path],
    cpu_artifact: Path,
) -> Callable[..., Outcome]:
    """run(code, chip, device, **rest of Driver.run) with a tiny model for that chip; `fault`, as
    Driver.run's `fail`, for when it was used once."""

    def run(
        code: str, chip: str = "gfx1100", device: str = "hip", fault: str = "", **rest: Any
    ) -> Outcome:
        model = make_tiny(target=chip, keep_mlir=True, **GPU_SIZES)
        rest.setdefault("devices", f"{chip}:512MiB")
        rest.setdefault("twins", twins_of(model.artifact))
        arguments = (model.artifact, device, cpu_artifact, json.dumps(PROMPT), fault)
        return hip_driver.run(code, *arguments, **rest)

    return run


@pytest.fixture(scope="module")
def on_cpu(hip_driver: Driver, cpu_artifact: Path) -> Callable[[str], Any]:
    """What the same code prints with the same model on the CPU, where each runs once."""
    arguments = (cpu_artifact, "cpu", cpu_artifact, json.dumps(PROMPT))
    return cache(lambda code: hip_driver.run(code, *arguments).value)


@pytest.fixture(scope="module")
def cpu_answer(on_cpu: Callable[[str], Any]) -> list[list[int]]:
    """What the same model answers on the CPU, with and without cached pages."""
    return on_cpu(ANSWER)


# Answers


def test_the_tiny_llama_answers_as_on_the_cpu(
    run_model: Callable[..., Outcome], cpu_answer: list[list[int]], chip: str
) -> None:
    assert run_model(ANSWER, chip).value == cpu_answer


def test_slow_streams_change_nothing(
    run_model: Callable[..., Outcome], cpu_answer: list[list[int]]
) -> None:
    """No wait is forgotten: work that is done late is still done in time."""
    assert run_model(ANSWER, delay_us=500).value == cpu_answer


def test_all_kinds_of_work(
    run_model: Callable[..., Outcome], on_cpu: Callable[[str], Any], chip: str
) -> None:
    """Batches, forks, preemption, streams, grammars, choices, logprobs: as on the CPU."""
    assert run_model(WORK, chip).value == on_cpu(WORK)


def test_answers_of_minus_one_are_refused(run_model: Callable[..., Outcome]) -> None:
    """As AMD code of format 3 gives them; also where no artifact.json tells how old it is."""
    outcome = run_model(
        RUN
        + """
    import shutil, tempfile
    from pathlib import Path
    from sf_local.model import outputs

    unpack, messages = outputs.unpack, []

    def old(logits, packed):
        packed[:, 0] = -1
        return unpack(logits, packed)

    outputs.unpack = old
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(artifact, folder, dirs_exist_ok=True))
        (copy / "artifact.json").unlink()
        for path in artifact, copy / "model.vmfb":
            with Engine(path, device, kv_pages=40) as engine:
                for params in greedy(9), greedy(0), PARAMS, greedy(9, return_logprob=True):
                    try:
                        engine.generate(prompt, params)
                    except SfLocalError as error:
                        messages.append([type(error).__name__, str(error)])
                stats = engine.stats()
                assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    print(json.dumps(messages))
"""
    )
    assert len(outcome.value) == 8
    for kind, message in outcome.value:
        assert kind == "DeviceError" and "returned token -1 of a vocabulary of" in message


def test_nan_ends_its_request_alone(
    run_model: Callable[..., Outcome], cpu_answer: list[list[int]]
) -> None:
    """Of the longer one of two, in whose pages later ones are computed; page 0 stays as it was."""
    outcome = run_model(
        RUN
        + """
    import shutil, tempfile
    from pathlib import Path
    import numpy as np
    from sf_local.artifact import open as artifacts
    from sf_local.artifact import irpa

    artifacts.MAX_HASHED_AT_LOAD = -1
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(artifact, folder, dirs_exist_ok=True))
        entry = irpa.read_table(copy / "weights.irpa")["rope"]
        angles = np.memmap(copy / "weights.irpa", np.float32, "r+", entry.offset, (256, 8))
        angles[50:] = np.nan
        found = []
        with Engine(copy, device, kv_pages=10) as engine:
            for length in 51, 40, 60:
                wrong = engine.submit([9] * length, greedy(12))
                right = engine.submit(prompt, PARAMS)
                try:
                    found.append(wrong.result().token_ids)
                except SfLocalError as error:
                    found.append([type(error).__name__, str(error)])
                found += [right.result().token_ids, answer(engine)]
            stats = engine.stats()
            assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
        print(json.dumps(found))
"""
    )
    for i, position in ((0, 50), (3, 50), (6, 59)):
        kind, message = outcome.value[i]
        assert (
            kind == "DeviceError" and f"NaN among the logits after position {position}" in message
        )
        assert outcome.value[i + 1] == outcome.value[i + 2] == cpu_answer[0]


# Those that start processes of their own, or are about the CPU's memory and how it recovers.
NOT_ON_GPUS = (
    "a_failed_step", "lost_device", "unknown_device", "native_failure", "exit_is_clean", "ctrl_c",
    "use_after_fork", "kv_memory", "kv_sizes",
)  # fmt: skip
ENGINE = ("engine/test_engine", "sampling/test_logprobs")
ALL_OF_THEM = (*ENGINE, "engine/test_scoring", "frontend/test_backend")
HALF = {"kv_dtype": "f16"}
SUITE = """
    import ast
    import sys
    from dataclasses import replace

    import pytest

    from sf_local.engine.engine import Engine
    from tests.support.reference import stored_as

    changes, near, cache, *arguments = sys.argv[1:]
    start, approx = Engine.__init__, pytest.approx

    class ForChip:
        def pytest_sessionstart(self):
            import tests.support.tiny as tiny
            options, make = ast.literal_eval(changes), tiny.TinyModels._make

            def made(models, keep_mlir, others):
                model = make(models, keep_mlir, options | others)
                if (dtype := options.get("weight_dtype")) is None:
                    return model
                weights = {
                    name: stored_as(name, weight, dtype) if weight.ndim == 2 else weight
                    for name, weight in model.weights.items()
                }
                return replace(model, weights=weights)

            tiny.TinyModels._make = made
            pytest.approx = lambda expected, rel=None, abs=0.0: approx(
                expected, rel=rel, abs=max(abs, float(near))
            )

    def start_on_gpu(self, vmfb, device="cpu", **rest):
        start(self, vmfb, "hip", **rest)

    Engine.__init__ = start_on_gpu
    sys.exit(pytest.main(["-q", "-o", f"cache_dir={cache}", *arguments], [ForChip()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "options", "near", "names"),
    [
        ("gfx942", {}, 0.0, ALL_OF_THEM),
        ("gfx942", {"weight_dtype": "int8", **HALF}, 0.02, ENGINE),
        ("gfx1100", {"weight_dtype": "int4", **HALF}, 0.02, ALL_OF_THEM),
        ("gfx1100", {"kind": "Q4_K", "weight_dtype": None, **HALF, **SUPER_BLOCKS}, 0.03, ENGINE),
    ],
    ids=["f32", "int8", "int4", "q4_k_m"],
)
def test_the_engines_own_tests_pass(
    hip_driver: Driver,
    make_tiny: Callable[..., TinyModel],
    twins_of: Callable[[Path], Path],
    request: pytest.FixtureRequest,
    chip: str,
    options: dict[str, Any],
    near: float,
    names: tuple[str, ...],
) -> None:
    """All that compare with the reference, on a GPU's artifact instead of the CPU's.

    near: how near numbers are to the reference's; what is larger in a test holds.
    """
    options = {"target": chip, **options, **GPU_SIZES}
    folder = Path(__file__).parents[1] / "sf_local"
    outcome = hip_driver.run(
        SUITE,
        options,
        near,
        request.config.cache.mkdir("hip").parents[1],
        *("-m", "not model and not slow", "-k", " and ".join(f"not {n}" for n in NOT_ON_GPUS)),
        *(folder / f"{name}.py" for name in names),
        devices=f"{chip}:512MiB",
        twins=twins_of(make_tiny(keep_mlir=True, **options).artifact),
        timeout=900,
    )
    assert outcome.exit_code == 0, outcome.stdout
    assert int(re.findall(r"(\d+) passed", outcome.stdout)[-1]) > 40 * len(names)
    assert len(outcome.of("hipModuleLaunchKernel")) > 10_000


# Devices


def test_code_for_another_chip_is_refused(run_model: Callable[..., Outcome]) -> None:
    """By the driver, where we do not ask first: an artifact without a manifest names no chip."""
    outcome = run_model(
        RUN
        + """
    from sf_local.engine import placement
    from sf_local.model import program
    placement.check_target = program.check_target = lambda *_: None
    try:
        Engine(artifact, device)
    except SfLocalError as error:
        print(json.dumps([type(error).__name__, str(error)]))
""",
        devices="gfx942:512MiB",
    )
    kind, message = outcome.value
    assert kind == "TargetError" and "another device" in message
    assert [call.result for call in outcome.of("hipModuleLoadDataEx")] == ["hipErrorNoBinaryForGpu"]


def test_the_second_device(run_model: Callable[..., Outcome], cpu_answer: list[list[int]]) -> None:
    """An index chooses it, and the first one is left alone."""
    outcome = run_model(ANSWER, "gfx1100", "hip:1", devices="gfx942:1GiB,gfx1100:512MiB")
    assert outcome.value == cpu_answer
    used = [*outcome.of("hipModuleLaunchKernel"), *outcome.of("hipMalloc")]
    assert {call.device for call in used} == {1}


# Traffic


@pytest.mark.parametrize(("params", "num_results"), [("greedy(24)", 1), ("PARAMS", 2)])
def test_what_a_decode_step_calls(
    run_model: Callable[..., Outcome], params: str, num_results: int
) -> None:
    """One copy of all arguments; one of what sums the logits up, and one of the logits where they
    are sampled from. Nothing is allocated, and nobody waits but for the results."""
    outcome = run_model(
        RUN
        + f"""
    from sf_local.model.runner import ModelRunner

    decode = ModelRunner.decode

    async def marked(self, *arguments):
        mark("step")
        result = await decode(self, *arguments)
        mark("end")
        return result

    with Engine(artifact, device, kv_pages=40) as engine:
        engine.generate(prompt, {params})
        ModelRunner.decode = marked
        print(len(engine.generate(prompt, {params}).token_ids))
"""
    )
    assert outcome.value == 24
    step = outcome.after("step")
    calls = Counter(call.function for call in step)
    launches = [call for call in step if call.function == "hipModuleLaunchKernel"]
    copies = [call for call in step if call.function.startswith("hipMemcpy")]
    ours = ("attend_", "combine_splits_", "summarize_", "find_best_")
    names = [call.notes["name"] for call in launches]
    assert all("$async_dispatch_" in name or name.startswith(ours) for name in names)
    assert all(call.notes["grid_x"] >= 1 and call.notes["block"] >= 1 for call in launches)
    assert len(launches) == 23
    assert len(between(copies, "host", "device")) == 1
    assert len(between(copies, "device", "host")) == num_results
    assert len(copies) == 1 + num_results
    allocating = ("hipMalloc", "hipHostMalloc", "hipFree", "hipHostFree", "hipHostRegister")
    assert not any(calls[function] for function in allocating)
    assert not calls["hipStreamSynchronize"] and not calls["hipDeviceSynchronize"]
    assert calls["hipEventRecord"] <= 20  # by how work falls to threads
    assert all(call.result in ("hipSuccess", "hipErrorNotReady") for call in step)


# Memory


def test_the_pages_take_what_is_free_and_give_it_back(run_model: Callable[..., Outcome]) -> None:
    outcome = run_model(
        RUN
        + """
    used = []
    for _ in range(3):
        with Engine(artifact, device) as engine:
            answer(engine)
            used.append(1 - memory()[0] / memory()[1])
        used.append(1 - memory()[0] / memory()[1])
    print(json.dumps(used))
"""
    )
    while_open, closed = outcome.value[::2], outcome.value[1::2]
    assert all(0.79 < share < 0.81 for share in while_open)
    assert closed == [0, 0, 0]


@pytest.mark.slow
def test_memory_is_flat(run_model: Callable[..., Outcome]) -> None:
    """Over 2,000 steps of random lengths: of the device from some time on, and of the process.

    By step 1,000 all sizes of buffers have been there, which the driver keeps; by step 500 on a
    loaded machine not always.
    """
    outcome = run_model(
        RUN
        + """
    import random
    from tests.hip.control import resident

    rng, seen = random.Random(5), []
    with Engine(artifact, device, kv_pages=100) as engine:
        while (steps := engine.stats()["steps"]) < 3000:
            lengths = [rng.randrange(1, 200) for _ in range(4)]
            handles = [engine.submit([rng.randrange(3, 300) for _ in range(n)],
                                     greedy(rng.randrange(1, 50))) for n in lengths]
            for handle in handles:
                handle.result()
            seen.append([steps, memory()[1] - memory()[0], resident()])
    print(json.dumps(seen))
""",
        timeout=600,
    )
    _, early, process_early = next(entry for entry in outcome.value if entry[0] >= 1000)
    _, late, process_late = outcome.value[-1]
    assert late <= 1.02 * early
    assert process_late - process_early < 10  # MiB


# Failures

FAULTS = {
    # at start, from the first call on
    "hipMalloc:1:hipErrorOutOfMemory": "hipMalloc failed with hipErrorOutOfMemory",
    "hipHostMalloc:1:hipErrorOutOfMemory": "hipHostMalloc failed with hipErrorOutOfMemory",
    "hipMemcpyAsync:1:hipErrorUnknown": "hipMemcpyAsync failed with hipErrorUnknown",
    "hipMemcpyAsync:1:hipErrorUnknown:async": "hipStreamSynchronize failed with hipErrorUnknown",
    "hipStreamSynchronize:1:hipErrorUnknown": "hipStreamSynchronize failed",
    "hipModuleLoadDataEx:1:hipErrorOutOfMemory": LOST,
    "hipModuleLoadDataEx:1:hipErrorUnknown": LOST,
    "hipModuleGetFunction:2:hipErrorUnknown": LOST,
    "hipMalloc:17:hipErrorOutOfMemory": LOST,  # for arguments
    "hipMalloc:18:hipErrorOutOfMemory": LOST,  # for KV pages
    "hipHostMalloc:3:hipErrorOutOfMemory": LOST,  # for arguments
    "hipHostMalloc:4:hipErrorOutOfMemory": LOST,  # for results
    "hipMemsetD32Async:1:hipErrorUnknown": LOST,
    "hipMemsetD32Async:1:hipErrorUnknown:async": LOST,
    "hipMalloc:19:hipErrorOutOfMemory": LOST,  # in the first call
    "hipMalloc:20:hipErrorOutOfMemory": LOST,
}
LATER_FAULTS = [
    f"{function}:{number}:{error}"
    for function, numbers, error in (
        ("hipMemcpyAsync", ("1", "2", "3", "7", "40"), "hipErrorUnknown"),
        ("hipMemcpyAsync", ("1", "2", "7"), "hipErrorUnknown:async"),
        ("hipModuleLaunchKernel", ("1", "30", "100"), "hipErrorLaunchOutOfResources"),
        ("hipModuleLaunchKernel", ("1", "30", "100"), "hipErrorLaunchFailure:async"),
        ("hipEventRecord", ("1", "4", "30"), "hipErrorUnknown"),
        ("hipEventSynchronize", ("1", "9", "30"), "hipErrorUnknown"),
    )
    for number in numbers
]
CORE = {"hipMalloc:1:hipErrorOutOfMemory", "hipModuleLoadDataEx:1:hipErrorUnknown",
        "hipMalloc:18:hipErrorOutOfMemory", "hipMemcpyAsync:2:hipErrorUnknown",
        "hipModuleLaunchKernel:30:hipErrorLaunchFailure:async"}  # fmt: skip
FAILING = (
    RUN
    + """
    devices.PATIENCE = 3  # seconds
    fault, errors = sys.argv[5], []

    def failing(action):
        try:
            return action()
        except SfLocalError as error:
            errors.append([type(error).__name__, str(error)])

    engine = failing(lambda: Engine(artifact, device, kv_pages=40))
    if engine is not None:
        if fault:
            answer(engine)
            fail(fault)
        handles = [engine.submit([*prompt, i], PARAMS) for i in range(3)]
        for handle in handles:
            failing(handle.result)
        failing(lambda: engine.submit(prompt))
    with Engine(cpu_artifact, "cpu", kv_pages=40) as other:
        print(json.dumps([errors, answer(other)]))
"""
)


def some(faults: Any) -> list[Any]:
    """A core of them by default."""
    return [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in faults]


@pytest.mark.parametrize("fault", some(FAULTS))
def test_a_device_that_fails_at_start(
    run_model: Callable[..., Outcome], cpu_answer: list[list[int]], fault: str
) -> None:
    outcome = run_model(FAILING, fail=fault)
    check_failure(outcome, FAULTS[fault], cpu_answer)


@pytest.mark.parametrize("fault", some(LATER_FAULTS))
def test_a_device_that_fails_later(
    run_model: Callable[..., Outcome], cpu_answer: list[list[int]], fault: str
) -> None:
    outcome = run_model(FAILING, fault=fault)
    check_failure(outcome, LOST, cpu_answer)
    errors, _ = outcome.value
    assert len(errors) == 4  # three requests under way, and one that came later


def test_weights_that_do_not_fit(run_model: Callable[..., Outcome]) -> None:
    """Refused at once: IREE would wait for ever for the memory of the one that failed."""
    outcome = run_model(
        RUN
        + """
    try:
        Engine(artifact, device)
    except SfLocalError as error:
        print(json.dumps([type(error).__name__, str(error)]))
""",
        devices="gfx1100:65536",
        timeout=60,
    )
    kind, message = outcome.value
    assert kind == "DeviceError" and "the weights take" in message
    assert not outcome.of("hipMalloc")
