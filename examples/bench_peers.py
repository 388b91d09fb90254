"""The same work on sf_local and on its peers, round after round in one run.

    bench_peers.py --bf16 ARTIFACT --int8 ARTIFACT --int4 ARTIFACT --peers FOLDER --json FILE

The artifacts are of the demo model; those of one width may differ in their activations, as in
`--int4 ARTIFACT --int4 ANOTHER`. `install_peers.sh FOLDER` makes the peers' environments. Every
peer is a worker process (examples/peers/), which is stopped while another one measures. One whose
first token of a known prompt is wrong is not measured. A ratio is always of two figures of the same
round; the table has the medians, with the smallest and the largest in brackets. Below it stand the
settings of each peer: version, threads, precision of the KV cache, and what else matters.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any

from peers import conversions, models

from sf_local.artifact.cache import cache_dir
from sf_local.artifact.open import Artifact, open_artifact
from sf_local.bench.roofline import decode_bytes
from sf_local.errors import RequestError, SfLocalError

SCRIPTS = Path(__file__).parent / "peers"
CONTEXT = 2304  # tokens of KV cache, for us and for llama.cpp
VOCABULARY = 32_000  # ids that every model here has
FRANCE, PARIS = [504, 3575, 282, 4649, 314], 7042  # "The capital of France is", and what follows
JOB_SECONDS = 300  # at most
NUM_CORES = len(os.sched_getaffinity(0))
ENVIRONMENTS = {
    "llama.cpp": "llama", "transformers": "torch", "shortfin HTTP": "shortfin",
    "OpenVINO GenAI": "openvino", "ONNX Runtime GenAI": "onnxruntime", "CTranslate2": "ctranslate2",
}  # fmt: skip
WIDTHS = ("f16", "bf16", "int8", "int4")  # of weights
SOURCE = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Job:
    """Work for a worker, with fresh prompts in each round; `fresh` runs it in a new process."""

    name: str
    arguments: Callable[[random.Random], list[Any]]
    fresh: bool = False


@dataclass(frozen=True)
class Row:
    """Ours against a peer, or against a bound where there is no peer."""

    work: str
    job: Job
    ours: str
    theirs: str = ""
    target: float | None = None
    unit: str = "tokens/s"
    scale: float = 1.0  # of our value, to have the unit

    @property
    def names(self) -> list[str]:
        return [name for name in (self.ours, self.theirs) if name]

    def ratio(self, ours: float, theirs: float | None) -> float:
        """How many times better we are; without a peer our value, which has an upper bound."""
        if theirs is None:
            return ours
        return theirs / ours if self.unit == "s" else ours / theirs


def tokens(count: int) -> Callable[[random.Random], list[int]]:
    return lambda rng: rng.choices(range(VOCABULARY), k=count)


START = Job("first", lambda rng: [tokens(16)(rng)], fresh=True)
WARM = Job("warm", lambda rng: [tokens(16)(rng)])
DECODE = Job("decode", lambda rng: [tokens(16)(rng), 96])
PREFILL = {n: Job("prefill", lambda rng, n=n: [tokens(n)(rng)]) for n in (128, 512, 2048)}
TOGETHER = {
    n: Job("together", lambda rng, n=n: [[tokens(16)(rng) for _ in range(n)], 64]) for n in (8, 16)
}
CACHED = Job("cached", lambda rng: [tokens(1000)(rng), tokens(16)(rng), tokens(16)(rng)])
MEMORY = Job("memory", lambda rng: [])
COMPARED = {
    "decode, 1 row": DECODE,
    **{f"prefill {length}": job for length, job in PREFILL.items()},
    **{f"{count} requests together": job for count, job in TOGETHER.items()},
    "first token, 1,000 cached": CACHED,
}  # on every peer that has our widths


@dataclass(frozen=True)
class Peer:
    """A runtime that is compared at each width that it has.

    kinds: what it calls its weights of our widths. model(python, kind): its file or folder, which
    its environment's `python` makes. wanted: the least ratio of a job, at a width.
    """

    script: str
    kinds: Mapping[str, str]
    model: Callable[[Path, str], Path]
    wanted: Mapping[Job, Mapping[str, float]] = field(default_factory=dict)


def _widths(labels: Iterable[str]) -> dict[str, str]:
    """The width of an artifact, by its label, which is "int4" or "int4, int8 activations"."""
    return {label: label.partition(",")[0] for label in labels}


def _each(sixteen_bits: float, quantized: float) -> dict[str, float]:
    return {w: quantized if w.startswith("int") else sixteen_bits for w in WIDTHS}


PEERS = {
    "llama.cpp": Peer(
        "llama_cpp_python.py",
        {"f16": "F16", "bf16": "F16", "int8": "Q8_0", "int4": "Q4_1"},
        lambda python, kind: models.demo_as_gguf(kind),
        {
            DECODE: _each(1.3, 1.5), PREFILL[512]: {"bf16": 2.0}, PREFILL[2048]: {"bf16": 1.7},
            TOGETHER[8]: {"bf16": 5.0},
        },
    ),
    "OpenVINO GenAI": Peer(
        "openvino_pipeline.py",
        {"f16": "fp16", "bf16": "fp16", "int8": "int8", "int4": "int4"},
        conversions.openvino,
        {
            DECODE: _each(1.5, 1.5), **dict.fromkeys(PREFILL.values(), _each(1.0, 1.0)),
            **dict.fromkeys(TOGETHER.values(), _each(1.0, 1.25)), CACHED: _each(2.0, 2.0),
        },
    ),
    "ONNX Runtime GenAI": Peer(
        "onnxruntime_generator.py", {"int8": "int8", "int4": "int4"}, conversions.onnxruntime
    ),
    "CTranslate2": Peer("ctranslate2_generator.py", {"int8": "int8"}, conversions.ctranslate2),
}  # fmt: skip


def rows(artifacts: Mapping[str, Artifact]) -> list[Row]:
    """The table, as far as the artifacts go, by label; what has no target is for information."""
    table = [
        Row(work, job, f"ours {label}", f"{name} {peer.kinds[width]}",
            peer.wanted.get(job, {}).get(width), *(("s",) if job is CACHED else ()))
        for label, width in _widths(artifacts).items()
        for name, peer in PEERS.items() if width in peer.kinds
        for work, job in COMPARED.items()
    ]  # fmt: skip
    if "bf16" not in artifacts:
        return table
    ours, llama, torch, http = "ours bf16", "llama.cpp F16", "transformers", "shortfin HTTP"
    gigabytes = decode_bytes(artifacts["bf16"], 16 + 96 / 2) / 1e9
    return [
        *table,
        Row("prefill 512", PREFILL[512], ours, torch, 1.4),
        Row("prefill 2048", PREFILL[2048], ours, torch, 1.4),
        Row("decode, 1 row", DECODE, ours, torch, 3.0),
        Row("first token, 1,000 cached", CACHED, ours, http, 10.0, "s"),
        Row("decode, 1 row", DECODE, ours, "amdsharktank"),
        Row("prefill 512", PREFILL[512], ours, "amdsharktank"),
        Row("bytes read / memory bandwidth", DECODE, ours, "memory", 0.8, "GB/s", gigabytes),
        Row("process start to first token", START, ours, llama, 1.0, "s"),
        Row("peak memory / (weights + KV)", MEMORY, ours, "", 1.25, "x"),
    ]


@dataclass
class Worker:
    """A worker process, started by the first job; it sleeps between jobs."""

    command: Sequence[str | Path]
    is_model: bool = True
    is_demo: bool = True  # a model which must know the capital of France
    settings: str = ""  # of a model, once it was asked
    process: subprocess.Popen[str] | None = None
    errors: IO[str] = field(default_factory=partial(tempfile.TemporaryFile, "w+"))

    def measure(self, job: Job, arguments: list[Any]) -> float:
        """The job's value; RuntimeError if it fails."""
        if job.fresh:
            return self._time_in_new_process(job, arguments)
        self.answer(WARM.name, *WARM.arguments(random.Random()))
        return float(self.answer(job.name, *arguments))

    def answer(self, name: str, *arguments: object) -> Any:
        """What the worker's function of that name returns; RuntimeError if it fails."""
        if self.process is None:
            self.process = self._open()
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            return self._ask(self.process, name, *arguments)
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        if self.process is not None:
            _kill(self.process)

    def _time_in_new_process(self, job: Job, arguments: list[Any]) -> float:
        started_at = time.perf_counter()
        process = self._start()
        try:
            self._ask(process, job.name, *arguments)
            return time.perf_counter() - started_at
        finally:
            _kill(process)

    def _open(self) -> subprocess.Popen[str]:
        process = self._start()
        try:
            if self.is_model and self.is_demo:
                token = self._ask(process, START.name, FRANCE)
                if token != PARIS:
                    raise RuntimeError(f"its first token is {token}, not {PARIS}: another model?")
            if self.is_model:
                self.settings = self._ask(process, "settings")
            return process
        except BaseException:
            _kill(process)
            raise

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(part) for part in self.command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, start_new_session=True,
        )  # fmt: skip

    def _ask(self, process: subprocess.Popen[str], *job: object) -> Any:
        assert process.stdin and process.stdout
        try:
            print(json.dumps(job), file=process.stdin, flush=True)
            if not select.select([process.stdout], [], [], JOB_SECONDS)[0]:
                raise RuntimeError(f"no answer in {JOB_SECONDS} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": f"it ended: {self._last_error()}"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def _last_error(self) -> str:
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["without a word"])[-1]


