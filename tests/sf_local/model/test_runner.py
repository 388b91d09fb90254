"""What only loading or running can find: wrong files without artifact.json, wrong pages."""

import asyncio
import gc
import json
import shutil
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from sf_local.artifact.manifest import CONFIG, MANIFEST, REPAIR, VMFB, WEIGHTS
from sf_local.artifact.open import open_artifact
from sf_local.device.device import Device
from sf_local.engine.engine import Engine
from sf_local.errors import (
    ArtifactError,
    CorruptFileError,
    EngineError,
    MismatchError,
    TargetError,
)
from sf_local.model.arrays import Argument
from sf_local.model.inputs import MAX_SHAPES
from sf_local.model.outputs import OutputSpec
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.request.params import SamplingParams
from tests.support.tiny import GPU_SIZES, TinyModel

T = TypeVar("T")
NUM_PAGES, PAGE_SIZE, MAX_SEQ_LEN = 40, 8, 256


@pytest.fixture
def folder(tiny: TinyModel, tmp_path: Path) -> Path:
    """A copy without artifact.json, so that only IREE can tell."""
    copy = Path(shutil.copytree(tiny.artifact, tmp_path / "artifact"))
    (copy / MANIFEST).unlink()
    return copy


def fails(folder: Path, kind: type[ArtifactError], *parts: object) -> None:
    """The engine raises exactly `kind`, with all `parts` and a remedy, as often as one tries."""
    for _ in range(2):
        with pytest.raises(ArtifactError) as caught:
            Engine(folder)
        assert type(caught.value) is kind
        for part in (*parts, REPAIR):
            assert str(part) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x", b"garbage" * 1000, bytes(5000)])
def test_garbage_for_a_vmfb(folder: Path, data: bytes) -> None:
    (folder / VMFB).write_bytes(data)
    fails(folder, CorruptFileError, folder / VMFB, "cannot be loaded")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_a_truncated_vmfb(folder: Path, share: float) -> None:
    data = (folder / VMFB).read_bytes()
    (folder / VMFB).write_bytes(data[: int(len(data) * share)])
    fails(folder, CorruptFileError, folder / VMFB, "cannot be loaded")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"num_layers": 1}, "range out of bounds", id="a layer is missing"),
        pytest.param({"hidden_size": 16}, "range out of bounds", id="too small"),
    ],
)
def test_weights_of_another_model(
    folder: Path, make_tiny: Callable[..., TinyModel], changes: dict[str, Any], reason: str
) -> None:
    """Larger matrices and more layers go unnoticed: IREE reads of them what it needs."""
    shutil.copy(make_tiny(**changes, has_code=False).artifact / WEIGHTS, folder / WEIGHTS)
    fails(folder, MismatchError, folder / WEIGHTS, folder / VMFB, "do not fit", reason)


def test_a_vmfb_for_hip(folder: Path, make_tiny: Callable[..., TinyModel]) -> None:
    hip = make_tiny(target="gfx942", keep_mlir=True, **GPU_SIZES).artifact
    for name in (VMFB, WEIGHTS, CONFIG):
        shutil.copy(hip / name, folder / name)
    fails(folder, TargetError, folder / VMFB, "another device than 'cpu'", "--target cpu")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"decode_batch_sizes": [1, 7]}, "decode_bs7"),
        ({"prefill_batch_sizes": [2, 9]}, "prefill_bs2, prefill_bs9"),
        ({"module_name": "other"}, "prefill_bs1"),
    ],
)
def test_a_config_that_names_what_the_vmfb_lacks(
    folder: Path, changes: dict[str, Any], missing: str
) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    fails(folder, MismatchError, folder / VMFB, missing)


@pytest.fixture(scope="module")
def runner(tiny: TinyModel) -> Iterator[ModelRunner]:
    device = Device("cpu")
    try:
        runner = ModelRunner(open_artifact(tiny.artifact), device, NUM_PAGES, 256)
        try:
            run(runner, runner.start())
            yield runner
        finally:
            runner.close()
    finally:
        device.close()


