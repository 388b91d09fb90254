"""What IREE makes of the GPU's code, as `python -m compile.tools.gpu_report` reads it."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import BuildOptions
from compile.tools.gpu_cards import CARDS, LAUNCH_SECONDS, Card
from compile.tools.gpu_dispatch import Dispatch
from compile.tools.gpu_kernels import Report, compile_shape
from compile.tools.gpu_profile import Profile, profile
from compile.tools.gpu_report import SHAPES, TOWERS, table

CONFIG = LlamaConfig(4096, 1024, 2048, 2, 8, 2, 64, 1e-5, 1e4, 1024, True)
MATRICES = 2 * 2 * (1024 * (512 + 2 * 128) + 512 * 1024 + 3 * 1024 * 2048) + 2 * 4096 * 1024
ATTENTION = re.compile("_attention_|^attend_")  # of towers by IREE, and ours
PRODUCTS = ("_matmul_like_", "_matvec_like_", "row_f16", "matrix_f16")
SO400M = VisionConfig("idefics3", 384, 14, 1152, 4304, 27, 16, 1e-6, "gelu_tanh", 3)
SEEING = {name: (SHAPES[name], TOWERS[name]) for name in TOWERS} | {
    "smolvlm-2.2b": (replace(CONFIG, hidden_size=2048, num_heads=32, num_kv_heads=32), SO400M)
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["gfx942", "gfx1100"])
def report(request: pytest.FixtureRequest) -> Report:
    options = BuildOptions(request.param, max_seq_len=1024, prefill_batch_sizes=(1,))
    return compile_shape(CONFIG, options)


@pytest.fixture(
    scope="module", params=itertools.product(SEEING, ["gfx942", "gfx1100"]), ids=" ".join
)
def seeing(request: pytest.FixtureRequest) -> Report:
    """Of models that see, with few layers: of one, and a first one that differs."""
    name, chip = request.param
    config, tower = SEEING[name]
    options = BuildOptions(
        chip, max_seq_len=1024, prefill_batch_sizes=(1,), decode_batch_sizes=(1,)
    )
    return compile_shape(replace(config, num_layers=1), options, replace(tower, num_layers=2))


def products(dispatches: list[Dispatch]) -> list[Dispatch]:
    return [d for d in dispatches if any(kind in d.name for kind in PRODUCTS)]


def multiplying(report: Report, dispatches: list[Dispatch]) -> list[Dispatch]:
    """Products and attention, which have matrix instructions."""
    attention = (d for d in dispatches if ATTENTION.search(d.name))
    found = [*products(dispatches), *attention]
    return [d for d in found if report.kernels[d.name].instructions]


def profiled(report: Report, dispatch: Dispatch, card: Card) -> Profile:
    kernel = report.kernels[dispatch.name]
    return profile(kernel.code, dispatch.arguments, kernel.size, card.architecture)


def check_parallel(report: Report, dispatches: list[Dispatch]) -> None:
    """A single thread touches a few numbers at most, and a workgroup no more than it must."""
    for dispatch in dispatches:
        kernel = report.kernels[dispatch.name]
        assert kernel.spilled == 0, dispatch.name
        assert kernel.threads * dispatch.workgroups >= min(32, dispatch.num_bytes // 256)


def test_prefill_uses_matrix_instructions(report: Report) -> None:
    """In all products but the head's, which has a single row; and in attention."""
    step = report.dispatches("prefill_bs1", 1, 256, 256)
    assert len(multiplying(report, step)) == 2 * 5 + 1
    assert sum(d.operations for d in products(step)) == 256 * MATRICES


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_a_decode_step_reads_each_weight_once(report: Report, rows: int) -> None:
    """A product for all rows, no matter how many; activations add little."""
    found = products(report.dispatches(f"decode_next_bs{rows}", rows, 1, 128))
    assert len(found) == 2 * 4 + 1
    assert MATRICES < sum(d.num_bytes for d in found) < MATRICES * (1 + rows / 50)
    assert all(bool(report.kernels[d.name].instructions) == (rows > 1) for d in found)
    assert sum(d.operations for d in found) == rows * MATRICES


def test_nothing_is_serial_or_spilled(report: Report) -> None:
    for function, rows, length in (("decode_next_bs1", 1, 1), ("decode_next_bs8", 8, 1),
                                   ("prefill_next_bs1", 1, 256)):  # fmt: skip
        check_parallel(report, report.dispatches(function, rows, length, 256))


def test_a_layer_adds_no_kernels(report: Report) -> None:
    """Those of one layer are those of the other."""
    step = report.dispatches("decode_next_bs8", 8, 1, 128)
    once = [d for d in step if step.count(d) == 1]
    assert len(once) < len(step) / 2


def test_a_tower(seeing: Report) -> None:
    """Batches of all sizes have the same kernels, but for the one that reads pixels."""
    names = []
    for num_tiles in seeing.options.image_batch_sizes:
        step = seeing.tile_dispatches(num_tiles)
        of_projector = 2 if seeing.vision and seeing.vision.has_class_token else 1
        assert len(multiplying(seeing, step)) == 1 + 2 * 5 + of_projector
        check_parallel(seeing, step)
        names.append([d.name for d in step])
    assert names[0][1:] == names[1][1:]


def test_a_prefill_with_embeddings(seeing: Report) -> None:
    step = seeing.dispatches("prefill_embeds_next_bs1", 1, 256, 256)
    assert len(multiplying(seeing, step)) == 5
    check_parallel(seeing, step)


STEPS = [
    ("decode_next_bs1", 1, 1, 128), ("decode_next_bs8", 8, 1, 300),
    ("prefill_next_bs1", 1, 256, 256),
]  # fmt: skip


@pytest.mark.parametrize(("function", "rows", "length", "context"), STEPS)
def test_every_loop_is_counted(
    report: Report, chip_card: Card, function: str, rows: int, length: int, context: int
) -> None:
    """It is known how often loops are gone through, and then products load all their weights, and
    execute as many matrix instructions as they have operations, or more for padding."""
    for dispatch in report.dispatches(function, rows, length, context):
        found = profiled(report, dispatch, chip_card)
        assert not found.has_unknown, dispatch.name
        lanes = report.kernels[dispatch.name].code.lanes * dispatch.workgroups
        assert found.work.load_bytes * lanes >= 2 * dispatch.weights, dispatch.name
        if found.work.matrix and "_attention_" not in dispatch.name:
            executed = found.work.matrix * dispatch.workgroups * 2 * 16**3
            assert executed >= dispatch.operations, dispatch.name


@pytest.fixture
def chip_card(report: Report) -> Card:
    """The card with the report's chip."""
    lanes = {kernel.code.lanes for kernel in report.kernels.values()}
    return CARDS["gfx942" if lanes == {64} else "gfx1100"]


def test_table(report: Report, chip_card: Card) -> None:
    step = report.dispatches("decode_next_bs1", 1, 1, 128)
    text = "\n".join(table(step, report.kernels, chip_card))
    memory = 1e6 * sum(d.num_bytes for d in step) / chip_card.bandwidth
    sums = rf"{len(step)} dispatches: at least (\d+) us \(by memory alone (\d+), .*; (\d+) us with"
    least, alone, launched = map(int, re.findall(sums, text)[0])
    assert alone == round(memory) <= least
    assert launched - least == pytest.approx(1e6 * LAUNCH_SECONDS * len(step), abs=1)
    assert re.search(
        r"row_f16_4096x1024_norm__1_rows: memory\n.* VGPRs, 0 AGPRs.*\n.*a weight: \d", text
    )
