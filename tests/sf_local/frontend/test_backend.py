"""ShortfinLocal under SGLang's own interpreter, on a tiny model."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.choices import ChoicesSamplingMethod
from sglang.lang.ir import SglSamplingParams

import sf_local
from sf_local.errors import ChatTemplateError, RequestError
from sf_local.frontend.backend import to_params
from sf_local.request.params import ResolvedParams
from tests.support.answers import assert_drawn
from tests.support.sglang_state import error_of
from tests.support.tiny import TinyModel


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


def failure(program: Any, backend: sf_local.ShortfinLocal, **arguments: Any) -> Exception:
    """What SGLang keeps when a program fails; nothing may be left of it in the engine."""
    with pytest.warns(UserWarning, match="stream_executor"):
        error = error_of(program.run(backend=backend, **arguments))
    assert isinstance(error, Exception)
    backend.flush_cache()
    stats = backend.engine.stats()
    assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)
    return error


def test_it_is_a_class(backend: sf_local.ShortfinLocal) -> None:
    assert isinstance(backend, BaseBackend) and isinstance(sgl.ShortfinLocal, type)
    assert sgl.ShortfinLocal is sf_local.ShortfinLocal
    assert backend.endpoint is backend  # SGLang swaps a backend for its endpoint
    view = backend.using(seed=1)
    assert view.endpoint is view


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
    backend.flush_cache()
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
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"min_p": 2}, "min_p=2"),
        ({"frequency_penalty": 3}, "frequency_penalty=3"),
        ({"presence_penalty": -3}, "presence_penalty=-3"),
        ({"n": 0}, "n=0"),
        ({"min_tokens": 5}, "min_new_tokens=5 must be an integer from 0 to 4"),
        ({"stop": [3]}, r"stop=\[3\]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1"),
        ({"return_logprob": True, "logprob_start_len": 3}, "logprob_start_len=3"),
        ({"return_logprob": True, "top_logprobs_num": 301}, "top_logprobs_num=301"),
        ({"dtype": list}, "dtype=<class 'list'> must be int, float, str or bool"),
        ({"dtype": "date"}, "dtype='date' must be int, float, str or bool"),
        ({"dtype": int, "regex": "a"}, "dtype and regex"),
        ({"dtype": int, "json_schema": "{}"}, "dtype and json_schema"),
        ({"regex": "a", "json_schema": "{}"}, "regex and json_schema"),
        ({"regex": "(?=a)b"}, "regex='"),
        ({"json_schema": "{"}, "json_schema='{'"),
        ({"choices": ["a", ""]}, r"choices\[1\]='' adds no token"),
        ({"choices": ["a", 3]}, "must be a list of str"),
        ({"choices": ["a", "b" * 500]}, "leave no room"),
        ({"choices": ["a", "b"], "temperature": 0.5}, "temperature=0.5: choices are scored"),
        ({"choices": ["a", "b"], "temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    backend: sf_local.ShortfinLocal, arguments: dict[str, Any], message: str
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("out", **{"max_tokens": 4} | arguments)

    error = failure(program, backend)
    with pytest.raises(RequestError, match=message):
        raise error


def test_choices_need_text_before_them(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.select("out", ["a", "b"])

    error = failure(program, backend)
    assert isinstance(error, RequestError) and "'a' has no text before it" in str(error)


def test_no_choices(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.select("out", [])

    assert isinstance(failure(program, backend), RequestError)


def test_images_are_an_error(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def look(s: Any, **rest: Any) -> None:
        s += sgl.user(sgl.image(b"not even a picture") + "what is it?")
        s += sgl.assistant(sgl.gen("out", **rest))

    for arguments in {"max_tokens": 4}, {"choices": ["a", "b"]}:
        error = failure(look, backend, **arguments)
        assert isinstance(error, RequestError) and "is a text model" in str(error)


@pytest.mark.parametrize(
    "method",
    [
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    ],
)
def test_select_by_each_method(
    backend: sf_local.ShortfinLocal, method: ChoicesSamplingMethod
) -> None:
    """The decision and SGLang's meta info are those of the method, given the engine's scores."""
    choices = ["red", "green", "re"]

    @sgl.function
    def program(s: Any) -> None:
        s += "colour: " + sgl.select("out", choices, choices_method=method) + "!"

    state = program.run()
    assert state.error() is None
    assert state.text() == f"colour: {state['out']}!"
    scores = backend.engine.score("colour: ", choices, unconditional=True)
    given = [list(zip(s.logprobs, s.token_ids, strict=True)) for s in scores]
    alone = [list(zip(s.unconditional or (), s.token_ids, strict=True)) for s in scores]
    expected = method(
        choices=choices,
        normalized_prompt_logprobs=[score.mean for score in scores],
        input_token_logprobs=given,
        output_token_logprobs=[[], [], []],
        unconditional_token_logprobs=alone,
    )
    meta = state.get_meta_info("out")
    assert state["out"] == expected.decision
    assert meta.keys() == expected.meta_info.keys()
    assert meta["normalized_prompt_logprobs"] == pytest.approx(
        expected.meta_info["normalized_prompt_logprobs"], abs=1e-4
    )
    assert [text for _, _, text in meta["input_token_logprobs"][0]] == ["r", "e", "d"]


def test_several_answers(backend: sf_local.ShortfinLocal, tiny: TinyModel) -> None:
    """The variable is a list, and the program goes on with the first."""

    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("out", max_tokens=6, n=2, ignore_eos=True, return_logprob=True)
        s += sgl.gen("next", max_tokens=2, ignore_eos=True)

    state = program.run(backend=backend.using(seed=1))
    first, second = state["out"]
    assert first != second
    assert state.text() == "abc" + first + state["next"]
    infos = state.get_meta_info("out")
    assert [info["completion_tokens"] for info in infos] == [6, 6]
    for i, info in enumerate(infos):
        ids = [token for _, token, _ in info["output_token_logprobs"]]
        assert_drawn(tiny, backend.engine.encode("abc"), ids, seed=1 + i)


def test_several_answers_cannot_stream(backend: sf_local.ShortfinLocal) -> None:
    error = failure(plain, backend, max_tokens=4, n=2, stream=True)
    assert isinstance(error, RequestError) and "n=2: a stream is one text" in str(error)


def test_logprobs_in_sglangs_shapes(backend: sf_local.ShortfinLocal) -> None:
    def meta(**rest: Any) -> dict[str, Any]:
        state = plain.run(
            max_tokens=2, temperature=0, ignore_eos=True, return_logprob=True,
            logprob_start_len=0, top_logprobs_num=2, **rest,
        )  # fmt: skip
        return dict(state.get_meta_info("out"))

    bare, texts = meta(), meta(return_text_in_logprobs=True)
    a, b, c = backend.engine.encode("abc")
    assert bare["input_token_logprobs"][0] == (None, a, None)
    assert texts["input_token_logprobs"][0] == (None, a, "a")
    assert [entry[1:] for entry in texts["input_token_logprobs"]] == [(a, "a"), (b, "b"), (c, "c")]
    assert all(value < 0 for value, _, _ in bare["input_token_logprobs"][1:])
    assert bare["input_top_logprobs"][0] is None
    tops = bare["input_top_logprobs"][1:] + bare["output_top_logprobs"]
    assert [len(top) for top in tops] == [2] * 4
    assert all(better[0] >= worse[0] for better, worse in tops)
    assert [top[0] for top in bare["output_top_logprobs"]] == bare["output_token_logprobs"]
    answer = "".join(text for _, _, text in texts["output_token_logprobs"])
    assert answer == plain.run(max_tokens=2, temperature=0, ignore_eos=True)["out"]


def test_logprobs_of_a_stream_come_last(backend: sf_local.ShortfinLocal) -> None:
    arguments = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_logprob": True}
    whole = plain.run(**arguments).get_meta_info("out")
    state = plain.run(**arguments, stream=True)
    assert "".join(state.text_iter("out"))
    assert state.get_meta_info("out")["output_token_logprobs"] == whole["output_token_logprobs"]


@pytest.mark.parametrize("dtype", [int, float, str, bool, "int", "float", "str", "bool"])
def test_dtype(backend: sf_local.ShortfinLocal, dtype: type | str) -> None:
    """A random model may write numbers and strings for ever; it is pushed towards their ends."""
    ends = backend.engine.encode('" \n')
    ending = backend.using(logit_bias=dict.fromkeys(ends, 9.0))
    state = plain.run(dtype=dtype, max_tokens=200, temperature=0, backend=ending)
    assert state.error() is None
    name = dtype.__name__ if isinstance(dtype, type) else dtype
    assert type(ast.literal_eval(state["out"])).__name__ == name
    assert state.get_meta_info("out")["finish_reason"]["type"] == "stop"


def test_trace(backend: sf_local.ShortfinLocal) -> None:
    """A traced program has the text of the model's template, and computes nothing."""
    state = chat.run(question="why?")
    text, answer = state.text(), state["answer"]
    before = backend.engine.stats()["prompt_tokens"]
    tracer = chat.trace(question="why?", backend=backend)
    nodes = tracer.flatten_nodes()
    assert "".join(getattr(node, "value", answer) for node in nodes) == text
    assert list(tracer.variables) == ["answer"]
    assert backend.engine.stats()["prompt_tokens"] == before


