"""The `sf-local` command on a tiny model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from sf_local.cli import main
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
    arguments = ["generate", str(tiny.artifact), "--max-new-tokens", "9"]
    main([*arguments, "--prompt", "abc"])
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


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
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny.artifact, tmp_path / "copy")
    file = next(folder.rglob("tokenizer_config.json"))
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    (folder / "artifact.json").unlink()  # which has the file's hash
    assert main(["chat", str(folder)]) == 1
    assert "has no chat template" in (err := capsys.readouterr().err) and err.count("\n") == 1


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
    for text in ("source", "decode_bs4", "256 tokens", "every file has the hash"):
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
    assert main(["generate", str(tmp_path), "--prompt", "x", "--top-p", "7"]) == 1
    assert "top_p=7.0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "generate", "inspect"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "artifact" in capsys.readouterr().out
