"""Which parameters hold: a request's, the engine's, the model's, or those of sf_local."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl

from sf_local import Engine, SamplingParams, cli
from sf_local.artifact.manifest import MANIFEST
from sf_local.errors import CorruptFileError, RequestError
from sf_local.request.params import ResolvedParams
from tests.support.running import assert_idle
from tests.support.tiny import TinyModel

MODELS = {"temperature": 0.0, "top_p": 0.5, "top_k": 7, "max_new_tokens": 9}
PROMPT = "abc"


def recommending(tiny: TinyModel, folder: Path, values: Any) -> Path:
    """The artifact of a model that recommends these values."""
    shutil.copytree(tiny.artifact, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sampling_defaults": values}))
    return folder


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
