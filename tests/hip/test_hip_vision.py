"""Tiny models that see on a stand-in for a GPU: answers, traffic, memory, and a call that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.hip.driver import Call, Driver, Outcome
from tests.hip.failures import LOST, between, check_failure
from tests.support.tiny import SeeingModel

FEW = {"num_layers": 1, "prefill_batch_sizes": (1,), "decode_batch_sizes": (1, 2)}
MODELS = [("idefics3", "gfx942"), ("llava", "gfx1100")]

pytestmark = pytest.mark.slow

RUN = """
    import json, sys

    import numpy as np
    import PIL.Image
    from tests.hip.control import fail, mark, memory
    from sf_local.device import device as devices
    from sf_local.engine.engine import Engine
    from sf_local.errors import SfLocalError
    from sf_local.request.params import SamplingParams
    from sf_local.model.runner import ModelRunner

    artifact, device, cpu_artifact, fault = sys.argv[1:5]
    PARAMS = SamplingParams(max_new_tokens=8, temperature=1, seed=3, ignore_eos=True)

    def picture(seed, width=60, height=40):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
        return PIL.Image.fromarray(pixels.astype(np.uint8))

    def submit(engine, prompt, *seeds, params=PARAMS):
        return engine.submit(prompt, params, images=[picture(seed) for seed in seeds])

    def ask(engine, *arguments, **rest):
        return submit(engine, *arguments, **rest).result()

    def open_engine(**rest):
        return Engine(artifact, device, kv_pages=120, **rest)

    def check_pages(engine):
        engine.flush_cache()
        stats = engine.stats()
        assert stats["pages_used"] == 0 and stats["pages_free"] == stats["pages_total"]
"""
WORK = (
    RUN
    + """
    with open_engine() as engine:
        num_tiles = len(engine.prepare("<image>", [picture(0)]).spans)
        shown = len(engine.prepare("see <image>", [picture(0)]).ids)
        results = [ask(engine, "see <image> what", 0).token_ids]
        assert engine.stats()["encoded_tiles"] == num_tiles

        again = ask(engine, "see <image> who", 0)
        assert again.cached_tokens >= shown and engine.stats()["encoded_tiles"] == num_tiles
        results += [again.token_ids, ask(engine, "<image> and <image>?", 0, 1).token_ids]
        assert engine.stats()["encoded_tiles"] == 2 * num_tiles

        forks = [submit(engine, f"so <image> {i}", 2) for i in range(4)]
        forks = [fork.result() for fork in forks]
        assert sum(fork.cached_tokens >= shown for fork in forks) == 3
        assert engine.stats()["encoded_tiles"] == 3 * num_tiles
        results += [fork.token_ids for fork in forks]

        images = [picture(0)]
        results += [output.token_ids for output in engine.samples(
            "see <image>", SamplingParams(max_new_tokens=6, seed=3, n=3), images=images)]
        regex = SamplingParams(max_new_tokens=20, temperature=1, seed=1, regex="(ab|cd)+[0-9]{3}")
        results.append(ask(engine, "see <image>", 0, params=regex).text)
        scores = engine.score("see <image>", [" yes", " no"], images=images, unconditional=True)
        results.append([round(score.mean, 3) for score in scores])
        results.append(engine.generate("no image", PARAMS).token_ids)
        assert engine.stats()["encoded_tiles"] == 3 * num_tiles
        check_pages(engine)
        print(json.dumps(results))
"""
)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A family and a chip."""
    return request.param


@pytest.fixture(scope="module")
def run_model(
    hip_driver: Driver,
    make_seeing: Callable[..., SeeingModel],
    twins_of: Callable[[Any], Any],
) -> Callable[..., Outcome]:
    """run(code, model, device, fault, **rest of Driver.run)"""

    def run(
        code: str, model: tuple[str, str], device: str = "hip", fault: str = "", **rest: Any
    ) -> Outcome:
        family, chip = model
        on_cpu = make_seeing(family, row_major=True, **FEW).artifact
        if device == "cpu":
            return hip_driver.run(code, on_cpu, device, on_cpu, fault)
        artifact = make_seeing(family, target=chip, keep_mlir=True, **FEW).artifact
        return hip_driver.run(
            code, artifact, device, on_cpu, fault, devices=f"{chip}:512MiB",
            twins=twins_of(artifact), **rest,
        )  # fmt: skip

    return run


def test_all_kinds_of_work(run_model: Callable[..., Outcome], model: tuple[str, str]) -> None:
    """One image, two, a second question, forks, samples, a grammar, choices: as on the CPU, where
    each image is encoded once."""
    outcome = run_model(WORK, model)
    assert outcome.value == run_model(WORK, model, "cpu").value
    assert any("encode_image" in call.notes["name"] for call in launches(outcome.calls))


