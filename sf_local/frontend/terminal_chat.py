"""A chat with a person: on a terminal with history and editing, elsewhere line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sf_local.engine.engine import Engine
from sf_local.errors import RequestError
from sf_local.frontend.conversation import Conversation, speed
from sf_local.request.params import SamplingParams

MIB = 1 << 20


def chat(
    engine: Engine,
    params: SamplingParams,
    system: str | None,
    told: Callable[[Exception], str] = str,
) -> None:
    """Talk until the end of the input, or /exit.

    told: what is printed of an error. Raises ChatTemplateError if the model has no chat template.
    """
    engine.apply_chat_template([{"role": "user", "content": ""}])
    print(header(engine), file=sys.stderr)
    conversation = Conversation(engine, params, _say, system)
    for line in lines(terminal_prompt() if sys.stdin.isatty() else _plain_prompt):
        try:
            if line.startswith("/"):
                conversation.command(line)
            else:
                _answer(conversation, line.strip())
        except RequestError as error:
            _say(told(error))


def read_prompt() -> str:
    """All of standard input; raises RequestError if there is nothing."""
    if sys.stdin.isatty():
        print("type a prompt, then a new line and Ctrl-D", file=sys.stderr)
    if prompt := sys.stdin.read():
        return prompt
    raise RequestError(
        "standard input is empty; give a prompt there, or sf-local generate --prompt"
    )


def header(engine: Engine) -> str:
    """What one talks to: model, device, context and memory."""
    artifact, pages = engine.artifact, engine.stats()["pages_total"]
    return (
        f"{artifact.name} on {', '.join(engine.devices)}: context of {engine.max_tokens} tokens, "
        f"{artifact.num_weight_bytes / MIB:.0f} MiB of weights, up to "
        f"{pages * artifact.config.page_bytes / MIB:.0f} MiB of KV cache\n"
        "/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat"
    )


def lines(ask: Callable[[], str]) -> Iterator[str]:
    """What a person enters, without empty lines; Ctrl-C drops what has been typed."""
    while True:
        try:
            line = ask()
        except KeyboardInterrupt:
            _say("[Ctrl-D or /exit ends the chat]")
            continue
        except EOFError:
            return
        if line.strip() in ("/exit", "exit", "quit"):
            return
        if line.strip():
            yield line


def _answer(conversation: Conversation, text: str) -> None:
    """Print the answer as it grows. Ctrl-C ends it, and what there is of it is kept."""
    handle = conversation.ask(text)
    try:
        for new, _ in handle.deltas():
            if isinstance(new, str):
                print(new, end="", flush=True)
            else:
                print(_dimmed(new.reasoning) + new.text, end="", flush=True)
    except KeyboardInterrupt:
        handle.cancel()
        print(" [stopped]", end="")
    print()
    output = handle.result()
    conversation.answered(output)
    _say(speed(output))


def _dimmed(text: str) -> str:
    return f"\033[2m{text}\033[0m" if text and sys.stdout.isatty() else text


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _plain_prompt() -> str:
    return input("> ")


def terminal_prompt() -> Callable[[], str]:
    """Asks with editing, and with the history of earlier chats; Alt-Enter begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(), key_bindings=keys, multiline=True, prompt_continuation="  "
    )
    return lambda: session.prompt("> ")


def _history() -> Any:
    """In a file of the user's, if it can be written."""
    import platformdirs
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        folder = Path(platformdirs.user_state_dir("sf-local"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
        return FileHistory(str(folder / "history"))
    except (OSError, RuntimeError):
        return InMemoryHistory()
