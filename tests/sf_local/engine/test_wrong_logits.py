"""What a device returns and cannot be right: only the requests that it was for end, and say why."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile.models.spec import LlamaConfig
from sf_local import Engine, SamplingParams
from sf_local.artifact import irpa
from sf_local.artifact import open as artifact
from sf_local.artifact.manifest import WEIGHTS
from sf_local.errors import EngineError
from sf_local.model.arrays import mapped
from sf_local.model.outputs import OutputSpec
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.request.params import ResolvedParams
from sf_local.sampling.logits import ModelOutput, WrongLogits, find_wrong, summarize
from sf_local.sampling.logprobs import PromptLogprobs
from sf_local.sampling.sampler import Sampler, sample
from tests.support.running import Runners, open_runner
from tests.support.tiny import TinyModel, random_weights

VOCAB = 320
NAN, INFINITE, NONE, IMPOSSIBLE = (3 + byte for byte in b"~^`_")  # the last tokens of prompts
WRONG = {
    NAN: "NaN among the logits",
    INFINITE: r"\+inf among the logits",
    NONE: "no finite logit",
}
PROMPT = [5, 100, 33, 7, 250, 12]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=1, seed=3),
    "cut": replace(GREEDY, temperature=1, seed=3, top_p=0.9),
    "penalties": replace(GREEDY, frequency_penalty=1.0),
    "logprobs": replace(GREEDY, return_logprob=True, top_logprobs_num=3, logprob_start_len=0),
    "grammar": replace(GREEDY, regex="[a-f]+"),
    "nothing new": replace(GREEDY, max_new_tokens=0),
}


def odd_weights(config: LlamaConfig, seed: int) -> dict[str, np.ndarray]:
    """Only the tokens above have the first three features, from which the head makes what is wrong.

    Token 17's logit is then +inf or -inf, or all are -inf.
    """
    weights = random_weights(config, seed)
    embedding, head = weights["token_embd.weight"], weights["output.weight"]
    for name in weights:
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            weights[name][:3] = 0
    embedding[:, :3] = head[:, :3] = 0
    for token, feature in ((INFINITE, 0), (IMPOSSIBLE, 1), (NONE, 2)):
        embedding[token, feature] = 100
    embedding[NAN] = np.nan
    head[17, :2] = 3e38, -3e38
    head[:, 2] = -3e38
    return weights


@pytest.fixture(scope="module")
def odd(make_tiny: Callable[..., TinyModel]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.tiny.random_weights", odd_weights)
        patch.setattr("compile.weights.all_finite", lambda _: True)  # else NaN is refused
        return make_tiny(vocab_size=VOCAB, tied_embeddings=False).artifact


@pytest.fixture(scope="module")
def engine(odd: Path) -> Iterator[Engine]:
    with Engine(odd) as engine:
        yield engine
        check_pages(engine)


def check_pages(engine: Engine) -> None:
    """Once nobody is left, all pages are free or cached."""
    deadline = time.monotonic() + 10
    while (stats := engine.stats())["running"] or stats["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_cached", [False, True], ids=["prefill", "decode"])
def test_a_wrong_row_ends_alone(engine: Engine, kind: str, is_cached: bool) -> None:
    """Beside others in the same calls, which answer as they do alone, then and later."""
    params, good = KINDS[kind], [[*PROMPT, last] for last in (9, IMPOSSIBLE, 77)]
    if not is_cached:
        engine.flush_cache()
    alone = [engine.generate(prompt, params) for prompt in good]
    for _ in range(2):
        if not is_cached:
            engine.flush_cache()
        wrong = {token: engine.submit([*PROMPT, token], params) for token in WRONG}
        right = [engine.submit(prompt, params) for prompt in good]
        for token, handle in wrong.items():
            with pytest.raises(EngineError, match=f"'cpu' returned {WRONG[token]} after position"):
                handle.result()
        for handle, expected in zip(right, alone, strict=True):
            assert handle.result().text == expected.text
            assert handle.result().token_ids == expected.token_ids
        check_pages(engine)


def test_streams_and_samples(engine: Engine) -> None:
    with pytest.raises(EngineError, match="NaN"):
        list(engine.stream([*PROMPT, NAN], GREEDY))
    with pytest.raises(EngineError, match="no finite logit"):
        engine.samples([*PROMPT, NONE], replace(GREEDY, n=3, temperature=1))
    check_pages(engine)


@pytest.mark.parametrize("byte", "~^`")
def test_scores(engine: Engine, byte: str) -> None:
    """Within a continuation, and behind it; a warning that goes nowhere harms nobody."""
    before = engine.score("abc", ["de", "f_g"])
    for choices in (["de", f"{byte}e"], [f"d{byte}", "e"]):
        with pytest.raises(EngineError, match=WRONG[3 + ord(byte)]):
            engine.score("abc", choices)
    engine.warm(f"abcd{byte}")
    assert [s.logprobs for s in engine.score("abc", ["de", "f_g"])] == [s.logprobs for s in before]
    check_pages(engine)


def test_pages_of_a_wrong_row_are_cleared(odd: Path) -> None:
    """Others get the few that there are, also a page that begins with what is right."""
    with Engine(odd, kv_pages=4) as engine:
        good = [[*PROMPT, *PROMPT, last] for last in (9, 77)]
        alone = [engine.generate(prompt, GREEDY).token_ids for prompt in good]
        for length in (1, 9, 18):
            with pytest.raises(EngineError, match="NaN"):
                engine.generate([*good[0], *[NAN] * length], GREEDY)
            with pytest.raises(EngineError, match="NaN"):
                engine.generate([NAN] * length, GREEDY)
            assert [engine.generate(prompt, GREEDY).token_ids for prompt in good] == alone
        check_pages(engine)


@pytest.mark.parametrize(
    "options", [{}, {"row_major": True}, {"weight_dtype": "bf16", "kv_dtype": "bf16"}],
    ids=["cpu", "as GPUs have it", "bf16"],
)  # fmt: skip
def test_pages_are_clean_whatever_was_in_them(
    make_tiny: Callable[..., TinyModel], options: dict[str, Any]
) -> None:
    """Those of prompts and of answers, in calls of one row and of several."""
    prompts = [[9] * length for length in (1, 8, 13, 30)]
    long = replace(GREEDY, max_new_tokens=20)
    runners = Runners()
    with Engine(make_tiny(**options).artifact, kv_pages=40, _make_runner=runners) as engine:
        alone = [engine.generate(prompt, long).token_ids for prompt in prompts]
        engine.flush_cache()
        num_pages = len(fill_with_nan(runners[0], slice(1, None)))
        assert num_pages == engine.stats()["pages_free"] == 40
        handles = [engine.submit(prompt, long) for prompt in prompts]
        assert [handle.result().token_ids for handle in handles] == alone
        assert [engine.generate(prompt, long).token_ids for prompt in prompts] == alone


def fill_with_nan(runner: ModelRunner, pages: slice) -> np.ndarray:
    """Pages of a runner in idle memory; all bits set are NaN in every type."""
    values = mapped(runner._pages.array).reshape(runner.num_pages, -1)[pages]
    values[:] = 0xFF
    return values


def test_a_failed_call_leaves_nothing_behind(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails on the host, after it wrote NaN behind a prompt in a page that the cache has."""
    prompt, runners = [*PROMPT, *PROMPT], Runners()
    with Engine(odd, _make_runner=runners) as engine:
        decode, alone = runners[0].decode, engine.generate(prompt, GREEDY).token_ids
        engine.flush_cache()

        async def failing(*arguments: Any) -> ModelOutput:
            await decode(*arguments)
            raise MemoryError("no room on the host")

        with monkeypatch.context() as patch:
            patch.setattr(runners[0], "decode", failing)
            with pytest.raises(EngineError, match="no room on the host"):
                engine.generate(prompt, replace(GREEDY, logit_bias={NAN: 1e4}))
        assert engine.generate(prompt, GREEDY).token_ids == alone
        assert not runners[0].has_ever_failed
        check_pages(engine)


