"""A model's own chat template, in Jinja: messages to the prompt that the model was trained on.

Templates are untrusted code. They run in Jinja's sandbox, set up as transformers does it but
without transformers, whose import takes 0.6 s where Jinja's takes 0.05 s.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sf_local.errors import ChatTemplateError
from sf_local.text.tokenizer import Tokenizer

Turn = tuple[str, str]  # role and content of a message

# Messages of trial conversations, whose contents are found again in the rendered text
SYSTEM_TURN: Turn = ("system", "SystemMarker71")
USER_TURN: Turn = ("user", "UserMarker72")
REPLY_TURN: Turn = ("assistant", "ReplyMarker73")
NEXT_USER_TURN: Turn = ("user", "UserMarker74")


class JinjaTemplate:
    """Writes conversations as one model expects them, without the BOS that `encode` adds.

    Templates that write the time write that of when this was made, so that a conversation keeps its
    prompt, and with it its place in the prefix cache.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, text: str | None = None) -> None:
        """Compile `text`, by default the tokenizer's own template; `name` is for error messages.

        Raises:
            ChatTemplateError: there is no template, or it is not valid Jinja.
        """
        self._name = name
        self._tokenizer = tokenizer
        self._added_bos = tokenizer.bos_token if tokenizer.adds_bos else None
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._variables = {key: token for key, token in tokens.items() if token is not None}
        text = tokenizer.chat_template if text is None else text
        if text is None:
            raise ChatTemplateError(
                f"{name} has no chat template in its tokenizer_config.json. Write its prompts as "
                "plain text, as `sf-local generate` takes them."
            )
        try:
            self._template = _environment().from_string(text)
        except Exception as error:
            self.fail(f"is not valid Jinja: {error}")
        # Templates of vision models may write a message's content only if it is a list of parts.
        self._takes_parts = False
        self._takes_parts = not self._writes(USER_TURN)

    def _writes(self, turn: Turn) -> bool:
        try:
            return turn[1] in self.render([turn])
        except ChatTemplateError:
            return False

    def render(
        self, turns: Sequence[Turn], add_generation_prompt: bool = True, images: int = 0
    ) -> str:
        """The prompt of a conversation.

        Args:
            turns: the messages, oldest first.
            add_generation_prompt: end with what opens the model's reply.
            images: how many images each message begins with.

        Raises:
            ChatTemplateError: the template fails, for example because it refuses a system message.
        """
        try:
            text = self._template.render(
                messages=[self._message(role, content, images) for role, content in turns],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            )
        except Exception as error:  # the template is untrusted: anything may come out of it
            roles = ", ".join(role for role, _ in turns)
            self.fail(f"refuses a conversation of {roles}: {str(error) or type(error).__name__}")
        return text.removeprefix(self._added_bos) if self._added_bos else text

    def _message(self, role: str, content: str, images: int) -> dict[str, Any]:
        if not (self._takes_parts or images):
            return {"role": role, "content": content}
        text = {"type": "text", "text": content}
        return {"role": role, "content": [{"type": "image"}] * images + [text]}

    def gaps(
        self, turns: Sequence[Turn], add_generation_prompt: bool = True, images: int = 0
    ) -> list[str]:
        """What the template writes before, between and after the contents of `turns`.

        Raises:
            ChatTemplateError: `render` does, or a content is not found once, in its place.
        """
        text, gaps = self.render(turns, add_generation_prompt, images), []
        for role, content in turns:
            gap, found, text = text.partition(content)
            if not found or content in text:
                self.fail(f"does not write the {role} message once and in its place")
            gaps.append(gap)
        return [*gaps, text]

    def stop_strings(self, reply_suffix: str | None = None) -> tuple[str, ...]:
        """The special token that ends a reply, if the template writes one; else nothing.

        `reply_suffix` is what stands after a reply, by default after the last of a conversation.
        """
        if reply_suffix is None:
            reply_suffix = self.gaps([USER_TURN, REPLY_TURN], add_generation_prompt=False)[-1]
        suffix = reply_suffix.lstrip()
        starts = (suffix[:end] for end in range(len(suffix), 0, -1))
        is_token = self._tokenizer.token_id
        return next(((text,) for text in starts if is_token(text) is not None), ())

    def fail(self, what: str) -> NoReturn:
        """Raise ChatTemplateError: this template does `what`."""
        raise ChatTemplateError(f"The chat template of {self._name} {what}.") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = datetime.now().strftime
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the type
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks replies for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, leaves HTML and non-ASCII characters as they are."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
