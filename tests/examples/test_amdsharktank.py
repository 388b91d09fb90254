"""Files that amdsharktank exported: what they can do, and that the rest is refused by name.

A toy with the interface of its `top_k` files stands in for them everywhere. The real ones, and
shortfin's own server on ours, take the environments of `examples/install_peers.sh FOLDER`, named by
SF_LOCAL_PEERS=FOLDER.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import iree.compiler
import numpy as np
import pytest

from sf_local import Engine, SamplingParams
from sf_local.artifact.manifest import CONFIG, MANIFEST, VMFB
from sf_local.artifact.open import open_artifact
from sf_local.engine.limits import limits_of
from sf_local.errors import CorruptFileError, EngineError, MismatchError, RequestError
from sf_local.sampling.logits import spread
from tests.support.reference import forward, logprobs, random_weights, write_hf_folder
from tests.support.running import all_at_once
from tests.support.tiny import DATA, TINY, TinyModel, peer

EXAMPLES = Path(__file__).parents[2] / "examples" / "peers"

# A toy with amdsharktank's interface. What follows token t are t + OFFSETS, by VALUES, in no order.
VALUES, OFFSETS, MODULUS = (1.0, 3.0, 2.0, 0.0), (7, 1, 5, 3), 250
FUNCTION = """
  func.func @{name}_bs1(%tokens: tensor<1x{s}xi64>, %seq_lens: tensor<1xi64>{start},
      %pages: tensor<1x?xi64>, %cache: tensor<?x{page_elements}xf32>)
      -> (tensor<1x{s}x{k}xf32>, tensor<1x{s}x{k}xi64>) {{
    %all_values = arith.constant dense<{values}> : tensor<{k}xf32>
    %offsets = arith.constant dense<{offsets}> : tensor<{k}xi64>
    %modulus = arith.constant {modulus} : i64
    %one = arith.constant 1 : index
    %length = tensor.dim %tokens, %one : tensor<1x{s}xi64>
    %no_values = tensor.empty({dynamic}) : tensor<1x{s}x{k}xf32>
    %no_ids = tensor.empty({dynamic}) : tensor<1x{s}x{k}xi64>
    %values, %ids = linalg.generic {{
        indexing_maps = [affine_map<(b, s, k) -> (b, s)>, affine_map<(b, s, k) -> (k)>,
                         affine_map<(b, s, k) -> (k)>, affine_map<(b, s, k) -> (b, s, k)>,
                         affine_map<(b, s, k) -> (b, s, k)>],
        iterator_types = ["parallel", "parallel", "parallel"]}}
        ins(%tokens, %all_values, %offsets : tensor<1x{s}xi64>, tensor<{k}xf32>, tensor<{k}xi64>)
        outs(%no_values, %no_ids : tensor<1x{s}x{k}xf32>, tensor<1x{s}x{k}xi64>) {{
      ^bb0(%token: i64, %value: f32, %offset: i64, %0: f32, %1: i64):
        %sum = arith.addi %token, %offset : i64
        %id = arith.remsi %sum, %modulus : i64
        linalg.yield %value, %id : f32, i64
    }} -> (tensor<1x{s}x{k}xf32>, tensor<1x{s}x{k}xi64>)
    return %values, %ids : tensor<1x{s}x{k}xf32>, tensor<1x{s}x{k}xi64>
  }}
