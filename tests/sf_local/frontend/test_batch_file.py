"""Batch files: read back by the openai package's types, and continued after every way to end."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from sf_local import Engine
from sf_local.cli import main
from sf_local.errors import RequestError
from sf_local.frontend.batch_file import run_batch
from tests.support.child import run_program
from tests.support.running import assert_idle
from tests.support.tiny import TinyModel

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{# <tool_call> #}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello!"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact, chat_template=TEMPLATE) as engine:
        yield engine
        assert_idle(engine)


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": HELLO, "max_tokens": 5} | body
    url = "/v1/chat/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def text(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": "abc", "max_tokens": 5} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write(file: Path, lines: list[Any]) -> Path:
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(written) + "\n")
    return file


def read(file: Path) -> dict[str, Any]:
    """Lines by id; each is there once."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["custom_id"] or line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def run(engine: Engine, folder: Path, lines: list[Any], **options: Any) -> dict[str, Any]:
    run_batch(engine, write(folder / "in.jsonl", lines), folder / "out.jsonl", **options)
    return read(folder / "out.jsonl")


def test_answers_are_openais(engine: Engine, tmp_path: Path) -> None:
    formats = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    lines = [
        chat("plain", temperature=0, seed=None, stop=["\n"]),
        chat("two", n=2, seed=5, temperature=1.0),
        chat("call", tools=[TOOL], tool_choice="required", max_tokens=150),
        chat("json", response_format=formats, max_completion_tokens=30, max_tokens=None),
        text("text", logit_bias={"5": -100}),
        text("ids", prompt=[5, 6, 7], ignore_eos=True),
        {"custom_id": "short", "prompt": "abc", "max_new_tokens": 4, "ignore_eos": True},
        {"messages": HELLO, "max_new_tokens": 3, "top_k": 5},
    ]
    found = run(engine, tmp_path, lines)
    assert len(found) == 8
    for key, line in found.items():
        assert line["error"] is None and line["response"]["status_code"] == 200, line
        body = line["response"]["body"]
        if body["object"] == "chat.completion":
            ChatCompletion.model_validate(body, strict=True)
        else:
            Completion.model_validate(body, strict=True)
        assert body["usage"]["total_tokens"] > body["usage"]["prompt_tokens"] > 0
        assert body["model"] == ("m" if key not in ("short", "batch_req_line_8") else "artifact")
    choices = {key: line["response"]["body"]["choices"] for key, line in found.items()}
    assert [choice["index"] for choice in choices["two"]] == [0, 1]
    assert choices["two"][0]["message"] != choices["two"][1]["message"]
    [call] = choices["call"]
    if call["finish_reason"] == "tool_calls":
        [*_, made] = call["message"]["tool_calls"]
        assert made["function"]["name"] == "now" and json.loads(made["function"]["arguments"]) == {}
    jsonschema.validate(json.loads(choices["json"][0]["message"]["content"]), SCHEMA)
    assert found["ids"]["response"]["body"]["usage"]["completion_tokens"] == 5
    assert found["short"]["response"]["body"]["usage"]["completion_tokens"] == 4


def test_what_is_wrong_with_a_line_is_its_own_error(engine: Engine, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "suffix: is not supported": text("a1", suffix="x"),
        "logprobs: is not supported": chat("a2", logprobs=True),
        "stream=true": chat("a3", stream=True),
        "url='/v1/embeddings'": chat("a4") | {"url": "/v1/embeddings"},
        "method='GET'": chat("a5") | {"method": "GET"},
        "more: is no field": chat("a6") | {"more": 1},
        "custom_id: is missing": {k: v for k, v in chat("a7").items() if k != "custom_id"},
        "custom_id=7 must be": chat("a8") | {"custom_id": 7},
        "another line has it": chat("good"),
        "temperature=-1": chat("a9", temperature=-1),
        "max_completion_tokens and max_tokens": chat("b1", max_completion_tokens=1),
        "messages: is missing": chat("b2", messages=None),
        "must be a dict": chat("b3", messages=[3]),
        "response_format=": chat("b4", response_format={"type": "xml"}),
        "tool_choice=": chat("b5", tool_choice="maybe"),
        "the schema of": chat("b6", tools=[TOOL | {"function": {"name": "now", "parameters": {
            "type": "object", "properties": {"a": {"not": {}}}}}}], tool_choice="required"),
        "is no JSON": "{",
        "is no JSON object": "[1]",
        "body=3": chat("b7") | {"body": 3},
        "n=0": chat("b8", n=0),
        "no room for an answer": text("b9", prompt="x" * 500),
        "logit_bias=": text("c1", logit_bias={"a": 1}),
        "parallel_tool_calls": chat("c2", parallel_tool_calls=False),
        "tools: is not supported": text("c3", tools=[TOOL]),
        "model=3": chat("c4", model=3),
    }  # fmt: skip
    source = write(tmp_path / "in.jsonl", [chat("good"), "", *wrong.values(), chat("last")])
    summary = run_batch(engine, source, tmp_path / "out.jsonl")
    assert (summary.answered, summary.failed) == (2, len(wrong))
    found = read(tmp_path / "out.jsonl")
    messages = [line["error"]["message"] for line in found.values() if line["error"]]
    for message in wrong:
        assert any(message in told for told in messages), message
    for line in found.values():
        if line["error"] is not None:
            assert line["response"]["status_code"] == 400
            assert line["response"]["body"]["error"]["message"] == line["error"]["message"]
    assert found["a9"]["error"]["code"] == "invalid_request"


