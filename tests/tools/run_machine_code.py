"""Runs many models' machine code in the interpreter, beside its CPU twins: `--list` says which.

Prints a row for each case and chip; `--markdown FILE` writes the table that stands in
tests/hip/README.md. Ends with 1 if anything is wrong. Everything takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from compile import BuildOptions, build
from compile.folder import MLIR, PLAIN_MLIR
from compile.models.spec import LlamaConfig
from compile.target import HIP_CHIPS
from compile.tools.gpu_report import SHAPES
from tests.hip.dispatches import BOUNDS, Difference, worst, wrong_ones
from tests.hip.driver import Driver, Outcome, build_driver, compile_twins
from tests.hip.machine_runs import Run, run_beside_twins
from tests.hip.model_calls import Plan
from tests.support.reference import forward, random_weights, uneven_weights, write_hf_folder
from tests.support.tiny import DATA, TINY, TINY_OPTIONS
from tests.support.vision_reference import IDEFICS3, LLAVA, random_model, write_vision_folder

MAIN = ("gfx942", "gfx90a", "gfx1100", "gfx1201")
# What the slow tests run: about five minutes.
SOME = {
    ("tiny-f16", "gfx90a"), ("tiny-f16", "gfx1100"), ("tiny-f16", "gfx1201"),
    ("tiny-bf16", "gfx90a"), ("tiny-bf16", "gfx1100"), ("smollm2-layer-f16", "gfx1100"),
    ("context-300", "gfx942"), ("images-idefics3", "gfx942"), ("images-llava", "gfx1100"),
    ("smollm2-f16", "gfx1100"),
}  # fmt: skip
ORDERS = ("forward", "backward", "random")  # of waves, by turns
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "hip"  # as the tests have it
GOLDEN = DATA / "smollm2_greedy.json"
SHORT = (6, 14)  # numbers of golden prompts of 4 and 9 tokens
TIMEOUT = 3600  # seconds of a child

IMAGES = """
    import json, sys

    import numpy as np
    import PIL.Image
    from sf_local.device import device as devices
    from sf_local.engine.engine import Engine
    from sf_local.request.params import SamplingParams

    artifact, device = sys.argv[1:3]
    devices.PATIENCE = 1000  # seconds
    greedy = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 40, 60, 3)).astype(np.uint8)
    pictures = [PIL.Image.fromarray(values) for values in pixels]
    with Engine(artifact, device, kv_pages=60) as engine:
        first = engine.generate("see <image> what", greedy, images=pictures[:1])
        both = engine.generate("<image> and <image>?", greedy, images=pictures)
        print(json.dumps([first.token_ids, both.token_ids]))
"""
GREEDY = """
    import json, sys
    from pathlib import Path
    from tests.support.running import open_runner
    from sf_local.request.batch import Row

    artifact, prompts, seconds = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
    import time
    until = time.monotonic() + seconds
    with open_runner(Path(artifact), 40, "hip", 3600) as run:
        answers = [[] for _ in prompts]

        async def answer(runner, prompt, pages, tokens):
            if not tokens:
                following = await runner.prefill([Row(prompt, 0, pages)])
            else:
                place = len(prompt) + len(tokens) - 1
                following = await runner.decode([Row(tokens[-1:], place, pages)])
            tokens.append(int(following.best[0]))

        while len(answers[-1]) < 2 or time.monotonic() < until:  # of prefill and of decode
            for i, prompt in enumerate(prompts):
                pages = range(1 + 4 * i, 5 + 4 * i)
                run(lambda runner: answer(runner, prompt, pages, answers[i]))
    print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Result:
    """What the table says of one case on one chip. seconds: of the interpreter alone."""

    case: str
    chip: str
    dispatches: int
    instructions: int
    seconds: float
    worst: Mapping[str, float]  # by type
    mlir: str  # sha256
    problems: Sequence[str] = ()
    note: str = ""

    def cells(self) -> list[str]:
        apart = ", ".join(f"{dtype} {value:.1e}" for dtype, value in sorted(self.worst.items()))
        return [
            self.case, self.chip, f"{self.dispatches:,}", f"{self.instructions / 1e6:,.1f}",
            f"{self.seconds:.1f}", apart or self.note, self.mlir[:12],
            "wrong" if self.problems else "ok",
        ]  # fmt: skip