"""


def toy_module(page_elements: int, k: int) -> str:
    best = sorted(range(4), key=lambda i: -VALUES[i])[:k]
    chosen = sorted(best)
    common = {
        "k": k, "page_elements": page_elements, "modulus": MODULUS,
        "values": [VALUES[i] for i in chosen], "offsets": [OFFSETS[i] for i in chosen],
    }  # fmt: skip
    prefill = FUNCTION.format(name="prefill", s="?", start="", dynamic="%length", **common)
    start = ", %start: tensor<1xi64>"
    decode = FUNCTION.format(name="decode", s="1", start=start, dynamic="", **common)
    return f"module @module {{{prefill}{decode}}}"


@pytest.fixture(scope="module")
def make_toy(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An artifact with the toy for a vmfb, and a config.json with this `top_k`."""

    def make(k: int) -> Path:
        folder = tmp_path_factory.mktemp("toy")
        shutil.copytree(tiny.artifact, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        config = json.loads((folder / CONFIG).read_text())
        elements = config["paged_kv_cache"]["paged_kv_block_size_elements_per_device"][0]
        iree.compiler.compile_str(
            toy_module(elements, k), output_file=str(folder / VMFB), target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=generic"],
        )  # fmt: skip
        change_config(folder, top_k=k, has_prefill_position=False,
                      prefill_batch_sizes=[1], decode_batch_sizes=[1])  # fmt: skip
        return folder

    return make


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def engine(make_toy: Callable[[int], Path]) -> Iterator[Engine]:
    with Engine(make_toy(4)) as engine:
        yield engine


def steps(tokens: list[int], first: int) -> list[int]:
    """What was added for each token."""
    return [(b - a) % MODULUS for a, b in zip([first, *tokens], tokens, strict=False)]


def test_spread() -> None:
    """Rows of candidates in any order become logits; all other tokens are impossible."""
    logits = spread(np.array([[1, 5], [3, 2]], np.float32), np.array([[4, 0], [1, 2]]))
    no = -np.inf
    assert logits.tolist() == [[5, no, no, no, 1], [no, 3, 2, no, no]]


def test_the_likeliest(engine: Engine) -> None:
    output = engine.generate([9, 9, 100], SamplingParams(max_new_tokens=60, temperature=0))
    assert output.token_ids == [(101 + i) % MODULUS for i in range(60)]
    assert output.cached_tokens == 0


def test_draws_among_the_candidates(engine: Engine) -> None:
    """In the proportions that the logits give them."""

    def drawn(**params: Any) -> list[int]:
        sampling = SamplingParams(max_new_tokens=200, seed=3, ignore_eos=True, **params)
        return steps(engine.generate([100], sampling).token_ids, 100)

    assert set(drawn(top_k=4)) == set(OFFSETS)
    two = drawn(top_k=2)
    assert set(two) == {1, 5}
    assert two.count(1) / 200 == pytest.approx(1 / (1 + np.exp(-1)), abs=0.1)
    assert set(drawn(top_k=1)) == set(drawn(top_k=4, top_p=0.5)) == {1}
    assert set(drawn(top_k=4, min_p=0.2)) == {1, 5}
    assert set(drawn(top_k=4, temperature=0.05)) == {1}


@pytest.mark.parametrize("wrong", [-5, 2**40])
def test_what_is_no_token_ends_its_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """Among the candidates, whether or not it is the likeliest."""
    runner: Any = engine._replicas.workers[0].core.runner
    following = runner._outputs.following

    def changed(results: Any, *arguments: Any) -> Any:
        results[1][..., 2] = wrong
        return following(results, *arguments)

    for params in SamplingParams(4, temperature=0), SamplingParams(4, top_k=4):
        with monkeypatch.context() as patch, pytest.raises(EngineError, match=f"token {wrong} of"):
            patch.setattr(runner._outputs, "following", changed)
            engine.generate([100], params)
        assert engine.generate([100], SamplingParams(1, temperature=0)).token_ids == [101]


@pytest.mark.parametrize(
    "refused",
    [
        {"regex": "a+"}, {"json_schema": "{}"}, {"ebnf": 'start: "a"'}, {"return_logprob": True},
        {"logit_bias": {5: 1.0}}, {"frequency_penalty": 0.5}, {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1}, {"min_new_tokens": 1},
    ],
)  # fmt: skip
def test_what_needs_all_logits_is_refused(engine: Engine, refused: dict[str, Any]) -> None:
    [name] = refused
    with pytest.raises(RequestError, match=f"^{name}=.* needs the logits of all tokens.*top_k=4"):
        engine.submit([100], SamplingParams(temperature=0, **refused))


@pytest.mark.parametrize("refused", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_draws_beyond_the_candidates_are_refused(engine: Engine, refused: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^top_k=.*temperature=0, or top_k from 1 to 4"):
        engine.submit([100], SamplingParams(**refused))


def test_choices_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"^choices=\['a', 'b'\] needs the logits"):
        engine.score("text", ["a", "b"])


def test_top_k_1(make_toy: Callable[[int], Path]) -> None:
    with Engine(make_toy(1)) as engine:
        for params in (SamplingParams(8, temperature=0), SamplingParams(8, top_k=1)):
            assert engine.generate([100], params).token_ids == list(range(101, 109))
        with pytest.raises(RequestError, match=r"^top_k=2"):
            engine.submit([100], SamplingParams(top_k=2))


@pytest.mark.parametrize(
    "change", [{"top_k": None}, {"has_prefill_position": True}], ids=["top_k", "position"]
)
def test_the_config_of_another_export(
    make_toy: Callable[[int], Path], change: dict[str, Any]
) -> None:
    folder = make_toy(4)
    change_config(folder, **change)
    with pytest.raises(MismatchError, match=r"prefill_bs1 is not what config\.json says"):
        Engine(folder)


@pytest.mark.parametrize("change", [{"top_k": 0}, {"logits_normalization": "sigmoid"}])
def test_values_that_no_export_has(tiny: TinyModel, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(tiny.artifact, tmp_path / "artifact"))
    change_config(folder, **change)
    with pytest.raises(CorruptFileError, match=next(iter(change))):
        open_artifact(folder)


@pytest.mark.parametrize("page_size", [8, 24, 512])
def test_chunks_are_whole_pages(tiny: TinyModel, page_size: int) -> None:
    artifact = open_artifact(tiny.artifact)
    cache = replace(artifact.config.paged_kv_cache, block_seq_stride=page_size)
    config = replace(artifact.config, paged_kv_cache=cache, max_seq_len=2048)
    limits = limits_of(replace(artifact, config=config, manifest=None))
    assert limits.reuse == "pages" and limits.prefill_tokens % page_size == 0
    assert limits.prefill_tokens == {8: 256, 24: 264, 512: 512}[page_size]


# What amdsharktank itself exports. Smaller heads than 64 it cannot compile for a CPU.

MODEL = replace(
    TINY, vocab_size=512, hidden_size=192, intermediate_size=256,
    num_heads=3, num_kv_heads=1, head_dim=64,
)  # fmt: skip
WEIGHTS = random_weights(MODEL, seed=7)
TEXT = np.random.default_rng(0).integers(3, 259, 220).tolist()
POSITION, LOGPROB = "--has-prefill-position", "--logits-normalization"


@pytest.fixture(
    scope="module",
    params=[
        [POSITION], [], [POSITION, "--top-k=4"], ["--top-k=1"],
        [POSITION, f"{LOGPROB}=log_softmax"], [f"{LOGPROB}=softmax"],
    ],
    ids=" ".join,
)  # fmt: skip
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python, folder = peer("amdsharktank"), tmp_path_factory.mktemp("exported")
    write_hf_folder(folder / "source", MODEL, WEIGHTS)
    command = [python, EXAMPLES / "export_amdsharktank.py", folder / "source", folder / "made",
               "--bs=1,3", *request.param]  # fmt: skip
    subprocess.run(command, check=True, timeout=1200)
    return folder / "made"


def greedy(count: int, **rest: Any) -> SamplingParams:
    return SamplingParams(count, temperature=0, ignore_eos=True, **rest)


def oracle(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(MODEL, WEIGHTS, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_what_amdsharktank_exports(exported: Path) -> None:
    """Prompts of any length alone and together, cached ones and preempted ones."""
    prompts = [TEXT[:n] for n in (1, 16, 33, 100, 220)]
    expected = [oracle(prompt, 20) for prompt in prompts]
    with Engine(exported, kv_pages=17) as engine:
        assert [engine.generate(prompt, greedy(20)).token_ids for prompt in prompts] == expected
        with all_at_once(engine):
            handles = [engine.submit(prompt, greedy(20)) for prompt in [*prompts, *prompts]]
        outputs = [handle.result() for handle in handles]
        assert [output.token_ids for output in outputs] == [*expected, *expected]
        has_position = engine.artifact.config.has_prefill_position
        assert any(output.cached_tokens for output in outputs) == has_position
        assert all(output.cached_tokens % 16 == 0 for output in outputs)
        assert engine.stats()["preemptions"] > 0
        assert engine.max_tokens == 240
        check_logits(engine)


def check_logits(engine: Engine) -> None:
    """Log probabilities, choices and grammars; or that they are refused, and drawing works."""
    logs = logprobs(forward(MODEL, WEIGHTS, TEXT[:40]))
    params = greedy(4, return_logprob=True, logprob_start_len=3)
    if engine.artifact.config.top_k is not None:
        with pytest.raises(RequestError, match="return_logprob=True needs"):
            engine.submit(TEXT[:40], params)
        drawn = engine.generate(TEXT[:40], SamplingParams(1, top_k=1)).token_ids
        assert drawn == oracle(TEXT[:40], 1)
        return
    found = engine.generate(TEXT[:40], params).logprobs
    assert found is not None
    np.testing.assert_allclose(
        np.array(found.prompt[1:], np.float64),
        [logs[i, TEXT[i + 1]] for i in range(3, 39)],
        atol=0.02 if engine.artifact.config.logits_normalization != "none" else 1e-3,
    )
    assert engine.generate(TEXT[:40], greedy(9, regex="[ab]{9}")).text.strip("ab") == ""
    [first, second] = engine.score("a", ["b", "c"])
    assert first.mean != second.mean


@pytest.mark.slow
@pytest.mark.model
def test_shortfins_own_server_serves_ours(smollm2: Path) -> None:
    """Its answers to greedy requests are the engine's."""
    cases = json.loads((DATA / "smollm2_greedy.json").read_text())["cases"][:4]
    prompts = [case["prompt_ids"] for case in cases]
    jobs = "".join(json.dumps(["generate", prompt, 16]) + "\n" for prompt in prompts)
    command = [peer("shortfin"), EXAMPLES / "shortfin_http.py", smollm2]
    done = subprocess.run(
        command, input=jobs, stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    theirs = [json.loads(line)["value"] for line in done.stdout.splitlines()]
    with Engine(smollm2) as engine:
        ours = [engine.generate(prompt, SamplingParams(16, temperature=0)) for prompt in prompts]
    assert theirs == [output.text for output in ours]