def test_it_continues_where_it_stopped(engine: Engine, tmp_path: Path) -> None:
    lines = [text(f"id{n}", prompt=f"p{n}") for n in range(8)]
    first = run(engine, tmp_path, lines[:5])
    output = tmp_path / "out.jsonl"
    torn = output.read_bytes()
    output.write_bytes(torn + b'{"id": "half')
    found = run(engine, tmp_path, lines)
    assert len(found) == 8 and all(found[key] == line for key, line in first.items())
    before = output.read_bytes()
    assert run(engine, tmp_path, lines) == found and output.read_bytes() == before
    output.write_bytes(before[:-1])  # the last answer without its end
    assert len(run(engine, tmp_path, lines)) == 8


def test_errors_are_retried_on_demand(engine: Engine, tmp_path: Path) -> None:
    lines = [text("good"), text("bad", prompt="x" * 500)]
    run(engine, tmp_path, lines)
    lines[1] = text("bad", prompt="x")
    with pytest.raises(RequestError, match=r"1 lines have changed .* 'bad'"):
        run(engine, tmp_path, lines)
    found = run(engine, tmp_path, lines, retry_errors=True)
    assert found["bad"]["error"] is None and len(found) == 2
    assert {file.name for file in tmp_path.iterdir()} == {
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.state",
    }


def test_what_was_computed_from_something_else_is_refused(engine: Engine, tmp_path: Path) -> None:
    lines = [text("a"), text("b")]
    run(engine, tmp_path, lines)
    changed = [text("a", prompt="other"), text("b"), text("c")]
    with pytest.raises(RequestError, match="1 lines have changed"):
        run(engine, tmp_path, changed)
    assert len(run(engine, tmp_path, changed, force=True)) == 3
    state = json.loads((tmp_path / "out.jsonl.state").read_text())
    (tmp_path / "out.jsonl.state").write_text(json.dumps(state | {"model": "another"}))
    with pytest.raises(RequestError, match="answers of another model"):
        run(engine, tmp_path, [*changed, text("d")])
    assert len(run(engine, tmp_path, [*changed, text("d")], force=True)) == 4
    (tmp_path / "out.jsonl.state").write_text("{")
    with pytest.raises(RequestError, match="is missing or damaged"):
        run(engine, tmp_path, changed)
    (tmp_path / "out.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(RequestError, match=r"out\.jsonl:1 is no answer of a batch"):
        run(engine, tmp_path, changed)


def test_two_processes_on_one_output(engine: Engine, tmp_path: Path) -> None:
    program = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'ab')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out.jsonl")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(RequestError, match="is being written by another process"):
            run(engine, tmp_path, [text("a")])
        other.communicate("")
    assert len(run(engine, tmp_path, [text("a")])) == 1


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [("no.jsonl", "out", "no.jsonl cannot be read: No such file"),
     (".", "out", "cannot be read: Is a directory"),
     ("pipe", "out", "pipe is read twice, so it must be a file"),
     ("in.jsonl", "no/out", "no/out cannot be written: No such file")],
)  # fmt: skip
def test_files_that_cannot_be_used(
    engine: Engine, tmp_path: Path, source: str, output: str, message: str
) -> None:
    write(tmp_path / "in.jsonl", [text("a")])
    os.mkfifo(tmp_path / "pipe")
    held = os.open(tmp_path / "pipe", os.O_RDWR)  # so that it can be opened to read
    with pytest.raises(RequestError, match=message):
        run_batch(engine, tmp_path / source, tmp_path / output)
    os.close(held)


def test_an_argument_that_cannot_work(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="max_in_flight=0 must be an integer of at least 1"):
        run(engine, tmp_path, [text("a")], max_in_flight=0)


