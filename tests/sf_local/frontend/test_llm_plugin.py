"""The plugin, with the real `llm`, on tiny models; transformers judges what they are asked."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from sf_local import Engine, SamplingParams
from sf_local.errors import SfLocalError
from sf_local.request.output import Output, ToolCall
from tests.support.pictures import picture, png
from tests.support.tiny import CI, SeeingModel, TinyModel

try:
    import llm
    from click.testing import CliRunner
    from llm.cli import cli

    plugin = import_module("sf_local.frontend.llm_plugin")
except ImportError:
    if CI:
        raise
    pytest.skip("llm is not installed", allow_module_level=True)

SHORT: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def user_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No other plugin, none of the user's settings, and no engine that is left."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    if not llm.plugins.pm.is_registered(plugin):
        llm.plugins.pm.register(plugin)
    yield tmp_path / "llm"
    for engine in plugin.engines.values():
        assert engine.stats()["running"] == engine.stats()["waiting"] == 0
        engine.shutdown()
    plugin.engines.clear()


def expected(tiny: TinyModel, turns: list[tuple[str, str]], **options: Any) -> str:
    """The answer to a conversation as transformers writes it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.artifact)
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = prompt.removeprefix(tokenizer.bos_token or "\0")
    with Engine(tiny.artifact) as engine:
        params = SamplingParams(**{"max_new_tokens": 6, "temperature": 0, **options})
        return engine.generate(prompt, params).text


def test_the_entry_point() -> None:
    project = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text())
    assert project["project"]["entry-points"]["llm"] == {"sf-local": plugin.__name__}


@pytest.mark.parametrize("stream", [True, False])
def test_a_conversation(tiny: TinyModel, stream: bool) -> None:
    conversation = llm.get_model(f"sf:{tiny.artifact}").conversation()
    first = conversation.prompt("hello", system="short", stream=stream, **SHORT)
    turns = [("system", "short"), ("user", "hello")]
    assert first.text() == expected(tiny, turns)
    second = conversation.prompt("again", stream=stream, **SHORT)
    turns += [("assistant", first.text()), ("user", "again")]
    assert second.text() == expected(tiny, turns)
    usage = second.usage()
    assert usage.output == 6 and usage.details["cached_tokens"] > 0
    assert usage.input > first.usage().input and second.json() == {"finish_reason": "length"}


def test_asyncio(tiny: TinyModel) -> None:
    model = llm.get_async_model(f"sf:{tiny.artifact}")

    async def ask(text: str, **options: Any) -> tuple[str, str]:
        response = model.prompt(text, **SHORT, **options)
        return "".join([delta async for delta in response]), await response.text()

    async def both() -> list[tuple[str, str]]:
        return await asyncio.gather(ask("hello"), ask("other", stream=False))

    for (streamed, whole), text in zip(asyncio.run(both()), ("hello", "other"), strict=True):
        assert streamed == whole == expected(tiny, [("user", text)])