def test_bind(backend: sf_local.ShortfinLocal) -> None:
    assert chat.bind(question="why?").run()["answer"] == chat.run(question="why?")["answer"]


def test_cache(tiny: TinyModel) -> None:
    """What a program begins with, whatever its arguments, is computed before it runs."""
    beginning = "what every run of this program begins with, and that is not so very short "

    @sgl.function
    def program(s: Any, end: str) -> None:
        s += beginning
        s += end
        s += sgl.gen("out", max_tokens=2)

    with sgl.ShortfinLocal(vmfb=tiny.artifact) as backend:
        program.cache(backend)
        state = program.run(end="so", backend=backend)
        assert state.get_meta_info("out")["cached_tokens"] >= len(beginning) // 8 * 8


def test_join_gathers_variables(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "root "
        forks = s.fork(3)
        forks += lambda i: f"{i}:" + sgl.gen("x", max_tokens=4, temperature=0, ignore_eos=True)
        forks.join()
        s += "end"

    state = program.run()
    assert state.error() is None and state.text() == "root end"
    params = sf_local.SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
    alone = [backend.engine.generate(f"root {i}:", params).text for i in range(3)]
    assert state["x"] == alone


def test_join_appends_texts(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "root "
        forks = s.fork(3)
        forks += lambda i: f"<{i}>"
        forks.join("concate_and_append")
        s += sgl.gen("out", max_tokens=4)

    state = program.run()
    assert state.error() is None
    assert state.text() == "root <0><1><2>" + state["out"]


def test_separate_reasoning(backend: sf_local.ShortfinLocal) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("why?")
        answer = sgl.gen("answer", regex="<think>[ab]{3}</think>[cd]{2}", max_tokens=40)
        s += sgl.assistant(sgl.separate_reasoning(answer, model_type="deepseek-r1"))

    state = program.run()
    assert state.error() is None
    assert set(state["answer_reasoning_content"]) <= set("ab")
    assert len(state["answer"]) == 2 and set(state["answer"]) <= set("cd")
    assert "think" not in state.text()


def test_server_info(backend: sf_local.ShortfinLocal, tiny: TinyModel) -> None:
    info = sgl.get_server_info(backend)
    assert info["model_path"] == backend.get_model_name()
    assert info["artifact"] == str(tiny.artifact)
    assert info["max_total_num_tokens"] == backend.engine.max_tokens
    assert info["pages_used"] == 0 and info["pages_total"] > 0
    assert sgl.get_server_info() == info  # of the default backend


def test_flush_cache(backend: sf_local.ShortfinLocal) -> None:
    plain.run(max_tokens=16, ignore_eos=True).sync()
    assert backend.engine.stats()["pages_cached"] > 0
    sgl.flush_cache()
    assert backend.engine.stats()["pages_cached"] == 0


def test_token_usage(backend: sf_local.ShortfinLocal) -> None:
    """Of generations, samples and choices, whichever view of the backend they ran on."""
    usage = backend.token_usage
    backend.flush_cache()
    usage.reset()
    plain.run(max_tokens=5, ignore_eos=True, backend=backend.using(seed=1)).sync()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 5, 0)
    plain.run(max_tokens=5, ignore_eos=True, n=3).sync()
    assert (usage.prompt_tokens, usage.completion_tokens) == (12, 20)
    plain.run(choices=["d", "ef"]).sync()
    assert (usage.prompt_tokens, usage.completion_tokens) == (12 + 4 + 5, 20)
    usage.reset()
    assert usage.prompt_tokens == usage.completion_tokens == usage.cached_tokens == 0


def test_unset_values_mean_defaults() -> None:
    """A bare SglSamplingParams has (None,) in three fields; speculation passes stop=None."""
    bare = SglSamplingParams()
    bare.stop = None  # type: ignore[assignment]
    assert to_params(bare, sf_local.SamplingParams()) == ResolvedParams()


def test_what_a_newer_sglang_asks_for_is_refused() -> None:
    newer = SglSamplingParams()
    newer.stop_regex = ""  # type: ignore[attr-defined]
    assert to_params(newer, sf_local.SamplingParams()) == ResolvedParams()
    newer.stop_regex = "a+"  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match=r"stop_regex='a\+' is not supported"):
        to_params(newer, sf_local.SamplingParams())


