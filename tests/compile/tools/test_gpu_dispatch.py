"""What calls of kernels that read and write pages move and do, worked out on paper."""

from __future__ import annotations

from compile.models.spec import LlamaConfig
from compile.tools.gpu_dispatch import STARTS, Dispatch, PagedCall
from compile.tools.gpu_registers import ARGUMENTS

CONFIG = LlamaConfig(100, 256, 512, 2, 4, 2, 64, 1e-5, 1e4, 1024, True)


def test_what_prefill_stores() -> None:
    """Two rows of 8 tokens: 2 x 2 heads of 64 numbers each, read in f32 and written in f16."""
    told = PagedCall(CONFIG, "f16", 2, 8, 40).told(Dispatch("store_tokens_f16", 3, 7, 0))
    assert (told.num_bytes, told.operations, told.share) == (16 * 256 * (4 + 2), 0, 1)
    assert [told.arguments[STARTS + at] for at in (0, 4, 8, 12)] == [32, 0, 40, 0]
    place = ARGUMENTS + STARTS
    found = [told.arguments[at] | told.arguments[at + 4] << 32 for at in (16, 24)]
    assert found == [place, place + 8]


def test_what_prefill_attends_to() -> None:
    """8 tokens after 32 others: the first sees 33 tokens, the last 40."""
    told = PagedCall(CONFIG, "f16", 1, 8, 40).told(Dispatch("attend_f16", 3, 1000, 0))
    assert told.num_bytes == 1000 + 8 * 256 * 4 + 40 * 256 * 2
    assert told.operations == 4 * 256 * sum(range(33, 41))
    assert told.share == 36.5 / 40


def test_what_decode_attends_to() -> None:
    """It reads keys and values of its token, too."""
    told = PagedCall(CONFIG, "f32", 3, 1, 40).told(Dispatch("attend_f32", 3, 1000, 0))
    assert told.num_bytes == 1000 + 3 * (256 + 256) * 4 + 3 * 40 * 256 * 4
    assert (told.operations, told.share) == (4 * 256 * 3 * 40, 1)
