"""A soak of the engine: many threads, random requests, a tiny pool.

`python tests/tools/soak.py 1200` runs it for 20 minutes.

Every answer is compared with that of the same request alone; nothing may be lost, hung or leaked.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from sf_local import Engine, SamplingParams

NUM_THREADS = 64


@dataclass
class Report:
    """Counts by how requests ended, resident memory in MiB over time, and what went wrong."""

    endings: dict[str, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def soak(artifact: Path, seconds: float, kv_pages: int = 40) -> Report:
    """Hammer a tiny model; raises if a page is left in use."""
    report, lock = Report(), threading.Lock()
    end = time.monotonic() + seconds
    with Engine(artifact, kv_pages=kv_pages) as engine, Engine(artifact) as alone:
        prompts = _prompts(random.Random(0))
        expected = [alone.generate(p, _params(40)).token_ids for p in prompts]

        def work(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                ending = _one(engine, rng, prompts, expected, report)
                with lock:
                    report.endings[ending] = report.endings.get(ending, 0) + 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            report.memory.append(_resident_mib())
            time.sleep(min(5.0, seconds / 10))
        stats = engine.stats()
        assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0), stats
        assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"], stats
        engine._replicas.workers[0].core.pool.check_integrity()
        engine._replicas.workers[0].core.cache.check_integrity()
        engine.flush_cache()
        assert engine.stats()["pages_free"] == stats["pages_total"]
        report.endings["preempted"] = int(stats["preemptions"])
    return report


def _prompts(rng: random.Random) -> list[list[int]]:
    """Stems and their forks, so that prefixes are shared, copied and evicted all the time."""
    stems = [[rng.randrange(3, 300) for _ in range(rng.randrange(1, 90))] for _ in range(12)]
    return [[*stem, *range(5, 5 + i)] for stem in stems for i in range(6)]


def _params(count: int, **rest: float) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True, **rest)  # type: ignore[arg-type]


def _one(
    engine: Engine,
    rng: random.Random,
    prompts: list[list[int]],
    expected: list[list[int]],
    report: Report,
) -> str:
    """One random request, ended in a random way; what it gave must be right as far as it goes."""
    i, count = rng.randrange(len(prompts)), rng.randrange(41)
    way = rng.choice(["result", "result", "result", "leave", "cancel", "drop", "timeout", "flush"])
    if way == "flush":
        engine.flush_cache()
        return way
    params = _params(count, **({"timeout": rng.random() / 5} if way == "timeout" else {}))
    handle = engine.submit(prompts[i], params)
    if way in ("leave", "drop"):
        stream = handle.deltas()
        for _ in range(rng.randrange(4)):
            next(stream, None)
        if way == "leave":
            stream.close()
        return way
    if way == "cancel":
        time.sleep(rng.random() / 50)
        handle.cancel()
    output = handle.result()
    right = expected[i][: len(output.token_ids)]
    complete = output.finish_reason != "length" or len(output.token_ids) == count
    if output.token_ids != right or not complete:
        report.wrong.append(f"prompt {i}, {count} tokens: {output.token_ids} is not {right}")
    return output.finish_reason


def _resident_mib() -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) // 1024 if match else 0


def main() -> None:
    import tempfile

    from compile import build
    from tests.support.reference import random_weights, write_hf_folder
    from tests.support.tiny import TINY, TINY_OPTIONS

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_hf_folder(source, TINY, random_weights(TINY, 7))
        artifact = build(source, Path(folder) / "artifact", TINY_OPTIONS)
        report = soak(artifact, float(sys.argv[1]))
    print("endings:", report.endings)
    print("memory (MiB):", report.memory[:: max(len(report.memory) // 20, 1)])
    print("wrong:", report.wrong[:5], len(report.wrong))
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
