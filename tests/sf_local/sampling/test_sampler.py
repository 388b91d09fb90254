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

from sf_local.artifact.manifest import LOGITS_BLOCK
from sf_local.request.params import ResolvedParams
from sf_local.sampling.distribution import Distribution, candidates
from sf_local.sampling.logits import summarize
from sf_local.sampling.sampler import Sampled, Sampler
from sf_local.sampling.sampler import sample as sample_rows

LOGITS = np.random.default_rng(3).permutation(np.linspace(-2, 2, 20, dtype=np.float32))
DRAWS = 20_000


def oracle(logits: list[float], params: ResolvedParams) -> dict[int, float]:
    """Temperature, top-k, renormalize, top-p, renormalize, min-p: token -> probability."""
    best = sorted(range(len(logits)), key=lambda token: -logits[token])
    if params.top_k > 0:
        best = best[: params.top_k]
    weights = [math.exp((logits[token] - logits[best[0]]) / params.temperature) for token in best]
    shares = [weight / math.fsum(weights) for weight in weights]
    kept: dict[int, float] = {}
    for token, share in zip(best, shares, strict=True):
        if params.top_p == 1 or math.fsum(kept.values()) < params.top_p:
            kept[token] = share
    least = params.min_p * max(kept.values())
    kept = {token: share for token, share in kept.items() if share >= least}
    return {token: share / math.fsum(kept.values()) for token, share in kept.items()}


def is_on_the_edge(logits: list[float], params: ResolvedParams) -> bool:
    """Whether rounding may decide if a token is kept."""
    shares = list(oracle(logits, replace(params, top_p=1.0, min_p=0.0)).values())
    at_top_p = params.top_p < 1 and any(abs(m - params.top_p) < 1e-5 for m in accumulate(shares))
    return at_top_p or any(abs(share / shares[0] - params.min_p) < 1e-5 for share in shares)


class Only:
    """A grammar that allows some tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = sorted(tokens)

    def has(self, token: int) -> bool:
        return token in self._tokens

    def tokens(self) -> NDArray[np.intp]:
        return np.array(self._tokens, np.intp)


def distribution(logits: NDArray[np.float32], params: ResolvedParams) -> dict[int, float]:
    scale = 1 / params.temperature
    row = Distribution(summarize(logits[None], np.array([scale], np.float32)), scale)
    tokens = candidates(row, params)
    assert len(tokens) == len({*tokens.tolist()})
    weights = np.exp(row.logs(tokens))
    return dict(zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True))


def sample(
    samplers: list[Sampler], logits: NDArray[np.float32], allowed: list[Only | None]
) -> list[Sampled]:
    scales = np.array([sampler.inv_temperature for sampler in samplers], np.float32)
    result = sample_rows(samplers, summarize(logits, scales), allowed)
    assert all(isinstance(sampled, Sampled) for sampled in result)
    return result  # type: ignore[return-value]


def draw(
    sampler: Sampler, logits: NDArray[np.float32] = LOGITS, allowed: Only | None = None
) -> int:
    [sampled] = sample([sampler], logits[None], [allowed])
    return sampled.token


def count_draws(
    sampler: Sampler, logits: NDArray[np.float32] = LOGITS, allowed: Only | None = None
) -> Counter[int]:
    """How often each token is drawn from the same logits, which are summed up once."""
    output = summarize(logits[None], np.array([sampler.inv_temperature], np.float32))
    rows = (sample_rows([sampler], output, [allowed]) for _ in range(DRAWS))
    return Counter(sampled.token for [sampled] in rows)  # type: ignore[union-attr]


distinct_logits = st.lists(
    st.floats(-30, 30, width=32).map(lambda x: round(x, 3)), min_size=1, max_size=40, unique=True
)


@settings(max_examples=200)
@given(
    distinct_logits,
    st.floats(0.05, 10),
    st.one_of(st.just(-1), st.integers(1, 50)),
    st.one_of(st.just(1.0), st.floats(0.01, 1)),
    st.one_of(st.just(0.0), st.floats(0, 1)),
)
def test_candidates_match_the_oracle(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(values, np.float32)
    params = ResolvedParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(not is_on_the_edge(logits.tolist(), params))
    expected = oracle(logits.tolist(), params)
    found = distribution(logits, params)
    assert found.keys() <= expected.keys()
    for token, probability in expected.items():  # f32 has no probability below 1e-38
        assert found.get(token, 0) == pytest.approx(probability, rel=1e-4, abs=1e-30)


@settings(max_examples=200)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.integers(1, 40),
    st.floats(0.05, 1),
)
def test_ties_keep_the_likeliest(values: list[int], top_k: int, top_p: float) -> None:
    """Which of two equals is kept is open, but never a lesser one, and never too many."""
    logits = np.array(values, np.float32)
    params = ResolvedParams(temperature=1.0, top_k=top_k, top_p=top_p)
    found = distribution(logits, params)
    kept = sorted((values[token] for token in found), reverse=True)
    assert kept == sorted(values, reverse=True)[: len(kept)]
    assert 1 <= len(kept) <= top_k


def test_temperature_below_the_limit_is_greedy() -> None:
    for temperature in (0.0, 1e-9, 9.9e-7):
        sampler = Sampler(ResolvedParams(temperature=temperature, top_k=3, top_p=0.5))
        assert {draw(sampler) for _ in range(20)} == {int(LOGITS.argmax())}


def test_a_tiny_temperature_samples_without_overflow() -> None:
    sampler = Sampler(ResolvedParams(temperature=1e-6, seed=1))
    with np.errstate(over="raise", invalid="raise"):
        assert {draw(sampler, LOGITS * 1000) for _ in range(20)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 1e-9}])
def test_one_candidate_is_the_likeliest(params: dict[str, Any]) -> None:
    sampler = Sampler(ResolvedParams(**params))
    assert {draw(sampler) for _ in range(20)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.3},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square; the limit is about six standard deviations above its mean."""
    sampling = ResolvedParams(seed=11, **params)
    expected = oracle(LOGITS.tolist(), sampling)
    assert len(expected) > 2
    counts = count_draws(Sampler(sampling))
    assert counts.keys() <= expected.keys()
    freedom = len(expected) - 1
    assert chi_square(counts, expected) < freedom + 6 * (2 * freedom) ** 0.5


