"""The `sf-local` command on a tiny model."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sf_local import Engine, SamplingParams
from sf_local.artifact.open import open_artifact
from sf_local.cli import main
from tests.support.reference import write_hf_folder
from tests.support.tiny import TinyModel


def test_generate(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(tiny.artifact), "--max-new-tokens", "9"]
    assert main([*arguments, "--prompt", "abc"]) == 0
    out, err = capsys.readouterr()
    assert out and "tokens/s" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--regex", "ab{2}c"], "abbc\n"),
        (["--json-schema", '{"const": [1, "x"]}'], '[1, "x"]\n'),
        (["--ebnf", 'root ::= "yes"'], "yes\n"),
        (["--regex", "one two", "--stop", "x", "--stop", " t"], "one\n"),
    ],
)
def test_generate_follows_a_grammar(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert main(["generate", str(tiny.artifact), "--prompt", "abc", *options]) == 0
    assert capsys.readouterr().out == expected


def test_generate_reads_standard_input(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", str(tiny.artifact), "--max-new-tokens", "9", "--seed", "1"]
    main([*arguments, "--prompt", "abc"])
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(arguments) == 1
    assert "standard input is empty; give a prompt there, or" in capsys.readouterr().err


def test_chat(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns, then the end of the input; the second turn sees the first."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    assert main(["chat", str(tiny.artifact), "--max-new-tokens", "5", "--system", "short"]) == 0
    speeds = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    lengths = [int(line[1:].split()[0]) for line in speeds]
    assert len(lengths) == 2 and lengths[1] > lengths[0]


def test_chat_needs_a_template(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = shutil.copytree(tiny.artifact, tmp_path / "copy")
    file = next(folder.rglob("tokenizer_config.json"))
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    (folder / "artifact.json").unlink()  # which has the file's hash
    assert main(["chat", str(folder)]) == 1
    assert "has no chat template" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert "sf-local chat --chat-template" in err  # which helps:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    arguments = ["chat", str(folder), "--max-new-tokens", "5", "--chat-template"]
    assert main([*arguments, str(template)]) == 0
    assert ", 5 of answer, " in capsys.readouterr().err
    assert main([*arguments, "none.jinja"]) == 1
    assert "--chat-template 'none.jinja' cannot be read" in capsys.readouterr().err


def test_trace(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The shares of what it prints are those of all steps; a path that cannot be is one line."""
    file = tmp_path / "out.json"
    arguments = ["trace", str(tiny.artifact), str(file), "--max-new-tokens", "5"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{file}: 8 requests in ") and "https://ui.perfetto.dev" in out
    parts = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+)%$", out, re.MULTILINE))
    assert {"queue", "copies", "prefill", "decode", "sampling"} <= set(parts)
    assert sum(map(float, parts.values())) == pytest.approx(100, abs=0.05 * len(parts) + 0.01)
    assert main([*arguments, "--prompt", "abc", "--prompt", "de"]) == 0
    assert f"{file}: 2 requests in " in capsys.readouterr().out
    names = [event["name"] for event in json.loads(file.read_text())]
    assert names.count("length") == 2
    assert main(["trace", str(tiny.artifact), str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith(f"sf-local: trace='{tmp_path}' cannot be written") and err.count("\n") == 1
    )
    monkeypatch.setattr("sf_local.engine.trace_file.TraceFile.flush", lambda file: file.abandon())
    assert main([*arguments, "--prompt", "abc"]) == 1
    assert "is not whole, as its disk is full" in capsys.readouterr().err


def test_kv_memory(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(tiny.artifact), "--prompt", "abc", "--max-new-tokens", "3"]
    for size in ("1MiB", "1000000"):
        assert main([*arguments, "--kv-memory", size]) == 0
    capsys.readouterr()
    assert main([*arguments, "--kv-memory", "999999TiB"]) == 1
    advised = capsys.readouterr().err.strip().rsplit("use at most ", 1)[1]
    assert re.fullmatch(r"[\d.]+ [MGT]iB", advised)
    few = 2 * open_artifact(tiny.artifact).config.page_bytes  # less than the model's context
    long = ["generate", str(tiny.artifact), "--raw", "--prompt", "abc" * 40]
    assert main([*long, "--kv-memory", str(few)]) == 1
    assert "raise --kv-memory, up to the model's " in capsys.readouterr().err
    assert main([*long, "--prompt", "abc" * 400]) == 1
    assert "shorten it; the model was trained for no more" in capsys.readouterr().err
    assert main([*arguments, "--kv-memory", "2"]) == 1
    assert "must be at least one page" in capsys.readouterr().err


def test_weights_that_do_not_fit_their_type(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`sf-local chat` has no options of compiling: the command that has them is named."""
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    largest = np.full_like(tiny.weights["blk.0.ffn_up.weight"], np.finfo(np.float32).max)
    folder = tmp_path / "model"
    write_hf_folder(folder, tiny.config, tiny.weights | {"blk.0.ffn_up.weight": largest})
    assert main(["chat", str(folder)]) == 1
    assert "compile with sf-compile --weights " in capsys.readouterr().err


def test_a_source_is_compiled_on_first_use(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the line about types and sizes, then; what cannot work is refused before."""
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path))
    arguments = ["generate", str(tiny.source), "--prompt", "abc", "--max-new-tokens", "4"]
    assert main([*arguments, "--top-p", "7"]) == 1 and not list(tmp_path.iterdir())
    capsys.readouterr()
    told = []
    for _ in range(2):
        assert main(arguments) == 0
        told.append("F32 weights become" in capsys.readouterr().err)
    assert told == [True, False]
    assert main(["inspect", str(tiny.source)]) == 0
    assert "decode batches   1, 2, 4, 8, 16" in capsys.readouterr().out
    assert main(["chat", "no-such.gguf"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sf-local: source 'no-such.gguf': not found") and err.count("\n") == 1


def test_inspect(tiny: TinyModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tiny.artifact), "--verify"]) == 0
    out = capsys.readouterr().out
    for text in ("source", "decode_bs4", "256 tokens", "every file has the hash", "none recomm"):
        assert text in out
    folder = shutil.copytree(tiny.artifact, tmp_path / "copy")
    data = bytearray((folder / "weights.irpa").read_bytes())
    data[-100] ^= 1
    (folder / "weights.irpa").write_bytes(data)
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert "weights.irpa: changed since" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sf-local: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("generate", ["--top-p", "7"], "--top-p 7.0 must be a number above 0"),
        ("generate", ["--seed", "-1"], "--seed -1 must be an integer"),
        ("generate", ["--regex", "a(", "--ebnf", "x"], "regex and ebnf: give one of them"),
        ("generate", ["--json-schema", "[1]"], "--json-schema"),
        ("generate", ["--prompt", "x" * 300], "shorten it; the model was trained for no more"),
        ("generate", ["--num-threads", "0"], "--num-threads 0 must be an integer"),
        ("generate", ["--kv-memory", "much"], "--kv-memory 'much' must be bytes"),
        ("chat", ["--device", "gpu"], "--device 'gpu' is unknown"),
        ("chat", ["--chat-template", "none.jinja"], "--chat-template 'none.jinja' cannot be read"),
        ("batch", ["in.jsonl", "-o", "out", "--max-in-flight", "0"], "--max-in-flight 0 must be"),
    ],
)
def test_errors_name_options(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], command: str, options: list[str],
    message: str,
) -> None:  # fmt: skip
    """As they are given here, and not as parameters of Python."""
    defaults = ["--prompt", "x"] if command == "generate" else []
    assert main([command, str(tiny.artifact), *defaults, *options]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_errors_within_a_chat_name_options(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300 + "\n"))
    assert main(["chat", str(tiny.artifact)]) == 0
    assert "shorten it; the model was trained for no more" in capsys.readouterr().err


