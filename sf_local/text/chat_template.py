"""From a model's own chat template to SGLang's: a prefix and a suffix for each role.

The Jinja text is rendered for conversations of marker messages, what stands between the markers
becomes the prefixes and suffixes, and SGLang's rendering is compared with Jinja's. Knows nothing
of engines or requests; imports sglang only when a template is made.

Templates are untrusted code. They run in Jinja's sandbox, set up as transformers does it but
without transformers, whose import takes 0.6 s and Jinja's 0.05 s. There is no `strftime_now`: the
derived text is fixed and a date is not, so a template writes the date it falls back to, or fails.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sf_local.errors import ChatTemplateError
from sf_local.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sglang.lang.chat_template import ChatTemplate

_REMEDY = (
    "Pass chat_template= with the name of one of SGLang's templates, a Jinja text, or a "
    "sglang.lang.chat_template.ChatTemplate."
)

# (role, content); the contents are markers found again in the rendered text
_SYSTEM = ("system", "SystemMarker71")
_USER = ("user", "UserMarker72")
_REPLY = ("assistant", "ReplyMarker73")
_USER_AGAIN = ("user", "UserMarker74")

_Turns = Sequence[tuple[str, str]]


def resolve_chat_template(
    chat_template: "str | ChatTemplate | None",
    tokenizer: Tokenizer,
    name: str,
    image_token: str | None = None,
) -> "ChatTemplate":
    """The chat template a user asked for.

    Args:
        chat_template: None for the model's own, the name of one of SGLang's, a Jinja text, or a
            ChatTemplate, which is returned as it is.
        tokenizer: the model's tokenizer.
        name: what a derived template is called.
        image_token: of a model that sees. Where the model writes a message that begins with an
            image otherwise than SGLang would, the template has `image_first`: what SGLang writes
            before, and what the model expects.

    Raises:
        ChatTemplateError: it is none of these, or cannot be expressed as a ChatTemplate.
    """
    from sglang.lang.chat_template import ChatTemplate, chat_template_registry

    if chat_template is None:
        return derive_chat_template(tokenizer, name, image_token)
    if isinstance(chat_template, ChatTemplate):
        return chat_template
    if isinstance(chat_template, str):
        if chat_template in chat_template_registry:
            return chat_template_registry[chat_template]
        if "{%" in chat_template or "{{" in chat_template:
            return _derive(chat_template, tokenizer, name, image_token)
    raise ChatTemplateError(
        f"chat_template={chat_template!r} is not a chat template. Allowed are a Jinja text, a "
        "sglang.lang.chat_template.ChatTemplate, None for the model's own, and the names "
        f"{', '.join(sorted(chat_template_registry))}."
    )


def derive_chat_template(
    tokenizer: Tokenizer, name: str, image_token: str | None = None
) -> "ChatTemplate":
    """The model's own chat template, called `name`; see `resolve_chat_template`.

    Raises:
        ChatTemplateError: the model has none, it fails, or SGLang cannot express it.
    """
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            f"{name} has no chat template in its tokenizer_config.json. {_REMEDY}"
        )
    return _derive(tokenizer.chat_template, tokenizer, name, image_token)


def _derive(text: str, tokenizer: Tokenizer, name: str, image_token: str | None) -> "ChatTemplate":
    model = _ModelTemplate(text, tokenizer, name)
    parts = _split(model)
    template = parts.to_chat_template(tokenizer, name)
    for turns in (
        [_SYSTEM, _USER],
        [_USER],
        [_SYSTEM, _USER, _REPLY, _USER_AGAIN],
        [_USER, _REPLY, _USER_AGAIN],
    ):
        wanted, written = model.render(turns), _write(template, turns, parts.reply_space)
        if wanted != written:
            model.fail_expressing(wanted, written)
    if image_token is not None:
        _add_images(template, model, parts.user[0], image_token)
    return template


def _add_images(
    template: "ChatTemplate", model: "_ModelTemplate", user_prefix: str, image_token: str
) -> None:
    """Set what stands for an image, and `image_first` where that changes what is before it."""
    before, _ = model.gaps([_USER])
    seeing, _ = model.gaps([_USER], images=1)
    start = len(before) if seeing.startswith(before) else len(before.rstrip())
    template.image_token = seeing[start:]
    if not seeing.startswith(before.rstrip()) or image_token not in template.image_token:
        model.fail(f"writes an image as {seeing!r}, not after {before!r} as {image_token!r}")
    if start < len(before):
        written = user_prefix + template.image_token
        template.image_first = (written, written[: len(user_prefix.rstrip())] + seeing[start:])


class _ModelTemplate:
    """A model's Jinja template, rendered as the model sees it but for the BOS `encode` adds."""

    def __init__(self, text: str, tokenizer: Tokenizer, name: str) -> None:
        self._name = name
        self._added_bos = tokenizer.bos_token if tokenizer.adds_bos else None
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._variables = {key: token for key, token in tokens.items() if token is not None}
        self._takes_parts = False
        try:
            self._template = _environment().from_string(text)
        except Exception as error:
            self.fail(f"is not valid Jinja: {error}")
        # Those of models that see may write contents only if they are lists
        self._takes_parts = _USER[1] not in self.render([_USER])

    def render(self, turns: _Turns, add_generation_prompt: bool = True, images: int = 0) -> str:
        """The prompt of a conversation, with images at the beginning of each message."""
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

    def gaps(self, turns: _Turns, add_generation_prompt: bool = True, images: int = 0) -> list[str]:
        """What the template writes before, between and after the messages of a conversation."""
        text, gaps = self.render(turns, add_generation_prompt, images), []
        for role, content in turns:
            gap, found, text = text.partition(content)
            if not found or content in text:
                self.fail(f"does not write the {role} message once and in its place")
            gaps.append(gap)
        return [*gaps, text]

    def fail_expressing(self, wanted: str, written: str) -> NoReturn:
        differs = (n for n, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b)
        start = max(0, next(differs, min(len(wanted), len(written))) - 20)
        self.fail(
            "is not a prefix and a suffix for each role, all that SGLang knows: the model expects "
            f"{wanted[start : start + 80]!r} where SGLang would write "
            f"{written[start : start + 80]!r}"
        )

    def fail(self, what: str) -> NoReturn:
        raise ChatTemplateError(f"The chat template of {self._name} {what}. {_REMEDY}") from None


