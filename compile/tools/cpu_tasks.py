"""`python -m compile.tools.cpu_tasks`: times of the tasks of CPU kernels, and what a step takes on
more threads, or in tasks of other sizes.

It builds kernels whose tasks write the CPU's time stamps to memory at a fixed address, runs them
with one thread and with two, and gives what it finds to `cpu_queue`. Beside what is simulated
stands what was measured, with tasks as they are, half and twice as large.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from compile.build import build
from compile.cpu import matrix_kernel
from compile.cpu.decoder import BEFORE_LAYERS, LAYER
from compile.cpu.decoder_layout import DecoderLayout
from compile.cpu.kernel import KernelBuilder
from compile.cpu.logits import AFTER_LAYERS
from compile.cpu.matrix_kernel import blocks_of_task
from compile.cpu.phases import MAX_AFTER
from compile.emitters import find_emitter
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from compile.options import BuildOptions
from compile.sources.open import open_source
from compile.target import Tuning
from compile.tools.cpu_queue import Costs, Phase, simulate
from compile.tools.gpu_report import SHAPES
from sf_local.artifact.manifest import WEIGHTS
from sf_local.artifact.open import open_artifact
from sf_local.device.device import Device
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row

ADDRESS = 0x6000_0000_0000  # of the log: i64 [phases, MAX_TASKS, 4], begin, end and workgroup
MAX_TASKS = 4096
ROWS = {
    "decode": Row([5], 100, range(1, 8)),
    "prefill": Row([i * 7919 % 40000 for i in range(512)], 0, range(8, 41)),
}
DECODED = "smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"
CALLS = {"decode": 12, "prefill": 5}  # of each, in a round; the first two are left out
SPIN, WAKE = 31e-6, 20e-6  # of `Costs`: SPIN_CYCLES at 2.1 GHz; as measured with SPIN_CYCLES = -1
Steps = list[NDArray[np.float64]]  # [tasks, 5]: phase, task, begin, end, workgroup; in seconds
Durations = dict[int, list[float]]  # of tasks, by the number of their phase


class TimedKernelBuilder(KernelBuilder):
    """Writes kernels that log when each task begins and ends."""

    @contextmanager
    def phase(self, counters: Memory, number: Scalar, num_tasks: Scalar) -> Iterator[Scalar]:
        """As KernelBuilder's."""
        with super().phase(counters, number, num_tasks) as task:
            begin = self._cycles()
            yield task
            values = begin, self._cycles(), self.workgroup().to("i64")
            at = (number * MAX_TASKS + task).to("i64") * 32 + ADDRESS
            for i, value in enumerate(values):
                pointer = f"llvm.inttoptr {(at + 8 * i).name} : i64 to !llvm.ptr"
                self.emit(f"llvm.store {value.name}, {self.op(pointer, '').name} : i64, !llvm.ptr")


