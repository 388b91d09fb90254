"""The compiled model against an independent float64 reference, on tiny random Llamas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile.cpu.emitter import CpuLlamaEmitter
from compile.gpu.emitter import LlamaEmitter
from compile.models.spec import LlamaConfig, RopeScaling
from compile.options import ModelOptions
from compile.target import Vectors, resolve_target
from sf_local.artifact.open import host_cpu_features, open_artifact
from sf_local.errors import UnsupportedError
from sf_local.model.outputs import OutputSpec
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.sampling.logits import ModelOutput, summarize
from tests.support.reference import forward, random_weights, stored_as
from tests.support.running import open_runner
from tests.support.tiny import (
    ONE_PADDED,
    ONE_SIZE,
    QUANTIZABLE,
    TINY,
    TINY_OPTIONS,
    TinyModel,
    TinyModels,
)

PAGE = TINY_OPTIONS.page_size
LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 64)
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa 3:1, tied": {},
    "gqa 1:1, untied, linear": {
        "num_kv_heads": 6,
        "tied_embeddings": False,
        "rope_scaling": RopeScaling("linear", 2.0),
        "prefill_batch_sizes": (3,),
        "decode_batch_sizes": (2, 5, 16, 33),
    },
    "gqa 4:1, llama3, odd sizes": {
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 10,
        "hidden_size": 50,
        "intermediate_size": 71,
        "vocab_size": 301,
        "rms_eps": 1e-2,
        "rope_scaling": LLAMA3,
        "prefill_batch_sizes": (3,),
    },
    "any x86-64": {
        "cpu": "generic",
        "prefill_batch_sizes": (3,),
        "decode_batch_sizes": (1, 2, 5, 16, 33),
    },
    "AVX2": {"cpu": "x86-64-v3", "prefill_batch_sizes": (3,), "decode_batch_sizes": (1, 4, 9)},
    "AVX-512": {"cpu": "x86-64-v4", "prefill_batch_sizes": (3,)},
    "row-major, 3:1": {"row_major": True},
    "row-major, 1:1, untied": {
        "row_major": True,
        "num_kv_heads": 6,
        "tied_embeddings": False,
        **ONE_PADDED,
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, make_tiny: Callable[..., TinyModel]) -> TinyModel:
    options = VARIANTS[request.param]
    features = resolve_target("cpu", options.get("cpu", "host")).cpu_features
    if missing := set(features) - host_cpu_features():
        pytest.skip(f"this CPU lacks {missing}")
    return make_tiny(**options)


def tokens_of(model: TinyModel, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-4 of the spread of the expected logits."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_prefill_of_odd_lengths_and_decode(variant: TinyModel) -> None:
    """Lengths around page borders, on scattered pages, continued by decode across a border."""
    with open_runner(variant.artifact) as run:
        for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5):
            tokens = tokens_of(variant, length + PAGE + 2, seed=length)
            expected = forward(variant.config, variant.weights, tokens)
            pages = [61, 3, 40, 9, 22, 7, 55][: -(-len(tokens) // PAGE)]

            async def use(
                runner: ModelRunner,
                tokens: list[int] = tokens,
                pages: list[int] = pages,
                length: int = length,
            ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
                every = (await runner.prefill_all([Row(tokens[:length], 0, pages)]))[0]
                last = (await runner.prefill([Row(tokens[:length], 0, pages)])).logits[0]
                steps = [
                    (await runner.decode([Row([tokens[i]], i, pages)])).logits[0]
                    for i in range(length, len(tokens))
                ]
                return every, last, steps

            every, last, steps = run(use)
            assert_close(every, expected[:length])
            assert_close(last, expected[length - 1])
            assert_close(np.stack(steps), expected[length:])


def test_prefill_continues_at_every_position_of_a_page(variant: TinyModel) -> None:
    tokens = tokens_of(variant, 3 * PAGE + 3)
    expected = forward(variant.config, variant.weights, tokens)
    pages = [12, 50, 2, 33]
    with open_runner(variant.artifact) as run:
        for start in range(1, 2 * PAGE + 1):

            async def use(runner: ModelRunner, start: int = start) -> np.ndarray:
                await runner.prefill([Row(tokens[:start], 0, pages)])
                return (await runner.prefill_all([Row(tokens[start:], start, pages)]))[0]

            assert_close(run(use), expected[start:])


def test_rows_of_different_lengths_in_one_call(variant: TinyModel) -> None:
    """Two of three prefill rows and three of four decode rows: the others are padding."""
    sequences = [tokens_of(variant, n, seed=n) for n in (2 * PAGE + 3, 5, PAGE)]
    pages = [[4, 60, 17], [8], [31, 30]]
    starts = [3, 0, 0]

    async def use(runner: ModelRunner) -> list[np.ndarray]:
        await runner.prefill([Row(sequences[0][:3], 0, pages[0])])
        rows = [
            Row(s[start:-1], start, p) for s, start, p in zip(sequences, starts, pages, strict=True)
        ]
        first = (await runner.prefill(rows[:2])).logits
        third = (await runner.prefill(rows[2:])).logits
        ends = [Row(s[-1:], len(s) - 1, p) for s, p in zip(sequences, pages, strict=True)]
        return [np.concatenate([first, third]), (await runner.decode(ends)).logits]

    with open_runner(variant.artifact) as run:
        prefilled, decoded = run(use)
    for i, sequence in enumerate(sequences):
        expected = forward(variant.config, variant.weights, sequence)
        assert_close(prefilled[i], expected[-2])
        assert_close(decoded[i], expected[-1])


def test_summaries_of_what_follows(variant: TinyModel) -> None:
    """As numpy makes them of the same logits; rows that only pad a batch change nothing."""
    sequences = [tokens_of(variant, n, seed=n) for n in (PAGE + 3, 5)]
    rows = [Row(s[:-1], 0, [1 + 2 * i, 2 + 2 * i]) for i, s in enumerate(sequences)]
    ends = [Row(s[-1:], len(s) - 1, r.page_ids) for s, r in zip(sequences, rows, strict=True)]
    scales = [2.5, 1e-6]

    async def use(runner: ModelRunner) -> list[ModelOutput]:
        spec = OutputSpec(scales)
        return [await runner.prefill(rows, spec), await runner.decode(ends, spec)]

    with open_runner(variant.artifact) as run:
        for found in run(use):
            expected = summarize(found.logits, np.array(scales, np.float32))
            np.testing.assert_array_equal(found.best, expected.best)
            np.testing.assert_array_equal(found.maxima, expected.maxima)
            np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-5)


@pytest.mark.parametrize("row_major", [False, True])
def test_the_first_of_equally_likely_tokens_is_best(
    row_major: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All tokens, of two blocks, have the same embedding, so the same logit."""

    def same_rows(config: LlamaConfig, seed: int) -> dict[str, np.ndarray]:
        weights = random_weights(config, seed)
        weights["token_embd.weight"][:] = weights["token_embd.weight"][0]
        return weights

    monkeypatch.setattr("tests.support.tiny.random_weights", same_rows)
    model = TinyModels(lambda: tmp_path)(row_major=row_major)  # its own: of these weights
    with open_runner(model.artifact) as run:
        found = run(lambda r: r.decode([Row([9], 0, [1])]))
    assert found.best.tolist() == [0]