def test_defaults_carry_what_sglang_cannot(tiny: TinyModel) -> None:
    """A seed for the backend, another inside `using`, and a timeout; SGLang's own values win."""

    def text(backend: Any) -> str:
        return str(
            plain.run(max_tokens=12, ignore_eos=True, temperature=1.0, backend=backend)["out"]
        )

    defaults = sf_local.SamplingParams(seed=1, temperature=0.0)
    with sgl.ShortfinLocal(vmfb=tiny.artifact, defaults=defaults) as seeded:
        text(seeded)  # from here on, all begin with the same cached pages
        first = text(seeded)
        assert text(seeded) == first
        assert text(seeded.using(seed=2)) != first
        assert text(seeded.using(seed=1)) == text(seeded) == first
        state = plain.run(max_tokens=12, backend=seeded.using(timeout=0.0))
        assert state.get_meta_info("out")["finish_reason"] == {"type": "timeout"}
        with pytest.raises(RequestError, match=r"sead=3.*did you mean seed\?"):
            seeded.using(sead=3)


def test_hints_warm_the_cache(tiny: TinyModel) -> None:
    with sgl.ShortfinLocal(vmfb=tiny.artifact) as backend:
        backend.cache_prefix("a common beginning of it all")
        backend.cache_prefix("")  # hints never raise
        backend.cache_prefix("x" * 10_000)
        state = plain.run(max_tokens=2, temperature=0, ignore_eos=True, backend=backend)
        assert state.error() is None and state["out"]
        output = backend.engine.generate(
            "a common beginning of it all: yes", sf_local.SamplingParams(max_new_tokens=2)
        )
        assert output.cached_tokens >= 24