def map_log(num_phases: int) -> NDArray[np.int64]:
    """The memory where kernels log their tasks."""
    size, call = num_phases * MAX_TASKS * 32, ctypes.CDLL(None).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    if call(ADDRESS, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != ADDRESS:
        raise OSError(f"something else lies at the log's address {ADDRESS:#x}")
    memory = ctypes.cast(ADDRESS, ctypes.POINTER(ctypes.c_int64))
    return np.ctypeslib.as_array(memory, (num_phases, MAX_TASKS, 4))


def measure(path: Path, num_threads: int, log: NDArray[np.int64]) -> dict[str, Steps]:
    """Steps of each of ROWS."""
    device, done = Device("cpu", num_threads), Future[None]()
    runner = ModelRunner(open_artifact(path), device, 64, 512)
    found: dict[str, Steps] = {name: [] for name in ROWS}
    times: list[tuple[float, float]] = []  # by the clock, and as time stamps

    async def run() -> None:
        try:
            await runner.start()
            for name in [call for call in ROWS for _ in range(CALLS[call])]:
                log[...] = 0
                began = time.perf_counter()
                await getattr(runner, name)([ROWS[name]])
                used = np.argwhere(log[..., 1])
                step = np.hstack([used, log[used[:, 0], used[:, 1], :3]])
                times.append((began, step[:, 2].min()))
                found[name].append(step - [0, 0, step[:, 2].min(), step[:, 2].min(), 0])
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    device.run(run())
    try:
        done.result(timeout=300)
    finally:
        runner.close()
        device.close()
    (began, first), (ended, last) = times[0], times[-1]
    scale = np.array([1, 1, (ended - began) / (last - first), (ended - began) / (last - first), 1])
    return {name: [step * scale for step in steps[2:]] for name, steps in found.items()}


def length(step: NDArray[np.float64]) -> float:
    """Seconds of a step."""
    return float(step[:, 3].max() - step[:, 2].min())


def durations(steps: Steps) -> Durations:
    """Means over the steps."""
    found: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, task, begin, end, _ in np.vstack(steps):
        found[int(number)][int(task)].append(end - begin)
    return {n: [mean(found[n][task]) for task in sorted(found[n])] for n in sorted(found)}


def costs_of(steps: Steps) -> Costs:
    """Medians of what lies between the tasks of these steps."""
    gaps: dict[str, list[float]] = {"take": [], "turn": [], "barrier": [], "line": []}
    for step in steps:
        last = None
        for number in np.unique(step[:, 0]):
            tasks = step[step[:, 0] == number]
            threads = [tasks[tasks[:, 4] == thread] for thread in np.unique(tasks[:, 4])]
            gaps["line"] += np.diff(sorted(own[:, 2].min() for own in threads)).tolist()
            for own in (own[own[:, 2].argsort()] for own in threads):
                gaps["take"] += (own[1:, 2] - own[:-1, 3]).tolist()
                if last is not None:
                    gaps["turn" if last[4] == own[0, 4] else "barrier"].append(own[0, 2] - last[3])
            last = tasks[tasks[:, 3].argmax()]
    return Costs(
        spin=SPIN, wake=WAKE, **{name: median(values or [0.0]) for name, values in gaps.items()}
    )


@dataclass(frozen=True)
class Measured:
    """Tasks of the demo's step of `rows` rows, with one thread and with two. bandwidth: bytes a
    second that more threads can read together."""

    layout: DecoderLayout
    rows: int
    one: Durations
    two: Durations
    bandwidth: float

    def phases(self, shape: DecoderLayout, tuning: Tuning) -> list[Phase]:
        """Phases of another shape, in tasks of another size.

        Matrices take time by their bytes, other phases by the features, heads or tokens that they
        go through. Of two threads each is as slow as was measured, of more as slow as the bandwidth
        lets it be.
        """
        old, new, names = self.layout.config, shape.config, names_of(self.layout.config)
        kinds: dict[str, list[list[float]]] = defaultdict(list)
        for n, times in self.one.items():
            kinds[names.get(n, "exit")].append([sum(self.two[n]), *times])
        hidden, tokens = new.hidden_size / old.hidden_size, new.vocab_size / old.vocab_size
        heads = new.num_kv_heads / old.num_kv_heads
        query = new.num_heads * new.head_dim / (old.num_heads * old.head_dim) / heads
        growth = {  # of the number of tasks, and of the time of each
            "set_up": (1, 1), "store_kv": (heads, query), "attend": (heads, query),
            "quantize": (1, new.intermediate_size / old.intermediate_size),
            "summarize": (tokens, 1), "find_best": (1, tokens),
        }  # fmt: skip
        found = {}
        for name, layers in kinds.items():
            with_two, *times = (mean(values) for values in zip(*layers, strict=True))
            number, share = growth.get(name, (1, hidden))
            tasks, rate = [mean(times) * share] * round(len(times) * number), 0.0
            if name in (was := matrices(self.layout)):
                heights = 1 if name == "head" else -(-self.rows // tuning.row_chunk)
                rate = was[name][0] * was[name][1] * heights / sum(times)
                count, size = matrices(shape)[name]
                run = blocks_of_task(count, size, tuning)
                tasks = [size / rate * min(run, count - i) for i in range(0, count, run)] * heights
            found[name] = Phase(tasks, self._pace(rate, with_two / sum(times)))
        return [found[name] for name in names_of(new).values() if name in found]

    def _pace(self, rate: float, with_two: float) -> Callable[[int], float]:
        return lambda n: with_two if n == 2 else max(1.0, n * rate / self.bandwidth)


def matrices(layout: DecoderLayout) -> dict[str, tuple[int, int]]:
    """Of each phase that has a matrix: its blocks, and the bytes of a block."""
    found = {}
    for name, (rows, cols) in layout.matrices().items():
        is_layer = name.startswith("blk.0.")
        format_ = layout.layers if is_layer else layout.head_format
        num_blocks = -(-rows // layout.vectors.block)
        found[name.removeprefix("blk.0.") if is_layer else "head"] = (
            num_blocks, format_.block_bytes(cols),
        )  # fmt: skip
    return found


def names_of(config: LlamaConfig) -> dict[int, str]:
    """Phases by their numbers, but for "exit"."""
    return dict(enumerate([*BEFORE_LAYERS, *LAYER * config.num_layers, *AFTER_LAYERS]))


def main() -> None:
    """Run the command with the arguments of the process."""
    args = _parser().parse_args()
    target, source = BuildOptions().targets[0], open_source("demo")
    assert target.vectors is not None
    base = target.vectors.tuning
    tunings = {
        "as is": base,
        "half": replace(base, task_bytes=base.task_bytes // 2, min_tasks=base.min_tasks * 2),
        "twice": replace(base, task_bytes=base.task_bytes * 2, min_tasks=base.min_tasks // 2),
    }
    options = BuildOptions(weight_dtype=args.weights, prefill_batch_sizes=(1,),
                           decode_batch_sizes=(1,), max_seq_len=1024)  # fmt: skip
    model = find_emitter(source, options, target).options
    dtypes = {"output.weight": model.dtype_of("token_embd.weight"), **model.tensor_dtypes}
    layouts = {name: DecoderLayout.of(SHAPES[name], replace(model, tensor_dtypes=dtypes),
                                      target.vectors) for name in DECODED}  # fmt: skip
    demo = layouts[DECODED[0]]
    log = map_log(len(names_of(demo.config)) + MAX_AFTER)
    steps: dict[tuple[str, str, int], Steps] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="sf-tasks-") as folder:
        weights = Path(folder, WEIGHTS)
        for name, tuning in tunings.items():
            with patch.object(matrix_kernel, "KernelBuilder", TimedKernelBuilder):
                build(source, path := Path(folder, name), replace(options, tuning=tuning))
            (path / WEIGHTS).replace(weights)  # all read the same memory
            (path / WEIGHTS).symlink_to(weights)
        for _, name, threads in product(range(args.rounds), tunings, (1, 2)):
            for call, found in measure(Path(folder, name), threads, log).items():
                steps[call, name, threads] += found
    quiet = {key: sorted(found, key=length)[: -(-len(found) // 4)] for key, found in steps.items()}
    for call, row in ROWS.items():
        one, two = (quiet[call, "as is", threads] for threads in (1, 2))
        costs = {1: costs_of(one), 2: costs_of(two)}
        measured = Measured(demo, len(row.tokens), durations(one), durations(two),
                            args.bandwidth * 1e9)  # fmt: skip
        print(f"\n{call} of the demo: tasks, threads, ms as measured, as simulated, their ratio")
        for (name, tuning), threads in product(tunings.items(), (1, 2)):
            real = mean(length(step) for step in quiet[call, name, threads])
            told = simulate(measured.phases(demo, tuning), threads, costs[threads])
            print(f"  {name:6}{threads:3}{real * 1e3:9.2f}{told * 1e3:9.2f}{told / real:7.2f}")
        print(
            "  ns:",
            ", ".join(f"{name} {value * 1e9:.0f}" for name, value in vars(costs[2]).items()),
        )
        for (shape, layout), name in product(layouts.items(), tunings) if call == "decode" else ():
            phases = measured.phases(layout, tunings[name])
            cells = [" to ".join(
                f"{1e3 * simulate(phases, threads, replace(costs[2], read=read)):.2f}"
                for read in (0, costs[2].line)) for threads in args.threads]  # fmt: skip
            print(f"  simulated: {shape:13} {name:6}", " | ".join(cells), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compile.tools.cpu_tasks",
        description="Steps of the demo, measured and simulated, and decode steps in ms on other"
        " threads: if threads that wait delay a counter by nothing, or by its line each.",
    )
    parser.add_argument("--weights", default="bf16", help="weight type (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[16, 64], help="(%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=300.0,
                        help="of more than two threads, in GB/s (%(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    main()