@dataclass(frozen=True)
class _Parts:
    """A chat template in SGLang's terms."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    is_llama2: bool  # the system message stands inside the first user message
    default_system: str | None
    opening: str  # stands before a conversation without a system message
    reply_space: str  # "" or the " " that the model itself begins its replies with

    def to_chat_template(self, tokenizer: Tokenizer, name: str) -> "ChatTemplate":
        from sglang.lang.chat_template import ChatTemplate, ChatTemplateStyle

        template = ChatTemplate(
            name=name,
            default_system_prompt=self.default_system,
            role_prefix_and_suffix={
                "system": self.system,
                "user": self.user,
                "assistant": self.assistant,
            },
            stop_str=_stop_strings(self.assistant[1], tokenizer),
            style=ChatTemplateStyle.LLAMA2 if self.is_llama2 else ChatTemplateStyle.PLAIN,
        )
        return _with_opening(template, self.opening) if self.opening else template


def _split(model: _ModelTemplate) -> _Parts:
    """Read the parts off rendered conversations; where they do not fit, comparing will tell."""
    first, *_ = model.gaps([_USER, _REPLY, _USER_AGAIN])
    before_system, system_to_user, user_to_reply, reply_to_user, after_user = model.gaps(
        [_SYSTEM, _USER, _REPLY, _USER_AGAIN]
    )
    user_suffix = model.gaps([_SYSTEM, _USER], add_generation_prompt=False)[-1]
    reply_end = model.gaps([_SYSTEM, _USER, _REPLY], add_generation_prompt=False)[-1]

    is_first_plain = reply_to_user.endswith(first)
    user_prefix = first if is_first_plain else reply_to_user.removeprefix(reply_end)
    reply_prefix = after_user.removeprefix(user_suffix)
    reply_space = user_to_reply.removeprefix(user_suffix).removeprefix(reply_prefix)

    is_llama2 = not system_to_user.endswith(user_prefix)
    if is_llama2:
        system = (before_system.removeprefix(user_prefix), system_to_user)
    else:
        system = (before_system, system_to_user.removesuffix(user_prefix))
    default_system = None
    if first.startswith(before_system) and first.endswith(system_to_user):
        default_system = first[len(before_system) : -len(system_to_user) or None] or None
    return _Parts(
        system=system,
        user=(user_prefix, user_suffix),
        assistant=(reply_prefix, reply_to_user.removesuffix(user_prefix)),
        is_llama2=is_llama2,
        default_system=default_system,
        opening="" if default_system else first.removesuffix(user_prefix),
        reply_space=reply_space if reply_space == " " else "",
    )


def _write(template: "ChatTemplate", turns: _Turns, reply_space: str) -> str:
    """The prompt SGLang's interpreter writes for `turns` and the beginning of a reply."""
    messages = [
        {"role": role, "content": reply_space + content if role == "assistant" else content}
        for role, content in turns
    ]
    if template.default_system_prompt and turns[0][0] != "system":
        messages.insert(0, {"role": "system", "content": template.default_system_prompt})
    reply_prefix, _ = template.get_prefix_and_suffix("assistant", messages)
    return f"{template.get_prompt(messages)}{reply_prefix}"


def _stop_strings(reply_suffix: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special token that ends a reply; a tuple, as sglang adds it to a list."""
    suffix = reply_suffix.lstrip()
    starts = (suffix[:end] for end in range(len(suffix), 0, -1))
    return next(((text,) for text in starts if tokenizer.token_id(text) is not None), ())


def _with_opening(template: "ChatTemplate", opening: str) -> "ChatTemplate":
    """`template` with `opening` before conversations that begin without a system message.

    Llama 3.1 writes a system header even then, and no default text can stand for an empty one.
    """
    from sglang.lang.chat_template import ChatTemplate

    class OpenedChatTemplate(ChatTemplate):  # type: ignore[misc]  # sglang is untyped
        def get_prefix_and_suffix(self, role: str, hist_messages: list[Any]) -> tuple[str, str]:
            prefix, suffix = super().get_prefix_and_suffix(role, hist_messages)
            begins = role != "system" and not hist_messages
            return (opening + prefix if begins else prefix), suffix

    return OpenedChatTemplate(**vars(template))


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
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