def run(runner: ModelRunner, coroutine: Coroutine[Any, Any, T]) -> T:
    """Its result, computed on the device's worker thread."""
    future: Future[T] = Future()

    async def work() -> None:
        try:
            future.set_result(await coroutine)
        except BaseException as error:
            future.set_exception(error)

    runner._device.run(work())
    return future.result(timeout=60)


def pages(num_tokens: int, first: int = 1) -> list[int]:
    return list(range(first, first - (-num_tokens // PAGE_SIZE)))


WRONG_ROWS = [
    pytest.param(Row([5], MAX_SEQ_LEN, pages(MAX_SEQ_LEN + 1)), "outside", id="one too far"),
    pytest.param(Row([5] * 10, MAX_SEQ_LEN - 8, pages(300)), "outside", id="reaches too far"),
    pytest.param(Row([5] * (MAX_SEQ_LEN + 1), 0, pages(300)), "outside", id="too long"),
    pytest.param(Row([5], -1, [1]), "outside", id="negative start"),
    pytest.param(Row([5], 8, [1]), r"pages \[1\] do not hold 9 tokens", id="a page too few"),
    pytest.param(Row([5] * 17, 0, [1, 2]), "do not hold 17 tokens", id="a page too few, long"),
    pytest.param(Row([5], 0, []), "do not hold 1 tokens", id="no pages"),
    pytest.param(Row([5], 0, [0]), r"pages \[0\]", id="page 0"),
    pytest.param(Row([5], 0, [-1]), r"pages \[-1\]", id="negative page"),
    pytest.param(Row([5], 0, [NUM_PAGES]), rf"pages \[{NUM_PAGES}\]", id="no such page"),
    pytest.param(Row([5], 0, [1, 2, 2**40]), "pages", id="no such page, and not needed"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS)
def test_wrong_positions_and_pages(runner: ModelRunner, row: Row, message: str) -> None:
    good = Row([5], 0, [NUM_PAGES - 1])
    for compute in (runner.prefill, runner.prefill_all, runner.decode):
        if compute == runner.decode and len(row.tokens) != 1:
            continue
        for rows in ([row], [good, row]):
            with pytest.raises(EngineError, match=message):
                run(runner, compute(rows))


def test_no_tokens(runner: ModelRunner) -> None:
    with pytest.raises(EngineError, match="outside the context"):
        run(runner, runner.prefill([Row([], 0, [1])]))


def test_more_rows_than_the_largest_batch(runner: ModelRunner) -> None:
    rows = [Row([5], 0, [page]) for page in range(1, 6)]
    for compute in (runner.prefill, runner.decode):
        with pytest.raises(EngineError):
            run(runner, compute(rows))


def test_it_works_after_all_that(runner: ModelRunner) -> None:
    """To the last position of the context, in the last page; padding does not disturb."""
    tokens = list(range(3, 3 + MAX_SEQ_LEN))
    last = pages(MAX_SEQ_LEN, first=NUM_PAGES - MAX_SEQ_LEN // PAGE_SIZE)
    [expected] = run(runner, runner.prefill([Row(tokens, 0, last)])).logits
    short = Row([9, 8, 7], 0, [1])
    found = run(runner, runner.prefill([short, Row(tokens[:-1], 0, last)])).logits
    [step] = run(runner, runner.decode([Row(tokens[-1:], MAX_SEQ_LEN - 1, last)])).logits
    np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-4)
    [alone] = run(runner, runner.prefill([short])).logits
    np.testing.assert_allclose(found[0], alone, rtol=1e-4, atol=1e-4)


def test_prefill_is_the_end_of_prefill_all(runner: ModelRunner) -> None:
    rows = [Row([5, 6, 7], 0, [1]), Row(list(range(20)), 0, [2, 3, 4])]
    everything = run(runner, runner.prefill_all(rows))
    assert [logits.shape for logits in everything] == [(3, 300), (20, 300)]
    for logits, last in zip(everything, run(runner, runner.prefill(rows)).logits, strict=True):
        np.testing.assert_allclose(logits[-1], last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ValueError, BaseException])
def test_host_work_that_raises(runner: ModelRunner, kind: type[BaseException]) -> None:
    """The call is finished all the same: its pages are written, and the next call works."""

    def meanwhile() -> None:
        raise kind("of the host")

    rows, next_row = [Row([5, 6], 0, [1]), Row([7, 8], 0, [2])], [Row([9], 2, [1])]
    run(runner, runner.prefill(rows))
    expected_next = run(runner, runner.decode(next_row)).logits
    run(runner, runner.clear_pages([1, 2]))
    for compute in (runner.prefill, runner.prefill_all):
        with pytest.raises(kind, match="of the host"):
            run(runner, compute(rows, OutputSpec(meanwhile=meanwhile)))
        assert not runner.is_broken and not runner.has_ever_failed
    assert np.array_equal(run(runner, runner.decode(next_row)).logits, expected_next)


def test_a_device_that_fails_beside_host_work(runner: ModelRunner) -> None:
    """The device's error counts, and breaks the model until it recovers; the host's does not."""
    worked = []

    async def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("of the device")

    def meanwhile() -> None:
        worked.append(True)

    row = [Row([5], 0, [1])]
    expected = run(runner, runner.prefill(row)).logits
    functions = runner._program.functions
    good, functions["prefill_next_bs1"] = functions["prefill_next_bs1"], failing
    try:
        with pytest.raises(RuntimeError, match="of the device"):
            run(runner, runner.prefill(row, OutputSpec(meanwhile=meanwhile)))
        assert runner.is_broken and runner.has_ever_failed and not worked
    finally:
        functions["prefill_next_bs1"] = good
        run(runner, runner.recover())
        runner.has_ever_failed = False  # nothing native did
    assert not runner.is_broken
    assert np.array_equal(run(runner, runner.prefill(row)).logits, expected)


def test_calls_may_be_awaited_one_after_the_other(runner: ModelRunner) -> None:
    async def both() -> bool:
        first = (await runner.prefill([Row([5], 0, [1])])).logits
        await asyncio.sleep(0)
        second = (await runner.prefill([Row([5], 0, [1])])).logits
        return bool((first == second).all())

    assert run(runner, both())


def test_more_copies_than_a_device_can_wait_for_at_once(runner: ModelRunner) -> None:
    """One page, copied on from place to place 400 times, still holds its tokens."""
    tokens = list(range(3, 3 + PAGE_SIZE))

    async def copied() -> tuple[np.ndarray, np.ndarray]:
        await runner.prefill([Row(tokens, 0, [1])])
        there = [(1 + i % 30, 2 + i % 30) for i in range(30)]
        await runner.copy_pages([*there, *[(31, 32), (32, 31)] * 200])
        last = [Row([9], PAGE_SIZE, [page, 39]) for page in (1, 31)]
        first, copy = (await runner.decode(last)).logits
        return first, copy

    first, copy = run(runner, copied())
    assert np.array_equal(first, copy)


def test_padding_has_no_tokens_of_earlier_calls(runner: ModelRunner) -> None:
    """Models that compute it would write to page 0 what these make, which may be NaN."""
    run(runner, runner.prefill([Row([7, 8], 0, [page]) for page in (1, 2, 3)]))
    size, inputs = runner._inputs.prefill([Row([5, 6], 0, [1]), Row([9], 0, [2])])
    tokens = inputs["tokens"].values
    assert (size, tokens[:, :2].tolist()) == (3, [[5, 6], [9, 0], [0, 0]])


def test_few_arguments_are_kept(tiny: TinyModel) -> None:
    """A page table is wider every few tokens, and a prompt's chunks have many lengths."""
    gc.collect()
    before = sum(isinstance(found, Argument) for found in gc.get_objects())
    with Engine(tiny.artifact) as engine:
        engine.generate([5], SamplingParams(max_new_tokens=250, ignore_eos=True))
        for length in range(1, 250, 7):
            engine.generate([length] * length, SamplingParams(max_new_tokens=0))
        kept = [found for found in gc.get_objects() if isinstance(found, Argument)]
        assert len(kept) - before <= 5 * MAX_SHAPES
        assert sum(found.values.ndim == 2 for found in kept) - before <= 2 * MAX_SHAPES
