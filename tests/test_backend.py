"""ShortfinLocal under SGLang's own interpreter, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from conftest import TinyModel
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.ir import SglSamplingParams

import sf_local
from sf_local.backend import to_params
from sf_local.errors import ChatTemplateError, RequestError


@pytest.fixture(scope="module")
def backend(tiny: TinyModel) -> Iterator[sf_local.ShortfinLocal]:
    with sgl.ShortfinLocal(vmfb=tiny.artifact, device="cpu") as backend:
        sgl.set_default_backend(backend)
        yield backend
        stats = backend.engine.stats()
        assert stats["pages_used"] == 0


@sgl.function
def chat(s: Any, question: str, **rest: Any) -> None:
    s += sgl.system("short")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=16, temperature=0, ignore_eos=True, **rest))


@sgl.function
def plain(s: Any, **rest: Any) -> None:
    s += "abc"
    s += sgl.gen("out", **rest)


def test_it_is_a_class(backend: sf_local.ShortfinLocal) -> None:
    assert isinstance(backend, BaseBackend) and isinstance(sgl.ShortfinLocal, type)
    assert sgl.ShortfinLocal is sf_local.ShortfinLocal
    assert not hasattr(backend, "endpoint")  # sglang would swap the backend for it


def test_chat_renders_the_models_own_template(backend: sf_local.ShortfinLocal) -> None:
    state = chat.run(question="why?")
    assert state.error() is None
    text, answer = state.text(), state["answer"]
    expected = backend.get_chat_template()
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "why?"}]
    prompt = expected.get_prompt(messages)
    prefix, suffix = expected.get_prefix_and_suffix("assistant", messages)
    assert text == prompt + prefix + answer + suffix
    direct = backend.engine.generate(
        prompt + prefix,
        sf_local.SamplingParams(
            max_new_tokens=16, temperature=0, ignore_eos=True, stop=expected.stop_str
        ),
    )
    assert direct.text == answer


def test_meta_info(backend: sf_local.ShortfinLocal) -> None:
    state = plain.run(max_tokens=5, temperature=0, ignore_eos=True)
    meta = state.get_meta_info("out")
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 5, 0)
    assert 0 < meta["time_to_first_token"] <= meta["e2e_latency"]


def test_streaming_gives_the_same_text(backend: sf_local.ShortfinLocal) -> None:
    whole = chat.run(question="why?")["answer"]
    state = chat.run(question="why?", stream=True)
    assert "".join(state.text_iter("answer")) == whole
    executor = state.stream_executor
    pieces = list(backend.generate_stream(executor, SglSamplingParams(max_new_tokens=8)))
    finished = [meta["finish_reason"] is not None for _, meta in pieces]
    assert finished == [False] * (len(pieces) - 1) + [True]


def test_stop_is_trimmed(backend: sf_local.ShortfinLocal) -> None:
    free = plain.run(max_tokens=40, temperature=0, ignore_eos=True)["out"]
    stop = free[10:12]
    for value in (stop, [stop], (stop, stop)):
        state = plain.run(max_tokens=40, temperature=0, ignore_eos=True, stop=value)
        assert state["out"] == free[: free.index(stop)]
        assert state.get_meta_info("out")["finish_reason"] == {"type": "stop", "matched": stop}


def test_forks_and_batches(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def forked(s: Any) -> None:
        s += "root "
        forks = s.fork(3)
        for i, fork in enumerate(forks.states):
            fork += f"{i}:" + sgl.gen("x", max_tokens=6, temperature=0, ignore_eos=True)
        s += "|".join(fork["x"] for fork in forks.states)

    alone = forked.run().text()
    assert alone.count("|") >= 2
    rows = [{"question": str(i)} for i in range(100)]
    answers = [state["answer"] for state in chat.run_batch(rows)]
    assert answers[:3] == [chat.run(question=str(i))["answer"] for i in range(3)]
    assert forked.run().text() == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"regex": "a+"}, "regex='a\\+' is not supported yet"),
        ({"dtype": int}, "dtype"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"n": 2}, "n=2"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"min_p": 0.5}, "min_p"),
        ({"min_tokens": 5}, "min_new_tokens"),
        ({"return_logprob": True}, "return_logprob"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    backend: sf_local.ShortfinLocal, arguments: dict[str, Any], message: str
) -> None:
    """SGLang keeps the exception; nothing is generated."""
    with pytest.warns(UserWarning, match="stream_executor"):
        state = plain.run(max_tokens=4, **arguments)
        error = state.error()
    assert isinstance(error, RequestError)
    with pytest.raises(RequestError, match=message):
        raise error


def test_choices_are_an_error(backend: sf_local.ShortfinLocal) -> None:
    with pytest.warns(UserWarning, match="stream_executor"):
        state = plain.run(choices=["a", "b"])
        assert isinstance(state.error(), RequestError)


def test_unset_values_mean_defaults() -> None:
    """A bare SglSamplingParams has (None,) in three fields; speculation passes stop=None."""
    bare = SglSamplingParams()
    bare.stop = None  # type: ignore[assignment]
    assert to_params(bare, sf_local.SamplingParams()) == sf_local.SamplingParams()


def test_defaults_carry_what_sglang_cannot(tiny: TinyModel) -> None:
    """A seed for the backend, another inside `using`, and a timeout; SGLang's own values win."""

    def text(backend: Any) -> str:
        return str(
            plain.run(max_tokens=12, ignore_eos=True, temperature=1.0, backend=backend)["out"]
        )

    defaults = sf_local.SamplingParams(seed=1, temperature=0.0)
    with sgl.ShortfinLocal(vmfb=tiny.artifact, defaults=defaults) as seeded:
        first = text(seeded)
        assert text(seeded) == first
        assert text(seeded.using(seed=2)) != first
        assert text(seeded.using(seed=1)) == text(seeded) == first
        state = plain.run(max_tokens=12, backend=seeded.using(timeout=0.0))
        assert state.get_meta_info("out")["finish_reason"] == {"type": "timeout"}
        with pytest.raises(TypeError):
            seeded.using(sead=3)