def test_a_seed_repeats_and_another_differs() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(ResolvedParams(seed=seed))
        return [draw(sampler) for _ in range(50)]

    assert draws(5) == draws(5)
    assert len({tuple(draws(seed)) for seed in (0, 5, 6, 2**40)}) == 4
    assert draws(None) != draws(None)


def test_samplers_do_not_share_their_state() -> None:
    params = ResolvedParams(seed=5)
    alone = Sampler(params)
    expected = [draw(alone) for _ in range(20)]
    first, other = Sampler(params), Sampler(ResolvedParams(seed=6))
    found = []
    for _ in range(20):
        found.append(draw(first))
        draw(other)
    assert found == expected


def test_returns_plain_ints() -> None:
    for params in (ResolvedParams(temperature=0), ResolvedParams(top_k=3, seed=1)):
        assert type(draw(Sampler(params))) is int


WIDE = np.random.default_rng(4).normal(0, 3, (6, 5 * LOGITS_BLOCK + 7)).astype(np.float32)


def test_rows_do_not_depend_on_their_company() -> None:
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_k": 30, "temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.8, "frequency_penalty": 1.0, "return_logprob": True, "top_logprobs_num": 2},
        {"min_p": 0.05, "temperature": 1.5},
    ]
    masks = [None, Only(list(range(0, 1000, 2))), Only(list(range(0, 1000, 3))), None, None, None]
    params = [ResolvedParams(seed=i, **kind) for i, kind in enumerate(kinds)]
    together, alone = [Sampler(p) for p in params], [Sampler(p) for p in params]
    for _ in range(40):
        row = [sample([s], WIDE[i : i + 1], [masks[i]])[0] for i, s in enumerate(alone)]
        for one, other in zip(sample(together, WIDE, masks), row, strict=True):
            assert (one.token, one.logprob) == (other.token, other.logprob)
            assert one.top.pairs() == other.top.pairs()
        for samplers in together, alone:
            for sampler, sampled in zip(samplers, row, strict=True):
                sampler.push(sampled.token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_tokens_are_never_chosen(temperature: float) -> None:
    tokens = np.argsort(WIDE[0])[:40].tolist()  # the least likely ones
    sampler = Sampler(ResolvedParams(temperature=temperature, seed=1))
    drawn = {draw(sampler, WIDE[0], Only(tokens)) for _ in range(500)}
    assert drawn <= set(tokens)
    assert (len(drawn) == 1) == (temperature == 0)


def chi_square(counts: Counter[int], shares: dict[int, float]) -> float:
    draws = counts.total()
    return sum((counts[t] - draws * s) ** 2 / (draws * s) for t, s in shares.items())


@pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"frequency_penalty": 0.1}])
def test_a_masked_draw_follows_the_distribution(params: dict[str, Any]) -> None:
    """Whether tokens not allowed are drawn again, or taken out from the start."""
    tokens = [2, 3, 5, 7, 11, 13]
    sampling = ResolvedParams(seed=3, **params)
    shares = oracle(LOGITS[tokens].tolist(), sampling)
    drawn = count_draws(Sampler(sampling), allowed=Only(tokens))
    counts = Counter({tokens.index(token): count for token, count in drawn.items()})
    assert counts.keys() == shares.keys()
    assert chi_square(counts, shares) < len(shares) + 6 * (2 * len(shares)) ** 0.5


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"top_p": 0.95}, {"min_p": 0.02}])
def test_wide_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Over several blocks, the last one partial; rare tokens are counted together."""
    sampling = ResolvedParams(seed=9, **params)
    shares = oracle(WIDE[0].tolist(), sampling)
    counts = count_draws(Sampler(sampling), WIDE[0])
    assert counts.keys() <= shares.keys()
    likely = {token: share for token, share in shares.items() if DRAWS * share > 20}
    rare = 1 - sum(likely.values())
    grouped = Counter({token: counts[token] for token in likely})
    if DRAWS * rare > 20:
        likely[-1] = rare
        grouped[-1] = DRAWS - grouped.total()
    assert chi_square(grouped, likely) < len(likely) + 6 * (2 * len(likely)) ** 0.5


@pytest.mark.parametrize(
    "width", [1, LOGITS_BLOCK - 1, LOGITS_BLOCK, LOGITS_BLOCK + 1, 3 * LOGITS_BLOCK]
)
def test_a_draw_ends_at_the_first_and_the_last_possible_token(width: int) -> None:
    """Whatever the random number, and with tokens that are impossible at both ends."""

    class Fixed(Sampler):
        number = 0.0

        def draw(self) -> float:
            return self.number

    logits = np.full(width + 2, -np.inf, np.float32)
    logits[1:-1] = WIDE[1, :width]
    sampler = Fixed(ResolvedParams())
    assert draw(sampler, logits) == 1
    sampler.number = 1 - 2**-53
    assert draw(sampler, logits) in range(max(1, width - 200), width + 1)


def test_what_a_grammar_raises_is_its_own_row_s() -> None:
    class Broken(Only):
        def has(self, token: int) -> bool:
            raise ValueError("broken")

    samplers = [Sampler(ResolvedParams(seed=i)) for i in range(3)]
    output = summarize(WIDE[:3], np.ones(3, np.float32))
    found = sample_rows(samplers, output, [None, Broken([]), None])
    assert isinstance(found[1], ValueError)
    alone = [Sampler(ResolvedParams(seed=i)) for i in (0, 2)]
    assert [found[0], found[2]] == [
        sample([alone[0]], WIDE[:1], [None])[0], sample([alone[1]], WIDE[2:3], [None])[0]
    ]  # fmt: skip


def changed(logits: list[float], params: ResolvedParams, prompt: list[int], answer: list[int]):
    sampler = Sampler(params, prompt, end_ids=[0])
    for token in answer:
        sampler.push(token)
    result = np.array(logits, np.float32)
    sampler.change(result)
    return result.tolist()


def test_frequency_and_presence_count_the_answer_only() -> None:
    params = ResolvedParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert changed([1, 1, 1, 1], params, [0, 1], [1, 2, 2]) == [1, 0.25, -0.25, 1]
    params = ResolvedParams(frequency_penalty=-0.5)
    assert changed([1, 1, 1], params, [], [1, 1]) == [1, 2, 1]


def test_repetition_penalty_counts_the_prompt_too() -> None:
    params = ResolvedParams(repetition_penalty=2.0)
    assert changed([1, -1, 4, 8], params, [0, 1], [2, 2, 2]) == [0.5, -2, 2, 8]


def test_bias_comes_after_penalties() -> None:
    params = ResolvedParams(repetition_penalty=2.0, logit_bias={1: 3.0, 2: -1.5})
    assert changed([1, 1, 1], params, [1], []) == [1, 3.5, -0.5]


def test_end_tokens_are_impossible_until_the_answer_is_long_enough() -> None:
    params = ResolvedParams(min_new_tokens=2)
    assert changed([1, 1], params, [], [1])[0] == -math.inf
    sampler = Sampler(params, [], end_ids=[0])
    sampler.push(1)
    sampler.push(1)
    assert not sampler.changes_logits


def test_logprobs_are_those_of_the_distribution_before_it_is_cut() -> None:
    params = ResolvedParams(
        temperature=0.5, top_k=1, return_logprob=True, top_logprobs_num=3, seed=1
    )
    [sampled] = sample([Sampler(params)], LOGITS[None], [None])
    exact = LOGITS.astype(np.float64) / 0.5
    exact -= np.log(np.exp(exact).sum())
    order = np.argsort(-exact)[:3].tolist()
    assert sampled.token == order[0]
    assert sampled.logprob == pytest.approx(exact[order[0]], abs=1e-6)
    assert sampled.top.ids.tolist() == order
    assert sampled.top.logprobs.tolist() == pytest.approx(exact[order].tolist(), abs=1e-6)


def test_logprobs_of_a_greedy_token_ignore_the_temperature() -> None:
    params = ResolvedParams(temperature=0.0, return_logprob=True)
    [sampled] = sample([Sampler(params)], LOGITS[None], [None])
    total = math.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert sampled.logprob == pytest.approx(float(LOGITS.max()) - total, abs=1e-6)


def test_top_k_beyond_the_vocabulary_is_none() -> None:
    for top_k in (len(WIDE[0]), 1 << 30):
        params = ResolvedParams(top_k=top_k, top_p=0.5)
        assert distribution(WIDE[0], params) == distribution(WIDE[0], replace(params, top_k=-1))


def test_as_many_top_logprobs_as_asked_for_at_any_temperature() -> None:
    params = ResolvedParams(temperature=0.001, return_logprob=True, top_logprobs_num=8)
    [sampled] = sample([Sampler(params)], LOGITS[None] * 9, [None])
    assert len(sampled.top.ids) == 8
    assert sampled.top.logprobs[7] < -300
