"""A person's chat: messages and commands, what is dropped, Ctrl-C, and a real line editor."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sf_local import Engine, SamplingParams
from sf_local.engine.handle import Handle
from sf_local.errors import ChatTemplateError, RequestError
from sf_local.frontend import terminal_chat
from sf_local.frontend.conversation import Conversation
from tests.support.child import run_program
from tests.support.pictures import picture
from tests.support.running import assert_idle
from tests.support.tiny import TinyModel

PARAMS = SamplingParams(max_new_tokens=8, seed=1, regex="[a-z]{8}")


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def conversation(engine: Engine, said: list[str]) -> Conversation:
    return Conversation(engine, PARAMS, said.append, system="short")


def talk(conversation: Conversation, *texts: str) -> None:
    for text in texts:
        conversation.answered(conversation.ask(text).result())


def test_messages_alternate(conversation: Conversation) -> None:
    talk(conversation, "hello", "again")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert all(len(m["content"]) == 8 for m in conversation.messages if m["role"] == "assistant")


def test_the_oldest_messages_are_dropped(conversation: Conversation, said: list[str]) -> None:
    """So that an answer has a quarter of the context; the system message stays."""
    talk(conversation, *("x" * 40 for _ in range(5)))
    assert any("256 tokens is full: the 2 oldest messages were dropped" in line for line in said)
    assert conversation.messages[0] == {"role": "system", "content": "short"}
    assert conversation.messages[1]["role"] == "user"
    before = conversation.messages
    with pytest.raises(RequestError, match="leave no room for an answer"):
        conversation.ask("y" * 300)
    assert conversation.messages == before


def test_an_answer_that_was_cut_is_told(conversation: Conversation, said: list[str]) -> None:
    conversation.params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    talk(conversation, "hello")
    assert said == ["[the answer was cut: it had no more room]"]


def test_commands(conversation: Conversation, said: list[str], tmp_path: Path) -> None:
    talk(conversation, "hello")
    conversation.command(f"/save {tmp_path}/chat.json")
    saved = conversation.messages
    assert json.loads((tmp_path / "chat.json").read_text()) == saved
    conversation.command("/reset")
    assert conversation.messages == saved[:1]
    conversation.command("/system be kind")
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
    conversation.command("/system")
    assert conversation.messages == []
    conversation.command(f"/load {tmp_path}/chat.json")
    assert conversation.messages == saved and conversation.system == "short"
    talk(conversation, "go on")
    said.clear()
    conversation.command("/stats")
    assert "tokens/s" in said[0] and "pages of the KV cache" in said[1]
    conversation.command("/help")
    assert {line.split()[0] for line in said[2:]} == {
        "/reset", "/system", "/image", "/save", "/load", "/stats", "/exit",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "/nonsense: no such command; /help lists them"),
        ("/save /no/such/folder/file", "/save /no/such/folder/file: No such file"),
        ("/load /no/such/file", "/load /no/such/file: No such file"),
        ("/load pyproject.toml", "no conversation"),
        ("/save", "/save: which file"),
        ("/load", "/load: which file"),
        ("/image picture.png", "is a text model"),
    ],
)
def test_commands_that_cannot_work(conversation: Conversation, line: str, message: str) -> None:
    talk(conversation, "hello")
    before = conversation.messages
    with pytest.raises(RequestError, match=message):
        conversation.command(line)
    assert conversation.messages == before


def test_images(make_seeing: Any, said: list[str], tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "a.png")
    with Engine(make_seeing("idefics3").artifact) as engine:
        params = SamplingParams(max_new_tokens=3, ignore_eos=True)
        conversation = Conversation(engine, params, said.append)
        with pytest.raises(RequestError, match="there is no such file"):
            conversation.command("/image no.png")
        conversation.command(f"/image {tmp_path}/a.png")
        talk(conversation, "what?")
        assert conversation.last is not None
        seen = conversation.last.prompt_tokens
        talk(conversation, "and?")
        assert conversation.last.prompt_tokens > seen  # the image stays in the conversation
        conversation.command("/reset")
        talk(conversation, "what?")
        assert conversation.last.prompt_tokens < seen


EDITOR = r"""
import os, sys
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from sf_local.frontend.terminal_chat import terminal_prompt

def entered(keys):
    pipe.send_text(keys)
    try:
        return ask()
    except BaseException as error:
        return type(error).__name__

os.environ["XDG_STATE_HOME"] = sys.argv[1]
with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
    ask = terminal_prompt()
    print([entered(keys) for keys in ("one\x1b\rtwo\r", "dropped\x03", "three\r", "\x04")])
    print(list(FileHistory(sys.argv[1] + "/sf-local/history").load_history_strings()))
    os.environ["XDG_STATE_HOME"] = "/proc/no"
    ask = terminal_prompt()
    print(entered("last\r"))
"""


def test_a_terminal(tmp_path: Path) -> None:
    """Alt-Enter begins a new line, Ctrl-C drops a line, and Ctrl-D ends; the history, which Up goes
    through, outlives the chat, if it can be written. In a process of its own: the editor's select()
    knows no file descriptors beyond 1,023, of which this process may have more."""
    assert run_program(EDITOR, tmp_path).splitlines() == [
        "['one\\ntwo', 'KeyboardInterrupt', 'three', 'EOFError']",
        "['three', 'one\\ntwo']",
        "last",
    ]


def test_a_chat_on_a_terminal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entered = iter(["one\ntwo", KeyboardInterrupt(), "/what", "  ", "three", "/exit", "never"])

    def ask() -> str:
        line = next(entered)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(terminal_chat, "terminal_prompt", lambda: ask)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    terminal_chat.chat(engine, PARAMS, None)
    err = capsys.readouterr().err
    assert "/what: no such command" in err and "256 tokens" in err
    assert err.count("tokens/s]") == 2 and "ends the chat" in err and next(entered) == "never"


def test_lines_of_a_pipe(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/stats\nagain\nquit\nno\n"))
    terminal_chat.chat(engine, PARAMS, None)
    assert capsys.readouterr().err.count("tokens/s]") == 3


def test_ctrl_c_ends_an_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What there is of it stays in the conversation, which goes on."""
    deltas = Handle.deltas

    def interrupted(self: Handle[Any]) -> Iterator[Any]:
        yield next(deltas(self))
        raise KeyboardInterrupt

    asked: list[list[Any]] = []
    started: Callable[[Conversation], Handle[Any]] = Conversation._started

    def spy(self: Conversation) -> Handle[Any]:
        asked.append(self.messages)
        return started(self)

    monkeypatch.setattr(Handle, "deltas", interrupted)
    monkeypatch.setattr(Conversation, "_started", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    params = SamplingParams(max_new_tokens=100, seed=1, regex="[a-z]{90}")
    terminal_chat.chat(engine, params, None)
    assert capsys.readouterr().out.count("[stopped]") == 2
    [user, stopped, _] = asked[1]
    assert user["content"] == "hello" and len(stopped["content"]) < 90


def test_a_model_without_a_template(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._chats, "_template", None)
    monkeypatch.setattr(engine.tokenizer, "chat_templates", {})
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        terminal_chat.chat(engine, PARAMS, None)
