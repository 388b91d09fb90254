"""Sampler against a slow and obvious oracle, and its draws against the exact distribution."""

import math
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sf_local.request import SamplingParams
from sf_local.sampler import Sampler, candidates

LOGITS = np.random.default_rng(3).permutation(np.linspace(-2, 2, 20, dtype=np.float32))


def oracle(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Temperature, then top-k, renormalize, then top-p, renormalize: token -> probability."""
    best = sorted(range(len(logits)), key=lambda token: -logits[token])
    if params.top_k > 0:
        best = best[: params.top_k]
    weights = [math.exp((logits[token] - logits[best[0]]) / params.temperature) for token in best]
    shares = [weight / math.fsum(weights) for weight in weights]
    kept: dict[int, float] = {}
    for token, share in zip(best, shares, strict=True):
        if params.top_p == 1 or math.fsum(kept.values()) < params.top_p:
            kept[token] = share
    return {token: share / math.fsum(kept.values()) for token, share in kept.items()}


def is_on_the_edge(logits: list[float], params: SamplingParams) -> bool:
    """Whether rounding may decide if a token is kept."""
    shares = oracle(logits, replace(params, top_p=1.0)).values()
    return params.top_p < 1 and any(abs(m - params.top_p) < 1e-9 for m in accumulate(shares))


def distribution(logits: NDArray[np.float32], params: SamplingParams) -> dict[int, float]:
    tokens, probabilities = candidates(logits, params)
    assert len(tokens) == len(probabilities) == len(set(tokens.tolist()))
    return dict(zip(tokens.tolist(), (probabilities / probabilities.sum()).tolist(), strict=True))


distinct_logits = st.lists(
    st.floats(-30, 30, width=32).map(lambda x: round(x, 3)), min_size=1, max_size=40, unique=True
)


@settings(max_examples=200, deadline=None)
@given(
    distinct_logits,
    st.floats(0.05, 10),
    st.one_of(st.just(-1), st.integers(1, 50)),
    st.one_of(st.just(1.0), st.floats(0.01, 1)),
)
def test_candidates_match_the_oracle(
    values: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.array(values, np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    assume(not is_on_the_edge(logits.tolist(), params))
    expected = oracle(logits.tolist(), params)
    found = distribution(logits, params)
    assert found.keys() == expected.keys()
    for token, probability in expected.items():
        assert found[token] == pytest.approx(probability, rel=1e-9, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.integers(1, 40),
    st.floats(0.05, 1),
)
def test_ties_keep_the_likeliest(values: list[int], top_k: int, top_p: float) -> None:
    """Which of two equals is kept is open, but never a lesser one, and never too many."""
    logits = np.array(values, np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    found = distribution(logits, params)
    kept = sorted((values[token] for token in found), reverse=True)
    assert kept == sorted(values, reverse=True)[: len(kept)]
    assert 1 <= len(kept) <= top_k


def test_temperature_below_the_limit_is_greedy() -> None:
    for temperature in (0.0, 1e-9, 9.9e-7):
        sampler = Sampler(SamplingParams(temperature=temperature, top_k=3, top_p=0.5))
        assert {sampler.sample(LOGITS) for _ in range(20)} == {int(LOGITS.argmax())}


def test_a_tiny_temperature_samples_without_overflow() -> None:
    sampler = Sampler(SamplingParams(temperature=1e-6, seed=1))
    with np.errstate(over="raise", invalid="raise"):
        assert {sampler.sample(LOGITS * 1000) for _ in range(20)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 1e-9}])
def test_one_candidate_is_the_likeliest(params: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(**params))
    assert {sampler.sample(LOGITS) for _ in range(20)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square; the limit is about six standard deviations above its mean."""
    sampling = SamplingParams(seed=11, **params)
    expected = oracle(LOGITS.tolist(), sampling)
    assert len(expected) > 2
    sampler, draws = Sampler(sampling), 20_000
    counts = Counter(sampler.sample(LOGITS) for _ in range(draws))
    assert counts.keys() <= expected.keys()
    statistic = sum(
        (counts[token] - draws * share) ** 2 / (draws * share) for token, share in expected.items()
    )
    freedom = len(expected) - 1
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draw(5) == draw(5)
    assert len({tuple(draw(seed)) for seed in (0, 5, 6, 2**40)}) == 4
    assert draw(None) != draw(None)


def test_samplers_do_not_share_their_state() -> None:
    params = SamplingParams(seed=5)
    alone = Sampler(params)
    expected = [alone.sample(LOGITS) for _ in range(20)]
    first, other = Sampler(params), Sampler(SamplingParams(seed=6))
    found = []
    for _ in range(20):
        found.append(first.sample(LOGITS))
        other.sample(LOGITS)
    assert found == expected


def test_returns_plain_ints() -> None:
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=3, seed=1)):
        assert type(Sampler(params).sample(LOGITS)) is int