@pytest.mark.parametrize("name", ["gqa 1:1, untied, linear", "any x86-64"])
def test_decode_batches_of_any_size(make_tiny: Callable[..., TinyModel], name: str) -> None:
    """Batches beyond a tile, and odd ones: every row is right."""
    model = make_tiny(**VARIANTS[name])
    sizes = VARIANTS[name]["decode_batch_sizes"]
    tokens = tokens_of(model, sizes[-1])
    expected = [forward(model.config, model.weights, [t])[0] for t in tokens]

    async def use(runner: ModelRunner, size: int) -> np.ndarray:
        return (
            await runner.decode([Row([t], 0, [1 + i]) for i, t in enumerate(tokens[:size])])
        ).logits

    with open_runner(model.artifact) as run:
        for size in sizes:
            assert_close(run(lambda r, size=size: use(r, size)), np.stack(expected[:size]))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_is_equal_to_the_bit_in_any_batch(
    make_tiny: Callable[..., TinyModel], dtype: str
) -> None:
    """Alone, and as any of four rows of other lengths."""
    model = make_tiny(weight_dtype=dtype, kv_dtype=dtype)
    lengths = (3, 11, 21, 40)
    sequences = [tokens_of(model, n, seed=n) for n in lengths]
    pages = [list(range(1 + 8 * i, 1 + 8 * i + -(-n // PAGE))) for i, n in enumerate(lengths)]

    async def use(runner: ModelRunner) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for tokens, ids in zip(sequences, pages, strict=True):
            await runner.prefill([Row(tokens[:-1], 0, ids)])
            rows.append(Row(tokens[-1:], len(tokens) - 1, ids))
        alone = [(await runner.decode([row])).logits for row in rows]
        return np.concatenate(alone), (await runner.decode(rows)).logits

    with open_runner(model.artifact) as run:
        alone, together = run(use)
    np.testing.assert_array_equal(together, alone)


PREFILLS: dict[int, dict[str, Any]] = {8: {}, 32: {"head_dim": 32, "decode_batch_sizes": (1,)}}


@pytest.mark.parametrize("head_dim", [8, 32])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_prefill_is_equal_to_the_bit_in_any_batch(
    make_tiny: Callable[..., TinyModel], dtype: str, head_dim: int
) -> None:
    """Alone, and beside prompts of other lengths; below, at and above a tile's 16 rows."""
    model = make_tiny(weight_dtype=dtype, kv_dtype=dtype, **PREFILLS[head_dim])
    prompts = [tokens_of(model, n, seed=n) for n in (3, 16, 50)]
    rows = [Row(tokens, 0, list(range(1 + 8 * i, 8 + 8 * i))) for i, tokens in enumerate(prompts)]

    async def use(runner: ModelRunner) -> tuple[np.ndarray, np.ndarray]:
        alone = [(await runner.prefill([row])).logits for row in rows]
        return np.concatenate(alone), (await runner.prefill(rows)).logits

    with open_runner(model.artifact) as run:
        alone, together = run(use)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    "cpu",
    [
        "host", "x86-64-v3", "generic",
        *(pytest.param(cpu, marks=pytest.mark.slow) for cpu in ("x86-64-v3+avx_vnni", "x86-64-v4")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_weights(make_tiny: Callable[..., TinyModel], dtype: str, cpu: str) -> None:
    """As the reference with the same quantized weights; a row of any batch equal to the bit, and
    prefill equal to decode."""
    features = resolve_target("cpu", cpu).cpu_features
    if missing := set(features) - host_cpu_features():
        pytest.skip(f"this CPU lacks {missing}")
    model = make_tiny(
        weight_dtype=dtype, activation_dtype="int16", kv_dtype="f32", cpu=cpu,
        prefill_batch_sizes=(1,), **QUANTIZABLE,
    )  # fmt: skip
    tokens, expected = quantized_reference(model, dtype, 2 * PAGE + 5)

    async def use(runner: ModelRunner) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [Row(tokens[-1:], len(tokens) - 1, [3, 9, 4])]
        every = (await runner.prefill_all([Row(tokens, 0, [3, 9, 4])]))[0]
        others = [Row([t], 0, [20 + t % 7]) for t in tokens[:3]]
        alone = (await runner.decode(rows)).logits[0]
        return every, alone, (await runner.decode([*others, *rows])).logits[3]

    with open_runner(model.artifact) as run:
        every, alone, together = run(use)
    assert np.abs(every - expected).max() <= 2e-3 * np.abs(expected).max()
    assert np.abs(alone - expected[-1]).max() <= 2e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_weights_and_short_activations(
    make_tiny: Callable[..., TinyModel], dtype: str, activations: str
) -> None:
    """Activations of 8 bits cost what 16-bit floats do. Matrices of 2,080 columns become floats in
    three panels."""
    vectors = resolve_target("cpu").vectors
    if activations == "bf16" and not (vectors and vectors.has_tiles):
        pytest.skip("this CPU has no AMX")
    model = make_tiny(
        weight_dtype=dtype, activation_dtype=activations, intermediate_size=2080, num_layers=1,
        **QUANTIZABLE, **ONE_SIZE,
    )  # fmt: skip
    assert open_artifact(model.artifact).manifest.activation_dtype == activations
    tokens, expected = quantized_reference(model, dtype, 3 * PAGE + 5)

    async def use(runner: ModelRunner) -> tuple[np.ndarray, np.ndarray]:
        every = (await runner.prefill_all([Row(tokens, 0, [3, 9, 4, 5])]))[0]
        return every, (
            await runner.decode([Row(tokens[-1:], len(tokens) - 1, [3, 9, 4, 5])])
        ).logits[0]

    with open_runner(model.artifact) as run:
        every, last = run(use)
    assert np.abs(every - expected).max() <= 0.03 * np.abs(expected).max()
    assert np.abs(last - expected[-1]).max() <= 0.03 * np.abs(expected).max()


def quantized_reference(model: TinyModel, dtype: str, count: int) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits of the reference with the weights that the artifact holds."""
    weights = {
        name: stored_as(name, weight, dtype) if weight.ndim == 2 else weight
        for name, weight in model.weights.items()
    }
    tokens = tokens_of(model, count)
    return tokens, forward(model.config, weights, tokens)


def test_heads_that_groups_do_not_fit_are_refused(make_tiny: Callable[..., TinyModel]) -> None:
    with pytest.raises(UnsupportedError, match=r"int8.*head_dim 8.*multiple of 32.*bf16"):
        make_tiny(weight_dtype="int8")


@pytest.mark.parametrize("head_dim", [8, 32])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_stays_near(
    make_tiny: Callable[..., TinyModel], dtype: str, head_dim: int
) -> None:
    """Heads of 8 make matrices whose columns fill no whole tile."""
    options = PREFILLS[head_dim] | (ONE_SIZE if dtype == "f16" else {})
    model = make_tiny(weight_dtype=dtype, kv_dtype=dtype, **options)
    tokens = tokens_of(model, 2 * PAGE + 3)
    expected = forward(model.config, model.weights, tokens)

    async def use(runner: ModelRunner) -> np.ndarray:
        return (await runner.prefill_all([Row(tokens, 0, [3, 9, 4])]))[0]

    with open_runner(model.artifact) as run:
        found = run(use)
    assert np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [LlamaEmitter, CpuLlamaEmitter])
def test_equal_inputs_emit_equal_text(kind: Callable[..., Any]) -> None:
    options = ModelOptions("f32", "f32", PAGE, (1,), (1, 2), 64)
    rest = [Vectors(8, 4) if kind is CpuLlamaEmitter else resolve_target("gfx942")]
    emitters = [kind(TINY, options, *rest) for _ in range(2)]
    texts = [emitter.emit() for emitter in emitters]
    assert texts[0] == texts[1]
    for name in options.function_names:
        assert f'util.func public @"{name}$async"' in texts[0]
    assert texts[0].count("util.func public") == len(options.function_names) == 6