def _kill(process: subprocess.Popen[str]) -> None:
    """End the process and its children, which are a group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


Workers = Mapping[str, Worker | str]  # or why it is missing
Measured = Mapping[tuple[str, Job], list[float] | str]  # one a round, or why there is none


@contextmanager
def open_workers(
    artifacts: Mapping[str, Artifact], sharktank: Path | None, peers: Path
) -> Iterator[Workers]:
    workers: dict[str, Worker | str] = {
        "memory": Worker([sys.executable, SCRIPTS / "memory.py"], is_model=False)
    }
    for label, width in _widths(artifacts).items():
        workers[f"ours {label}"] = our_worker(artifacts[label].vmfb.parent)
        for name, peer in PEERS.items():
            if width in peer.kinds:
                kind = peer.kinds[width]
                workers[f"{name} {kind}"] = peer_of_kind(peers, name, kind)
    if "bf16" in artifacts:
        folder = artifacts["bf16"].vmfb.parent
        workers["transformers"] = peer_worker(
            peers, "transformers", "torch_transformers.py", models.demo_as_folder
        )
        workers["shortfin HTTP"] = peer_worker(
            peers, "shortfin HTTP", "shortfin_http.py", lambda: folder
        )
        workers["amdsharktank"] = our_worker(sharktank) if sharktank else "no --amdsharktank given"
    try:
        yield workers
    finally:
        for worker in workers.values():
            if not isinstance(worker, str):
                worker.close()


def our_worker(folder: Path, context: int = CONTEXT) -> Worker:
    return Worker([sys.executable, SCRIPTS / "sf_engine.py", folder, str(context)])


def peer_of_kind(peers: Path, name: str, kind: str) -> Worker | str:
    """One of PEERS on weights of a kind that it has; or why there is none."""
    peer = PEERS[name]
    return peer_worker(peers, name, peer.script, lambda: peer.model(python_of(peers, name), kind))


def peer_worker(
    peers: Path, name: str, script: str, model: Callable[[], Path], context: int = CONTEXT
) -> Worker | str:
    """A peer on the file or folder that `model()` makes; or why there is none."""
    python = python_of(peers, name)
    if not python.exists():
        return f"not installed in {peers}"
    try:
        return Worker([python, SCRIPTS / script, model(), str(context), str(NUM_CORES)])
    except RuntimeError as error:
        return str(error)


def python_of(peers: Path, name: str) -> Path:
    return peers / ENVIRONMENTS[name] / "bin" / "python"


def measure(
    table: Sequence[Row], workers: Workers, rounds: int, progress: Callable[[str], None]
) -> Measured:
    """Every job on all its workers in turn; every other round in the opposite order.

    Round 0 is not counted: it fills caches and allocates.
    """
    measured: dict[tuple[str, Job], list[float] | str] = {}
    for row in table:
        for name in row.names:
            worker = workers[name]
            measured[name, row.job] = worker if isinstance(worker, str) else []
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}")
        for index, job in enumerate(dict.fromkeys(row.job for row in table)):
            # Of one seed, a prompt would begin with a shorter one, which prefix caches know
            arguments = job.arguments(random.Random(f"{number} {index}"))
            names = [name for name, their_job in measured if their_job is job]
            for name in names if number % 2 else reversed(names):
                worker, values = workers[name], measured[name, job]
                if isinstance(values, str) or isinstance(worker, str):
                    continue
                try:
                    values.append(worker.measure(job, arguments))
                except RuntimeError as error:
                    measured[name, job] = str(error)
                    progress(f"{name}, {job.name}: {error}")
    return {key: v if isinstance(v, str) else v[1:] for key, v in measured.items()}


def results(table: Sequence[Row], measured: Measured) -> list[dict[str, Any]]:
    """A row's values, one a round, and their ratios; or why there are none."""
    found = []
    for row in table:
        sides = [measured[name, row.job] for name in row.names]
        result: dict[str, Any] = {
            "work": row.work, "unit": row.unit, "target": row.target,
            "ours": {"name": row.ours}, "theirs": {"name": row.theirs},
        }  # fmt: skip
        scales = (row.scale, 1.0)
        for side, scale, values in zip(("ours", "theirs"), scales, sides, strict=False):
            if isinstance(values, str):
                result[side]["missing"] = values
            else:
                result[side] |= _summary([value * scale for value in values])
        ours, theirs = (result[side].get("values") for side in ("ours", "theirs"))
        if ours and (theirs or not row.theirs):
            pairs = zip(ours, theirs or [None] * len(ours), strict=True)
            result["ratio"] = _summary([row.ratio(a, b) for a, b in pairs])
        found.append(result)
    return found


