"""Models that see, tiny ones with random weights: against numpy, and how the engine serves them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sf_local.artifact.manifest import ImageSettings
from sf_local.artifact.open import open_artifact
from sf_local.engine.engine import Engine
from sf_local.errors import EngineError, ImageError, RequestError
from sf_local.request.params import SamplingParams
from sf_local.vision.processor import ImageProcessor
from tests.support.pictures import picture, png
from tests.support.reference import forward
from tests.support.running import Runners, all_at_once, encode_all, open_runner
from tests.support.tiny import TINY, SeeingModel, TinyModel
from tests.support.vision_reference import IMAGE_TOKEN, encode

PARAMS = SamplingParams(max_new_tokens=8, temperature=1, seed=3, ignore_eos=True)
QUESTION = "see <image> what"


@pytest.fixture(scope="module", params=["idefics3", "llava"])
def model(request: pytest.FixtureRequest, make_seeing: Callable[..., SeeingModel]) -> SeeingModel:
    return make_seeing(request.param)


@pytest.fixture
def runners() -> Runners:
    return Runners()


@pytest.fixture
def engine(model: SeeingModel, runners: Runners) -> Iterator[Engine]:
    with Engine(model.artifact, kv_pages=120, _make_runner=runners) as engine:
        yield engine
        engine.flush_cache()
        stats = engine.stats()
        assert stats["pages_free"] == stats["pages_total"]


def processor_of(engine: Engine) -> ImageProcessor:
    assert engine.artifact.manifest and engine.artifact.manifest.images
    return ImageProcessor(ImageSettings(**engine.artifact.manifest.images))


def pixels_of(engine: Engine, *images: PIL.Image.Image) -> np.ndarray:
    """What the model reads of images, tile after tile."""
    processor = processor_of(engine)
    tiles = [processor.tiles(np.asarray(image)).pixels for image in images]
    return processor.normalized(np.concatenate(tiles))


def check_logprobs(
    model: SeeingModel, engine: Engine, prompt: str, *images: PIL.Image.Image
) -> None:
    """Log probabilities of a prompt's tokens, and of the answer's, are the reference's."""
    params = SamplingParams(
        max_new_tokens=4, temperature=0, ignore_eos=True, return_logprob=True, logprob_start_len=0
    )
    output = engine.generate(prompt, params, images=list(images))
    tokens = [*engine.prepare(prompt, images).ids, *output.token_ids]
    logits = model.logits(tokens[:-1], pixels_of(engine, *images))
    logits -= logits.max(axis=1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = expected[np.arange(len(tokens) - 1), tokens[1:]]
    assert output.logprobs is not None
    found = [*output.logprobs.prompt[1:], *output.logprobs.output]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_embeddings_that_are_wrong_end_their_request_alone(
    engine: Engine, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded with others, of which one shows another image; the same image later is encoded
    again."""
    runner: Any = runners[-1]
    encode_tiles, images = runner.encode, [picture(32, 32), picture(32, 32, 1)]
    first, second = (engine.generate(QUESTION, PARAMS, images=[i]).token_ids for i in images)
    victim, processor = pixels_of(engine, picture(32, 32, 2))[0], processor_of(engine)

    async def changed(tiles: Any) -> list[np.ndarray]:
        embeds = await encode_tiles(tiles)
        for tile, values in zip(tiles, embeds, strict=True):
            if np.array_equal(processor.normalized(tile[None])[0], victim):
                values[-1, 0] = np.nan
        return list(embeds)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "encode", changed)
        wrong = engine.submit(QUESTION, PARAMS, images=[picture(32, 32, 2)])
        others = [engine.submit(QUESTION, PARAMS, images=[i]) for i in images]
        with pytest.raises(EngineError, match="NaN or infinity among the embeddings"):
            wrong.result()
        assert [other.result().token_ids for other in others] == [first, second]
    assert engine.generate(QUESTION, PARAMS, images=[picture(32, 32, 2)]).completion_tokens == 8


def test_an_encoder_that_fails_ends_only_whose_tiles_it_had(
    model: SeeingModel, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three images that wait for it at a time; the others are encoded in later steps."""
    images = [picture(32, 32, seed) for seed in range(4)]
    submitted = threading.Event()
    with Engine(model.artifact, kv_pages=120, _make_runner=runners) as engine:
        alone = [engine.generate(QUESTION, PARAMS, images=[i]).token_ids for i in images[2:]]
    with Engine(model.artifact, kv_pages=120, _make_runner=runners) as engine:
        processor, victim = processor_of(engine), pixels_of(engine, images[1])[0]
        encode_tiles = runners[-1].encode

        async def failing(tiles: Any) -> Any:
            submitted.wait(60)
            if np.array_equal(processor.normalized(tiles[0][None])[0], victim):
                raise ValueError("of the host")
            return await encode_tiles(tiles)

        monkeypatch.setattr(runners[-1], "max_tiles", 1)
        monkeypatch.setattr(runners[-1], "encode", failing)
        first, wrong, *others = [engine.submit(QUESTION, PARAMS, images=[i]) for i in images]
        submitted.set()
        with pytest.raises(EngineError, match="the step failed: of the host"):
            wrong.result()
        assert first.result().completion_tokens == 8
        assert [other.result().token_ids for other in others] == alone
        assert not runners[-1].has_ever_failed


SIZES = [(32, 32), (90, 60), (31, 77), (200, 20), (7, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image(model: SeeingModel, engine: Engine, size: tuple[int, int]) -> None:
    check_logprobs(model, engine, QUESTION, picture(*size))


def test_two_images(model: SeeingModel, engine: Engine) -> None:
    check_logprobs(model, engine, "<image> and <image>?", picture(40, 30), picture(64, 64, 1))


@pytest.mark.parametrize("family", ["idefics3", "llava"])
@pytest.mark.parametrize(
    "options",
    [
        {"row_major": True},
        pytest.param({"cpu": "x86-64-v3"}, marks=pytest.mark.slow),
        pytest.param({"cpu": "generic"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_code(
    make_seeing: Callable[..., SeeingModel], family: str, options: dict[str, object]
) -> None:
    """As GPUs have it, and for lesser CPUs."""
    model = make_seeing(family, **options)
    with Engine(model.artifact, kv_pages=60) as engine:
        check_logprobs(model, engine, QUESTION, picture(60, 40))


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_a_gpus_tower_of_several_blocks(
    make_seeing: Callable[..., SeeingModel], family: str
) -> None:
    """Of positions and of tokens, with padding; of four tiles, three are encoded at once."""
    model = make_seeing(
        family, image_size=72, scale_factor=1, num_layers=1, row_major=True,
        prefill_batch_sizes=(1,), decode_batch_sizes=(1,),
    )  # fmt: skip
    tiles = np.random.default_rng(0).integers(0, 256, (4, 72, 72, 3)).astype(np.uint8)
    manifest = open_artifact(model.artifact).manifest
    assert manifest and manifest.images
    pixels = ImageProcessor(ImageSettings(**manifest.images)).normalized(tiles)
    with open_runner(model.artifact) as run:
        found = run(lambda runner: encode_all(runner, tiles))
    np.testing.assert_allclose(found, encode(model.vision, model.weights, pixels), atol=2e-5)


@pytest.mark.parametrize("family", ["idefics3", "llava"])
@pytest.mark.parametrize("row_major", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pixels_beyond_whole_patches(
    make_seeing: Callable[..., SeeingModel], family: str, row_major: bool
) -> None:
    """As SmolVLM-2.2B has them, of 384 pixels in patches of 14; and as there, heads of 72."""
    model = make_seeing(family, image_size=37, hidden_size=144, num_heads=2, row_major=row_major)
    with Engine(model.artifact, kv_pages=60) as engine:
        check_logprobs(model, engine, QUESTION, picture(60, 40))


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_half_precision(make_seeing: Callable[..., SeeingModel], family: str) -> None:
    model = make_seeing(family, weight_dtype="bf16", kv_dtype="bf16")
    with Engine(model.artifact, kv_pages=60) as engine:
        tokens, pixels = engine.prepare(QUESTION, [picture(60, 40)]), picture(60, 40)
        params = SamplingParams(max_new_tokens=0, return_logprob=True, logprob_start_len=0)
        found = engine.generate(QUESTION, params, images=[pixels]).logprobs
        logits = model.logits(tokens.ids, pixels_of(engine, pixels))
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = expected[np.arange(len(tokens.ids) - 1), tokens.ids[1:]]
        assert found is not None
        assert np.abs(np.array(found.prompt[1:]) - expected).mean() < 0.05


def test_a_second_question_computes_only_itself(engine: Engine) -> None:
    """However the image is given: as a file, or as pixels."""
    image = picture(90, 60)
    first = engine.generate(f"{QUESTION} is it", PARAMS, images=[image])
    num_tiles = engine.stats()["encoded_tiles"]
    second = engine.generate(f"{QUESTION} are they", PARAMS, images=[image])
    assert engine.stats()["encoded_tiles"] == num_tiles
    shown = len(engine.prepare(QUESTION, [image]).ids)
    assert first.cached_tokens == 0 and second.cached_tokens >= shown
    engine.flush_cache()
    again = engine.generate(f"{QUESTION} are they", PARAMS, images=[image])
    assert again.cached_tokens == 0 and again.token_ids == second.token_ids
    assert engine.stats()["encoded_tiles"] == num_tiles


def test_an_image_at_the_end(model: SeeingModel, engine: Engine) -> None:
    """Its last position is computed from the image, also where all before it is cached."""
    image, rest = picture(40, 30), "see <image>"
    params = replace(PARAMS, return_logprob=True)
    engine.flush_cache()
    first, again = (engine.generate(rest, params, images=[image]) for _ in range(2))
    assert again.cached_tokens >= first.prompt_tokens - 1 and again.token_ids == first.token_ids
    assert np.allclose(again.logprobs.output, first.logprobs.output, atol=1e-4)
    check_logprobs(model, engine, rest + " what", image)


def test_other_pixels_are_another_prefix(engine: Engine) -> None:
    one = engine.generate(QUESTION, PARAMS, images=[picture(32, 32)])
    other = engine.generate(QUESTION, PARAMS, images=[picture(32, 32, seed=1)])
    assert other.cached_tokens < 10 and one.token_ids != other.token_ids


def test_many_at_once_encode_and_prefill_once(engine: Engine) -> None:
    """Forks of one prompt, from several threads."""
    data = png(picture(90, 60))
    alone = [engine.generate(f"{QUESTION} {i}", PARAMS, images=[data]).token_ids for i in range(4)]
    engine.flush_cache()
    num_tiles = engine.stats()["encoded_tiles"]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(
            lambda i: engine.generate(f"{QUESTION} {i}", PARAMS, images=[data]), range(4)
        ))  # fmt: skip
    assert [output.token_ids for output in outputs] == alone
    assert engine.stats()["encoded_tiles"] == num_tiles
    shown = len(engine.prepare(QUESTION, [data]).ids)
    assert sum(output.cached_tokens >= shown for output in outputs) == 3


def test_samples_streams_choices_and_grammars(engine: Engine) -> None:
    image = picture(60, 40)
    params = SamplingParams(max_new_tokens=6, temperature=1, seed=3, n=3, ignore_eos=True)
    outputs = engine.samples(QUESTION, params, images=[image])
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    streamed = "".join(engine.stream(QUESTION, PARAMS, images=[image]))
    assert streamed == engine.generate(QUESTION, PARAMS, images=[image]).text
    text = engine.generate(
        QUESTION, SamplingParams(max_new_tokens=20, regex="(ab|cd)+[0-9]{3}"), images=[image]
    ).text
    assert text[-3:].isdigit()
    scores = engine.score(QUESTION, [" yes", " no"], images=[image], unconditional=True)
    other = engine.score(QUESTION, [" yes", " no"], images=[picture(60, 40, seed=5)])
    assert [score.token_ids for score in scores] == [score.token_ids for score in other]
    assert scores[0].mean != pytest.approx(other[0].mean, abs=1e-4)


def test_token_ids_with_markers(engine: Engine) -> None:
    image = picture(32, 32)
    expected = engine.generate(QUESTION, PARAMS, images=[image]).token_ids
    ids = engine.encode(QUESTION)
    assert ids.count(IMAGE_TOKEN) == 1
    assert engine.generate(ids, PARAMS, images=[image]).token_ids == expected


REFUSED = [
    (QUESTION, [], "there are 0, and 1 markers"),
    ("nothing to see", [picture(8, 8)], "there are 1, and 0 markers"),
    ("<image><image>", [picture(8, 8)], "there are 1, and 2 markers"),
    (QUESTION, picture(8, 8), "must be a list"),
    (QUESTION, [b"no image"], "image="),
    (QUESTION, [png(picture(64, 64))[:200]], "image="),
    (QUESTION, ["/no/such/file.png"], "image="),
    (QUESTION, ["http://localhost/a.png"], "allow_urls"),
    ("<image>" * 90, [picture(8, 8)] * 90, "give fewer"),
    ("<image>" * 16, [picture(90, 90)] * 16, "of images|no room"),
]


@pytest.mark.parametrize(("prompt", "images", "message"), REFUSED)
def test_refusals(engine: Engine, prompt: str, images: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt, PARAMS, images=images)  # type: ignore[arg-type]
    assert engine.generate("still here", PARAMS).completion_tokens == 8


def test_a_text_model_sees_nothing(make_tiny: Callable[..., object]) -> None:
    with Engine(make_tiny().artifact, kv_pages=40) as engine:  # type: ignore[attr-defined]
        with pytest.raises(RequestError, match="is a text model"):
            engine.generate("<image>", PARAMS, images=[picture(8, 8)])
        assert engine.generate("<image>", PARAMS).completion_tokens == 8


def test_text_alone_is_served_as_by_a_text_model(model: SeeingModel, engine: Engine) -> None:
    prompt = engine.encode("the quick brown")
    output = engine.generate(prompt, replace(PARAMS, temperature=0))
    tokens = [*prompt, *output.token_ids[:-1]]
    logits = forward(TINY, model.weights, tokens)
    assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == output.token_ids


def test_images_are_let_go_of(model: SeeingModel) -> None:
    """Those beyond image_memory; what runs keeps its own."""
    with Engine(model.artifact, kv_pages=120, image_memory=1) as engine:
        images = [picture(32, 32, seed) for seed in range(3)]
        first = [engine.generate(QUESTION, PARAMS, images=[image]).token_ids for image in images]
        engine.flush_cache()
        handles = [engine.submit(QUESTION, PARAMS, images=[image]) for image in images]
        assert [handle.result().token_ids for handle in handles] == first
        assert engine.stats()["encoded_tiles"] > 3


def test_few_pages(model: SeeingModel) -> None:
    """Preempted requests show their images again."""
    with Engine(model.artifact, kv_pages=26) as engine:
        images = [picture(32, 32, seed) for seed in range(4)]
        prompts = [f"a <image> b{i}" for i in range(4)]
        params = replace(PARAMS, max_new_tokens=60)
        alone = [
            engine.generate(prompt, params, images=[image]).token_ids
            for prompt, image in zip(prompts, images, strict=True)
        ]
        engine.flush_cache()
        with all_at_once(engine):
            handles = [
                engine.submit(prompt, params, images=[image])
                for prompt, image in zip(prompts, images, strict=True)
            ]
        assert [handle.result().token_ids for handle in handles] == alone
        assert engine.stats()["preemptions"] > 0


@pytest.mark.parametrize("prefill_tokens", [1, 5])
def test_a_tile_in_several_chunks(model: SeeingModel, prefill_tokens: int) -> None:
    with Engine(model.artifact, kv_pages=120, prefill_tokens=prefill_tokens) as engine:
        check_logprobs(model, engine, "a <image> and <image>?", picture(90, 60), picture(8, 8))
        num_tokens = len(engine.prepare(QUESTION, [picture(90, 60)]).ids)
        assert engine.stats()["steps"] > num_tokens / prefill_tokens


def test_replicas_answer_as_one(model: SeeingModel) -> None:
    images = [picture(60, 40, seed) for seed in range(6)]
    with Engine(model.artifact, kv_pages=120) as engine:
        expected = [engine.generate(QUESTION, PARAMS, images=[image]).token_ids for image in images]
    with Engine(model.artifact, ["cpu", "cpu"], kv_pages=120) as engine:
        handles = [engine.submit(QUESTION, PARAMS, images=[i]) for i in images for _ in range(2)]
        found = [handle.result().token_ids for handle in handles]
        assert found[::2] == found[1::2] == expected
        workers = engine._replicas.workers
        assert all(worker.core.stats()["encoded_tiles"] for worker in workers)


def test_cancelled_and_late_while_encoding(
    engine: Engine, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was encoded is kept for those that come after; the rest never was."""
    runner: Any = runners[-1]
    encode, is_encoding, may_go_on = runner.encode, threading.Event(), threading.Event()

    async def held(tiles: Sequence[np.ndarray]) -> list[np.ndarray]:
        is_encoding.set()
        assert may_go_on.wait(60)
        return await encode(tiles)

    monkeypatch.setattr(runner, "encode", held)
    image = picture(90, 60, seed=8)
    running = engine.submit(QUESTION, PARAMS, images=[image])
    late = engine.submit(f"{QUESTION}?", replace(PARAMS, timeout=0.01), images=[image])
    assert is_encoding.wait(60)
    running.cancel()
    time.sleep(0.02)
    may_go_on.set()
    assert [h.result().finish_reason for h in (running, late)] == ["abort", "timeout"]
    first = engine.stats()["encoded_tiles"]
    assert engine.generate(QUESTION, PARAMS, images=[image]).completion_tokens == 8
    num_tiles = len(engine.prepare(QUESTION, [image]).spans)
    assert first == min(num_tiles, 3) and engine.stats()["encoded_tiles"] == num_tiles


def test_others_decode_between_tiles(
    model: SeeingModel, engine: Engine, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, calls = runners[-1], list[str]()
    encode, decode = runner.encode, runner.decode

    async def encoding(tiles: Sequence[np.ndarray]) -> list[np.ndarray]:
        calls.append("encode")
        return await encode(tiles)

    async def decoding(*args: Any) -> Any:
        calls.append("decode")
        return await decode(*args)

    monkeypatch.setattr(runner, "encode", encoding)
    monkeypatch.setattr(runner, "decode", decoding)
    images = [picture(90, 60, seed) for seed in range(7 if model.vision.has_class_token else 1)]
    stream = engine.submit("talk", replace(PARAMS, max_new_tokens=200))
    deltas = iter(stream)
    next(deltas)
    output = engine.generate("<image>" * len(images), PARAMS, images=images)
    assert output.completion_tokens == 8 and len(list(deltas)) > 0
    assert calls.count("encode") >= 2 and "encode encode" not in " ".join(calls)


def test_a_prompt_that_another_engine_prepared(engine: Engine, tiny: TinyModel) -> None:
    """Is checked as any other."""
    with Engine(tiny.artifact, kv_pages=6) as small:
        for prompt in (engine.prepare("x" * 100), engine.prepare("<image>", [picture(8, 8)])):
            with pytest.raises(RequestError, match=r"no room|is a text model"):
                small.generate(prompt, PARAMS)
        assert small.generate("hi", PARAMS).completion_tokens == 8


def test_asyncio(engine: Engine) -> None:
    images = [picture(60, 40, seed) for seed in range(4)]
    expected = [engine.generate(QUESTION, PARAMS, images=[image]) for image in images]

    async def stream(image: PIL.Image.Image) -> str:
        return "".join([t async for t in engine.astream(QUESTION, PARAMS, images=[image])])

    async def main() -> None:
        texts = await asyncio.gather(*map(stream, images))
        assert texts == [output.text for output in expected]
        with pytest.raises(ImageError):
            await engine.agenerate(QUESTION, PARAMS, images=[b"no image"])
        endless = replace(PARAMS, max_new_tokens=100)
        async for _ in engine.astream(QUESTION, endless, images=images[:1]):
            break
        task = asyncio.create_task(engine.agenerate(QUESTION, endless, images=images[:1]))
        await asyncio.sleep(0)  # it is being prepared
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_urls_are_fetched_once_a_call(model: SeeingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    data, fetched = png(picture(60, 40)), list[str]()

    def fetch(url: str, seconds: float) -> bytes:
        fetched.append(url)
        return data

    monkeypatch.setattr("sf_local.vision.image_file._fetch", fetch)
    url = "https://example.com/a.png"
    with Engine(model.artifact, kv_pages=120, allow_urls=True) as engine:
        expected = engine.generate(QUESTION, PARAMS, images=[data]).token_ids
        assert engine.generate(QUESTION, PARAMS, images=[url]).token_ids == expected
        assert engine.samples(QUESTION, replace(PARAMS, n=3), images=[url])[0].token_ids == expected
        assert len(engine.score(QUESTION, [" yes", " no", " so"], images=[url])) == 3
    assert fetched == [url] * 3


def test_an_image_error_is_a_request_error() -> None:
    assert issubclass(ImageError, RequestError)
