"""Which parameters hold: a request's, the engine's, the model's, or those of sf_local."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sglang as sgl

from sf_local import Engine, SamplingParams, cli
from sf_local.artifact.manifest import MANIFEST
from sf_local.errors import CorruptFileError, EngineError, PromptTooLongError, RequestError
from sf_local.request.params import ResolvedParams
from tests.support.running import assert_idle
from tests.support.tiny import TinyModel

MODELS = {"temperature": 0.0, "top_p": 0.5, "top_k": 7, "max_new_tokens": 9}
PROMPT = "abc"


def recommending(tiny: TinyModel, folder: Path, values: Any) -> Path:
    """The artifact of a model that recommends these values."""
    return changed(tiny, folder, sampling_defaults=values)


def changed(tiny: TinyModel, folder: Path, **facts: Any) -> Path:
    """A copy of the artifact whose artifact.json tells something else."""
    shutil.copytree(tiny.artifact, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | facts))
    return folder


@pytest.mark.parametrize(
    ("trained_for", "remedy"),
    [
        (None, "or compile the model for more, if it"),
        (256, "shorten it; the model was trained for no more"),
        (512, "for up to 512: sf-compile SOURCE --max-seq-len N"),
    ],
)
def test_how_a_context_gets_longer(
    tiny: TinyModel, tmp_path: Path, trained_for: int | None, remedy: str
) -> None:
    source = {"name": "tiny", "sha256": ""} | ({"max_seq_len": trained_for} if trained_for else {})
    with (
        Engine(changed(tiny, tmp_path / "model", source=source)) as engine,
        pytest.raises(PromptTooLongError, match=remedy),
    ):
        engine.prepare("x" * 1000)


@pytest.fixture(scope="module")
def artifact(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recommending(tiny, tmp_path_factory.mktemp("model") / "artifact", MODELS)


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Iterator[Engine]:
    with Engine(artifact, defaults=SamplingParams(top_k=3, regex="[a-z]+", stop="z")) as engine:
        yield engine
        assert_idle(engine)


def test_who_decides(engine: Engine) -> None:
    expected = ResolvedParams(
        max_new_tokens=9, temperature=0, top_p=0.5, top_k=3, regex="[a-z]+", stop=["z"]
    )
    assert engine.resolved() == engine.resolved(SamplingParams()) == expected
    given = SamplingParams(temperature=1, top_p=1.0, stop=[])
    assert engine.resolved(given) == replace(expected, temperature=1.0, top_p=1.0, stop=())
    assert engine.resolved(expected) is expected
    other = SamplingParams(ebnf='start: "a"')  # instead of the grammar of the engine
    assert engine.resolved(other) == replace(expected, regex=None, ebnf=other.ebnf)


def test_what_holds_is_used(engine: Engine) -> None:
    output = engine.generate(PROMPT)
    assert output.completion_tokens == 9 and output.text.isalpha()
    explicit = engine.resolved(SamplingParams())
    assert engine.generate(PROMPT, explicit).token_ids == output.token_ids
    assert [o.token_ids for o in engine.samples(PROMPT)] == [output.token_ids]
    assert [o.token_ids for o in engine.map([PROMPT], progress=False)] == [output.token_ids]
    sampled = {
        engine.generate(PROMPT, SamplingParams(temperature=1, top_k=-1, top_p=1, seed=seed)).text
        for seed in range(4)
    }
    assert len(sampled) > 1


def test_chats_too(engine: Engine) -> None:
    output = engine.chat([{"role": "user", "content": "hello"}])
    assert 0 < output.completion_tokens <= 9 and output.text.isalpha()


def test_scores_and_hints_are_not_touched(engine: Engine, tiny: TinyModel) -> None:
    engine.warm(PROMPT)
    with Engine(tiny.artifact) as plain:
        expected = plain.score(PROMPT, ["d", "ef"])
    found = engine.score(PROMPT, ["d", "ef"])
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"top_k": 3}, "defaults={'top_k': 3} must be SamplingParams"),
        (SamplingParams(min_new_tokens=10), "min_new_tokens=10 must be an integer from 0 to 9"),
    ],
)
def test_defaults_that_cannot_hold(artifact: Path, defaults: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Engine(artifact, defaults=defaults)
    assert message in str(caught.value)


def test_parameters_that_cannot_hold(engine: Engine) -> None:
    with pytest.raises(RequestError, match="min_new_tokens=10 must be an integer from 0 to 9"):
        engine.submit(PROMPT, SamplingParams(min_new_tokens=10))
    with pytest.raises(RequestError, match=r"params=\{'seed': 1\} must be SamplingParams"):
        engine.resolved({"seed": 1})  # type: ignore[arg-type]


Call = Callable[..., Any]


def collected(stream: Iterable[Any]) -> str:
    return "".join(stream)


async def acollected(stream: AsyncIterable[Any]) -> str:
    return "".join([delta async for delta in stream])


def run(make: Callable[..., Coroutine[Any, Any, Any]]) -> Call:
    return lambda *args, **options: asyncio.run(make(*args, **options))


def text_of(answer: Any) -> str:
    return str(getattr(answer, "text", answer))


def entry_points(engine: Engine) -> dict[str, Call]:
    """Each takes parameters as `params` or by name, and gives the text of an answer."""

    async def asubmit(*args: Any, **options: Any) -> Any:
        return await (await engine.asubmit(*args, **options)).result()

    async def astream(*args: Any, **options: Any) -> str:
        return await acollected(engine.astream(*args, **options))

    async def asubmit_chat(*args: Any, **options: Any) -> Any:
        return await (await engine.asubmit_chat(*args, **options)).result()

    async def astream_chat(*args: Any, **options: Any) -> str:
        return await acollected(engine.astream_chat(*args, **options))

    return {
        "submit": lambda *args, **options: engine.submit(*args, **options).result(),
        "generate": engine.generate,
        "generate a list": lambda prompt, *args, **options: engine.generate(
            [prompt], *args, **options
        )[0],
        "stream": lambda *args, **options: collected(engine.stream(*args, **options)),
        "samples": lambda *args, **options: engine.samples(*args, **options)[0],
        "map": lambda prompt, *args, **options: next(
            engine.map([prompt], *args, progress=False, **options)
        ),
        "agenerate": run(engine.agenerate),
        "asubmit": run(asubmit),
        "astream": run(astream),
        "asamples": lambda *args, **options: run(engine.asamples)(*args, **options)[0],
        "chat": engine.chat,
        "chat a list": lambda chat, *args, **options: engine.chat([chat], *args, **options)[0],
        "stream_chat": lambda *args, **options: collected(engine.stream_chat(*args, **options)),
        "submit_chat": lambda *args, **options: engine.submit_chat(*args, **options).result(),
        "achat": run(engine.achat),
        "asubmit_chat": run(asubmit_chat),
        "astream_chat": run(astream_chat),
    }


NAMES = list(entry_points(Engine.__new__(Engine)))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_by_name(engine: Engine, name: str) -> None:
    """In every entry point, which refuses them beside `params`, and names that are none."""
    call = entry_points(engine)[name]
    prompt: Any = [{"role": "user", "content": "a"}] if "chat" in name else PROMPT
    expected = text_of(call(prompt, SamplingParams(max_new_tokens=3, temperature=0.9, seed=1)))
    options = {"temperature": np.float64(0.9), "seed": np.int64(1)}
    assert text_of(call(prompt, max_new_tokens=3, **options)) == expected
    assert text_of(call(prompt, max_tokens=3, **options)) == expected
    assert 0 < len(expected) <= 3
    for wrong, message in (
        ({"params": SamplingParams(), "max_tokens": 3}, "max_tokens=3 beside params: give one"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "max_tokens and max_new_tokens: give one"),
        ({"temprature": 1}, "temprature=1: there is no such parameter; did you mean temperature?"),
        ({"image": []}, "image=[]: there is no such parameter; did you mean images?"),
        ({"started_at": 0.0}, "started_at=0.0: there is no such parameter"),
        ({"top_p": 2}, "top_p=2 must be"),
    ):
        with pytest.raises(RequestError) as caught:
            call(prompt, **wrong)
        assert message in str(caught.value)


def test_scores_by_name(engine: Engine) -> None:
    for score in (engine.score, run(engine.ascore)):
        assert len(score(PROMPT, ["d"], timeout=60, priority=np.int8(1))) == 1
        with pytest.raises(EngineError, match="scoring ended early: timeout"):
            score(PROMPT, ["d"], timeout=0.0)
        with pytest.raises(RequestError, match=r"timeout=1 beside params: give one of them"):
            score(PROMPT, ["d"], params=SamplingParams(), timeout=1)
        with pytest.raises(RequestError, match=r"image=\[\]: there is no such"):
            score(PROMPT, ["d"], image=[])


def test_lists_by_name(engine: Engine) -> None:
    """One mistake for all, and not one for each."""
    with pytest.raises(RequestError, match="seed=1 beside params: give one of them"):
        engine.generate([PROMPT] * 2, [SamplingParams()] * 2, seed=1, return_exceptions=True)
    with pytest.raises(RequestError, match="did you mean seed"):
        engine.generate([PROMPT] * 2, sed=1, return_exceptions=True)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="images is for one prompt"):
        engine.generate([PROMPT] * 2, images=[])  # type: ignore[call-overload]
    texts = [output.text for output in engine.generate([PROMPT] * 2, max_tokens=2)]
    assert texts[0] == texts[1] and len(texts[0]) == 2


def test_resolved_by_name(engine: Engine) -> None:
    assert engine.resolved(max_tokens=5) == engine.resolved(SamplingParams(max_new_tokens=5))
    with pytest.raises(RequestError, match="images="):
        engine.resolved(images=[])  # type: ignore[call-arg]


def test_token_ids_of_numpy(engine: Engine) -> None:
    ids = np.array([5, 6, 7])
    output = engine.generate(list(ids), max_tokens=3)
    assert engine.generate(ids.tolist(), max_tokens=3).token_ids == output.token_ids
    prepared = engine.prepare(list(ids))
    assert {type(token) for token in prepared.ids} == {int}


def test_numbers_of_numpy_as_options(tiny: TinyModel) -> None:
    with Engine(
        tiny.artifact, kv_pages=np.int64(8), image_memory=np.int32(0), prefill_tokens=np.int64(16),
        max_running=np.array(2), jump_forward=np.bool_(True), allow_urls=np.bool_(False),
    ) as engine:  # fmt: skip
        stats = engine.stats()
        assert (stats["pages_total"], stats["prefill_tokens"], stats["max_running"]) == (8, 16, 2)
    with Engine(tiny.artifact, kv_memory=np.int64(1 << 20)) as engine:
        assert engine.stats()["pages_total"] > 8
    for option, value in (
        ("kv_pages", np.float64(8)), ("max_running", np.int64(0)), ("allow_urls", 1),
        ("kv_memory", np.float64(1e9)),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"{option}="):
            Engine(tiny.artifact, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [{"top_p": 7}, {"temperature": "hot"}, {"surprise": 1}, [], None], ids=str
)
def test_damaged_recommendations(tiny: TinyModel, tmp_path: Path, values: Any) -> None:
    folder = recommending(tiny, tmp_path / "artifact", values)
    with pytest.raises(CorruptFileError, match=r"artifact.json: not a manifest: .*compile the"):
        Engine(folder)


def test_sglang_programs_keep_sglangs_values(artifact: Path) -> None:
    """128 tokens drawn from all of them, and not the model's nine best ones."""

    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("out")

    with sgl.ShortfinLocal(artifact) as backend:
        states = [
            program.run(backend=backend.using(seed=seed), ignore_eos=True) for seed in range(2)
        ]
        assert len({state["out"] for state in states}) == 2
        assert {s.get_meta_info("out")["completion_tokens"] for s in states} == {128}


def test_the_command_takes_the_models_values(
    artifact: Path, tiny: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(folder: Path, *options: str) -> str:
        assert cli.main(["generate", str(folder), "--prompt", PROMPT, *options]) == 0
        return capsys.readouterr().out

    models = text(artifact)
    assert models == text(tiny.artifact, "--max-new-tokens", "9", "--temperature", "0")
    assert len(text(artifact, "--max-new-tokens", "2")) < len(models)
    assert cli.main(["inspect", str(artifact)]) == 0
    assert "temperature 0.0, top_p 0.5, top_k 7, max_new_tokens 9" in capsys.readouterr().out