def settings_of(workers: Workers) -> dict[str, str]:
    """What the workers that were measured said of their settings."""
    return {
        name: worker.settings for name, worker in workers.items()
        if not isinstance(worker, str) and worker.settings
    }  # fmt: skip


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def text(found: Sequence[dict[str, Any]]) -> str:
    """The results as a table for a screen."""
    lines = [("work", "", "ours", "", "theirs", "ratio", "wanted")]
    for result in found:
        bound = "<=" if result["unit"] == "x" else ">="
        wanted = f"{bound} {result['target']}" if result["target"] else ""
        work = f"{result['work']}, {result['unit']}".removesuffix(", x")
        ours, theirs = result["ours"], result["theirs"]
        lines.append((work, ours["name"], _shown(ours), theirs["name"], _shown(theirs),
                      _shown(result.get("ratio", {})), wanted))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _shown(figure: Mapping[str, Any]) -> str:
    if "median" not in figure:
        return str(figure.get("missing", ""))
    values = (figure[key] for key in ("min", "median", "max"))
    low, middle, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{middle} [{low}..{high}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="sf_local against its peers, on the demo model")
    for width in WIDTHS:
        names = (f"{name} {p.kinds[width]}" for name, p in PEERS.items() if width in p.kinds)
        parser.add_argument(f"--{width}", metavar="ARTIFACT", action="append", default=[],
                            help=f"against {', '.join(names)}; may be repeated")  # fmt: skip
    parser.add_argument("--amdsharktank", metavar="ARTIFACT", type=Path, help="exported by it")
    parser.add_argument("--peers", metavar="FOLDER", type=Path, default=cache_dir() / "peers",
                        help="made by install_peers.sh (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose work has this text")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every value there")
    args = parser.parse_args(arguments)
    try:
        artifacts = _artifacts({width: getattr(args, width) for width in WIDTHS})
    except SfLocalError as error:
        parser.error(str(error))
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    table = [row for row in rows(artifacts) if args.only in row.work]
    if not table:
        parser.error(
            f"--only {args.only!r}: in no row's name; try 'decode', 'prefill 512', 'start'"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that stopped workers end, too
    with open_workers(artifacts, args.amdsharktank, args.peers) as workers:
        measured = measure(table, workers, args.rounds, lambda line: print(line, file=sys.stderr))
    found, settings = results(table, measured), settings_of(workers)
    print(text(found))
    print("\n".join(f"{name}: {stated}" for name, stated in settings.items()))
    print(f"{NUM_CORES} cores, {args.rounds} rounds")
    if args.json:
        made = {"rounds": args.rounds, "settings": settings, "results": found}
        args.json.write_text(json.dumps(made, indent=2) + "\n")


def _artifacts(paths: Mapping[str, Sequence[str]]) -> dict[str, Artifact]:
    """Those that are given, by label; RequestError for none, or one of another model or type."""
    given = [(width, path, open_artifact(path)) for width in paths for path in paths[width]]
    if not given:
        raise RequestError("give at least one of --f16, --bf16, --int8 and --int4: folders that "
                           "`sf-compile demo --weights bf16 -o FOLDER` makes")  # fmt: skip
    labelled: dict[str, Artifact] = {}
    for width, path, artifact in given:
        made = artifact.manifest
        found = (made.source["name"], made.weight_dtype) if made else ("unknown", "unknown")
        if found != (SOURCE, width):
            raise RequestError(
                f"--{width} {path}: holds {found[0]} in {found[1]}, but the peers have "
                f"{SOURCE}; make it with: sf-compile demo --weights {width} -o FOLDER"
            )
        activations = made and made.activation_dtype
        label = f"{width}, {activations} activations" if activations else width
        if label in labelled:
            raise RequestError(f"--{width} {path}: {label} is given twice; give each kind once")
        labelled[label] = artifact
    return labelled


if __name__ == "__main__":
    main()