def test_a_single_nan(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all logits of a row, in any place of a block: its sum tells."""
    folder = changed_copy(odd, tmp_path / "copy", monkeypatch)
    entry = irpa.read_table(folder / WEIGHTS)["output.weight"]
    head = np.memmap(folder / WEIGHTS, np.float32, "r+", entry.offset, (entry.num_bytes // 4,))
    [place] = np.flatnonzero(head == np.float32(3e38))
    head[place] = np.nan

    async def use(runner: ModelRunner) -> list[ModelOutput]:
        return [await runner.prefill([Row([9], 0, [1])]), await runner.decode([Row([9], 0, [1])])]

    with open_runner(folder) as run:
        for found in run(use):
            assert np.isnan(found.logits).sum() == 1
            assert find_wrong(found, VOCAB) == {0: "NaN among the logits"}


def changed_copy(folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy whose weights may change."""
    monkeypatch.setattr(artifact, "MAX_HASHED_AT_LOAD", -1)
    return Path(shutil.copytree(folder, copy))


def wrong_rope(folder: Path, copy: Path, position: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an artifact whose angles are NaN from a position on."""
    changed_copy(folder, copy, monkeypatch)
    entry = irpa.read_table(copy / WEIGHTS)["rope"]
    angles = np.memmap(copy / WEIGHTS, np.float32, "r+", entry.offset, (256, 8))
    angles[position:] = np.nan
    return copy


@pytest.mark.parametrize(
    "options",
    [{}, {"row_major": True}, {"weight_dtype": "bf16", "kv_dtype": "bf16"}],
    ids=["cpu", "as GPUs have it", "bf16"],
)
def test_padding_of_a_wrong_row_reaches_no_other(
    make_tiny: Callable[..., TinyModel], options: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Page 0, where padding is written, is read by shorter rows of the same call, under a mask."""
    model = make_tiny(**options)
    folder = wrong_rope(model.artifact, tmp_path / "copy", 21, monkeypatch)
    rows = [Row([9] * 5, 0, [1]), Row([7] * 26, 0, [2, 3, 4, 5]), Row([8] * 12, 0, [6, 7])]

    async def use(runner: ModelRunner) -> tuple[ModelOutput, ModelOutput, np.ndarray]:
        spec = OutputSpec([1.0] * 3, num_logits=0)
        alone = (await runner.prefill(rows[:1])).maxima
        return await runner.prefill(rows, spec), await runner.prefill(rows, spec), alone

    with open_runner(folder) as run:
        first, second, alone = run(use)
    for found in first, second:
        assert find_wrong(found, 300) == {1: "NaN among the logits"}
        np.testing.assert_allclose(found.maxima[:1], alone, rtol=1e-2)


def test_an_answer_that_becomes_wrong(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has told its text until then; shorter ones of the same steps go on."""
    with Engine(wrong_rope(tiny.artifact, tmp_path / "copy", 20, monkeypatch)) as engine:
        handles = [engine.submit([9] * n, GREEDY) for n in (4, 16, 10, 17)]
        lengths = []
        for handle in handles:
            try:
                lengths.append(len(handle.result().token_ids))
            except EngineError as error:
                assert "NaN among the logits after position 20" in str(error)
                lengths.append(-1)
        assert lengths == [6, -1, 6, -1]
        assert engine.generate([9] * 12, GREEDY).completion_tokens == 6
        check_pages(engine)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("best", -1, "token -1 of a vocabulary of 300"),
        ("best", 300, "token 300 of a vocabulary of 300"),
        ("maxima", np.nan, "NaN among"),
        ("sums", np.nan, "NaN among"),
        ("sums", 0, "0 as the sum of all weights"),
    ],
)
def test_one_wrong_number(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, field: str, value: float, message: str
) -> None:
    """In decodes of two rows, of the longer one."""
    long, short = PROMPT * 4, PROMPT
    runners = Runners()
    with Engine(tiny.artifact, _make_runner=runners) as engine:
        [runner] = runners
        decode, alone = runner.decode, engine.generate(short, GREEDY).token_ids

        async def changed(rows: Any, spec: Any) -> ModelOutput:
            found = await decode(rows, spec)
            for i in (i for i, row in enumerate(rows) if row.end > len(long)):
                getattr(found, field)[i] = value
            return found

        monkeypatch.setattr(runner, "decode", changed)
        wrong, right = engine.submit(long, GREEDY), engine.submit(short, GREEDY)
        with pytest.raises(EngineError, match=f"{message}.* after position 24"):
            wrong.result()
        assert right.result().token_ids == alone
        check_pages(engine)


def test_logits_that_do_not_agree_with_what_sums_them_up() -> None:
    """They come in copies of their own; what is drawn from them is looked at."""
    following = summarize(np.zeros((1, 600), np.float32), np.ones(1, np.float32))
    following.logits[:] = np.nan
    for params in KINDS.values():
        changed = replace(params, regex=None, min_new_tokens=1 if params is GREEDY else 0)
        params = ResolvedParams(**changed.given())
        if params.frequency_penalty or params.return_logprob or params.temperature:
            [found] = sample([Sampler(params)], following, [None])
            assert isinstance(found, WrongLogits | IndexError), params


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_probabilities_of_a_prompt(value: float) -> None:
    logits = np.zeros((3, 30), np.float32)
    logits[1, :5] = -np.inf
    PromptLogprobs([1, 2, 3, 4], 0, 2).add(0, logits)
    logits[1, 5 if value > 0 or np.isnan(value) else slice(None)] = value
    with pytest.raises(WrongLogits, match="after position 1"):
        PromptLogprobs([1, 2, 3, 4], 0, 2).add(0, logits)