def test_speculation_asks_once(backend: sf_local.ShortfinLocal) -> None:
    """`num_api_spec_tokens`: what the model writes past a stop is kept for the next `gen`."""

    def write(s: Any) -> None:
        s += "abc" + sgl.gen("a", max_tokens=4, temperature=0, stop=stop, ignore_eos=True)
        s += stop + sgl.gen("b", max_tokens=4, temperature=0, stop="#", ignore_eos=True)

    free = plain.run(max_tokens=32, temperature=0, ignore_eos=True)["out"]
    stop = free[3]
    backend.token_usage.reset()
    state = sgl.function(write, num_api_spec_tokens=32).run()
    assert state.error() is None
    assert state["a"] == free[: free.index(stop)]
    assert state.text() == "abc" + free[: len(state.text()) - 3]
    assert backend.token_usage.prompt_tokens == 3
    assert sgl.function(write).run().error() is None
    assert backend.token_usage.prompt_tokens > 6


def test_a_base_model_has_no_roles(tiny: TinyModel, tmp_path: Any) -> None:
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
            error = error_of(chat.run(question="why?", backend=base))
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


def test_it_is_there_without_importing_sglang_first() -> None:
    program = "import sf_local; mine = sf_local.ShortfinLocal; import sglang; "
    program += "assert sglang.ShortfinLocal is mine"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": {"a": 1}}, "choices={'a': 1} must be a list"),
        ({"choices": ["a"], "temperature": -5}, "temperature=-5"),
        ({"choices": ["a"], "temperature": "x"}, "temperature='x'"),
        ({"choices": ["a"], "choices_method": 5}, "choices_method=5"),
        ({"logprob_start_len": "x"}, "logprob_start_len='x'"),
        ({"top_logprobs_num": -5}, "top_logprobs_num=-5"),
        ({"return_text_in_logprobs": "q"}, "return_text_in_logprobs='q'"),
        ({"stop_token_ids": 5}, "stop_token_ids=5"),
    ],
)
def test_nonsense_is_named(
    backend: sf_local.ShortfinLocal, arguments: dict[str, Any], message: str
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("out", **arguments)

    with pytest.warns(UserWarning, match="stream_executor"):
        error = error_of(program.run())
    assert isinstance(error, RequestError) and message in str(error)


def test_defaults_are_checked_and_their_stops_added(
    tiny: TinyModel, backend: sf_local.ShortfinLocal
) -> None:
    with pytest.raises(RequestError, match=r"defaults=\{'seed': 1\} must be SamplingParams"):
        sgl.ShortfinLocal(vmfb=tiny.artifact, defaults={"seed": 1})
    defaults = sf_local.SamplingParams(stop=["a"], stop_token_ids=[5])
    params = to_params(SglSamplingParams(stop="b", stop_token_ids=[6]), defaults)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (5, 6))