def test_a_chat_has_the_whole_context(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model's own sampling parameters, where no options are given."""
    given = []

    def chat(engine: Engine, params: SamplingParams, *_: object) -> None:
        given.append(params.given())

    monkeypatch.setattr("sf_local.frontend.terminal_chat.chat", chat)
    assert main(["chat", str(tiny.artifact)]) == 0
    assert main(["chat", str(tiny.artifact), "--max-new-tokens", "5", "--top-k", "3"]) == 0
    assert given == [{"max_new_tokens": 256}, {"max_new_tokens": 5, "top_k": 3}]


def test_a_batch_that_is_stopped_can_be_continued(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sf_local.frontend.batch_file.run_batch", stopped)
    assert main(["batch", str(tiny.artifact), "in.jsonl", "-o", "out.jsonl"]) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "generate", "inspect"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "artifact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("chat demo --tempeature 0", "chat: --tempeature: no such option, did you mean --temp"),
        ("generate demo --foo=1", "generate: --foo: no such option; see sf-local generate -h"),
        ("inspect demo more", "inspect: more: one argument too many"),
        ("bench demo --rounds x", "bench: argument --rounds: invalid int value: 'x'"),
        ("batch demo", "batch: the following arguments are required: input, -o/--output"),
        ("chta demo", "argument command: invalid choice: 'chta'"),
    ],
)
def test_mistakes_in_arguments(
    capsys: pytest.CaptureFixture[str], arguments: str, error: str
) -> None:
    """One line of the command that was meant, and no usage of thirty."""
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert err.startswith("sf-local") and error in err