HEADINGS = ["case", "chip", "dispatches", "M instructions", "seconds", "largest difference",
            "MLIR", ""]  # fmt: skip


class Bench:
    """Builds models in a folder, and runs them."""

    def __init__(self, driver: Driver, folder: Path) -> None:
        self.driver, self.folder, self._turn = driver, folder, 0
        self._made: dict[str, Path] = {}

    def order(self) -> str:
        self._turn += 1
        return ORDERS[self._turn % len(ORDERS)]

    def source(self, name: str, write: Callable[[Path], object]) -> Path:
        """A folder of weights, written once."""
        if name not in self._made:
            self._made[name] = self.folder / name
            write(self._made[name])
        return self._made[name]

    def artifact(self, source: Path, options: BuildOptions) -> Path:
        name = sha256(f"{source} {options}".encode()).hexdigest()[:16]
        if name not in self._made:
            self._made[name] = build(source, self.folder / name, options, keep_mlir=True)
        return self._made[name]

    def result(
        self, case: str, chip: str, outcome: Outcome, differences: Mapping[str, Difference],
        mlir: Path, problems: Iterable[str] = (), note: str = "",
    ) -> Result:  # fmt: skip
        """The row of a run; it is wrong if the process failed, or if nothing was interpreted."""
        found = [*wrong_ones(differences.values()), *problems]
        interpreted = outcome.of("interpret")
        if outcome.exit_code or not interpreted:
            found.append(f"exit code {outcome.exit_code}: {outcome.stderr.strip()[-2000:]}")
        return Result(
            case, chip, len(interpreted), sum(call.notes["steps"] for call in interpreted),
            sum(call.notes["microseconds"] for call in interpreted) / 1e6,
            worst(differences.values()), sha256(mlir.read_bytes()).hexdigest(), found, note,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What runs on each of its chips."""

    name: str
    chips: Sequence[str]
    about: str
    run: Callable[[Bench, Case, str], Result]


def language_model(
    config: LlamaConfig, dtype: str, plan: Plan, page: int, *, is_uneven: bool = False
) -> Callable[[Bench, Case, str], Result]:
    """All functions of a Llama with random weights."""

    def run(bench: Bench, case: Case, chip: str) -> Result:
        make = uneven_weights if is_uneven else random_weights
        stored = "float32" if dtype == "f32" else "float16"
        source = bench.source(
            f"llama-{config.hidden_size}-{config.vocab_size}-{config.max_seq_len}-{is_uneven}",
            lambda folder: write_hf_folder(folder, config, make(config, seed=11), stored),
        )
        options = replace(
            TINY_OPTIONS, target=chip, weight_dtype=dtype, kv_dtype=dtype, page_size=page,
            prefill_batch_sizes=(1,), decode_batch_sizes=(1, 8),
        )  # fmt: skip
        artifact = bench.artifact(source, options)
        mlir = artifact / MLIR
        twins = compile_twins(artifact / PLAIN_MLIR, CACHE)
        done = run_beside_twins(bench.driver, artifact, twins, plan, bench.folder,
                                bench.order(), "6GiB", TIMEOUT)  # fmt: skip
        problems = [] if done.names == set(done.dispatches) else ["not every dispatch ran"]
        if done.results and is_uneven and dtype == "f32":
            problems += [] if is_as_float64(config, plan, done) else ["logits are not float64's"]
        if done.results:
            problems += wrong_tokens(done)
        return bench.result(case.name, chip, done.outcome, done.differences, mlir, problems)

    return run


def is_as_float64(config: LlamaConfig, plan: Plan, done: Run) -> bool:
    """Whether the prompt's logits are, each token's beside the largest of that token's."""
    weights = uneven_weights(config, seed=11)
    expected = forward(config, weights, plan.tokens[: plan.prompt])
    apart = np.abs(done.results["prefill"] - expected) / np.abs(expected).max(axis=0)
    return bool(apart.max() <= BOUNDS["f32"])


def wrong_tokens(done: Run) -> list[str]:
    """Calls whose best tokens are not the first of the largest logits."""
    return [
        f"{name}: the best token is another"
        for name in ("next", "one", "forks")
        if name in done.results
        and (done.results[name].argmax(axis=-1) != done.results[f"{name}_best"]).any()
    ]


def images(family: str) -> Callable[[Bench, Case, str], Result]:
    """The engine with images: each dispatch beside its twin, the text beside the CPU's."""
    tower = {"idefics3": IDEFICS3, "llava": LLAVA}[family]

    def run(bench: Bench, case: Case, chip: str) -> Result:
        weights = random_model(TINY, tower, seed=7)
        source = bench.source(
            family, lambda folder: write_vision_folder(folder, TINY, tower, weights)
        )
        options = replace(TINY_OPTIONS, prefill_batch_sizes=(1,), decode_batch_sizes=(1,))
        on_cpu = bench.artifact(source, replace(options, row_major=True))
        artifact = bench.artifact(source, replace(options, target=chip))
        expected = bench.driver.run(IMAGES, on_cpu, "cpu").value
        plan = Plan(TINY.vocab_size)
        code = IMAGES.replace("sys.argv[1:3]", 'sys.argv[1], "hip"')
        done = run_beside_twins(
            bench.driver, artifact, compile_twins(artifact / PLAIN_MLIR, CACHE), plan, bench.folder,
            bench.order(), timeout=TIMEOUT, code=code,
        )  # fmt: skip
        problems = []
        if done.outcome.exit_code == 0 and done.outcome.value != expected:
            problems.append(f"answers {done.outcome.value}, the CPU {expected}")
        return bench.result(
            case.name, chip, done.outcome, done.differences, artifact / MLIR, problems
        )

    return run


def smollm2(dtype: str, seconds: float) -> Callable[[Bench, Case, str], Result]:
    """SmolLM2 itself, for about that long: its first tokens after golden prompts."""

    def run(bench: Bench, case: Case, chip: str) -> Result:
        options = BuildOptions(
            chip, weight_dtype=dtype, prefill_batch_sizes=(1,), decode_batch_sizes=(1,),
            max_seq_len=256,
        )  # fmt: skip
        artifact = bench.folder / f"smollm2-{dtype}-{chip}"
        build("demo", artifact, options, keep_mlir=True, force=True)
        golden = [json.loads(GOLDEN.read_text())["cases"][i] for i in SHORT]
        prompts = json.dumps([each["prompt_ids"] for each in golden])
        outcome = bench.driver.run(
            GREEDY, artifact, prompts, seconds, devices=f"{chip}:2GiB", runs="machine",
            machine=bench.order(), timeout=TIMEOUT,
        )  # fmt: skip
        answers = outcome.value if outcome.exit_code == 0 else []
        problems = [
            f"answers {tokens}, llama.cpp {each['greedy_ids'][: len(tokens)]}"
            for tokens, each in zip(answers, golden, strict=False)
            if tokens != each["greedy_ids"][: len(tokens)]
        ]
        note = f"golden tokens {' and '.join(str(len(tokens)) for tokens in answers)}"
        return bench.result(case.name, chip, outcome, {}, artifact / MLIR, problems, note)

    return run


def layer(shape: str, vocab_size: int, max_seq_len: int = 256) -> LlamaConfig:
    """One layer of a known model."""
    config = SHAPES[shape]
    return replace(config, num_layers=1, vocab_size=vocab_size, max_seq_len=max_seq_len)


def language_cases() -> list[Case]:
    tiny, small = Plan(TINY.vocab_size), layer("smollm2-135m", 1024, 2048)
    large = layer("llama-3.1-8b", 4096)
    whole = layer("smollm2-135m", SHAPES["smollm2-135m"].vocab_size)
    contexts = {length: Plan(small.vocab_size, 16, length, steps=2) for length in (300, 2000)}
    return [
        *(
            Case(f"tiny-{dtype}", HIP_CHIPS, f"the tiny Llama in {dtype}",
                 language_model(TINY, dtype, tiny, tiny.page, is_uneven=True))
            for dtype in ("f32", "f16", "bf16")
        ),
        *(
            Case(f"smollm2-layer-{dtype}", MAIN,
                 f"one layer of SmolLM2-135M with its whole vocabulary, in {dtype}",
                 language_model(whole, dtype, Plan(whole.vocab_size, 16, 37, steps=2), 16))
            for dtype in ("f16", "bf16")
        ),
        *(
            Case(f"llama-8b-layer-{dtype}", MAIN,
                 f"one layer of Llama-3.1-8B with 4,096 tokens, in {dtype}",
                 language_model(large, dtype, Plan(large.vocab_size, 16, 37, steps=1), 16))
            for dtype in ("f16", "bf16")
        ),
        *(
            Case(f"context-{length}", MAIN, f"a layer of SmolLM2-135M after {length} tokens, f16",
                 language_model(small, "f16", plan, 16))
            for length, plan in contexts.items()
        ),
    ]  # fmt: skip


def all_cases(seconds: float) -> list[Case]:
    """seconds: for the tokens of SmolLM2, after each prompt's first two."""
    return [
        *language_cases(),
        *(
            Case(f"images-{family}", MAIN, f"the engine with images, a tiny {family} tower in f32",
                 images(family))
            for family in ("idefics3", "llava")
        ),
        *(
            Case(f"smollm2-{dtype}", ("gfx942", "gfx1100"),
                 f"SmolLM2 itself in {dtype} after two golden prompts", smollm2(dtype, seconds))
            for dtype in ("f16", "int4")
        ),
    ]  # fmt: skip


def pairs(some: bool = False) -> list[tuple[Case, str]]:
    """Cases and chips: all, or SOME, with fewer tokens of SmolLM2: from the second one on, each
    runs the kernels of the one before."""
    cases = all_cases(seconds=20 if some else 200)
    every = [(case, chip) for case in cases for chip in case.chips]
    return [(case, chip) for case, chip in every if not some or (case.name, chip) in SOME]


def run_cases(cases: Iterable[tuple[Case, str]], report: Callable[[Result], None]) -> list[Result]:
    driver = build_driver(CACHE)
    if driver is None:
        raise SystemExit("no g++ to build the stand-in for AMD's driver with")
    results: list[Result] = []
    for case, chip in cases:
        with tempfile.TemporaryDirectory(prefix="sf-machine-code-") as folder:
            results.append(case.run(Bench(driver, Path(folder)), case, chip))
            report(results[-1])
    return results


def markdown(results: Iterable[Result]) -> str:
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(result.cells() for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = list(dict.fromkeys(case.name for case, _ in pairs()))
    parser.add_argument("--case", action="append", choices=names, help="may be repeated (all)")
    parser.add_argument("--chip", action="append", choices=HIP_CHIPS, help="(all of each case)")
    parser.add_argument("--some", action="store_true", help="only what the slow tests run")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    args = parser.parse_args(arguments)
    chosen = [
        (case, chip) for case, chip in pairs(args.some)
        if case.name in (args.case or names) and chip in (args.chip or HIP_CHIPS)
    ]  # fmt: skip
    if args.list:
        for case, chip in chosen:
            print(f"{case.name:16} {chip:8} {case.about}")
        return 0

    def report(result: Result) -> None:
        print("  ".join(f"{cell:15}" for cell in result.cells()), flush=True)
        for problem in result.problems:
            print(f"    {problem}", flush=True)

    print("  ".join(f"{heading:15}" for heading in HEADINGS))
    started_at = time.monotonic()
    results = run_cases(chosen, report)
    print(f"{time.monotonic() - started_at:.0f} seconds in all, on {os.cpu_count()} cores")
    if args.markdown:
        args.markdown.write_text(markdown(results))
    return int(any(result.problems for result in results) or not results)


if __name__ == "__main__":
    sys.exit(main())
