"""Conversation: the messages of a person's chat, and the commands that change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sf_local.engine.engine import Engine
from sf_local.engine.handle import Handle
from sf_local.errors import ImageError, PromptTooLongError, RequestError
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

SHARE = 4  # an answer has at least this part of the context before old messages are dropped


@dataclass
class Conversation:
    """What has been said, oldest first. say: tells the user something, in a line."""

    engine: Engine
    params: SamplingParams
    say: Callable[[str], object]
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # for the next message
    last: Output | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def ask(self, text: str) -> Handle[Any]:
        """Add the user's next message, and start the answer to it.

        Where the context has no room, the oldest messages are dropped. Raises RequestError for a
        message that cannot be sent, which is not added.
        """
        content: Any = text
        if self.images:
            parts = [{"type": "image", "image": path} for path in self.images]
            content = [*parts, {"type": "text", "text": text}]
        before = list(self.turns)
        self.turns.append({"role": "user", "content": content})
        try:
            handle = self._started()
        except BaseException:
            self.turns = before
            raise
        self.images = []
        return handle

    def _started(self) -> Handle[Any]:
        dropped = 0
        while True:
            try:
                handle = self.engine.submit_chat(self.messages, self.params)
                if dropped or self._has_room(handle) or len(self.turns) < 3:
                    break
                handle.cancel()
            except PromptTooLongError:
                if len(self.turns) < 3:
                    raise
            dropped += len(self._drop_oldest())
        if dropped:
            self.say(
                f"[the context of {self.engine.max_tokens} tokens is full: the {dropped} oldest "
                "messages were dropped]"
            )
        return handle

    def _has_room(self, handle: Handle[Any]) -> bool:
        most, answer = self.engine.max_tokens, self.engine.resolved(self.params).max_new_tokens
        return handle.num_prompt_tokens <= most - min(answer, most // SHARE)

    def _drop_oldest(self) -> list[dict[str, Any]]:
        """The oldest exchange, which is no longer in the conversation."""
        end = next(i for i, turn in enumerate(self.turns[1:], 1) if turn["role"] == "user")
        dropped, self.turns = self.turns[:end], self.turns[end:]
        return dropped

    def answered(self, output: Output) -> None:
        """Add the answer, or what there is of one that was stopped."""
        self.turns.append({"role": "assistant", "content": output.text})
        self.last = output
        if output.finish_reason == "length":
            self.say("[the answer was cut: it had no more room]")

    def command(self, line: str) -> None:
        """Do what a line such as "/save FILE" says; raises RequestError if that cannot be done."""
        name, _, argument = line.strip().partition(" ")
        commands = {
            "/help": self._help, "/reset": self._reset, "/system": self._system,
            "/image": self._image, "/save": self._save, "/load": self._load, "/stats": self._stats,
        }  # fmt: skip
        if name in ("/save", "/load", "/image") and not argument:
            raise RequestError(f"{name}: which file? Give its path, as in {name} FILE")
        if name not in commands:
            raise RequestError(
                f"{name}: no such command; /help lists them, and a message that begins with a "
                "blank may begin with / behind it"
            )
        commands[name](argument.strip())

    def _help(self, _: str) -> None:
        """list the commands"""
        for line in (
            "/reset         forget all messages but that of /system",
            "/system TEXT   instruct the model; without a text, no longer",
            "/image PATH    show an image with the next message",
            "/save FILE     write the conversation there",
            "/load FILE     go on with one that was saved",
            "/stats         speed and memory",
            "/exit          end; so does Ctrl-D. Ctrl-C ends an answer.",
        ):
            self.say(line)

    def _reset(self, _: str) -> None:
        self.turns, self.images = [], []

    def _system(self, text: str) -> None:
        self.system = text or None

    def _image(self, path: str) -> None:
        if self.engine.image_token is None:
            raise RequestError(f"/image: {self.engine.artifact.name} is a text model")
        if not Path(path).expanduser().is_file():
            raise ImageError(f"/image {path}: there is no such file")
        self.images.append(str(Path(path).expanduser()))
        self.say(f"[the next message shows {len(self.images)} images]")

    def _save(self, path: str) -> None:
        try:
            text = json.dumps(self.messages, ensure_ascii=False, indent=2)
            Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"/save {path}: {error.strerror}") from None
        self.say(f"[{len(self.messages)} messages saved]")

    def _load(self, path: str) -> None:
        try:
            messages = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            self.engine.apply_chat_template(messages)
        except OSError as error:
            raise RequestError(f"/load {path}: {error.strerror}") from None
        except ValueError as error:  # no JSON, no text, or no messages
            raise RequestError(f"/load {path}: no conversation: {error}") from None
        has_system = messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else None
        self.turns, self.images = messages[has_system:], []
        self.say(f"[{len(messages)} messages]")

    def _stats(self, _: str) -> None:
        if self.last is not None:
            self.say(speed(self.last))
        stats = self.engine.stats()
        self.say(
            f"[{stats['pages_cached'] + stats['pages_used']:.0f} of {stats['pages_total']:.0f} "
            f"pages of the KV cache in use; {stats['hit_rate']:.0%} of prompt tokens were cached]"
        )


def speed(output: Output) -> str:
    """How long an answer took, in a line."""
    decode_time = output.latency - output.time_to_first_token
    rate = max(output.completion_tokens - 1, 0) / decode_time if decode_time > 0 else 0.0
    return (
        f"[{output.prompt_tokens} of prompt, {output.completion_tokens} of answer, "
        f"{output.time_to_first_token * 1000:.0f} ms to the first, {rate:.0f} tokens/s]"
    )