def test_a_schema(tiny: TinyModel) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    model = llm.get_model(f"sf:{tiny.artifact}")
    response = model.prompt("hello", schema=schema, device="cpu", seed=1)
    jsonschema.validate(json.loads(response.text()), schema)
    assert response.json() == {"finish_reason": "stop"}
    with pytest.raises(SfLocalError, match="regex"):
        model.prompt("hello", schema=schema, regex="a", device="cpu").text()


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5, "temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.5, "frequency_penalty": 1, "presence_penalty": 1},
        {"regex": "ab{2}c", "stop": "bc"},
        {"ebnf": 'root ::= "yes"'},
        {"logit_bias": {"65": 9000}, "stop_token_ids": [65], "ignore_eos": True},
    ],
)
def test_options(tiny: TinyModel, options: dict[str, Any]) -> None:
    """As Python values and, for values of JSON, as the text that the command is given."""
    model = llm.get_model(f"sf:{tiny.artifact}")
    params = dict(options)
    if "logit_bias" in params:
        params["logit_bias"] = {65: 9000}
    if "stop" in params:
        params["stop"] = [params["stop"]]
    wanted = expected(tiny, [("user", "hello")], **params)
    texts = {
        name: json.dumps(value) if isinstance(value, dict | list | bool) else str(value)
        for name, value in options.items()
    }
    for given in (options, texts):
        assert model.prompt("hello", **(SHORT | given)).text() == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"unknown": 1}, "unknown"),
        ({"stop_token_ids": "1,2"}, "stop_token_ids"),
    ],
)
def test_bad_options(tiny: TinyModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises((SfLocalError, ValueError), match=message):
        llm.get_model(f"sf:{tiny.artifact}").prompt("hello", **options).text()


def test_an_answer_that_nobody_reads_ends(tiny: TinyModel) -> None:
    """Both kinds; the fixture waits for none that runs."""
    options = {"max_new_tokens": 200, "temperature": 0, "device": "cpu", "ignore_eos": True}
    stream = iter(llm.get_model(f"sf:{tiny.artifact}").prompt("hello", **options))
    next(stream)
    stream.close()  # type: ignore[attr-defined]

    async def begin() -> None:
        model = llm.get_async_model(f"sf:{tiny.artifact}")
        async for _ in model.prompt("hello", **options):
            break

    asyncio.run(begin())  # closes what is left
    [engine] = plugin.engines.values()
    engine.generate("x", SamplingParams(max_new_tokens=1))  # the steps before this one are done


def test_images(make_seeing: Callable[..., SeeingModel], tiny: TinyModel) -> None:
    artifact = make_seeing("idefics3").artifact
    image, other = (
        llm.Attachment(type="image/png", content=png(picture(64, 48, seed))) for seed in (0, 1)
    )
    conversation = llm.get_model(f"sf:{artifact}").conversation()
    first = conversation.prompt("what is it?", attachments=[image], **SHORT)
    blind = conversation.model.prompt("what is it?", **SHORT)
    assert first.text() and first.usage().input > blind.usage().input
    two = [
        conversation.model.prompt("which?", attachments=images, **SHORT).text()
        for images in ([image, other], [other, image])
    ]
    with Engine(artifact) as engine:
        content = [
            {"type": "image", "image": image.content},
            {"type": "image", "image": other.content},
            {"type": "text", "text": "which?"},
        ]
        params = SamplingParams(max_new_tokens=6, temperature=0)
        assert engine.chat([{"role": "user", "content": content}], params).text == two[0] != two[1]
    second = conversation.prompt("and now?", **SHORT)
    assert second.text() and second.usage().details["cached_tokens"] > blind.usage().input
    with pytest.raises(SfLocalError, match="text model"):
        llm.get_model(f"sf:{tiny.artifact}").prompt("x", attachments=[image], **SHORT).text()
    with pytest.raises(ValueError, match="attachments of type"):
        sound = llm.Attachment(type="audio/wav", content=b"x")
        conversation.prompt("x", attachments=[sound], **SHORT)


def test_tools(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """`llm` runs the calls, and the model is shown the results; a model without tools refuses."""

    def upper(text: str) -> str:
        """Upper case."""
        return text.upper()

    model = llm.get_model(f"sf:{tiny.artifact}")
    with pytest.raises(SfLocalError, match="tools"):
        model.prompt("hello", tools=[upper], **SHORT).text()
    call = ToolCall("abcdefghi", "upper", {"text": "x"})
    outputs = [output("", [call]), output("X", [])]
    asked: list[tuple[Any, Any]] = []

    class Caller:
        """An engine that calls the tool, then answers."""

        max_tokens = 8

        def submit_chat(self, messages: Any, params: Any, tools: Any) -> Any:
            asked.append((messages, tools))
            return Answer(outputs.pop(0))

    monkeypatch.setattr(plugin, "open_engine", lambda source, device: Caller())
    assert model.chain("hello", tools=[upper]).text() == "X"
    [first, [tool]], [second, _] = asked
    assert tool["function"] == {
        "name": "upper",
        "description": "Upper case.",
        "parameters": {
            "properties": {"text": {"type": "string"}}, "required": ["text"], "type": "object",
        },
    }  # fmt: skip
    assert second[: len(first)] == first
    assistant, result = second[len(first) :]
    [asked_for] = assistant["tool_calls"]
    assert asked_for["function"] == {"name": "upper", "arguments": {"text": "x"}}
    assert result["content"] == "X" and result["tool_call_id"] == asked_for["id"] == call.id


def output(text: str, calls: list[ToolCall]) -> Output:
    return Output(text, [], "stop", None, 1, 1, 0, 0.0, 0.0, tool_calls=calls)


class Answer(list[str]):
    """A handle of an answer that is there."""

    def __init__(self, output: Output) -> None:
        super().__init__([output.text])
        self.output = output

    def result(self) -> Output:
        return self.output


def command(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command(tiny: TinyModel) -> None:
    """A path, a conversation that goes on, an alias, and a default."""
    name, letters = f"sf:{tiny.artifact}", "[a-z]{9}"
    given = (SHORT | {"regex": letters}).items()
    options = [part for key, value in given for part in ("-o", key, str(value))]
    first = command("prompt", "-m", name, "hello", *options)
    assert first == expected(tiny, [("user", "hello")], regex=letters) + "\n"
    turns = [("user", "hello"), ("assistant", first.strip()), ("user", "again")]
    assert command("prompt", "-c", "again", *options) == expected(tiny, turns, regex=letters) + "\n"
    command("aliases", "set", "mine", name)
    assert command("prompt", "-m", "mine", "hello", *options) == first
    command("models", "default", name)
    assert command("prompt", "hello", *options) == first
    assert "sf:demo" in (shown := command("models")) and "mine" in shown


def test_mistakes_are_one_line(tiny: TinyModel, tmp_path: Path) -> None:
    """In a process of its own, which ends well with an engine open."""
    program = """
import sys
from sf_local.frontend import llm_plugin
import llm, llm.cli
llm.plugins.pm.register(llm_plugin)
llm.cli.cli(sys.argv[1:])
"""

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", program, "prompt", *arguments],
            capture_output=True, text=True, timeout=100, cwd=tmp_path, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("-m", "sf:nothing.gguf", "hello")
    assert (code, out) == (1, "") and err.startswith("Error: source 'nothing.gguf': not found")
    code, out, err = run("-m", f"sf:{tiny.artifact}", "hello", "-o", "max_new_tokens", "3")
    assert (code, err) == (0, "") and out