def test_hints_warm_the_cache(tiny: TinyModel) -> None:
    with sgl.ShortfinLocal(vmfb=tiny.artifact) as backend:
        backend.cache_prefix("a common beginning of it all")
        backend.cache_prefix("")  # hints never raise
        backend.cache_prefix("x" * 10_000)
        state = plain.run(max_tokens=2, backend=backend)
        assert state.error() is None and state["out"]
        output = backend.engine.generate(
            "a common beginning of it all: yes", sf_local.SamplingParams(max_new_tokens=2)
        )
        assert output.cached_tokens >= 24


def test_speculative_execution(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function(num_api_spec_tokens=32)
    def speculative(s: Any) -> None:
        s += "abc" + sgl.gen("a", max_tokens=4, temperature=0, stop="#")
        s += sgl.gen("b", max_tokens=4, temperature=0, stop="#")

    state = speculative.run()
    assert state.error() is None and state["a"]


def test_a_base_model_has_no_roles(tiny: TinyModel, tmp_path: Any) -> None:
    import json
    import shutil

    folder = shutil.copytree(tiny.artifact, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(folder / "tokenizer.json", tokenizer)
    with sgl.ShortfinLocal(vmfb=folder, tokenizer=tokenizer) as base:
        assert plain.run(max_tokens=3, backend=base)["out"]
        with pytest.warns(UserWarning, match="stream_executor"):
            error = chat.run(question="why?", backend=base).error()
        assert isinstance(error, ChatTemplateError) and "chat_template=" in str(error)
    with sgl.ShortfinLocal(vmfb=folder, tokenizer=tokenizer, chat_template="chatml") as chatml:
        assert chat.run(question="why?", backend=chatml).error() is None


def test_unknown_chat_template(tiny: TinyModel) -> None:
    with pytest.raises(ChatTemplateError, match="chat_template"):
        sgl.ShortfinLocal(vmfb=tiny.artifact, chat_template="no such one")


def test_model_name_is_where_the_tokenizer_lies(backend: sf_local.ShortfinLocal) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backend.get_model_name())
    assert tokenizer.encode("abc") == backend.engine.tokenizer.encode("abc")


@pytest.mark.parametrize("order", ["sf_local, sglang", "sglang, sf_local"])
def test_attaches_in_either_order(order: str) -> None:
    program = f"""
import {order.split(", ")[0]}
import {order.split(", ")[1]}
class Mine(sglang.ShortfinLocal):
    pass
from sglang.lang.backend.base_backend import BaseBackend
assert isinstance(sglang.ShortfinLocal, type) and issubclass(Mine, BaseBackend)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_import_is_light() -> None:
    program = """
import sys, sf_local
heavy = {"sglang", "transformers", "shortfin", "iree", "numpy", "tokenizers", "compile"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_engine_needs_no_sglang_or_compiler() -> None:
    program = """
import sys
from sf_local import Engine
heavy = {"sglang", "transformers", "torch", "iree", "compile", "jinja2"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