def test_common_beginnings_are_computed_once(tiny: TinyModel, tmp_path: Path) -> None:
    """In random order, with a pool that holds few of them."""
    preambles = [f"{name}{'preamble ' * 12}" for name in "abcdefgh"]
    lines = [text(f"{i}-{n}", prompt=f"{preambles[i]}{n}", max_tokens=1)
             for i in range(8) for n in range(12)]  # fmt: skip

    def computed(order: list[Any], folder: str) -> float:
        (tmp_path / folder).mkdir()
        with Engine(tiny.artifact, kv_pages=40) as engine:
            run(engine, tmp_path / folder, order, max_in_flight=4)
            stats = engine.stats()
            return stats["prompt_tokens"] - stats["cached_tokens"]

    in_order = computed(lines, "sorted")
    random.Random(1).shuffle(lines)
    assert computed(lines, "shuffled") <= 1.1 * in_order


def test_the_command(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [text("a"), text("b", prompt="x" * 500)])
    arguments = ["batch", str(tiny.artifact), str(source), "-o", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert re.search(r"2 new, \d+ tokens/s; in all 1 answered, 1 failed\nb: prompt: .*shorten", err)
    assert "--retry-errors" in err
    write(source, [text("a"), text("b")])
    assert main(arguments) == 1 and "have changed" in capsys.readouterr().err
    assert main([*arguments, "--retry-errors"]) == 0
    assert capsys.readouterr().err.startswith("1 new, ")
    assert main(arguments) == 0
    assert capsys.readouterr().err == "nothing left to do: 2 answered, 0 failed\n"
    write(source, [])
    assert main([*arguments[:-1], str(tmp_path / "none.jsonl")]) == 0
    assert capsys.readouterr().err == "no requests: 0 answered, 0 failed\n"


FULL = r"""
import resource, sys
from sf_local import Engine, errors, run_batch

def run():
    try:
        return run_batch(engine, *sys.argv[2:])
    except errors.RequestError as error:
        return error

with Engine(sys.argv[1]) as engine:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    print(run())
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(run())
"""


def test_an_output_without_room(tiny: TinyModel, tmp_path: Path) -> None:
    """Nothing is lost: there is room later, and the batch goes on."""
    source = write(tmp_path / "in.jsonl", [text(f"id{n}") for n in range(100)])
    output = tmp_path / "out.jsonl"
    failed, summary = run_program(FULL, tiny.artifact, source, output).splitlines()
    assert failed.startswith(f"{output} cannot be written: File too large; make room, and run")
    assert (
        re.fullmatch(r"Summary\(answered=100, failed=0, new=\d+\)", summary)
        and len(read(output)) == 100
    )


MANY = r"""
import resource, sys
from sf_local import Engine, run_batch

def count(result, params):
    ended.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

ended = []
with Engine(sys.argv[1], kv_pages=64, on_finish=count) as engine:
    run_batch(engine, sys.argv[2], sys.argv[3])
print(len(ended), ended[2000], ended[-1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_answers(tiny: TinyModel, tmp_path: Path) -> None:
    """What is kept of a line, such as its id, is there before the first one is answered."""
    lines = [text(f"id{n}", prompt=f"prompt {n}", max_tokens=1) for n in range(20_000)]
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    printed = run_program(MANY, tiny.artifact, source, output, timeout=500)
    count, early_kib, peak_kib = map(int, printed.split())
    assert count == len(read(output)) == 20_000
    assert peak_kib - early_kib < 8 << 10


@pytest.mark.slow
def test_killed_ten_times(tiny: TinyModel, tmp_path: Path) -> None:
    """At random moments; at the end every id is there once."""
    lines = [text(f"id{n}", prompt=f"prompt {n}", max_tokens=40, ignore_eos=True)
             for n in range(1000)]  # fmt: skip
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "sf_local", "batch", str(tiny.artifact), str(source), "-o",
               str(output)]  # fmt: skip
    draw = random.Random(3)
    kills, counts = 0, []
    while True:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if kills < 10:
            before = output.stat().st_size if output.exists() else 0
            while (
                process.poll() is None
                and kills % 3
                and (not output.exists() or output.stat().st_size <= before)
            ):
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.15 if kills % 3 else 2.0))  # or while it starts
            process.send_signal(signal.SIGKILL)
            kills += 1
        code = process.wait()
        counts.append(output.read_bytes().count(b"\n") if output.exists() else 0)
        if code == 0:
            break
    assert kills == 10 and counts == sorted(counts)
    assert read(output).keys() == {f"id{n}" for n in range(1000)}
