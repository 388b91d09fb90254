"""Replicas on two stand-ins for a GPU: both work, and one goes on when the other fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hip.driver import Driver
from tests.support.tiny import GPU_SIZES, TinyModel

CODE = """
    import json, sys
    from tests.hip.control import fail
    from sf_local.engine.engine import Engine
    from sf_local.errors import SfLocalError
    from sf_local.request.params import SamplingParams

    artifact, devices = sys.argv[1], json.loads(sys.argv[2])
    PARAMS = SamplingParams(max_new_tokens=24, temperature=1, seed=3, ignore_eos=True)
    first, *rest = [[*range(5 + i, 37 + i)] for i in range(6)]
    errors = []
    with Engine(artifact, devices, kv_pages=60) as engine:
        handles = [engine.submit(prompt, PARAMS) for prompt in [first, *rest]]
        answers = [handle.result().token_ids for handle in handles]
        again = [engine.generate(prompt, PARAMS) for prompt in [first, *rest]]
        cached = [output.cached_tokens for output in again]
        answers += [output.token_ids for output in again]
        if len(devices) > 1:
            fail("hipModuleLaunchKernel:30:hipErrorLaunchFailure:async")
            for prompt in [first, *rest]:  # one after the other: the failure is of one device
                try:
                    answers.append(engine.generate(prompt, PARAMS).token_ids)
                except SfLocalError as error:
                    errors.append([type(error).__name__, str(error)])
            stats = engine.stats()
            assert stats["running"] == stats["waiting"] == 0
            assert stats["completion_tokens"] >= 24 * len(answers)
        print(json.dumps([answers, cached, errors]))
"""


@pytest.mark.slow
def test_two_gpus(
    hip_driver: Driver, make_tiny: Callable[..., TinyModel], twins_of: Callable[[Path], Path]
) -> None:
    """The same answers as on one; a prompt comes back to where it was computed; the failure of one
    costs its request, and the other serves all that follow."""
    model = make_tiny(target="gfx1100", keep_mlir=True, **GPU_SIZES)
    outcomes = [
        hip_driver.run(
            CODE, model.artifact, json.dumps(devices), devices="gfx1100:512MiB,gfx1100:512MiB",
            twins=twins_of(model.artifact),
        )
        for devices in (["hip:0"], ["hip:0", "hip:1"])
    ]  # fmt: skip
    (expected, _, _), (answers, cached, errors) = (outcome.value for outcome in outcomes)
    assert answers[:12] == expected
    assert len(answers) == 12 + 5 and all(tokens in expected for tokens in answers)
    assert all(count >= 24 for count in cached)
    assert {call.device for call in outcomes[1].of("hipModuleLaunchKernel")} == {0, 1}
    [(kind, message)] = errors
    assert kind == "DeviceError" and "start the program again" in message
