"""All of `sf-local bench`: speeds on this machine, and ratios that do not depend on it.

They run in turn, round after round on one engine, so that figures of one run can be compared.
Prompts are random tokens and the cache is emptied before each measurement: what is found in it was
put there on purpose. What the machine can do at most is measured beside what is compared with it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from sf_local.artifact.open import Artifact, compiled_targets
from sf_local.bench.engine_costs import (
    batch,
    behind,
    chat,
    choose,
    fork,
    grammar,
    outside,
    stream,
)
from sf_local.bench.harness import QUICK, ROWS, SHORT, Bench, Sizes
from sf_local.bench.model_speed import constrained, context, decode, first_token, fresh, prefill
from sf_local.bench.report import Figure, summary
from sf_local.bench.stream_gaps import gaps
from sf_local.device.cpu_threads import num_usable_cores
from sf_local.device.info import find_device
from sf_local.engine.engine import Engine
from sf_local.engine.placement import Place
from sf_local.errors import RequestError

MEASUREMENTS = (
    prefill, decode, context, first_token, constrained, fork, batch, chat, stream, behind, gaps,
    grammar, choose, outside, fresh,
)  # fmt: skip


def run(
    artifact: str | Path,
    device: str = "cpu",
    rounds: int = 3,
    *,
    num_threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run all measurements on one engine, `rounds` times.

    Args:
        artifact: the artifact's folder, or its .vmfb file.
        device: a device's name, as `Engine` takes it.
        rounds: of all measurements; each figure has as many values.
        num_threads: of a CPU, as `Engine` takes it. The limits of the machine stay those of all.
        quick: one round with small sizes.
        progress: called with what is measured next.

    Returns what `--json` writes; see `report`.

    Raises:
        RequestError: `rounds` is less than 1.
        ArtifactError, DeviceError: as `Engine` does.
    """
    if rounds < 1:
        raise RequestError(f"rounds={rounds} must be at least 1")
    sizes, rounds = (QUICK, 1) if quick else (Sizes(), rounds)
    found = find_device(device, compiled_targets(artifact))
    place = Place.of(found, artifact, None, "50%" if found.kind == "cpu" else None)
    opened, pages = place.artifact, min(sizes.nodes, place.num_pages - 1)
    with Engine(artifact, device, kv_pages=pages, num_threads=num_threads) as engine:
        figures = [Figure("memory after load", _resident_megabytes(), "MB")]
        bench = Bench(engine, device, sizes, random.Random(0), num_threads)
        bench.run([bench.prompt(SHORT) for _ in range(ROWS)], SHORT)  # reads the weights
        for number in range(rounds):
            for measurement in MEASUREMENTS:
                progress(f"round {number + 1} of {rounds}: {measurement.__name__}")
                engine.flush_cache()
                figures += measurement(bench)
        figures.append(Figure("memory at the end", _resident_megabytes(), "MB"))
    settings = {"kv_pages": pages, "num_threads": num_threads}
    told = report(opened, device, rounds, figures) | settings
    if found.kind == "cpu":
        threads = num_threads or num_usable_cores()
        return told | {"machine": f"{told['cpu']}, {threads} thread{'s' * (threads > 1)}"}
    return told | {"machine": found.description}


def report(
    artifact: Artifact, device: str, rounds: int, figures: Sequence[Figure]
) -> dict[str, Any]:
    """The figures with their median and spread, and what they were measured on, as JSON values."""
    return {
        "artifact": str(artifact.vmfb.parent),
        "model": artifact.manifest.source["name"] if artifact.manifest else None,
        "weights": artifact.manifest.weight_dtype if artifact.manifest else None,
        "device": device,
        "cpu": re.findall(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": python_version()}
        | {name: version(name) for name in ("sf-local", "shortfin", "numpy")},
        "rounds": rounds,
        "figures": summary(figures),
    }


def _resident_megabytes() -> float:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3