def launches(calls: Any) -> list[Call]:
    return [call for call in calls if call.function == "hipModuleLaunchKernel"]


def test_what_an_image_calls(run_model: Callable[..., Outcome], model: tuple[str, str]) -> None:
    """One copy of all arguments, and one of each result: of embeddings, of logits and their sums.
    The buffers for these are there from the start, and nothing is allocated for a second image."""
    outcome = run_model(
        RUN
        + """
    invoke = ModelRunner._invoke

    async def marked(self, name, *arguments):
        mark(name)
        result = await invoke(self, name, *arguments)
        mark("end")
        return result

    with open_engine() as engine:
        mark("first")
        ask(engine, "see <image> what", 0)
        mark("seen")
        ModelRunner._invoke = marked
        print(len(ask(engine, "see <image> what", 1).token_ids))
""",
        model,
    )
    assert outcome.value == 8
    assert "hipHostMalloc" not in {call.function for call in outcome.after("first")}
    pixels, hidden = 3 * 32 * 32 * 4, 48 * 4
    sizes = {"encode_image_bs1": 1} | ({"encode_image_bs3": 3} if model[0] == "idefics3" else {})
    for name, tiles in sizes.items():
        sent, received = copied(outcome, name)
        tokens = 16 if model[0] == "llava" else 4
        assert (sent, received) == ([tiles * pixels], [tiles * tokens * hidden])
    sent, received = copied(outcome, "prefill_embeds_next_bs1")
    assert len(sent) == 1 and sent[0] > 32 * hidden and len(received) == 2


def copied(outcome: Outcome, name: str) -> tuple[list[int], list[int]]:
    """Bytes of each copy to and from the device, in a call that does not allocate."""
    calls = outcome.after(name)
    copies = [call for call in calls if call.function.startswith("hipMemcpy")]
    counts = Counter(call.function for call in calls)
    assert launches(calls)
    for function in ("hipMalloc", "hipHostMalloc", "hipFree", "hipStreamSynchronize"):
        assert not counts[function]
    both = between(copies, "host", "device"), between(copies, "device", "host")
    sent, received = ([call.notes["bytes"] for call in found] for found in both)
    return sent, received


def test_memory_is_flat(run_model: Callable[..., Outcome]) -> None:
    """Over images of all forms, of which old ones are dropped; whole prompts in one step, of any
    length."""
    outcome = run_model(
        RUN
        + """
    import random
    from tests.hip.control import resident

    rng, seen = random.Random(5), []
    with open_engine(image_memory="1MiB", prefill_tokens=10**12) as engine:
        for i in range(150):
            sizes = [(rng.randrange(20, 90), rng.randrange(20, 90)) for _ in range(2)]
            handles = [engine.submit(f"a <image> {i}", PARAMS, images=[picture(i, *size)])
                       for size in sizes]
            for handle in handles:
                handle.result()
            seen.append([memory()[1] - memory()[0], resident()])
        check_pages(engine)
    print(json.dumps(seen))
""",
        MODELS[0],
        timeout=600,
    )
    early, process_early = outcome.value[50]
    late, process_late = outcome.value[-1]
    assert late <= 1.02 * early
    assert process_late - process_early < 10  # MiB


FAULTS = [
    "hipModuleLaunchKernel:2:hipErrorLaunchFailure:async",
    "hipMemcpyAsync:1:hipErrorUnknown",
    "hipMalloc:1:hipErrorOutOfMemory",
    "hipModuleLaunchKernel:2:hipErrorLaunchOutOfResources",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_encoder_that_fails(
    run_model: Callable[..., Outcome], model: tuple[str, str], fault: str
) -> None:
    """It ends the engine, as other calls that fail."""
    outcome = run_model(
        RUN
        + """
    devices.PATIENCE = 3  # seconds
    errors = []

    def failing(action):
        try:
            action()
        except SfLocalError as error:
            errors.append([type(error).__name__, str(error)])

    engine = open_engine()
    text = engine.generate("no image", PARAMS).token_ids
    fail(fault)
    for i in range(2):
        failing(lambda: ask(engine, "see <image>", i))
    failing(lambda: ask(engine, "no image"))
    with Engine(cpu_artifact, "cpu", kv_pages=120) as other:
        assert ask(other, "see <image>", 0).completion_tokens == 8
        assert ask(other, "no image").token_ids == text
    print(json.dumps([errors, text]))
""",
        model,
        fault=fault,
    )
    errors, text = outcome.value
    check_failure(outcome, LOST, [text])
    assert len(errors) == 3
