"""What sums logits up, row by row, also where the last rows' logits stayed on the device."""

import numpy as np
import pytest

from sf_local.artifact.manifest import LOGITS_BLOCK
from sf_local.sampling.logits import ModelOutput, summarize, unpack

VOCAB_SIZE = 3 * LOGITS_BLOCK - 7


@pytest.fixture
def output() -> ModelOutput:
    logits = np.random.default_rng(1).normal(size=(4, VOCAB_SIZE)).astype(np.float32)
    return summarize(logits, np.array([1, 0.5, 2, 1], np.float32))


def test_sums_are_what_they_say(output: ModelOutput) -> None:
    assert (output.best == output.logits.argmax(axis=1)).all()
    last = output.logits[2, 2 * LOGITS_BLOCK :]
    assert output.maxima[2, 2] == last.max()
    np.testing.assert_allclose(output.sums[2, 2], np.exp((last - last.max()) * 2).sum(), 1e-5)


def test_packed_as_gpus_return_it(output: ModelOutput) -> None:
    packed = np.concatenate([output.best[:, None], output.maxima, output.sums], axis=1)
    found = unpack(output.logits[:1], packed.astype(np.float32))
    assert found.best.dtype == np.int64 and (found.best == output.best).all()
    assert (found.maxima == output.maxima).all() and (found.sums == output.sums).all()
    assert len(found.logits) == 1


@pytest.mark.parametrize(
    ("rows", "with_logits"),
    [([0, 1, 3], 2), ([1, 2], 1), ([2, 3], 0), ([], 0), (slice(1, 2), 1), (slice(3, 4), 0)],
)
def test_rows_keep_what_they_have(
    output: ModelOutput, rows: list[int] | slice, with_logits: int
) -> None:
    """The first two of four rows have their logits here."""
    cut = ModelOutput(output.logits[:2], output.best, output.maxima, output.sums)
    taken = cut.take(rows)
    assert (taken.best == output.best[rows]).all()
    assert (taken.maxima == output.maxima[rows]).all()
    assert (taken.logits == output.logits[rows][:with_logits]).all()
    assert len(taken.logits) == with_logits
