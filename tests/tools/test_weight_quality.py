"""How far logits are from others, and those that peers give."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.perplexity import CHUNK, chunks, perplexity, quality, text_logits
from tests.support.tiny import TinyModel
from tests.tools.weight_quality import worker_logits


def test_quality_of_two_tokens() -> None:
    """By hand: KL of (1/2, 1/2) from (3/4, 1/4), and of a distribution from itself."""
    exact = np.log(np.array([[0.5, 0.5], [0.2, 0.8]], np.float32))
    found = np.log(np.array([[0.75, 0.25], [0.2, 0.8]], np.float32)) + 7  # any constant
    result = quality(found, exact, [0, 1])
    divergence = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert result.divergence == pytest.approx(divergence / 2, rel=1e-5)
    assert result.perplexity == pytest.approx(4, rel=1e-5)  # token 1 after 0 has 1/4
    assert result.agreement == 1  # the first of two equal ones


def test_quality_over_many_chunks() -> None:
    """The chunks in which it is computed do not show."""
    rng = np.random.default_rng(0)
    count = 2 * CHUNK + 3
    exact, found = rng.standard_normal((2, count, 50)).astype(np.float32)
    ids = rng.integers(0, 50, count).tolist()
    p, q = (np.exp(a.astype(np.float64)) for a in (exact, found))
    p, q = (a / a.sum(axis=-1, keepdims=True) for a in (p, q))
    result = quality(found, exact, ids)
    assert result.divergence == pytest.approx((p * np.log(p / q)).sum() / count)
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    chances = [q[i, token] for i, token in enumerate(ids[1:])]
    assert result.perplexity == pytest.approx(np.prod(np.power(chances, -1 / len(chances))))


def test_logits_of_a_text(tiny: TinyModel) -> None:
    ids = [3, 4, 5, 6, 7]
    logits = text_logits(tiny.artifact, ids)
    assert logits.shape == (5, tiny.config.vocab_size)
    same = quality(logits, logits, ids)
    assert same.divergence == 0 and same.agreement == 1
    assert same.perplexity == perplexity(tiny.artifact, ids)
    assert chunks(range(CHUNK + 1)) == [[*range(CHUNK)], [CHUNK]]


def test_worker_logits() -> None:
    """A worker writes its logits to a file, and is closed, also if it fails."""
    closed: list[str] = []

    def worker(answer: object) -> SimpleNamespace:
        return SimpleNamespace(answer=answer, close=lambda: closed.append("closed"))

    def save(name: str, parts: list[list[int]], path: str) -> None:
        assert name == "logits" and parts == [[1, 2]]
        np.save(path, np.ones((2, 3), np.float32))

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    assert np.array_equal(worker_logits(worker(save), [1, 2]), np.ones((2, 3)))
    assert worker_logits(worker(fail), [1, 2]) == "no memory"
    assert worker_logits("not installed in /peers", [1]) == "not installed in /peers"
    assert closed == ["closed", "closed"]
