"""Runs of a model's machine code beside its twins, in a child process, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compile.models.spec import LlamaConfig
from tests.hip.dispatches import Difference, Dispatch, compare_record, read_dispatches, wrong_ones
from tests.hip.driver import Driver, Outcome
from tests.hip.model_calls import Arrays, Plan
from tests.support.reference import Weights, forward

# A device that failed may wait for ever when it is closed: such a process ends at once.
CALLS = """
    import json, os, sys, traceback
    from pathlib import Path

    import numpy as np
    from tests.hip.model_calls import Plan, run_calls

    artifact, plan, results, patience = sys.argv[1:5]
    try:
        calls = run_calls(Path(artifact), Plan(**json.loads(plan)), float(patience))
        np.savez(results, **calls)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
"""


TEXT = """
    import json, sys
    from sf_local.engine.engine import Engine
    from sf_local.request.params import SamplingParams

    artifact, device, prompts = sys.argv[1:]
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    with Engine(artifact, device, kv_pages=40) as engine:
        handles = [engine.submit(prompt, params) for prompt in json.loads(prompts)]
        print(json.dumps([handle.result().token_ids for handle in handles]))
"""


@dataclass(frozen=True)
class Run:
    """How a run ended. differences: by dispatch, of those that changed anything."""

    outcome: Outcome
    dispatches: Mapping[str, Dispatch]
    differences: Mapping[str, Difference]
    results: Arrays  # empty if it failed

    @property
    def names(self) -> set[str]:
        """The dispatches whose machine code ran."""
        return {call.notes["name"] for call in self.outcome.of("interpret")}

    def check(self) -> None:
        """It ended well, something ran, and each dispatch is as its twin."""
        assert self.outcome.exit_code == 0, self.outcome.stderr
        assert self.names
        assert wrong_ones(self.differences.values()) == []

    def check_logits(self, plan: Plan, config: LlamaConfig, weights: Weights) -> None:
        """They are those of float64 numpy on these weights, up to 1% of the largest."""
        main = forward(config, weights, plan.tokens)
        forks = [forward(config, weights, plan.fork(i)) for i in range(plan.forks)]
        expected = {
            "prefill": main[: plan.prompt],
            "one": main[None, plan.prompt :],
            "forks": np.stack([rows[-plan.steps :] for rows in forks]),
        }
        for name, values in expected.items():
            apart = np.abs(self.results[name] - values).max()
            assert apart <= 0.01 * np.abs(values).max(), name


def run_beside_twins(
    driver: Driver,
    artifact: Path,
    twins: Path,
    plan: Plan,
    folder: Path,
    machine: str = "",
    device: str = "512MiB",
    timeout: float = 300,
    code: str = CALLS,
) -> Run:
    """Runs `plan`, or other code with the same arguments, on the artifact's chip.

    folder: for the record and the results. machine: words for the interpreter, which here keeps
    denormals as twins do. device: its memory. timeout: of the child, in seconds.
    """
    record, results = folder / "record", folder / "results.npz"
    for path in (record, results):
        path.unlink(missing_ok=True)
    outcome = driver.run(
        code, artifact, json.dumps(vars(plan)), results, timeout,
        devices=f"{chip_of(artifact)}:{device}", twins=twins, runs="both",
        machine=f"{machine} keep_denormals".lstrip(), record=record, timeout=timeout,
    )  # fmt: skip
    dispatches = read_dispatches(twins)
    differences = compare_record(record, dispatches) if record.exists() else {}
    arrays: Arrays = {}
    if results.exists():
        with np.load(results) as loaded:
            arrays = dict(loaded)
    return Run(outcome, dispatches, differences, arrays)


def check_text(
    driver: Driver, artifact: Path, on_cpu: Path, prompts: Sequence[Sequence[int]]
) -> None:
    """The engine's greedy answers to several at once, by machine code, are those of the CPU."""
    arguments = json.dumps(prompts)
    outcome = driver.run(
        TEXT, artifact, "hip", arguments, devices=f"{chip_of(artifact)}:512MiB", runs="machine",
        machine="random",
    )  # fmt: skip
    assert outcome.value == driver.run(TEXT, on_cpu, "cpu", arguments).value
    assert len(outcome.of("interpret")) == len(outcome.of("hipModuleLaunchKernel")) > 100


def chip_of(artifact: Path) -> str:
    chip: str = json.loads((artifact / "artifact.json").read_text())["target"]
    return chip
